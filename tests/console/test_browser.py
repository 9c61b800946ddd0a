"""The console in Chromium, as people use it."""

import re
import time
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import anyio
import pytest
import sqlalchemy as sa

from tests.console.conftest import axe_script, opened, unknown, violations
from tests.gateway.conftest import KEY, ROWS, Site, jsonl, scripted, site
from tests.waiting import until
from training_backends.core.status import TrainingStatus
from training_backends.store import gateway_schema
from training_backends.store.job_counts import recount_jobs

pytestmark = [pytest.mark.anyio, pytest.mark.browser]

FILE = {"name": "chats.jsonl", "mimeType": "application/jsonl", "buffer": jsonl()}
HEIGHT = "document.documentElement.scrollHeight"
FOCUSED = "document.activeElement.textContent"
NASTY = "\x1b[31m<img src=x onerror=\"document.title='owned'\">\u202e{{7*7}}"


async def shows(page: Any, selector: str, text: str) -> None:
    """Wait until an element has a text."""
    await page.locator(selector, has_text=re.compile(text)).first.wait_for()


async def key_of(here: Site, project: str, scope: Any = "write") -> str:
    """Create a key."""
    keys = here.served.gateway.keys
    made = await anyio.to_thread.run_sync(
        lambda: keys.create(project, scope=scope, project=project)
    )
    return made.key.get_secret_value()


async def test_a_run_by_hand(here: Site, chromium: Any) -> None:
    """Sign in, upload, preview, estimate, launch, watch the chart, chat beside the base."""
    async with unknown(chromium, here.served.url) as page:
        await page.get_by_label("API key").fill("wrong")
        await page.get_by_role("button", name="Sign in").click()
        await shows(page, "[role=alert]", "not a key of this gateway")
        await page.get_by_label("API key").fill(f" {KEY} ")
        await page.get_by_role("button", name="Sign in").click()
        await shows(page, "h1", "Runs")
        assert KEY not in page.url
        assert await page.evaluate("localStorage.length + sessionStorage.length") == 0
        assert await page.evaluate("document.cookie") == ""

        await page.get_by_role("link", name="Data", exact=True).click()
        await page.locator("#upload").set_input_files(FILE)
        await shows(page, "h1", "chats.jsonl")
        await shows(page, ".tiles", "valid")
        await shows(page, "mark", "It is 0")
        assert "What is" not in await page.locator("mark").first.inner_text()

        await page.get_by_role("link", name="Launch a run with it").click()
        launch = page.get_by_role("button", name="Launch", exact=True)
        await launch.wait_for()
        assert await launch.is_disabled()
        await page.get_by_label("Name").fill("by-hand")
        await shows(page, ".figures", "free")
        assert await launch.is_enabled()
        await launch.click()
        await shows(page, "h1", "by-hand")
        await shows(page, ".head .badge", "running")

        remote_id = await here.remote_id(page.url.rpartition("/")[2])
        for step in range(1, 6):
            here.backend.measure(remote_id, step, train_loss=2 / step)
        here.backend.measure(remote_id, 5, valid_loss=0.5)
        chart = page.get_by_role("img", name=re.compile("Training: 2 at step 1, 0.4000 at step 5"))
        await chart.wait_for()
        assert "Validation: 0.5000 at step 5" in (await chart.get_attribute("aria-label") or "")
        await shows(page, ".log", "step 5")

        here.backend.finish(remote_id)
        await shows(page, ".head .badge", "completed")
        await page.locator(".head").get_by_role("link", name="Chat").click()
        await page.get_by_label("Message", exact=True).fill("Hello?")
        await page.keyboard.press("Enter")
        for side in ("tuned", "base"):
            await shows(page, f".talk.{side} li.assistant", r"Hi\.")
            await shows(page, f".talk.{side} li.assistant", "2 tokens")


PAIR = {
    "input": {"messages": [{"role": "user", "content": "2 + 2?"}]},
    "preferred_output": [{"role": "assistant", "content": "4"}],
    "non_preferred_output": [{"role": "assistant", "content": "5"}],
}
LABELS = [
    {"text": "I love it", "labels": {"mood": "good"}},
    {"text": "I hate it", "labels": {"mood": "bad"}},
]


