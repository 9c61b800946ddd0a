"""What the run directories tell of their runs once the store is lost."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from training_backends.backends.local.backend import LocalBackend
from training_backends.backends.local.spec import build_spec, config_of
from training_backends.core.backend import RemoteFilters
from training_backends.core.run import TrainingRun, utc_now
from training_backends.core.status import TrainingStatus
from training_backends.rundir.directory import Event, ExitRecord, RunDir
from training_backends.rundir.place import make_place

pytestmark = pytest.mark.anyio

MakeRun = Callable[..., TrainingRun]


def launched(home: Path, run: TrainingRun) -> RunDir:
    """Write what a launch writes before it starts a process."""
    directory = RunDir(home / "runs" / run.id)
    directory.write_spec(build_spec(run.id, run.config, home / "slots"))
    return directory


async def test_runs_are_found_by_their_directories(
    backend: LocalBackend, home: Path, make_run: MakeRun
) -> None:
    """Each comes with its id, configuration, state and beginning."""
    assert await backend.list_remote(RemoteFilters()) == []
    began = utc_now()
    run = make_run()
    launched(home, run)
    (found,) = await backend.list_remote(RemoteFilters())
    assert (found.remote_id, found.run_id, found.model) == ("r", "r", "tiny-mistral")
    assert found.state == await backend.status(run)
    assert found.created_at is not None
    assert abs(found.created_at - began) < timedelta(minutes=1)
    assert found.config is not None
    assert found.config.data == run.config.data
    assert found.config.hyperparameters.training_steps == 20


async def test_a_run_began_with_its_first_process(
    backend: LocalBackend, home: Path, make_run: MakeRun
) -> None:
    """A later start, which touches the spec, makes it no younger."""
    directory = launched(home, make_run())
    first = datetime(2026, 1, 2, tzinfo=UTC)
    directory.add_event(Event(at=first, name="status", data={"status": "running"}))
    (found,) = await backend.list_remote(RemoteFilters())
    assert found.created_at == first


async def test_runs_are_filtered(backend: LocalBackend, home: Path, make_run: MakeRun) -> None:
    """By status and model; none has a suffix."""
    launched(home, make_run("waits"))
    launched(home, make_run("done")).write_exit(ExitRecord(status="completed", code=0))
    launched(home, make_run("other", model="org/model"))

    async def ids(**filters: Any) -> list[str]:
        found = await backend.list_remote(RemoteFilters.model_validate(filters))
        return [run.remote_id for run in found]

    assert await ids(status=TrainingStatus.COMPLETED) == ["done"]
    assert await ids(model="org/model") == ["other"]
    assert await ids(suffix="mine") == []


async def test_a_damaged_directory_hides_no_other(
    backend: LocalBackend, home: Path, make_run: MakeRun
) -> None:
    """What cannot be read is left out, and said to be."""
    launched(home, make_run("whole"))
    launched(home, make_run("torn")).spec.write_text('{"version": 2')
    launched(home, make_run("hidden")).path.rename(home / "runs" / ".hidden")
    with capture_logs() as said:
        assert [run.run_id for run in await backend.list_remote(RemoteFilters())] == ["whole"]
    assert [Path(entry["path"]).name for entry in said] == ["torn"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": "org/model"},
        {"model": "org/model", "tuning": {"kind": "lora", "rank": 4, "target_modules": ["q"]}},
        {"hyperparameters": {}},
        {"hyperparameters": {"epochs": 2.5, "seq_len": 100, "seed": 7, "weight_decay": 0}},
        {"options": {"max_runs": 3, "checkpoint_every": 2, "sample_prompt": "Hi"}},
    ],
)
def test_a_configuration_is_found_in_its_spec(
    make_run: MakeRun, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """It asks for the same training: the same spec comes of it."""
    spec = build_spec("r", make_run(**changes).config, tmp_path)
    found = config_of(spec)
    assert found is not None
    assert build_spec("r", found, tmp_path) == spec


def test_a_spec_of_somebody_else_has_no_configuration(make_run: MakeRun, tmp_path: Path) -> None:
    """One that no configuration can ask for is not made to fit."""
    spec = build_spec("r", make_run().config, tmp_path)
    assert config_of(spec.model_copy(update={"seq_len": 16})) is None


# -- several homes on one store -----------------------------------------------------------------


async def test_a_run_belongs_to_the_home_that_started_it(tmp_path: Path, make_run: MakeRun) -> None:
    """Another home sees that it is not its own, even before it has any; a moved one keeps it."""
    run = make_run()
    here, elsewhere = LocalBackend(tmp_path / "here"), LocalBackend(tmp_path / "elsewhere")
    directory = launched(tmp_path / "here", run)
    directory.write_exit(ExitRecord(status="completed", code=0))
    assert (await here.status(run)).place is None, "a home of an older version has no mark"
    place = make_place(tmp_path / "here")
    assert make_place(tmp_path / "here") == place
    state = await LocalBackend(tmp_path / "here").status(run)
    assert state.place == place
    known = run.updated(state)
    assert LocalBackend(tmp_path / "here").sees(known)
    assert not elsewhere.sees(known)
    make_place(tmp_path / "elsewhere")
    assert not LocalBackend(tmp_path / "elsewhere").sees(known)
    (tmp_path / "here").rename(tmp_path / "moved")
    moved = LocalBackend(tmp_path / "moved")
    assert moved.sees(known)
    assert (await moved.status(known)).place == place.model_copy(
        update={"path": tmp_path / "moved"}
    )


def test_a_copied_home_does_not_claim_the_runs_of_the_other_machine(
    tmp_path: Path, make_run: MakeRun
) -> None:
    """A machine image may bring a mark along; what counts then is whether the run is there."""
    place = make_place(tmp_path).model_copy(update={"host": "another-machine"})
    run = make_run().model_copy(update={"place": place})
    assert not LocalBackend(tmp_path).sees(run)
    launched(tmp_path, run)
    assert LocalBackend(tmp_path).sees(run), "a disk that both machines have"
