"""Validation of backend-specific options."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ValidationError

from training_backends.core.config import NOT_A_NUMBER, is_number
from training_backends.core.errors import Issue, suggest, validation_issues

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
        known = list(model.model_fields)
        otherwise = f"known options: {', '.join(known) or 'none'}"
        for issue in validation_issues(error, ["options"], unknown="unknown option"):
            name = (issue.field or "").removeprefix("options.")
            is_option = issue.code == "unknown_field" and "." not in name
            yield replace(issue, fix=suggest(name, known, otherwise)) if is_option else issue
