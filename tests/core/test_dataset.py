"""Tolerating bad rows: few enough become warnings, everything else stays an error."""

from pathlib import Path

import pytest

from training_backends import DataFile, Dataset, Issue

FILE = DataFile(path=Path("a.jsonl"), role="train", size=1, sha256="", rows=10, bad_rows=2)
BAD_ROWS = (
    Issue(code="bad_role", message="line", path="a.jsonl", line=3),
    Issue(code="bad_role", message="5 more of this kind", path="a.jsonl"),
)
OVERLAP = Issue(code="train_validation_overlap", message="file", path="a.jsonl")


@pytest.mark.parametrize(("fraction", "errors"), [(0.0, 3), (0.19, 3), (0.2, 1), (0.5, 1)])
def test_bad_rows_are_tolerated_up_to_their_share(fraction: float, errors: int) -> None:
    """Two of ten rows pass at 20 percent; a fault of the whole file never does."""
    dataset = Dataset(files=(FILE,), issues=(*BAD_ROWS, OVERLAP))
    assert len(dataset.tolerating(fraction).errors) == errors


def test_nothing_is_hidden() -> None:
    """What is tolerated is still told."""
    dataset = Dataset(files=(FILE,), issues=BAD_ROWS).tolerating(0.5)
    assert [issue.severity for issue in dataset.issues] == ["warning", "warning"]
