"""The code blocks and links of the documentation.

`python -m tests.pages` lists the external links, for `make links`.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "DOCS",
    "PAGES",
    "Block",
    "Link",
    "all_blocks",
    "anchors",
    "code_blocks",
    "links",
    "prose",
]

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


class Link(NamedTuple):
    """A link of a page.

    Attributes:
        target: A URL, or a path relative to the page, with an anchor.
    """

    page: Path
    line: int
    target: str

    def __str__(self) -> str:
        """Return the place for a message."""
        return f"{self.page.name}:{self.line}: {self.target}"


def prose(path: Path) -> list[str]:
    """Return the lines of a page; those of code blocks are empty."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for block in all_blocks(path):
        last = block.line + block.text.count("\n") + 1
        lines[block.line - 1 : last] = [""] * (last - block.line + 1)
    return lines


_LINK = re.compile(
    r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)|^ *\[[^\]]+\]: <?([^\s>]+)>?|<(https?://[^>]+)>"
)


def links(path: Path) -> list[Link]:
    """Return the links and images of a page."""
    return [
        Link(path, number, next(filter(None, found.groups())))
        for number, line in enumerate(prose(path), 1)
        for found in _LINK.finditer(re.sub(r"`[^`]*`", "``", line))
    ]


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings that both the site and GitHub give them."""
    titles = [line.lstrip("#").strip() for line in prose(path) if re.match(r"#{1,6} ", line)]
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    site = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip()) for title in plain}
    github = {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}
    return site & github


if __name__ == "__main__":
    external = {each.target for path in PAGES for each in links(path) if "://" in each.target}
    sys.stdout.write("".join(f"{url}\n" for url in sorted(external)))
