"""Run any command on this machine, in a process that outlives its parent."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from anyio import to_thread
from pydantic import BaseModel, Field, PositiveFloat, field_validator

from training_backends.backends.command.state import CommandDir, CommandSpec
from training_backends.core.backend import BackendContext, Journal, TrainingBackend
from training_backends.core.capabilities import Capabilities
from training_backends.core.config import ConfigPath, Resources, TrainingConfig
from training_backends.core.dataset import Dataset
from training_backends.core.errors import ConfigError, DuplicateRun, Issue, RunNotFound, StoreError
from training_backends.core.estimate import CostItem, Estimate, Money, PriceSource
from training_backends.core.files import make_private_directory, write_atomic
from training_backends.core.run import (
    Observation,
    Place,
    RunState,
    TrainingRun,
    ValidationReport,
    utc_now,
)
from training_backends.core.status import TrainingStatus
from training_backends.rundir.handover import is_secret_name, safe_environment
from training_backends.rundir.place import find_place, is_visible, make_place

__all__ = ["CommandBackend", "CommandOptions"]

_SUPERVISOR: Final = (
    sys.executable,
    "-P",
    "-m",
    "training_backends.backends.command.supervisor",
)
_PAGE: Final = 5000
"""Lines of an observation."""
_FREE: Final = Money.model_validate("0 USD")
_GPUS: Final = "CUDA_VISIBLE_DEVICES"


class CommandOptions(BaseModel, frozen=True, extra="forbid"):
    """What to run."""

    command: tuple[str, ...] = Field(
        min_length=1,
        description="Program and arguments, as a list or as one string; no shell is involved.",
    )
    env: dict[str, str] = Field(
        default_factory=dict, description="Environment variables; stored, so no secrets."
    )
    cwd: ConfigPath | None = Field(
        default=None,
        description="Working directory, relative to the configuration file; default: that of the "
        "launch.",
    )
    stop_timeout: PositiveFloat = Field(
        default=10.0, description="Seconds between SIGTERM and SIGKILL when the run is stopped."
    )

    @field_validator("command", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return shlex.split(value) if isinstance(value, str) else value

    @property
    def directory(self) -> Path:
        """The absolute working directory."""
        return (self.cwd or Path()).expanduser().absolute()


class CommandBackend(TrainingBackend):
    """Any command as a run.

    A run is stored entirely in its directory, `HOME/commands/ID`, where any process of the same
    user can find it.
    """

    name: ClassVar[str] = "command"
    summary: ClassVar[str] = "Runs any command on this machine; no API key, no cost."
    options_model: ClassVar[type[BaseModel]] = CommandOptions

    def __init__(self, home: Path) -> None:
        self._home = home
        self._place: Place | None = None

    @classmethod
    def create(cls, context: BackendContext) -> Self:
        """Create the backend for the state in `context.home`."""
        return cls(context.home)

    @property
    def capabilities(self) -> Capabilities:
        """What this backend supports; the command gets the configuration in a file."""
        return Capabilities(
            methods=frozenset(),
            hyperparameters=None,
            needs_model=False,
            data=frozenset({"file", "uri"}),
            needs_data=False,
            inspects=False,
            weights=True,
            validation_files=True,
            resources=frozenset({"workers", "cpus", "gpus", "max_duration"}),
            names_result=False,
            resumes="anew",
            deletes=True,
        )

    @property
    def poll_interval(self) -> tuple[timedelta, timedelta]:
        """Short: reading a directory takes a millisecond."""
        return timedelta(seconds=0.1), timedelta(seconds=1)

    async def validate(self, config: TrainingConfig, dataset: Dataset) -> ValidationReport:
        """Check that the command can be started; its data is its own business."""
        del dataset
        issues = await to_thread.run_sync(lambda: tuple(_find_issues(config)))
        return ValidationReport(issues=issues)

    async def estimate(self, config: TrainingConfig, dataset: Dataset) -> Estimate:
        """Return no cost; nothing else is known of a command."""
        del config, dataset
        source = PriceSource(name="commands on this machine are free", as_of=utc_now().date())
        costs = (CostItem(name="command", amount=_FREE, source=source),)
        notes = ("A command has no tokens or steps that could be counted.",)
        return Estimate(costs=costs, notes=notes)

    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        """See `TrainingBackend.launch`.

        The command is started at most once: if the machine fails right before the start, the run
        is lost.
        """
        directory = self._directory(run)
        spec = await to_thread.run_sync(_spec, run, await journal.token("run"), directory)
        with _reporting_disk(run):
            self._place = await to_thread.run_sync(make_place, self._home)
        await journal.record(
            RunState(status=TrainingStatus.PENDING, remote_id=run.id, place=self._place)
        )

        async def do() -> bool:
            with _reporting_disk(run):
                await to_thread.run_sync(_start, directory, spec, run)
            return True

        async def find() -> bool | None:
            return await to_thread.run_sync(_has_started, directory, spec) or None

        await journal.step("start", do, find)
        return await self.status(run)

    async def status(self, run: TrainingRun) -> RunState:
        """Read the state without the output."""
        return await to_thread.run_sync(self._read, run)

    def _read(self, run: TrainingRun) -> RunState:
        directory = self._existing(run)
        return self._here(directory.read_state(directory.read_end()))

    def _here(self, state: RunState) -> RunState:
        return state.model_copy(update={"place": self._known_place()})

    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        """Read the state and the new lines of output; cursors are byte offsets."""
        return await to_thread.run_sync(self._observe, run, after)

    def _observe(self, run: TrainingRun, after: str | None) -> Observation:
        directory = self._existing(run)
        if after is not None and not (after.isascii() and after.isdecimal()):
            raise ConfigError(
                f"Invalid log cursor {after!r}.",
                hint="`logs --json` returns a cursor with each record.",
                backend=self.name,
                run_id=run.id,
            )
        end = directory.read_end()  # first: what is written later belongs to the next observation
        state = self._here(directory.read_state(end))
        with closing(directory.read_records(int(after or 0), end)) as lines:
            records = tuple(islice(lines, _PAGE))
            more = next(lines, None) is not None
        return Observation(state, records, records[-1].cursor if records else after, more)

    async def stop(self, run: TrainingRun, *, save_checkpoint: bool = True) -> None:
        """Ask for a stop: SIGTERM to the command's process group, then SIGKILL."""
        del save_checkpoint
        await to_thread.run_sync(self._stop, run)

    def _stop(self, run: TrainingRun) -> None:
        directory = self._existing(run)
        if directory.read_end() is None:
            # The file alone is enough; the signal only makes it faster.
            with _reporting_disk(run):
                directory.request_stop()
            directory.signal_process(signal.SIGTERM)

    async def delete(self, run: TrainingRun) -> None:
        """Remove the directory of a finished run."""
        await to_thread.run_sync(self._delete, run)

    def _delete(self, run: TrainingRun) -> None:
        directory = self._existing(run)
        if directory.read_end() is None:
            raise self.unsupported("delete a run that has not finished", "Stop it first.")
        shutil.rmtree(directory.path)

    def sees(self, run: TrainingRun) -> bool:
        """Return whether the run belongs to this home on this machine."""
        return is_visible(run, self._known_place(), self._directory(run).spec)

    def _known_place(self) -> Place | None:
        if self._place is None:
            self._place = find_place(self._home)
        return self._place

    def _directory(self, run: TrainingRun) -> CommandDir:
        return CommandDir((self._home / "commands" / run.id).absolute())

    def _existing(self, run: TrainingRun) -> CommandDir:
        directory = self._directory(run)
        if not directory.spec.is_file():
            raise RunNotFound(
                f"Run {run.id} not found on this machine.", backend=self.name, run_id=run.id
            )
        return directory


