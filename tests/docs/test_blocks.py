"""Every code block of the documentation works: it is run here, or by a test that is named here.

A block that no test can run says why, in a comment before it: `<!-- not run: REASON -->`.
"""

import ast
import asyncio
import base64
import inspect
import json
import os
import re
import shutil
import subprocess
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from anyio.from_thread import start_blocking_portal
from jinja2 import Environment
from mistralai.client import Mistral
from pydantic import SecretStr
from typer.main import get_command

from tests.commands import Done, run_here
from tests.docs.scripted import ExampleBackend
from tests.docs.shell import HARMLESS, Call, run_in_bash
from tests.pages import PAGES, Block, all_blocks
from training_backends import (
    AsyncTrainingClient,
    TrainingClient,
    TrainingStatus,
    installed_backends,
)
from training_backends.cli.main import app
from training_backends.client.config_file import load_config
from training_backends.client.observe import WatchSettings
from training_backends.core import registry
from training_backends.core.plugins import backend_entries
from training_backends.core.registry import backend_class
from training_backends.core.settings import SectionSettings, Settings, load_settings
from training_backends.credentials.choice import CredentialSettings
from training_backends.gateway.catalogue import Catalogue
from training_backends.gateway.server import running
from training_backends.gateway.settings import GatewaySettings
from training_backends.http.webhook import signed_headers, signing_key
from training_backends.objects.settings import ObjectSettings
from training_backends.testing.server import LoopbackServer, Received, StubReply

pytestmark = pytest.mark.e2e

ROOT = PAGES[0].parent
SAMPLES = ROOT / "training_backends" / "samples"
KEY = "tb-a-static-key-of-this-test"
BLOCKS = [block for path in PAGES for block in all_blocks(path)]

ELSEWHERE = {
    "README.md": {},
    "architecture.md": {"python": "tests/testing/test_documented_backend.py"},
    "data.md": dict.fromkeys(("console", "json", "python", "text"), "tests/cli/test_data_page.py"),
    "local.md": {
        "classify.py": "tests/trainer/objectives/test_classifier.py",
        "load.py": "tests/trainer/test_checkpoint.py",
    },
    "migrate-mistral.md": {"finetune.py": "tests/e2e/test_guides.py"},
    "migrate-openai.md": {"finetune.py": "tests/e2e/test_guides.py"},
    "operations.md": {
        f"{verb}{database}.sh": "tests/gateway/test_backup.py"
        for verb in ("back-up", "restore")
        for database in ("", "-postgres")
    },
    "orchestrators.md": {"python": "tests/e2e/test_orchestrators.py"},
    "other-clients.md": {"python": "tests/e2e/sdks.py tests/e2e/test_orchestrators.py"},
    "plugins.md": {"python": "tests/http/test_toolkit_page.py"},
    "testing.md": {"python": "tests/testing/test_conformance.py"},
    "trackers.md": {"yaml": "tests/trainer/test_tracking.py"},
    "write-a-backend.md": dict.fromkeys(
        ("toml", "python", "sh", "yaml"), "tests/plugins/test_write_a_backend.py"
    ),
}
"""The tests that run blocks of a page, by language or title; several are separated by spaces."""


def elsewhere(block: Block) -> str | None:
    tests = ELSEWHERE.get(block.page, {})
    return tests.get(block.title) or tests.get(block.language)


def handled_here(block: Block) -> bool:
    return not (block.generated or block.not_run or elsewhere(block))


# -- shell ---------------------------------------------------------------------------------


ONLY_PARSED = {
    "doctor": "examines this machine: tests/cli/test_doctor.py",
    "push": "needs the Hub: tests/client/test_push.py",
    "quickstart": "trains: tests/cli/test_quickstart.py",
    "serve": "runs until Ctrl-C: tests/cli/test_serve.py",
}
"""Commands of which the options and the settings are checked, and nothing is run.

Those with data in a bucket neither: tests/cli/test_remote_data.py runs them."""
SECTIONS: tuple[type[SectionSettings], ...] = (
    Settings,
    CredentialSettings,
    GatewaySettings,
    ObjectSettings,
    WatchSettings,
)


def load_all_settings() -> None:
    """Validate every section, and with it every name."""
    backends = (backend_class(name).settings_model for name in installed_backends())
    for section in (*SECTIONS, *filter(None, backends)):
        load_settings(section)


def parse(words: tuple[str, ...]) -> None:
    """Parse a command line as the program does."""
    command: Any = get_command(app)
    context = command.make_context("training-backends", list(words))
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


