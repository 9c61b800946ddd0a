"""Measure the console: size of its files, and time to the first row of the list of runs.

    python benchmarks/console.py [RUNS]

Chromium loads the page from a gateway with 100 runs and from one with RUNS (10,000), each five
times with an empty cache. Printed are the median times to the first contentful paint and to the
first row, the bytes transferred, and the JavaScript heap after scrolling through 1,000 rows; then
the heap of the page of a live run after STEPS steps, as many as a run has in some hours.
"""

import gzip
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import sqlalchemy as sa
from anyio.from_thread import start_blocking_portal
from playwright.sync_api import Browser, BrowserContext, sync_playwright
from pydantic import SecretStr

import training_backends.gateway
from training_backends.gateway.server import running
from training_backends.gateway.settings import GatewaySettings
from training_backends.store.gateway_schema import jobs
from training_backends.store.job_counts import recount_jobs
from training_backends.testing.backend import ScriptedBackend

KEY = "a-key-for-the-benchmark"
TIMES = 5
STEPS = 20_000
FIRST_ROW = """() => new Promise((done) => {
  const look = () => document.querySelector('.runs .name') ? done(performance.now())
    : requestAnimationFrame(look);
  look();
})"""
PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0"
BYTES = """performance.getEntriesByType('navigation')[0].transferSize +
  performance.getEntriesByType('resource').reduce((sum, each) => sum + each.transferSize, 0)"""
HEAP = "performance.memory.usedJSHeapSize"


def row(number: int) -> dict[str, Any]:
    """Make a finished job."""
    now = time.time()
    lists = ("training_files", "validation_files", "blobs", "classifier_targets", "integrations")
    return {
        **{name: [] for name in lists},
        "id": str(uuid4()),
        "suffix": f"run-{number}",
        "backend": "scripted",
        "model": "tiny-mistral",
        "job_type": "completion",
        "status": "SUCCESS",
        "auto_start": True,
        "fingerprint": "x",
        "created_at": now - 1e6 + number,
        "created_by": "k",
        "modified_at": now - 1e6,
        "launched": True,
        "cleaned_up": True,
        "hyperparameters": {},
        "context_length": 1,
        "config": "{}",
        "project": "default",
    }


@contextmanager
def gateway(count: int, backend: ScriptedBackend) -> Iterator[str]:
    """Serve so many runs and yield the URL."""
    settings = GatewaySettings(api_key=SecretStr(KEY))
    with tempfile.TemporaryDirectory() as home, start_blocking_portal() as portal:
        opening = running(
            settings,
            home=Path(home),
            backend="scripted",
            port=0,
            backends={"scripted": backend},
        )
        with portal.wrap_async_context_manager(opening) as served:
            rows = [row(number) for number in range(count)]
            if rows:

                def fill(connection: sa.Connection) -> None:
                    connection.execute(sa.insert(jobs), rows)
                    recount_jobs(connection)

                served.gateway.store.write(fill)
            yield served.url


def sign_in(browser: Browser, url: str) -> BrowserContext:
    """Return a profile that has signed in."""
    answer = httpx.post(f"{url}/console/session", json={"key": KEY})
    name, _, value = answer.headers["set-cookie"].partition(";")[0].partition("=")
    context = browser.new_context()
    context.add_cookies([{"name": name, "value": value, "url": url}])
    return context


def follow(browser: Browser) -> None:
    """Print the heap of a page that follows a run."""
    backend = ScriptedBackend()
    row = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    with gateway(0, backend) as url:
        http = httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"})
        file = http.post("/v1/files", files={"file": ("a.jsonl", json.dumps(row).encode())}).json()
        job: dict[str, Any] = {"model": "tiny-mistral"}
        job |= {"training_files": [{"file_id": file["id"]}]}
        job |= {"hyperparameters": {"training_steps": STEPS}, "auto_start": True}
        run = http.post("/v1/fine_tuning/jobs", json=job).json()["id"]
        while not backend.created:
            time.sleep(0.1)
        page = sign_in(browser, url).new_page()
        page.goto(f"{url}/#/run/{run}")
        debugger = page.context.new_cdp_session(page)
        heaps = []
        for step in range(1, STEPS + 1):
            backend.measure(backend.created[0], step, train_loss=1 / step)
            if step % (STEPS // 4) == 0:
                page.locator(".lines li", has_text=f"step {step}").wait_for(timeout=300_000)
                debugger.send("HeapProfiler.collectGarbage")
                heaps.append(page.evaluate(HEAP) / 1e6)
    print(
        f"live run: heap after each quarter of {STEPS:,} steps:", *(f"{n:.1f}" for n in heaps), "MB"
    )


def measure(browser: Browser, count: int) -> None:
    """Print one line."""
    with gateway(count, ScriptedBackend()) as url:
        paints, rows, sizes, heap = [], [], [], 0
        for _ in range(TIMES):
            context = sign_in(browser, url)
            page = context.new_page()
            page.goto(url)
            rows.append(page.evaluate(FIRST_ROW))
            paints.append(page.evaluate(PAINT))
            sizes.append(page.evaluate(BYTES))
            if len(rows) == TIMES:
                for _ in range(10):
                    page.mouse.wheel(0, 100_000)
                    page.wait_for_timeout(200)
                heap = page.evaluate(HEAP)
            context.close()
    print(
        f"{count:>7,} runs: first paint {statistics.median(paints):4.0f} ms, "
        f"first row {statistics.median(rows):4.0f} ms, "
        f"{statistics.median(sizes) / 1000:.0f} kB transferred, heap {heap / 1e6:.1f} MB"
    )


def sizes() -> None:
    """Print the size of the files."""
    root = Path(training_backends.gateway.__file__).with_name("console")
    files = [path for path in root.rglob("*") if path.suffix in {".js", ".css", ".html", ".svg"}]
    plain = sum(path.stat().st_size for path in files)
    packed = sum(len(gzip.compress(path.read_bytes())) for path in files)
    chart = (root / "vendor" / "uPlot.js").stat().st_size
    print(
        f"files: {plain / 1000:.0f} kB, of them uPlot {chart / 1000:.0f} kB; "
        f"compressed {packed / 1000:.0f} kB"
    )


def main() -> None:
    """Print all figures."""
    sizes()
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        raise SystemExit("Chromium is not installed.")
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--enable-precise-memory-info"]
        browser = playwright.chromium.launch(executable_path=program, args=options)
        for count in (100, int(sys.argv[1]) if len(sys.argv) > 1 else 10_000):
            measure(browser, count)
        follow(browser)
        browser.close()


if __name__ == "__main__":
    main()
