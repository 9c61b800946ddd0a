"""Whatever a plugin does, its callers get this package's errors, in time, without secrets."""

import pickle
import traceback
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, NoReturn

import anyio
import pytest

from tests.client.conftest import MakeConfig
from tests.plugins import Install
from training_backends import (
    AsyncTrainingClient,
    BackendBroken,
    BackendUnavailable,
    Health,
    Observation,
    PermissionDenied,
    RemoteFilters,
    TrainingBackend,
    TrainingBackendError,
    TrainingRun,
)
from training_backends.cli.exit_codes import ExitCode, exit_code_of
from training_backends.client import boundary
from training_backends.client.boundary import guarded
from training_backends.core.redaction import register_secret
from training_backends.testing.backend import ScriptedBackend

pytestmark = pytest.mark.anyio

SECRET = "correct-horse-battery-staple"
VERBS = (
    "validate",
    "estimate",
    "launch",
    "status",
    "stop",
    "resume",
    "download",
    "download_checkpoint",
    "sample",
    "delete",
    "list_remote",
    "statuses",
    "observe",
    "suspend",
    "health",
)


class Failing(ScriptedBackend):
    """Raises what it is given from one verb, or returns it."""

    def __init__(self, verb: str, outcome: Any) -> None:
        super().__init__()
        self._outcome = outcome

        async def act(*_: Any, **__: Any) -> Any:
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        setattr(self, verb, act)


class Hanging(ScriptedBackend):
    """Never answers about its health."""

    async def health(self) -> Health:
        await anyio.sleep_forever()
        raise AssertionError


async def call(backend: TrainingBackend, verb: str, run: TrainingRun) -> Any:
    """Call a verb with arguments that fit."""
    more: dict[str, Sequence[Any]] = {
        "validate": (run.config, None),
        "estimate": (run.config, None),
        "launch": (run, None),
        "resume": (run, run, None),
        "download": (run, Path("never-written")),
        "download_checkpoint": (run, "step-1", Path("never-written")),
        "sample": (run, "hello"),
        "list_remote": (RemoteFilters(),),
        "statuses": ([run],),
        "suspend": (),
        "health": (),
    }
    return await getattr(backend, verb)(*more.get(verb, (run,)))


@pytest.fixture
def a_run(make_config: MakeConfig) -> TrainingRun:
    return TrainingRun(id="mine", backend="plugin", config=make_config())


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "error", [KeyError("state"), SystemExit(3), ExceptionGroup("g", [OSError()] * 2)], ids=repr
)
async def test_a_foreign_exception_names_the_plugin(
    verb: str, error: BaseException, a_run: TrainingRun
) -> None:
    """Its class, the verb, the backend and the package; and it stays the cause."""
    plugin = guarded(Failing(verb, error), "plugin", "acme-plugin")
    with pytest.raises(BackendBroken, match=r"'plugin' of acme-plugin failed in '") as caught:
        await call(plugin, verb, a_run)
    assert type(error).__name__ in caught.value.message
    assert f"'{verb}'" in caught.value.message
    assert (caught.value.package, caught.value.backend) == ("acme-plugin", "plugin")
    assert caught.value.__cause__ is error
    assert exit_code_of(caught.value) is ExitCode.UNAVAILABLE
    assert pickle.loads(pickle.dumps(caught.value)).package == "acme-plugin"


async def test_an_exception_of_a_followed_log_names_the_plugin(a_run: TrainingRun) -> None:
    """Whoever uses a backend directly gets the same error from a stream."""
    plugin = guarded(Failing("observe", KeyError("state")), "plugin", "acme-plugin")
    with pytest.raises(BackendBroken, match="failed in 'logs'") as caught:
        async with aclosing(plugin.logs(a_run, follow=True)) as records:
            await anext(records)
    assert caught.value.run_id == "mine"


async def test_a_run_is_named_where_one_is_concerned(a_run: TrainingRun) -> None:
    """So that a log line or a service can say which."""
    with pytest.raises(BackendBroken) as caught:
        await guarded(Failing("stop", KeyError()), "plugin").stop(a_run)
    assert caught.value.run_id == "mine"


@pytest.mark.parametrize(
    ("verb", "answer"),
    [
        ("validate", None),
        ("estimate", {}),
        ("launch", None),
        ("observe", None),
        ("observe", Observation(state=None)),  # type: ignore[arg-type]
        ("statuses", {"mine": "running"}),
        ("list_remote", [{"id": 1}]),
        ("health", True),
        ("sample", "hello"),
    ],
)
async def test_an_answer_of_the_wrong_type_is_the_plugins_bug(
    verb: str, answer: Any, a_run: TrainingRun
) -> None:
    """Not an AttributeError in the client, far from its cause."""
    with pytest.raises(BackendBroken, match=r"returned .*, not "):
        await call(guarded(Failing(verb, answer), "plugin"), verb, a_run)


async def test_an_error_of_this_package_stays_itself(a_run: TrainingRun) -> None:
    """It gets the backend's name and the run's id where it has none."""
    error = PermissionDenied("not yours")
    with pytest.raises(PermissionDenied) as caught:
        await guarded(Failing("stop", error), "plugin").stop(a_run)
    assert caught.value is error
    assert (error.backend, error.run_id) == ("plugin", "mine")


async def test_an_error_in_a_task_group_comes_out_by_itself(a_run: TrainingRun) -> None:
    """A plugin may do things side by side."""
    group = ExceptionGroup("unhandled errors in a TaskGroup", [PermissionDenied("not yours")])
    with pytest.raises(PermissionDenied, match="not yours"):
        await guarded(Failing("stop", group), "plugin").stop(a_run)


