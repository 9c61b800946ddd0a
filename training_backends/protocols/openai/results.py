"""The result file of a job: a CSV of metrics, one row per step.

OpenAI documents plain CSV, but its service returned the content in base64 (its cookbook decodes it;
reports of 2024-06 and 2024-08). Azure returns plain CSV with columns of its own (documentation of
2025-12). Empty cells were not measured; old files of Azure are reported to have -1 there, which
neither a loss nor an accuracy can be.
"""

import base64
import binascii
import csv
import io
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, Literal

from training_backends.core.errors import ProtocolError
from training_backends.protocols.openai.wire import StepMetrics

__all__ = ["RESULT_COLUMNS", "read_results", "write_results"]

_Layout = Literal["openai", "azure"]

RESULT_COLUMNS: Final[Mapping[_Layout, Mapping[str, str]]] = MappingProxyType(
    {
        "openai": {
            "step": "step",
            "train_loss": "train_loss",
            "train_accuracy": "train_mean_token_accuracy",
            "valid_loss": "valid_loss",
            "valid_mean_token_accuracy": "valid_mean_token_accuracy",
        },
        "azure": {
            "step": "step",
            "train_loss": "train_loss",
            "train_mean_token_accuracy": "train_mean_token_accuracy",
            "valid_loss": "valid_loss",
            "validation_mean_token_accuracy": "valid_mean_token_accuracy",
            "full_valid_loss": "full_valid_loss",
            "full_valid_mean_token_accuracy": "full_valid_mean_token_accuracy",
        },
    }
)
"""Columns of each provider's file, in order, with the metric that each contains."""

_FIELDS: Final = {
    column: name for layout in RESULT_COLUMNS.values() for column, name in layout.items()
}


def write_results(
    rows: Iterable[StepMetrics],
    *,
    coding: Literal["plain", "base64"] = "plain",
    layout: _Layout = "openai",
) -> bytes:
    """Return the content of a result file; metrics without a column are left out."""
    columns = RESULT_COLUMNS[layout]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        values = (getattr(row, name) for name in columns.values())
        writer.writerow(["" if value is None else repr(value) for value in values])
    content = text.getvalue().encode()
    return base64.b64encode(content) if coding == "base64" else content


def read_results(content: bytes) -> list[StepMetrics]:
    """Parse a result file, plain or in base64; unknown columns are ignored.

    Raises:
        ProtocolError: It is neither, or has no step column.
    """
    text = _text(content)
    if text is None and (decoded := _decoded(content)) is not None:
        text = _text(decoded)
    if text is None:
        raise ProtocolError(
            "The result file is not a CSV with a step column.",
            excerpt=content[:500].decode("utf-8", "replace"),
        )
    try:
        found = [_row(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
    except csv.Error as error:
        raise ProtocolError(
            f"The result file is not valid CSV: {error}.", excerpt=text[:500]
        ) from error
    return [row for row in found if row.step is not None]


def _text(content: bytes) -> str | None:
    """Return the text of a CSV whose header has a step column."""
    text = content.decode("utf-8-sig", "replace")
    header = text.partition("\n")[0].split(",")
    return text if "step" in {column.strip().strip('"') for column in header} else None


def _decoded(content: bytes) -> bytes | None:
    try:
        return base64.b64decode(b"".join(content.split()), validate=True)
    except binascii.Error:
        return None


def _row(row: Mapping[str | None, str | list[str] | None]) -> StepMetrics:
    values: dict[str, float | None] = {}
    for column, cell in row.items():
        name = _FIELDS.get((column or "").strip())
        if name is not None and isinstance(cell, str):
            values[name] = _number(cell, measured=name != "step")
    return StepMetrics.model_validate(values)


def _number(cell: str, *, measured: bool) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return None if measured and value == -1 else value
