"""Chromium in front of a gateway whose runs move when a test says so."""

import json
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.conftest import KEY, Site, scripted, shared_site
from tests.gateway.test_chat import answered
from training_backends.testing.server import LoopbackServer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a browser where there is none."""
    missing = "playwright" if find_spec("playwright") is None else "chromium"
    if CHROMIUM and missing == "chromium":
        return
    skip = pytest.mark.skip(reason=f"not installed: {missing}")
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(skip)


@pytest.fixture(scope="module")
def upstream() -> Iterator[LoopbackServer]:
    """Answer chats like an inference server."""
    with LoopbackServer(answered) as server:
        yield server


@pytest.fixture(scope="module")
async def here(
    tmp_path_factory: pytest.TempPathFactory, upstream: LoopbackServer
) -> AsyncIterator[Site]:
    """The gateway of a module."""
    backend = scripted(methods=frozenset({"sft", "dpo", "classifier"}))
    url = f"{upstream.base_url}/v1"
    async with shared_site(tmp_path_factory, backend=backend, inference_url=url) as opened:
        yield opened


@pytest.fixture(scope="module")
async def chromium() -> AsyncIterator[Any]:
    """The browser of a module."""
    from playwright.async_api import async_playwright  # noqa: PLC0415  # skipped without it

    async with async_playwright() as playwright:
        # The sandbox needs rights that containers do not have; nothing foreign is opened.
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        await browser.close()


@asynccontextmanager
async def opened(
    chromium: Any,
    url: str,
    path: str = "",
    *,
    key: str = KEY,
    is_strict: bool = True,
    **context: Any,
) -> AsyncIterator[Any]:
    """Open a page of the console in a profile of its own, signed in.

    Fails if a script of the page fails or, if strict, if the page breaks its policy.
    """
    async with httpx.AsyncClient(base_url=url, verify=False) as http:
        answer = await http.post("/console/session", json={"key": key})
    assert answer.status_code == 200, answer.text
    name, _, value = answer.headers["set-cookie"].partition(";")[0].partition("=")
    cookie = {"name": name, "value": value, "url": url, "httpOnly": True, "sameSite": "Strict"}
    profile = await chromium.new_context(**context)
    await profile.add_cookies([cookie])
    async with _watched(profile, is_strict=is_strict) as page:
        await page.goto(f"{url}/{path}")
        yield page


@asynccontextmanager
async def _watched(profile: Any, *, is_strict: bool) -> AsyncIterator[Any]:
    profile.set_default_timeout(30_000)
    page = await profile.new_page()
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.on(
        "console",
        lambda message: (
            broken.append(message.text)
            if is_strict and "Content Security Policy" in message.text
            else None
        ),
    )
    try:
        yield page
    finally:
        await profile.close()
    assert broken == []


@asynccontextmanager
async def unknown(
    chromium: Any, url: str, *, is_strict: bool = True, **context: Any
) -> AsyncIterator[Any]:
    """Open the console in a profile of its own, not signed in."""
    profile = await chromium.new_context(**context)
    async with _watched(profile, is_strict=is_strict) as page:
        await page.goto(url)
        yield page


def axe_script() -> str:
    """Return the accessibility checker, which runs within the page."""
    found = find_spec("axe_playwright_python")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).with_name("axe.min.js").read_text("utf-8")


async def violations(page: Any, *rules: str) -> list[str]:
    """Return what a page violates of WCAG 2.2 A and AA and the best practices."""
    options: dict[str, Any] = {"resultTypes": ["violations"]}
    if rules:
        options["runOnly"] = {"type": "rule", "values": rules}
    found = await page.evaluate(f"axe.run(document, {json.dumps(options)})")
    return [
        f"{each['id']}: {node['html'][:200]} {node['failureSummary']}"
        for each in found["violations"]
        for node in each["nodes"]
    ]