def training_backends_(call: Call) -> Done:
    """Run a command in this process, or only parse it."""
    if call.arguments[0] in ONLY_PARSED or any("s3://" in word for word in call.arguments):
        parse(call.arguments)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in call.environment.items():
                patch.setenv(name, value)
            load_all_settings()
        return Done(0, "", "")
    typed = KEY if call.arguments[:2] == ("credentials", "set") else ""  # at the prompt
    return run_here(call.arguments, call.directory, call.stdin or typed, call.environment)


def pip(call: Call) -> Done:
    """Check the extras of an installation."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in call.arguments:
        ours = re.fullmatch(r"(?:\.|training-backends)\[([\w,]+)\]", word)
        if ours and (unknown := set(ours[1].split(",")) - set(project["optional-dependencies"])):
            return Done(1, "", f"no such extras: {unknown}")
    return Done(0, "", "")


def make(call: Call) -> Done:
    """Check the targets."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    unknown = set(call.arguments) - set(targets)
    return Done(int(bool(unknown)), "", f"no such targets: {unknown}")


def python_(call: Call) -> Done:
    """Check the options of a script of this repository."""
    script, *rest = call.arguments
    text = (ROOT / script).read_text()
    unknown = [word for word in rest if word.startswith("--") and f'"{word}"' not in text]
    return Done(int(bool(unknown)), "", f"{script} has no {unknown}")


def pass_(call: Call) -> Done:
    """Print a key, as a password manager does."""
    return Done(0, f"{KEY}\n", "")


HANDLERS = {
    "training-backends": training_backends_,
    "pip": pip,
    "make": make,
    "python": python_,
    "pass": pass_,
}


# -- the machine of the reader -------------------------------------------------------------


CHAT = {
    "messages": [{"role": "user", "content": "Ping?"}, {"role": "assistant", "content": "Pong."}]
}
FILES = {
    "run.yaml": "backend: local\nmodel: tiny-mistral\ndata: {train: train.jsonl}\n",
    "train.jsonl": (SAMPLES / "train.jsonl").read_text(),
    "chats.jsonl": f"{json.dumps(CHAT)}\n" * 10,
    "test.jsonl": f"{json.dumps(CHAT)}\n" * 3,
    "ticket.schema.json": '{"type": "object"}',
    "my_scores.py": "def rouge(prompt, expected, answer):\n    return expected == answer\n",
    "alpaca.json": '[{"instruction": "Ping?", "input": "", "output": "Pong."}]',
    "faq.csv": "Question,Answer,Reply\nPing?,,Pong.\n",
    "saved-dataset/train.jsonl": f"{json.dumps(CHAT)}\n",
    "more.jsonl": f"{json.dumps(CHAT)}\n",
    "models.toml": '[models.tiny-mistral]\ntarget = "tiny-mistral"\n',
    "chatml.jinja": "{% for message in messages %}{{ message.content }}{% endfor %}",
    "table.csv": "a,b\n",
    "password": f"{KEY}\n",
}
LAUNCHED = {"cli.md": None, "configuration.md": TrainingStatus.COMPLETED}
LAUNCHED |= {"local.md": TrainingStatus.COMPLETED}
"""Pages that speak of the run `experiment-7` without launching it, with its end."""
WRITTEN = {
    "configuration.md": "run.yaml",
    "data.md": "train.jsonl",
    "index.md": "run.yaml",
}
"""Files that the commands of a page write."""
SCRIPTED = {"openai.md": "openai", "ray.md": "ray", "together.md": "together"}
"""The backend whose runs are scripted; on other pages `local`."""


