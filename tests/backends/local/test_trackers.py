"""Integrations of a local run: reported by a process of its own, with a key from the vault."""

import json
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.backends.local.conftest import inspected, is_over, until_state
from tests.forking import Trainer
from tests.receiver import Receiver
from tests.waiting import until
from training_backends.backends.local.backend import LocalBackend
from training_backends.backends.local.process import Hub
from training_backends.core.run import TrainingRun
from training_backends.credentials.vault import CredentialVault
from training_backends.testing.journal import MemoryJournal

pytestmark = pytest.mark.anyio

MakeRun = Callable[..., TrainingRun]

_SECRET = "whsec_c2VjcmV0LW9mLXRoZS1yZWNlaXZlcg=="


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def _hub(home: Path, **environ: str) -> Hub:
    return Hub(None, CredentialVault(home=home / "vault", environ=environ))


@pytest.mark.engine
async def test_a_run_is_reported_to_its_end(
    home: Path, trainer: Trainer, make_run: MakeRun, receiver: Receiver
) -> None:
    """Every step's loss, then the end; signed with the key from the vault."""
    hub = _hub(home, HOOK_API_KEY=_SECRET)
    backend = LocalBackend(home, program=trainer.program, hub=hub)
    entry = {"type": "webhook", "url": receiver.url, "credential": "hook"}
    run = make_run(integrations=[entry], hyperparameters={"training_steps": 4, "batch_size": 2})
    await backend.launch(run, MemoryJournal(run))
    await until_state(backend, run, is_over)
    await until(lambda: receiver.documents and receiver.documents[-1]["type"] == "run.completed")
    assert receiver.steps == [1, 2, 3, 4]
    assert all("webhook-signature" in headers for headers, _ in receiver.received)
    assert not [path for path in _files(home / "runs") if _SECRET.encode() in path.read_bytes()]


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


async def test_the_key_is_in_no_environment_and_no_argument(
    home: Path, make_run: MakeRun, receiver: Receiver
) -> None:
    """Other processes of the user can read both."""
    dump = (
        "import json, os, sys; from pathlib import Path; "
        "told = [Path('/proc/self/cmdline').read_text(), dict(os.environ), sys.stdin.read()]; "
        "Path(sys.argv[1], 'told').write_text(json.dumps(told))"
    )
    hub = _hub(home, HOOK_API_KEY=_SECRET)
    backend = LocalBackend(home, program=(sys.executable, "-c", dump), hub=hub)
    entry = {"type": "webhook", "url": receiver.url, "credential": "hook"}
    run = make_run(integrations=[entry])
    await backend.launch(run, MemoryJournal(run))
    told = home / "runs" / run.id / "told"
    await until(lambda: told.exists() and told.read_text())
    arguments, environment, stdin = json.loads(told.read_text())
    assert _SECRET not in arguments + json.dumps(environment)
    assert json.loads(stdin) == {"0": _SECRET}


@pytest.mark.parametrize(
    ("entry", "field", "text"),
    [
        (
            {"type": "webhook", "url": "http://h", "credential": "no"},
            ".credential",
            "no api key for no",
        ),
        ({"type": "mlflwo"}, "", "mlflwo"),
    ],
)
async def test_an_integration_that_cannot_work_is_found_by_validate(
    home: Path, make_run: MakeRun, entry: dict[str, Any], field: str, text: str
) -> None:
    """Before the run is queued, by the field's name."""
    run = make_run(integrations=[entry])
    backend = LocalBackend(home, hub=_hub(home))
    report = await backend.validate(run.config, inspected(run))
    (issue,) = report.issues
    assert issue.field == f"integrations.0{field}"
    assert text in issue.message.lower()


async def test_a_tracker_that_is_not_installed_is_named_with_its_extra(
    backend: LocalBackend, make_run: MakeRun
) -> None:
    """The fix is a command."""
    if find_spec("wandb"):
        pytest.skip("wandb is installed here")
    run = make_run(integrations=[{"type": "wandb", "project": "p", "mode": "offline"}])
    (issue,) = (await backend.validate(run.config, inspected(run))).issues
    assert issue.fix == "pip install 'training-backends[wandb]'"