async def test_cancelling_is_no_error_of_the_plugin() -> None:
    """Who gives up waiting gets no error."""
    with anyio.move_on_after(0.01) as scope:
        await guarded(Hanging(), "plugin").health()
    assert scope.cancelled_caught


async def test_a_verb_that_hangs_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the plugin, and may be repeated."""
    monkeypatch.setattr(boundary, "TIME_LIMITS", {"health": 0.01})
    with pytest.raises(BackendUnavailable, match=r"'plugin' of acme .* 'health' within") as caught:
        await guarded(Hanging(), "plugin", "acme").health()
    assert caught.value.retryable


async def test_a_guarded_backend_is_still_a_backend(client: AsyncTrainingClient) -> None:
    """With its own class, name and further attributes."""
    backend = client.backend("scripted")
    assert isinstance(backend, TrainingBackend)
    assert isinstance(backend, ScriptedBackend)
    assert (backend.name, backend.created) == ("scripted", [])
    assert not hasattr(backend, "no_such_attribute")


class Secretive(RuntimeError):
    """Builds its text from something that is no argument."""

    def __str__(self) -> str:
        return f"sent {SECRET}"


def _chained() -> NoReturn:
    try:
        try:
            raise ConnectionError(f"proxy user:{SECRET}@host")  # noqa: TRY301
        except ConnectionError as error:
            error.add_note(f"the header was {SECRET}")
            raise Secretive from error
    except Secretive as error:
        raise ExceptionGroup(f"two of {SECRET}", [KeyError(SECRET), error]) from error


class Telling(ScriptedBackend):
    """Repeats the key in whatever it raises."""

    async def stop(self, run: TrainingRun, *, save_checkpoint: bool = True) -> None:
        del save_checkpoint
        if run.id == "mine":
            _chained()
        try:
            _chained()
        except ExceptionGroup as group:
            raise PermissionDenied(f"refused {SECRET}", hint=f"not {SECRET}") from group


@pytest.mark.parametrize("run_id", ["mine", "other"])
async def test_no_secret_is_in_what_leaves_a_plugin(run_id: str, a_run: TrainingRun) -> None:
    """Neither in its message, hint, notes and attributes, nor in any of its causes."""
    register_secret(SECRET)
    with pytest.raises(TrainingBackendError) as caught:
        await guarded(Telling(), "plugin").stop(a_run.model_copy(update={"id": run_id}))
    shown = "".join(traceback.format_exception(caught.value))
    assert "KeyError" in shown
    assert "the header was [redacted]" in shown
    for text in (shown, str(caught.value), repr(vars(caught.value)), repr(caught.value.__cause__)):
        assert SECRET not in text


async def test_errors_of_callbacks_are_the_callers(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """They pass through the verb that led to them."""

    def on_update(run: TrainingRun) -> None:
        if run.remote_id is not None:
            raise LookupError(f"no room for {run.id}")

    with pytest.raises(LookupError, match="no room for mine"):
        await client.launch(make_config(), backend="scripted", run_id="mine", on_update=on_update)
    assert len(backend.created) == 1
    assert (await client.launch(make_config(), backend="scripted", run_id="mine")).remote_id
    assert len(backend.created) == 1


async def test_a_failed_launch_says_so_in_its_record(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """Whatever was raised, and without the secrets in it."""
    register_secret(SECRET)
    plugin = Failing("launch", KeyError(SECRET))
    async with AsyncTrainingClient(home=tmp_path, backends={"plugin": plugin}) as client:
        with pytest.raises(BackendBroken):
            await client.launch(make_config(), backend="plugin", run_id="mine")
        failure = (await client.get("mine")).failure
    assert failure is not None
    assert (failure.kind, "KeyError" in failure.message) == ("internal", True)
    assert SECRET.encode() not in (tmp_path / "runs.db").read_bytes()


async def test_a_backend_that_cannot_be_closed_hides_no_result(tmp_path: Path) -> None:
    """Closing is the last thing, and the work is done by then."""
    async with AsyncTrainingClient(home=tmp_path) as client:
        client._own.append(guarded(Failing("aclose", KeyError()), "plugin"))


BLOCKED = """
import threading
from training_backends.testing.backend import ScriptedBackend

class Plugin(ScriptedBackend):
    @classmethod
    def create(cls, context):
        threading.Event().wait()
"""
ON_IMPORT = BLOCKED.replace("class", "threading.Event().wait()\n\nclass", 1)
CAPABILITIES = BLOCKED.replace("@classmethod", "@property").replace(
    "create(cls, context)", "capabilities(self)"
)


@pytest.mark.parametrize("source", [BLOCKED, ON_IMPORT, CAPABILITIES])
async def test_a_plugin_that_blocks_while_it_is_made_is_left(
    source: str,
    install: Install,
    client: AsyncTrainingClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its thread keeps neither the caller nor the process."""
    monkeypatch.setattr(boundary, "CREATE_LIMIT", 1.0)
    package = f"blocking{abs(hash(source))}"
    install(package, "blocking", source)
    with pytest.raises(BackendUnavailable, match=f"'blocking' of {package}"):
        client.backend("blocking")


async def test_a_plugin_without_verbs_is_named_in_one_error(
    install: Install, client: AsyncTrainingClient
) -> None:
    """It cannot be instantiated."""
    install("my_package", "mine", "from training_backends import TrainingBackend as Plugin")
    with pytest.raises(BackendBroken, match=r"'mine' of my_package failed in 'create'.*abstract"):
        client.backend("mine")