def _find_issues(config: TrainingConfig) -> Iterator[Issue]:
    options = CommandOptions.model_validate(config.options)
    program, cwd = options.command[0], options.directory
    if not cwd.is_dir():
        yield Issue(
            code="no_directory",
            message=f"{cwd} is not a directory",
            field="options.cwd",
            fix="create it, or correct the path",
        )
    path = (safe_environment() | options.env).get("PATH", os.defpath)
    named = str(cwd / program) if os.sep in program else program
    if shutil.which(named, path=path) is None:
        yield Issue(
            code="command_not_found",
            message=f"{program!r} is not an executable program",
            field="options.command",
            fix="install it, or give its path; for shell syntax use `sh -c '…'`",
        )
    for name in options.env:
        if is_secret_name(name):
            yield Issue(
                code="secret_in_options",
                message=f"{name} would be stored in plain text",
                field="options.env",
                fix="let the command read the secret itself, for example from a file",
            )
    visible = os.environ.get(_GPUS)
    if visible is not None and (config.resources.gpus or 0) > len(_listed(visible)):
        yield Issue(
            code="too_few_gpus",
            message=f"{_GPUS} has only {len(_listed(visible))} GPUs",
            field="resources.gpus",
            fix=f"ask for fewer, or change {_GPUS}",
        )


