"""What is raised inside this package; its callers get a reason instead."""

__all__ = ["BadRow", "Uncountable"]


class Uncountable(ValueError):
    """A row or a model has no exact count; the text says why."""


class BadRow(Uncountable):
    """The data have a row without an exact count; the text says where and why."""
