"""Encode rows with the chat templates of open models, and write the table of docs/templates.md.

    python benchmarks/templates.py [--check]

Requires trl 1.16, which ships the templates. With --check the page is only compared.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks._template_families import CASES, FAMILIES, family_directory
from training_backends.datasets.rows import parse_row
from training_backends.tokens.encoders import TemplateEncoder, UnusableRow

__all__ = ["PAGE", "table", "with_table"]

PAGE: Final = Path(__file__).parents[1] / "docs" / "templates.md"
_START: Final = "<!-- table: python benchmarks/templates.py -->\n"
_END: Final = "<!-- end of table -->\n"

_REASONS: Final = {
    "leaves it out": "left out",
    "generation prompt": "prompt",
    "rejects the row": "error",
}
"""Short names of the reasons of rejections, by a part of their message."""


def outcome(encoder: TemplateEncoder, case: str) -> str:
    """Return what becomes of the row of a case."""
    row = CASES[case]
    try:
        examples = encoder.encode(parse_row(json.dumps(row).encode(), keep_source=True))
    except UnusableRow as error:
        short = next(short for part, short in _REASONS.items() if part in str(error))
        return f"rejected: {short}"
    answers = sum(message["role"] == "assistant" for message in row["messages"])
    return "exact" if len(examples) == 1 or answers == 1 else "one per answer"


def table() -> str:
    """Return the table, in which families with the same outcomes share a line."""
    found: dict[tuple[str, ...], list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            encoder = TemplateEncoder(family, family_directory(family, Path(folder) / family))
            outcomes = tuple(outcome(encoder, case) for case in CASES)
            found.setdefault(outcomes, []).append(f"`{family}`")
    return "".join(_lines(found))


def _lines(found: dict[tuple[str, ...], list[str]]) -> Iterator[str]:
    yield f"| templates | {' | '.join(CASES)} |\n"
    yield "| --- " * (len(CASES) + 1) + "|\n"
    for outcomes, families in found.items():
        yield f"| {', '.join(families)} | {' | '.join(outcomes)} |\n"


def with_table(page: str) -> str:
    """Return the page with today's table."""
    head, _, rest = page.partition(_START)
    return f"{head}{_START}\n{table()}\n{_END}{rest.partition(_END)[2]}"


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    page = PAGE.read_text(encoding="utf-8")
    written = with_table(page)
    if parser.parse_args().check:
        return int(page != written)
    PAGE.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