def _spec(run: TrainingRun, token: str, directory: CommandDir) -> CommandSpec:
    options = CommandOptions.model_validate(run.config.options)
    limit = run.config.resources.max_duration
    own = {
        "RUN_ID": run.id,
        "RUN_DIR": str(directory.path),
        "RUN_CONFIG": str(directory.path / "config.json"),
        "RUN_RESULT": str(directory.result),
    }
    return CommandSpec(
        token=token,
        argv=options.command,
        cwd=options.directory,
        env=options.env | own | _resource_variables(run.config.resources),
        stop_timeout=options.stop_timeout,
        max_duration=limit and limit.total_seconds(),
    )


def _resource_variables(resources: Resources) -> dict[str, str]:
    """Return what the command may use; nothing but the visible GPUs is enforced."""
    asked = {"WORKERS": resources.workers, "CPUS": resources.cpus, "GPUS": resources.gpus}
    found = {f"RUN_{name}": f"{value:g}" for name, value in asked.items() if value is not None}
    if resources.gpus is not None:
        visible = _listed(os.environ.get(_GPUS) or ",".join(map(str, range(resources.gpus))))
        found[_GPUS] = ",".join(visible[: resources.gpus])
    return found


def _listed(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _start(directory: CommandDir, spec: CommandSpec, run: TrainingRun) -> None:
    """Start the supervisor, and wait until it has started the command."""
    if directory.spec.is_file() and not _is_same(directory, spec):
        raise DuplicateRun(
            f"The directory of another run {run.id} already exists.",
            other=run.id,
            hint="Choose another id, or delete the earlier run.",
            backend="command",
            run_id=run.id,
        )
    make_private_directory(directory.path)
    directory.result.mkdir(exist_ok=True)
    write_atomic(directory.path / "config.json", run.config.model_dump_json(indent=2))
    write_atomic(directory.spec, spec.model_dump_json(indent=2), private=True)
    done = subprocess.run(  # noqa: S603  # our own program and directory
        [*_SUPERVISOR, str(directory.path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=directory.path,
        env={"PYTHONUNBUFFERED": "1"} | safe_environment(),
        start_new_session=True,
        check=False,
    )
    if not directory.started.exists():
        lines = done.stdout.decode("utf-8", "replace").strip().splitlines()
        raise OSError(f"the supervisor did not start: {lines[-1] if lines else 'no message'}")


def _has_started(directory: CommandDir, spec: CommandSpec) -> bool:
    return directory.started.exists() and _is_same(directory, spec)


def _is_same(directory: CommandDir, spec: CommandSpec) -> bool:
    try:
        found = CommandSpec.model_validate_json(directory.spec.read_bytes())
    except (OSError, ValueError):
        return False
    return found.token == spec.token


@contextmanager
def _reporting_disk(run: TrainingRun) -> Iterator[None]:
    """Raise file system errors, such as a full disk, as StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"Cannot store run {run.id} on this machine: {error.strerror or error}.",
            hint="Check free space and write permission, then run the same command again.",
            backend="command",
            run_id=run.id,
        ) from error
