"""Links of the documentation lead somewhere, and so do the paths that code and pages name."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from tests.pages import DOCS, PAGES, Link, anchors, links, prose
from training_backends import backend_class

ROOT = DOCS.parent
MARKDOWN = (*PAGES, ROOT / "CHANGELOG.md")
LINKS = [link for path in MARKDOWN for link in links(path)]
INTERNAL = [link for link in LINKS if "://" not in link.target]

SOURCES = {".py", ".pyi", ".toml", ".yaml", ".yml", ".js", ".service", ""}

anchors_of = cache(anchors)


def leads_nowhere(link: Link) -> str | None:
    name, _, anchor = link.target.partition("#")
    target = link.page.parent / name if name else link.page
    if not target.exists():
        return f"{link}: no such file"
    if anchor and anchor not in anchors_of(target):
        return f"{link}: no such heading"
    return None


def test_internal_links_lead_to_a_file_and_a_heading() -> None:
    """In the repository; the strict build of the site checks the pages of docs/ as well."""
    assert len(INTERNAL) > 100
    assert [*filter(None, map(leads_nowhere, INTERNAL))] == []


@pytest.mark.parametrize("target", ["nowhere.md", "data.md#nothing", "#nothing"])
def test_a_broken_link_is_found(target: str) -> None:
    """The check above would fail."""
    assert leads_nowhere(Link(DOCS / "index.md", 1, target))


def test_external_links_are_well_formed() -> None:
    """They are https, with a host of a domain; `make links` lists them."""
    urls = [(str(link), urlsplit(link.target)) for link in LINKS if "://" in link.target]
    assert urls
    wrong = [
        place
        for place, url in urls
        if url.scheme != "https"
        or not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)*\.[a-z]{2,}", url.netloc)
        or place[-1] in ".,;:…"
    ]
    assert wrong == []


def test_pages_of_the_site_link_only_to_the_site() -> None:
    """A link out of docs/ would be dead there."""
    outside = [
        str(link) for link in INTERNAL if link.page.parent == DOCS and link.target.startswith("../")
    ]
    assert outside == []


def test_every_page_is_in_the_navigation_and_in_llms_txt() -> None:
    """Once; llms.txt has a title, a summary, and sections of links with a description each."""
    pages = sorted(path.name for path in DOCS.glob("*.md"))
    sections = yaml.safe_load((ROOT / ".mkdocs.yml").read_text())["nav"]
    entries = [page for section in sections for each in section.values() for page in each]
    assert sorted(name for entry in entries for name in entry.values()) == pages
    title, summary, _, *parts = (DOCS / "llms.txt").read_text().strip().split("\n\n")
    assert title.startswith("# ")
    assert summary.startswith("> ")
    listed = [line for part in parts if not part.startswith("## ") for line in part.splitlines()]
    found = [re.fullmatch(r"- \[[^]]+\]\(([\w-]+\.md)\): \S.*\.", line) for line in listed]
    assert sorted(each[1] for each in found if each) == pages


def sources() -> Iterator[tuple[Path, str]]:
    """Yield the files of the repository, with their text."""
    folders = ("training_backends", "tests", "configs", "benchmarks", "docs", ".github")
    for path in (
        ROOT / "Makefile",
        *(each for name in folders for each in (ROOT / name).rglob("*")),
    ):
        if path.suffix in SOURCES and path.is_file():
            yield path, path.read_text(encoding="utf-8", errors="replace")


def test_pages_that_code_and_messages_name_exist() -> None:
    """The path of a page in a docstring, a message, a comment or the Makefile."""
    named = [
        Link(path, text[: found.start()].count("\n") + 1, found[1])
        for path, text in sources()
        for found in re.finditer(r"\bdocs/([\w-]+\.(?:md|py|svg|png)(?:#[\w-]+)?)", text)
    ]
    assert len(named) > 10
    missing = [
        str(each)
        for each in named
        if leads_nowhere(Link(DOCS / "index.md", each.line, each.target))
    ]
    assert missing == []


def test_files_that_pages_name_exist() -> None:
    """A path of the repository or of the package, in backquotes."""
    places = (ROOT, ROOT / "training_backends")
    missing = [
        f"{path.name}:{number}: {name}"
        for path in PAGES
        for number, line in enumerate(prose(path), 1)
        for name in re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|toml|yaml|md|jsonl|service))`", line)
        if (ROOT / name.partition("/")[0]).exists() or (places[1] / name.partition("/")[0]).exists()
        if not any((place / name).exists() for place in places)
    ]
    assert missing == []


def test_targets_that_pages_name_exist() -> None:
    """`make TARGET`, in a sentence or a table."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = "\n".join(path.read_text() for path in MARKDOWN)
    named = {word for line in re.findall(r"`make ([a-z -]+)`", text) for word in line.split()}
    assert named - set(targets) == set()


@pytest.mark.parametrize("name", ["command", "local", "mistral", "openai", "ray", "together"])
def test_every_option_of_a_backend_is_on_its_page(name: str) -> None:
    """In a table or a sentence; `ray` has those of `local`."""
    pages = {"ray": ("ray.md", "local.md")}.get(name, (f"{name}.md",))
    text = "\n".join((DOCS / page).read_text() for page in pages)
    options = backend_class(name).options_model.model_fields
    assert [option for option in options if not re.search(rf"[`.]{option}`", text)] == []