@pytest.mark.parametrize(
    ("name", "rows", "label"),
    [("dpo", [PAIR], "Preferences (DPO)"), ("classifier", LABELS, "Classifier")],
)
async def test_the_method_follows_the_data(
    here: Site, chromium: Any, name: str, rows: list[dict[str, Any]], label: str
) -> None:
    """And a classifier learns the labels that the data has."""
    content = {"name": f"{name}.jsonl", "mimeType": "text/plain", "buffer": jsonl(rows)}
    async with opened(chromium, here.served.url, "#/data", key=await key_of(here, name)) as page:
        await page.locator("#upload").set_input_files(content)
        await shows(page, "h1", f"{name}.jsonl")
        await page.get_by_role("link", name="Launch a run with it").click()
        await shows(page, ".figures", "free")
        assert (
            await page.get_by_label("Method").evaluate("at => at.selectedOptions[0].text") == label
        )
        await page.get_by_label("Name").fill(name)
        await shows(page, ".figures", "free")
        await page.locator("button[type=submit]:enabled").click()
        await shows(page, ".head .badge", "running")
        config = (await here.served.gateway.client.get(page.url.rpartition("/")[2])).config
    assert config.method == name
    labels = [target.labels for target in config.classifier_targets]
    assert labels == ([("bad", "good")] if name == "classifier" else [])


async def test_two_people_see_each_others_runs(here: Site, chromium: Any) -> None:
    """A launch, a pause and a stop of one show up at the other without a reload."""
    key = await key_of(here, "shared")
    url = here.served.url
    async with opened(chromium, url, key=key) as one, opened(chromium, url, key=key) as two:
        await shows(two, "h2", "No runs yet")
        await one.goto(f"{url}/#/launch")
        await one.locator("#upload").set_input_files(FILE)
        await one.get_by_label("Name").fill("ours")
        await one.get_by_role("button", name="Launch", exact=True).click()
        await shows(two, ".runs .name", "ours")
        await shows(two, ".runs .badge", "running")
        await one.get_by_role("button", name="Pause").click()
        await shows(two, ".runs .badge", "paused")
        await two.locator(".runs .name").click()
        await two.get_by_role("button", name="Resume").click()
        await shows(one, ".head .badge", "running")
        await one.get_by_role("button", name="Stop").click()
        await one.get_by_role("button", name="Stop the run").click()
        await shows(two, ".head .badge", "stopping")


async def test_the_page_survives_a_restart_of_the_gateway(tmp_path: Path, chromium: Any) -> None:
    """It reconnects by itself, misses nothing and shows nothing twice."""
    backend = scripted()
    async with site(tmp_path, backend) as first:
        job_id, remote_id = await first.started(suffix="lasting")
        backend.measure(remote_id, 1, train_loss=2.0)
        await first.until(job_id, "RUNNING")
        url = first.served.url
        page_of = opened(chromium, url, f"#/run/{job_id}")
        page = await page_of.__aenter__()
        await shows(page, ".log", "step 1")
    try:
        await shows(page, ".state", "Reconnecting")
        backend.measure(remote_id, 2, train_loss=1.0)
        port = int(url.rpartition(":")[2])
        async with site(tmp_path, backend, at=port):
            await shows(page, ".log", "step 2")
            await shows(page, ".state", "Live")
            lines = await page.locator(".lines .metrics").all_inner_texts()
            assert [line.split()[-1] for line in lines] == ["1", "2"]
    finally:
        await page_of.__aexit__(None, None, None)


async def test_a_session_that_ends_keeps_what_was_entered(here: Site, chromium: Any) -> None:
    """The page asks for the key above the form, and goes on with it."""
    key = await key_of(here, "forgetful")
    async with opened(chromium, here.served.url, "#/launch", key=key) as page:
        await page.locator("#upload").set_input_files(FILE)
        await page.get_by_label("Name").fill("kept")
        await shows(page, ".figures", "free")
        gone = gateway_schema.sessions.delete()
        await here.served.gateway.store.awrite(lambda c: c.execute(gone))
        await page.get_by_role("button", name="Launch", exact=True).click()
        dialog = page.get_by_role("dialog")
        await dialog.get_by_label("API key").fill(key)
        await dialog.get_by_role("button", name="Sign in").click()
        await shows(page, "h1", "kept")


async def test_an_injecting_name_is_only_text(here: Site, chromium: Any) -> None:
    """In the list, the page, the log, the title, and as the name of a file."""
    answer = await here.http.post(
        "/openai/v1/files",
        files={"file": ("<svg onload=alert(1)>.jsonl", jsonl())},
        data={"purpose": "fine-tune"},
    )
    file_id = answer.json()["id"]
    body = {"model": "tiny-mistral", "training_file": file_id, "suffix": NASTY}
    created = await here.http.post("/openai/v1/fine_tuning/jobs", json=body)
    job_id = str(UUID(created.json()["id"].removeprefix("ftjob-")))
    await here.until(job_id, "RUNNING")
    remote_id = await here.remote_id(job_id)
    here.backend.log(remote_id, "</li><script>document.title='owned'</script>")
    here.backend.fail(remote_id, "<b>broken</b>")
    await here.until(job_id, "FAILED")
    async with opened(chromium, here.served.url) as page:
        name = page.locator(".runs tr", has_text=job_id[:8]).locator(".name")
        assert await name.text_content() == NASTY
        await name.click()
        await shows(page, ".head .badge", "failed")
        assert await page.locator("h1").text_content() == NASTY
        await shows(page, ".lines", "<script>")
        await shows(page, "[role=alert]", "<b>broken</b>")
        assert await page.locator(".lines script, main img, main b, svg[onload]").count() == 0
        assert "<img src=x" in await page.title()
        await page.get_by_role("link", name="<svg onload").click()
        await shows(page, "h1", "<svg onload")


