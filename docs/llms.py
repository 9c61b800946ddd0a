"""Texts of the documentation for language models, by the format of llmstxt.org."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import yaml

__all__ = ["full_text", "index"]

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def index() -> str:
    """Return `llms.txt`: what this is, and the pages of the site with their first sentences."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    parts = [
        f"# {project['name']}",
        f"> {project['description']}",
        _paragraphs((ROOT / "README.md").read_text())[0],
    ]
    for section, pages in _sections():
        lines = [f"- [{title}]({name}): {_summary(DOCS / name)}" for title, name in pages]
        parts.append(f"## {section}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def full_text() -> str:
    """Return `llms-full.txt`: all pages, one after the other."""
    names = [name for _, pages in _sections() for _, name in pages]
    return "\n\n".join((DOCS / name).read_text().strip() for name in names) + "\n"


def _sections() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield the navigation of the site: each section with its pages."""
    for section in yaml.safe_load((ROOT / ".mkdocs.yml").read_text())["nav"]:
        for title, pages in section.items():
            yield title, [next(iter(page.items())) for page in pages]


def _summary(page: Path) -> str:
    sentence = _paragraphs(page.read_text())[0].partition(". ")[0]
    return sentence.rstrip(".:") + "."


def _paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a page, without its headings, tables, lists, code and links."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)
    found = [" ".join(each.split()) for each in text.split("\n\n")]
    return [each for each in found if each and each[0] not in "#|<!-["]
