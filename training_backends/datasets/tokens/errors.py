"""What is raised inside this package; its callers get a reason instead."""

__all__ = ["Uncountable"]


class Uncountable(ValueError):
    """A row or a model has no exact count; the text says why."""