async def _fill(here: Site, project: str, count: int) -> None:
    """Store finished jobs."""
    lists = ("training_files", "validation_files", "blobs", "classifier_targets", "integrations")
    empty: dict[str, Any] = {name: [] for name in lists}
    row = empty | {
        "backend": "scripted",
        "model": "tiny-mistral",
        "job_type": "completion",
        "status": "SUCCESS",
        "auto_start": True,
        "fingerprint": "x",
        "created_by": "k",
        "launched": True,
        "cleaned_up": True,
        "hyperparameters": {},
        "context_length": 1,
        "config": "{}",
        "project": project,
    }
    now = time.time() - 86400
    rows = [
        row | {"id": str(uuid4()), "suffix": f"run-{n}", "created_at": now + n, "modified_at": now}
        for n in range(count)
    ]

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.insert(gateway_schema.jobs), rows)
        recount_jobs(connection)

    await here.served.gateway.store.awrite(work)


async def test_ten_thousand_runs_are_as_quick_as_a_hundred(here: Site, chromium: Any) -> None:
    """The first row appears as soon, few rows are in the document, and all can be reached."""
    taken = {}
    for count in (100, 10_000):
        await _fill(here, f"p{count}", count)
        key = await key_of(here, f"p{count}")
        async with opened(chromium, here.served.url, key=key) as page:
            seconds = []
            for _ in range(3):
                began = time.perf_counter()
                await page.reload()
                await page.locator(".runs .name").first.wait_for()
                seconds.append(time.perf_counter() - began)
            taken[count] = min(seconds)
            await shows(page, ".count", f"{count:,} runs")
            assert await page.locator(".runs tbody tr").count() < 60
            if count == 10_000:
                for _ in range(3):  # loads page after page
                    seen = await page.evaluate(HEIGHT)
                    await page.mouse.wheel(0, 100_000)
                    await until(lambda: page.evaluate(HEIGHT), seen.__lt__)
                assert await page.locator(".runs tbody tr").count() < 80
                await page.get_by_label("Search runs").fill("run-4711")
                await shows(page, ".count", "^1 run$")
                await shows(page, ".runs .name", "run-4711")
    assert taken[10_000] < 3 * taken[100] + 0.2


async def test_a_run_is_launched_with_the_keyboard_alone(here: Site, chromium: Any) -> None:
    """Every control is reached by Tab, in order, with a visible focus."""
    key = await key_of(here, "keyboard")
    async with opened(chromium, here.served.url, "#/data", key=key) as page:
        await page.locator("#upload").set_input_files(FILE)
        await shows(page, "h1", "chats.jsonl")

        async def tab_to(name: str) -> None:
            for _ in range(40):
                await page.keyboard.press("Tab")
                found = await page.evaluate(
                    """() => {
                    const at = document.activeElement, style = getComputedStyle(at);
                    const label = at.labels?.[0] ?? (at.matches("a, button") ? at : null);
                    return [label?.textContent.trim() ?? "", style.outlineStyle, style.opacity];
                    }"""
                )
                if found[0] == name:
                    assert found[1:] in (["solid", "1"], ["auto", "1"]), found
                    return
            raise AssertionError(f"{name} is not reached")

        await tab_to("Launch")  # in the navigation
        await page.keyboard.press("Enter")
        await shows(page, "h1", "Launch a run")
        await until(lambda: page.evaluate(FOCUSED), "Launch a run".__eq__)
        await tab_to("Name")
        await page.keyboard.type("by-keys")
        await tab_to("chats.jsonl8 rows")
        await page.keyboard.press("Space")
        await shows(page, ".figures", "free")
        await tab_to("Launch")
        await page.keyboard.press("Enter")
        await shows(page, "h1", "by-keys")
        await until(lambda: page.evaluate(FOCUSED), "by-keys".__eq__)


