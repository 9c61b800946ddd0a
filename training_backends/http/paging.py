"""Lists of a server that come in pages."""

import re
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, TypeVar, overload
from urllib.parse import urljoin, urlsplit

from pydantic import BaseModel

from training_backends.core.errors import ProtocolError
from training_backends.http.answer import Answer, Model
from training_backends.http.client import HttpClient
from training_backends.http.exchange import Query

__all__ = [
    "NextPage",
    "Page",
    "after_last",
    "first_match",
    "next_cursor",
    "next_link",
    "next_number",
    "paged",
]

_T = TypeVar("_T")

_MOST_PAGES: Final = 1000
"""Maximum pages of a list, in case a server never ends it."""
_LINK: Final = re.compile(r'<([^>]*)>((?:\s*;\s*[^\s=;,]+\s*=\s*(?:"[^"]*"|[^\s;,"]*))*)')
_NEXT: Final = re.compile(
    r';\s*rel\s*=\s*(?:"(?:[^"]*\s)?next(?:\s[^"]*)?"|next(?![^\s;,]))', re.IGNORECASE
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One page of a list.

    Attributes:
        number: Its position, from 0.
        items: Its entries.
        document: The complete document, which may be the list itself.
        base_url: Where the list was requested.
    """

    number: int
    items: list[Any]
    document: Any
    answer: Answer
    base_url: str

    def value(self, name: str) -> Any:
        """Return a value beside the list, or None."""
        return self.document.get(name) if isinstance(self.document, Mapping) else None


NextPage = Callable[[Page], Query | str | None]
"""Returns the query of the next page, to be added to that of the list, or its path with the
complete query; None: this was the last page."""


def after_last(
    identifier: str = "id", *, parameter: str = "after", more: str | None = "has_more"
) -> NextPage:
    """Continue after the id of the last entry, as OpenAI's lists do.

    Args:
        more: Name of the value that says whether there is another page. If the server does not
            send it, the list ends with a page that has no new entries.
    """

    def next_page(page: Page) -> Query | None:
        ended = more is not None and page.value(more) is False
        last = page.items[-1] if page.items else None
        if ended or not isinstance(last, Mapping) or not last.get(identifier):
            return None
        return [(parameter, str(last[identifier]))]

    return next_page


def next_cursor(field: str = "next_cursor", *, parameter: str = "cursor") -> NextPage:
    """Continue with a cursor that the document contains."""

    def next_page(page: Page) -> Query | None:
        cursor = page.value(field)
        return [(parameter, str(cursor))] if cursor else None

    return next_page


def next_number(parameter: str = "page", *, first: int = 0) -> NextPage:
    """Count pages; the list ends with one that has no new entries.

    Args:
        first: Number of the first page.
    """

    def next_page(page: Page) -> Query | None:
        return [(parameter, str(first + page.number + 1))] if page.items else None

    return next_page


def next_link() -> NextPage:
    """Follow the `Link` header with `rel="next"` (RFC 8288), as GitHub and Hugging Face send it."""

    def next_page(page: Page) -> str | None:
        for url, parameters in _LINK.findall(page.answer.headers.get("link", "")):
            if _NEXT.search(parameters):
                return _path_of(url, page)
        return None

    return next_page


def _path_of(url: str, page: Page) -> str:
    """Return the path of a link; only that is used, so that the key is sent to this server."""
    own = urlsplit(page.base_url)
    try:
        found = urlsplit(urljoin(page.answer.request.partition(" ")[2], url))
    except ValueError:
        found = urlsplit("")
    if found.hostname != own.hostname or not found.path.startswith(f"{own.path}/"):
        raise ProtocolError(
            f"{page.answer.request}: the next page is not on this server.",
            hint="Use the base URL that the server's links have.",
            backend=page.answer.backend,
        )
    path = found.path.removeprefix(own.path)
    return f"{path}?{found.query}" if found.query else path


@overload
def paged(
    http: HttpClient,
    path: str,
    *,
    shape: type[Model],
    query: Query = (),
    items: str | None = "data",
    next_page: NextPage | None = None,
    identifier: str | None = "id",
) -> AsyncGenerator[Model, None]: ...


@overload
def paged(
    http: HttpClient,
    path: str,
    *,
    shape: None = None,
    query: Query = (),
    items: str | None = "data",
    next_page: NextPage | None = None,
    identifier: str | None = "id",
) -> AsyncGenerator[Any, None]: ...


async def paged(
    http: HttpClient,
    path: str,
    *,
    shape: type[BaseModel] | None = None,
    query: Query = (),
    items: str | None = "data",
    next_page: NextPage | None = None,
    identifier: str | None = "id",
) -> AsyncGenerator[Any, None]:
    """Yield every entry of a list, page by page; consume it under `aclosing`.

    Args:
        shape: A model to parse each entry; None: entries are yielded as they are.
        items: Name of the list in the document; None: the document is the list.
        next_page: `after_last`, `next_cursor`, `next_number`, `next_link` or your own; None:
            there is only one page.
        identifier: Name of the entries' ids, by which repeated entries are dropped and a list that
            does not advance ends; None: entries have no ids.

    Raises:
        ProtocolError: The response has no such list or an invalid entry, or there are more than a
            thousand pages.
    """
    seen: set[str] = set()
    place, asked = path, query
    for number in range(_MOST_PAGES):
        answer = await http.send("GET", place, query=asked)
        document: Any = answer.json("array") if items is None else answer.json()
        found = document if items is None else document.get(items)
        if not isinstance(found, list):
            raise ProtocolError(
                f"{answer.request}: the response has no list {items!r}.", backend=answer.backend
            )
        page = Page(
            number=number, items=found, document=document, answer=answer, base_url=http.base_url
        )
        fresh = False
        for entry in found:
            known = entry.get(identifier) if identifier and isinstance(entry, Mapping) else None
            if known is not None and str(known) in seen:
                continue
            fresh = True
            if known is not None:
                seen.add(str(known))
            yield entry if shape is None else answer.parse(shape, entry)
        following = next_page(page) if next_page and fresh else None
        if following is None:
            return
        if isinstance(following, str):
            place, asked = following, ()
        else:
            named = {name for name, _ in following}
            asked = [*(each for each in query if each[0] not in named), *following]
    raise ProtocolError(
        f"GET {path}: the list is too long: more than {_MOST_PAGES} pages.",
        hint="Check that the base URL is that of a server of this protocol.",
    )


async def first_match(
    entries: AsyncGenerator[_T, None], matches: Callable[[_T], bool] = lambda _: True
) -> _T | None:
    """Return the first entry of a list that matches, or None; reads no further page."""
    async with aclosing(entries):
        async for entry in entries:
            if matches(entry):
                return entry
    return None
