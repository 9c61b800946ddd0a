"""The code blocks of the documentation."""

import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["DOCS", "PAGES", "Block", "all_blocks", "code_blocks"]

DOCS = Path(__file__).parents[1] / "docs"
PAGES = (DOCS.parent / "README.md", *sorted(DOCS.glob("**/*.md")))
_FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")
_MARK = re.compile(r"<!-- not run: (.+) -->")
_GENERATED = re.compile(r"<!-- generated: [a-z-]+ -->")


class Block(NamedTuple):
    """A code block.

    Attributes:
        title: The file that it belongs to, if the page names one.
        page: Name of the page's file.
        line: Number of the fence's line.
        not_run: Why no test runs it, from the comment `<!-- not run: REASON -->` before it.
        generated: Whether docs/generate.py writes it.
    """

    language: str
    title: str
    text: str
    page: str = ""
    line: int = 0
    not_run: str = ""
    generated: bool = False

    def __str__(self) -> str:
        """Return the place for a message."""
        return f"{self.page}:{self.line} ({self.language or 'no language'})"


def all_blocks(path: Path) -> list[Block]:
    """Return the fenced code blocks of a page, in order.

    Raises:
        ValueError: A fence is not closed.
    """
    found: list[Block] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    before, generated, at = "", False, 0
    while at < len(lines):
        line = lines[at]
        if fence := _FENCE.match(line):
            indent, ticks, info = fence.groups()
            ends = [n for n in range(at + 1, len(lines)) if lines[n].strip() == ticks]
            if not ends:
                raise ValueError(f"{path.name}:{at + 1}: the code block has no end")
            text = "".join(f"{each.removeprefix(indent)}\n" for each in lines[at + 1 : ends[0]])
            language, _, rest = info.strip().partition(" ")
            title = re.search(r'title="([^"]+)"', rest)
            mark = _MARK.fullmatch(before)
            found.append(
                Block(
                    language,
                    title[1] if title else "",
                    text,
                    path.name,
                    at + 1,
                    mark[1] if mark else "",
                    generated,
                )
            )
            at, before, line = ends[0], "", ""
        if _GENERATED.fullmatch(line.strip()):
            generated = True
        elif line.strip() == "<!-- end -->":
            generated = False
        before = line.strip() or before
        at += 1
    return found


def code_blocks(page: str, language: str | None = None) -> list[Block]:
    """Return the code blocks of a page in docs/, in order."""
    return [block for block in all_blocks(DOCS / page) if language in {None, block.language}]
