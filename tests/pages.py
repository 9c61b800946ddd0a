"""The code blocks of the documentation."""

import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["DOCS", "Block", "code_blocks"]

DOCS = Path(__file__).parents[1] / "docs"
_FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A code block.

    Attributes:
        title: The file that it belongs to, if the page names one.
    """

    language: str
    title: str
    text: str


def code_blocks(page: str, language: str | None = None) -> list[Block]:
    """Return the code blocks of a page in docs/, in order."""
    found = [Block(*parts) for parts in _FENCE.findall((DOCS / page).read_text())]
    return [block for block in found if language in {None, block.language}]
