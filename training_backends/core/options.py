"""Validation of backend-specific options."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from training_backends.core.config import NOT_A_NUMBER, is_number
from training_backends.core.errors import Issue

__all__ = ["given_options", "option_issues"]


def given_options(model: type[BaseModel], options: Mapping[str, Any]) -> dict[str, Any]:
    """Drop known options without a value; keep unknown ones, so that they are rejected."""
    return {
        name: value
        for name, value in options.items()
        if value is not None or name not in model.model_fields
    }


def option_issues(model: type[BaseModel], options: Mapping[str, Any]) -> Iterator[Issue]:
    """Yield an issue for each option that is unknown or invalid.

    Args:
        model: Schema of the options, see `TrainingBackend.options_model`.
    """
    for name, field in model.model_fields.items():
        if isinstance(options.get(name), bool) and is_number(field.annotation):
            yield Issue(code="bool_type", message=NOT_A_NUMBER, field=f"options.{name}")
    try:
        model.model_validate(options)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            unknown = detail["type"] == "extra_forbidden"
            name = ".".join(str(part) for part in detail["loc"])
            yield Issue(
                code=detail["type"],
                message="unknown option" if unknown else detail["msg"],
                field=f"options.{name}" if name else "options",
                fix=_suggestion(name, list(model.model_fields)) if unknown else None,
            )


def _suggestion(name: str, known: list[str]) -> str:
    if near := get_close_matches(name, known, n=1):
        return f"did you mean {near[0]!r}?"
    return f"known options: {', '.join(known) or 'none'}"