@pytest.fixture(scope="module")
async def views(here: Site) -> dict[str, str]:
    """Each view of the console, with something to show."""
    key = await key_of(here, "shown", "admin")
    headers = {"authorization": f"Bearer {key}"}
    content = jsonl([*ROWS, ROWS[0]])
    answer = await here.http.post(
        "/v1/files", files={"file": ("a.jsonl", content)}, headers=headers
    )
    file_id = answer.json()["id"]
    runs = []
    for n in range(2):
        body = {
            "model": "tiny-mistral",
            "training_files": [{"file_id": file_id, "weight": 1}],
            "hyperparameters": {"training_steps": 30 + n, "learning_rate": 1e-4},
            "auto_start": True,
        }
        made = await here.http.post("/v1/fine_tuning/jobs", json=body, headers=headers)
        runs.append(made.json()["id"])
        await here.until(runs[n], "RUNNING")
        remote_id = await here.remote_id(runs[n])
        for step in (10, 20, 30):
            here.backend.measure(remote_id, step, train_loss=20 / step, valid_loss=21 / step)
        if n:
            here.backend.fail(remote_id, "CUDA out of memory")
            await here.until(runs[n], "FAILED")
        else:
            here.backend.say(remote_id, TrainingStatus.RUNNING, step=20, total_steps=31)
    return {
        "key": key,
        "runs": "#/runs",
        "run": f"#/run/{runs[0]}",
        "failed run": f"#/run/{runs[1]}",
        "compare": f"#/compare?runs={','.join(runs)}",
        "data": "#/data",
        "file": f"#/file/{file_id}?model=tiny-mistral",
        "launch": f"#/launch?file={file_id}",
        "chat": "#/chat",
        "keys": "#/keys",
        "missing": f"#/run/{uuid4()}",
    }


READY = {"run": ".uplot", "failed run": ".uplot", "compare": ".uplot", "file": "mark"}
READY |= {"launch": ".figures", "runs": ".runs .name", "missing": "[role=alert]", "chat": ".talk"}


async def test_every_view_is_accessible_and_fits(
    here: Site, chromium: Any, views: dict[str, str]
) -> None:
    """Axe finds nothing, in light or dark; no view is wider than the screen at 360 px or 4k."""
    url = here.served.url
    script = axe_script()
    # The checker itself applies styles.
    async with unknown(chromium, url, is_strict=False) as page:
        await page.get_by_label("API key").wait_for()
        await page.evaluate(script)
        assert await violations(page) == []
    async with opened(chromium, url, key=views["key"], is_strict=False) as page:
        # Evaluated by the debugger, which the page's policy does not bind.
        await page.evaluate(script)
        for name, path in views.items():
            if name == "key":
                continue
            await page.set_viewport_size({"width": 1280, "height": 800})
            await page.emulate_media(color_scheme="light")
            await page.evaluate(f"location.hash = {path!r}")
            await page.locator(READY.get(name, "main .panel, main table")).first.wait_for()
            assert await violations(page) == [], name
            await page.emulate_media(color_scheme="dark")
            assert await violations(page, "color-contrast") == [], f"{name}, dark"
            for width in (360, 3840):
                await page.set_viewport_size({"width": width, "height": 800})
                more = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
                assert more <= 0, f"{name} at {width}"


async def test_an_admin_creates_a_key_that_is_shown_once(
    here: Site, chromium: Any, views: dict[str, str]
) -> None:
    """What is wrong with the input is said beside it, and the input is kept."""
    async with opened(chromium, here.served.url, "#/keys", key=views["key"]) as page:
        await page.get_by_label("Name").fill("ci")
        await page.get_by_label("Expires").fill("banana")
        await page.get_by_role("button", name="Create key").click()
        await shows(page, "[role=alert]", "banana")
        assert await page.get_by_label("Name").input_value() == "ci"
        await page.get_by_label("Expires").fill("30d")
        await page.get_by_role("button", name="Create key").click()
        key = await page.locator(".new-key code").inner_text()
        async with opened(chromium, here.served.url, key=key) as theirs:
            await shows(theirs, "h1", "Runs")
            assert await theirs.get_by_role("link", name="Keys").count() == 0
        await page.get_by_role("button", name="Revoke ci").click()
        await page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
        await shows(page, "tr", "revoked")


async def test_a_bad_file_is_rejected_by_line(here: Site, chromium: Any) -> None:
    """With what is wrong in which line; nothing is stored."""
    key = await key_of(here, "careless")
    content = jsonl() + b'{"messages": []}\nnot json\n'
    async with opened(chromium, here.served.url, "#/data", key=key) as page:
        bad = {"name": "bad.jsonl", "mimeType": "text/plain", "buffer": content}
        await page.locator("#upload").set_input_files(bad)
        await shows(page, "[role=alert]", "Line 9")
        await shows(page, "[role=alert]", "Line 10")
        await shows(page, "h2", "No data yet")