def answered(request: Received) -> StubReply:
    """Answer a chat, as an inference server does."""
    if not request.path.endswith("/chat/completions"):
        return StubReply(status=404, content=b"{}")
    asked = json.loads(request.body)
    choice = {"index": 0, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    same = {"id": "c1", "created": 1, "model": asked["model"], "usage": usage}
    if asked.get("stream"):
        event = {**same, "object": "chat.completion.chunk"}
        event["choices"] = [{**choice, "delta": {"role": "assistant", "content": "4"}}]
        content = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n".encode()
        return StubReply(content=content, content_type="text/event-stream")
    event = {**same, "object": "chat.completion", "choices": [choice]}
    event["choices"] = [{**choice, "message": {"role": "assistant", "content": "4"}}]
    return StubReply(content=json.dumps(event).encode())


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Serve a gateway in front of scripted runs, with a job that has completed."""
    ExampleBackend.shared = backend = ExampleBackend()
    with LoopbackServer(answered) as upstream, start_blocking_portal() as portal:
        settings = GatewaySettings(api_key=SecretStr(KEY), inference_url=f"{upstream.base_url}/v1")
        serving = running(
            settings,
            home=tmp_path_factory.mktemp("gateway"),
            backend="scripted",
            port=0,
            backends={"scripted": backend},
        )
        with portal.wrap_async_context_manager(serving) as served:
            client = Mistral(api_key=KEY, server_url=served.url)
            content = FILES["chats.jsonl"].encode()
            file = client.files.upload(file={"file_name": "chats.jsonl", "content": content})
            job: Any = client.fine_tuning.jobs.create(
                model="tiny-mistral",
                training_files=[{"file_id": file.id, "weight": 1}],
                hyperparameters={"training_steps": 2},
                auto_start=True,
            )
            for _ in range(500):
                job = client.fine_tuning.jobs.get(job_id=job.id)
                if job.status == "SUCCESS":
                    break
            yield SimpleNamespace(url=served.url, job=job)


class Reader:
    """Somebody who follows a page from its beginning, block by block."""

    def __init__(
        self, page: str, directory: Path, monkeypatch: pytest.MonkeyPatch, url: Callable[[], Any]
    ) -> None:
        self.page = page
        self.directory = directory
        self.monkeypatch = monkeypatch
        self.gateway = url
        self.names: dict[str, Any] = {"__name__": "__main__"}

    def follow(self, block: Block) -> None:
        """Do what a block shows."""
        self.names |= self.given(block)
        text = self.literal(block.text)
        self.place = str(block)
        getattr(self, f"follow_{block.language}")(text)

    def literal(self, text: str) -> str:
        """Replace what stands for the reader's own values."""
        if "8321" in text:
            text = text.replace("8321", self.gateway().url.rpartition(":")[2])
            text = text.replace("tb-…", KEY)
        if "revoke ID" in text:
            made = run_here(("keys", "create", "--json"), self.directory, "", {}).document
            text = text.replace("revoke ID", f"revoke {made['id']}")
        text = text.replace("whsec_…", self.names.get("secret", ""))
        if "/MODEL/" in text:
            text = text.replace("/MODEL/", f"/{self.gateway().job.fine_tuned_model}/")
        return re.sub(r"\bRUN\b", "experiment-7", text)

    # -- languages --

    def follow_sh(self, text: str) -> None:
        """Run it; what it exports holds for the rest of the page."""
        for program in HARMLESS:
            if shutil.which(program) is None and re.search(rf"^{program}\b", text, re.MULTILINE):
                pytest.skip(f"not installed: {program}")
        done, exported = run_in_bash(text, self.directory, HANDLERS)
        assert done.returncode == 0, f"{self.place}:\n{done.stdout}"
        for name, value in exported.items():
            self.monkeypatch.setenv(name, value)

    def follow_python(self, text: str) -> None:
        """Run it in the names of the blocks before it."""
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(text, self.place, "exec", flags=flags)
        if code.co_flags & inspect.CO_COROUTINE:
            asyncio.run(self.awaited(code))
        else:
            exec(code, self.names)

    async def awaited(self, code: Any) -> None:
        """Run a part of a coroutine."""
        async with AsyncTrainingClient() as client:
            self.names["client"] = client
            with suppress(Alerted):  # which ends the watcher
                await eval(code, self.names)

    def given(self, block: Block) -> dict[str, Any]:
        """Return what the text around a block speaks of."""
        if "job." in block.text and self.page == "gateway.md":
            messages = [{"role": "user", "content": "What is 2 plus 2?"}]
            return {"key": KEY, "job": self.gateway().job, "messages": messages}
        if "verify_signature" in block.text:
            return signed()
        if "await alert(" in block.text:
            ExampleBackend.shared.ends = TrainingStatus.FAILED
            with TrainingClient() as client:
                client.launch("run.yaml", backend="local")
            return {"alert": alert}
        return {"key": KEY, "database_password": KEY}

    def follow_yaml(self, text: str) -> None:
        """Validate a configuration, which the commands after it use."""
        values = yaml.safe_load(text)
        complete = {"model": "tiny-mistral", "data": {"train": "train.jsonl"}} | values
        path = self.directory / "run.yaml"
        path.write_text(yaml.safe_dump(complete))
        loaded = load_config(path)
        if loaded.backend:
            kind = backend_class(loaded.backend)
            kind.options_model.model_validate(loaded.config.options)

    def follow_toml(self, text: str) -> None:
        """Validate settings, a catalogue, or the entry points of a package."""
        values = tomllib.loads(text)
        path = self.directory / "some.toml"
        path.write_text(text)
        if "models" in values:
            Catalogue.load(path)
        elif "project" in values:
            ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert set(values["project"]["entry-points"]) <= set(ours["entry-points"])
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("training_backends.core.settings.config_file", lambda: path)
                load_all_settings()

    def follow_json(self, text: str) -> None:
        """Read it, or each line of it."""
        try:
            json.loads(text)
        except ValueError:
            assert all(json.loads(line) for line in text.splitlines())

    def follow_jinja(self, text: str) -> None:
        """Parse the template."""
        Environment(autoescape=True).parse(text)

    def follow_text(self, text: str) -> None:
        """Compare the layers with the contract that is enforced, or check HAProxy's file."""
        if text.startswith("frontend"):
            path = self.directory / "haproxy.cfg"
            path.write_text(text)
            if program := shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin"):
                subprocess.run([program, "-c", "-q", "-f", path], check=True)
            return
        contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
        assert text.splitlines() == contracts["contracts"][0]["layers"], self.place


LANGUAGES = {name.removeprefix("follow_") for name in vars(Reader) if name.startswith("follow_")}


class Alerted(Exception):
    """Somebody was alerted."""


async def alert(text: str) -> None:
    """End the program with the alert."""
    raise Alerted(text)


def signed() -> dict[str, Any]:
    """Return a webhook as a receiver gets it."""
    secret = f"whsec_{base64.b64encode(KEY.encode()).decode()}"
    headers = signed_headers(signing_key(secret), "msg_1", int(time.time()), b"{}")
    return {"body": "{}", "headers": headers, "secret": secret}


@pytest.fixture
def reader(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    remembered_keys: None,
) -> Reader:
    """Give somebody a directory with the files that pages speak of, and scripted runs."""
    page: str = request.param
    directory = tmp_path / "reader"
    for name, text in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    (directory / "password").chmod(0o600)
    monkeypatch.chdir(directory)
    monkeypatch.setenv("TRAINING_BACKENDS_CREDENTIALS__KEYRING", "file")
    monkeypatch.setenv("TRAINING_BACKENDS_CREDENTIALS__PASSWORD_FILE", str(directory / "password"))
    if page == "credentials.md":
        url = request.getfixturevalue("gateway").url
        monkeypatch.setenv("TRAINING_BACKENDS_MISTRAL__BASE_URL", url)
    ExampleBackend.shared = ExampleBackend()
    name = SCRIPTED.get(page, "local")
    real = tuple(entry for entry in backend_entries() if entry.name != name)
    group = "training_backends.backends"
    monkeypatch.setattr(ExampleBackend, "name", name)
    scripted = EntryPoint(name, "tests.docs.scripted:ExampleBackend", group)
    monkeypatch.setattr(registry, "backend_entries", lambda: (*real, scripted))
    if page in LAUNCHED:
        ExampleBackend.shared.ends = LAUNCHED[page]
        words = ("launch", "run.yaml", "--id", "experiment-7")
        assert run_here(words, directory, "", {}).code == 0
    if page in WRITTEN:
        (directory / WRITTEN[page]).unlink()
    return Reader(page, directory, monkeypatch, lambda: request.getfixturevalue("gateway"))


@pytest.mark.parametrize(
    "reader", sorted({each.page for each in BLOCKS if handled_here(each)}), indirect=True
)
def test_the_blocks_of_a_page_work(reader: Reader) -> None:
    """One after the other, in the order of the page."""
    for block in BLOCKS:
        if block.page == reader.page and handled_here(block):
            reader.follow(block)


def test_every_block_is_run_or_says_why_not() -> None:
    """By language: of a language that no test knows, a block needs a reason, too."""
    left = [str(each) for each in BLOCKS if handled_here(each) and each.language not in LANGUAGES]
    assert left == []


def test_tests_that_run_other_blocks_read_their_page() -> None:
    """One of those named here names the page, and the file that a block belongs to."""
    for block in BLOCKS:
        if tests := elsewhere(block):
            text = "".join((ROOT / test).read_text() for test in tests.split())
            assert block.page in text, block
            if block.title and block.page != "write-a-backend.md":  # whose files are all written
                assert block.title in text, block


def test_blocks_that_are_not_run_are_counted() -> None:
    """Add to this list only what no machine without a cluster or an account can run."""
    assert Counter(each.page for each in BLOCKS if each.not_run) == NOT_RUN


NOT_RUN = {
    "architecture.md": 1,
    "gateway.md": 1,
    "local.md": 2,
    "mistral.md": 1,
    "operations.md": 1,
    "other-clients.md": 1,
    "ray.md": 2,
}
