"""Train on this machine, in a process that outlives its parent."""

import shutil
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import ClassVar, Final, Self, cast

import anyio
from anyio import to_thread
from pydantic import BaseModel

from training_backends.backends.local.checkpoint_copy import (
    copy_atomically,
    copy_checkpoint,
    named_checkpoint,
    reason_of,
    reporting_disk,
    require_space,
)
from training_backends.backends.local.estimate import estimate_run
from training_backends.backends.local.interpreter import NEEDED, THIS_INTERPRETER, Interpreter
from training_backends.backends.local.process import (
    ChildEnvironment,
    Hub,
    ask_model,
    run_trainer,
    spawn,
)
from training_backends.backends.local.run_log import Cursor, read_records
from training_backends.backends.local.runs import find_runs, revive
from training_backends.backends.local.settings import LocalOptions, LocalSettings
from training_backends.backends.local.spec import (
    base_of,
    build_spec,
    defaults_taken,
    find_issues,
    resolved_values,
)
from training_backends.backends.local.state import (
    Snapshot,
    has_begun,
    is_orphaned,
    read_ending,
    read_state,
)
from training_backends.backends.local.trackers import tracker_issues
from training_backends.backends.local.validate import (
    files_issues,
    find_directory,
    hub_issues,
    unusable_severity,
)
from training_backends.backends.local.warm import WarmModel
from training_backends.core.backend import (
    BackendContext,
    Health,
    Journal,
    JSONValue,
    RemoteFilters,
    RemoteRun,
    TrainingBackend,
)
from training_backends.core.capabilities import Capabilities
from training_backends.core.config import TINY_MODEL, TrainingConfig
from training_backends.core.dataset import Dataset
from training_backends.core.errors import (
    BackendNotInstalled,
    ConfigError,
    DuplicateRun,
    Issue,
    RunNotFound,
    TrainingBackendError,
)
from training_backends.core.estimate import Estimate
from training_backends.core.integrations import INTEGRATION_FIELDS
from training_backends.core.run import (
    Observation,
    Place,
    Prompt,
    Reply,
    RunState,
    TrainingRun,
    ValidationReport,
)
from training_backends.core.settings import SectionSettings, load_settings
from training_backends.core.status import TrainingStatus
from training_backends.datasets.provider_formats import LOCAL
from training_backends.rundir.checkpoints import remove_optimizer_state, step_of
from training_backends.rundir.directory import ResultRecord, RunDir, RunSpec
from training_backends.rundir.place import find_place, is_visible, make_place
from training_backends.tokens.overlong import overlong_rows
from training_backends.trackers.tracker import tracker_names

__all__ = ["LocalBackend", "require_same"]

_SUSPENSION_CHECK: Final = 0.1
"""Seconds between two checks for the end of a process."""
_PROBE_CACHE: Final = "local-python.json"
"""In the home: what is known of the interpreter in `local.python`."""


class LocalBackend(TrainingBackend):
    """Fine-tuning on this machine.

    A run is stored entirely in its run directory, `HOME/runs/ID`, where any process of the same
    user can find it.

    Args:
        program: Command that trains the run directory given as its last argument; default: the
            trainer, run by `interpreter`.
        hub: Access to models that are not on this machine.
        interpreter: Python environment that trains.
        warm: Answers prompts; default: a process for each prompt.
    """

    name: ClassVar[str] = "local"
    summary: ClassVar[str] = "Trains on this machine, on CPUs or GPUs; no API key, no cost."
    options_model: ClassVar[type[BaseModel]] = LocalOptions
    settings_model: ClassVar[type[SectionSettings] | None] = LocalSettings

    def __init__(
        self,
        home: Path,
        *,
        program: Sequence[str] | None = None,
        hub: Hub | None = None,
        interpreter: Interpreter = THIS_INTERPRETER,
        warm: WarmModel | None = None,
    ) -> None:
        self._home = home
        self._warm = warm
        self._runs = home / "runs"
        self._slots: Path | None = home / "slots"
        self._interpreter = interpreter
        self._program = interpreter.command("train") if program is None else program
        self._hub = hub or Hub()
        self._place: Place | None = None
        self._is_ending = False  # see `suspend`

    @classmethod
    def create(cls, context: BackendContext) -> Self:
        """Create the backend for the state in `context.home`."""
        settings = cast("LocalSettings", context.settings or load_settings(LocalSettings))
        interpreter = Interpreter(settings.python, context.home / _PROBE_CACHE)
        hub = Hub(settings, context.credentials, interpreter)
        idle = settings.generate_idle
        warm = WarmModel(context.home / "generate", interpreter, idle) if idle else None
        return cls(context.home, hub=hub, interpreter=interpreter, warm=warm)

    @property
    def interpreter(self) -> Interpreter:
        """The Python environment that trains."""
        return self._interpreter

    @property
    def capabilities(self) -> Capabilities:
        """What this backend supports."""
        return Capabilities(
            methods=frozenset({"sft", "dpo", "classifier"}),
            tunings=frozenset({"full", "lora", "qlora"}),
            hyperparameters=None,
            weights=True,
            validation_files=True,
            chat_template=True,
            integrations=frozenset(tracker_names()),
            integration_fields=INTEGRATION_FIELDS,
            keeps_checkpoint_on_stop=True,
            resumes="checkpoint",
            result_checkpoints=frozenset({"last", "best"}),
            downloads=True,
            downloads_checkpoints=True,
            samples=True,
            samples_chats=True,
            deletes=True,
            lists_remote=True,
            provider_format=LOCAL,
        )

    @property
    def poll_interval(self) -> tuple[timedelta, timedelta]:
        """Short: reading a run directory takes a millisecond."""
        return timedelta(seconds=0.1), timedelta(seconds=1)

    def tolerated_bad_rows(self, config: TrainingConfig) -> float:
        """Return `options.max_invalid_fraction`."""
        return LocalOptions.model_validate(config.options).max_invalid_fraction

    def options_tolerating(self, fraction: float) -> dict[str, JSONValue]:
        """Return the option that tolerates this fraction."""
        return {"max_invalid_fraction": fraction}

    async def validate(self, config: TrainingConfig, dataset: Dataset) -> ValidationReport:
        """See `TrainingBackend.validate`."""
        await self._require_trainer()
        found = partial(find_issues, config, dataset, self._checked_interpreter)
        issues = await to_thread.run_sync(lambda: tuple(found()))
        issues += await tracker_issues(config, self._hub, self._checked_interpreter)
        if any(issue.severity == "error" for issue in issues):
            return ValidationReport(issues=issues)
        issues += await self._model_issues(config, dataset)
        if any(issue.severity == "error" for issue in issues):
            return ValidationReport(issues=issues)

        def overlong() -> Issue | None:
            return overlong_rows(
                dataset,
                config.base_model,
                int(resolved_values(config)["seq_len"]),
                fix="longer rows are truncated in training: shorten them, or raise seq_len",
                chat_template=config.chat_template.read() if config.chat_template else None,
                unusable=unusable_severity(config, issues),
            )

        rows = await to_thread.run_sync(overlong)
        return ValidationReport(issues=(*issues, rows) if rows else issues)

    async def _model_issues(self, config: TrainingConfig, dataset: Dataset) -> tuple[Issue, ...]:
        if config.base_model == TINY_MODEL:
            return ()
        try:
            base = await to_thread.run_sync(base_of, config.base_model)
        except ValueError as error:
            return (Issue(code="model_files", message=str(error), field="model"),)
        config = config.model_copy(update={"model": base})
        directory = await to_thread.run_sync(find_directory, base)
        if directory is None:
            return tuple(await hub_issues(config, self._hub, self._checked_interpreter))
        found = partial(files_issues, config, dataset, directory, self._checked_interpreter)
        return await to_thread.run_sync(lambda: tuple(found()))

    async def estimate(self, config: TrainingConfig, dataset: Dataset) -> Estimate:
        """Count tokens and steps; the duration is only known from earlier local runs."""
        spec = await to_thread.run_sync(build_spec, "estimate", config, self._slots)
        taken = ", ".join(f"{name} {value:g}" for name, value in defaults_taken(config).items())
        notes = (f"Defaults used: {taken}.",) if taken else ()
        found = await to_thread.run_sync(estimate_run, spec, dataset, self._runs, notes)
        return found.model_copy(update={"hyperparameters": resolved_values(config)})

    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        """See `TrainingBackend.launch`; the run may be queued until a slot is free."""
        await self._require_trainer()
        return await self._start(run, journal)

    async def _start(
        self, run: TrainingRun, journal: Journal, source: RunDir | None = None
    ) -> RunState:
        directory = self._directory(run)

        def build() -> RunSpec:
            earlier = None if source is None else source.read_spec()
            return build_spec(run.id, run.config, self._slots, source=earlier)

        spec = await to_thread.run_sync(build)
        with reporting_disk(run):
            self._place = await to_thread.run_sync(self._make_place)
        await journal.record(
            RunState(status=TrainingStatus.PENDING, remote_id=run.id, place=self._place)
        )
        await journal.step(
            "start",
            partial(self._begin, run, directory, spec),
            partial(self._find_begun, run, directory),
        )
        return await self.status(run)

    async def _begin(self, run: TrainingRun, directory: RunDir, spec: RunSpec) -> JSONValue:
        """Write the spec and start the training process, which may need all of the memory."""
        if self._warm is not None:
            await to_thread.run_sync(self._warm.stop)
        child_env = await self._hub.child_environment(spec.model, spec.integrations)
        start = partial(_start_process, directory, spec, run, self._program, child_env)
        return {"pid": await to_thread.run_sync(start)}

    async def _find_begun(self, run: TrainingRun, directory: RunDir) -> JSONValue:
        """Return something if an interrupted launch started the training process."""
        del run
        begun = await to_thread.run_sync(has_begun, directory)
        return {"found": True} if begun else None

    async def _require_trainer(self) -> None:
        """Require the libraries that train on this machine."""
        await to_thread.run_sync(self._interpreter.require)

    @property
    def _checked_interpreter(self) -> Interpreter | None:
        """The environment that `validate` checks; None: the trainer runs elsewhere."""
        return self._interpreter

    async def status(self, run: TrainingRun) -> RunState:
        """Read the state without the log, which grows with the run."""
        await self._revive([run])
        return await to_thread.run_sync(self._read, run)

    async def statuses(self, runs: Sequence[TrainingRun]) -> Mapping[str, RunState]:
        """Read all run directories in one thread."""
        await self._revive(runs)

        def read_all() -> dict[str, RunState]:
            found = {}
            for run in runs:
                try:
                    found[run.id] = self._read(run)
                except RunNotFound:
                    continue
            return found

        return await to_thread.run_sync(read_all)

    async def _revive(self, runs: Sequence[TrainingRun]) -> None:
        """Restart queued runs whose process has died, for example in a reboot."""
        if self._is_ending:
            return

        def find() -> list[RunDir]:
            return [found for run in runs if is_orphaned(found := self._directory(run))]

        for directory in await to_thread.run_sync(find):
            spec = await to_thread.run_sync(directory.read_spec)
            child_env = await self._hub.child_environment(spec.model, spec.integrations)
            await to_thread.run_sync(revive, directory, spec, self._slots, self._program, child_env)

    def _read(self, run: TrainingRun) -> RunState:
        return self._here(read_state(self._existing(run)))

    def _here(self, state: RunState) -> RunState:
        return state.model_copy(update={"place": self._known_place()})

    def _make_place(self) -> Place:
        return make_place(self._home)

    def _known_place(self) -> Place | None:
        if self._place is None:
            self._place = find_place(self._home)
        return self._place

    def sees(self, run: TrainingRun) -> bool:
        """Return whether the run belongs to this home on this machine."""
        return is_visible(run, self._known_place(), self._directory(run).spec)

    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        """Read the state and the new log records as of the same moment."""
        await self._revive([run])
        return await to_thread.run_sync(self._observe, run, after)

    def _observe(self, run: TrainingRun, after: str | None) -> Observation:
        directory = self._existing(run)
        snapshot = Snapshot.at(directory)
        state = self._here(read_state(directory, snapshot))
        records = read_records(directory, self._cursor(run, after), snapshot)
        return Observation(state, tuple(records), records[-1].cursor if records else after)

    def _cursor(self, run: TrainingRun, text: str | None) -> Cursor:
        try:
            return Cursor.parse(text)
        except ValueError as error:
            raise ConfigError(
                f"Invalid log cursor {text!r}.",
                hint="`logs --json` returns a cursor with each record.",
                backend=self.name,
                run_id=run.id,
            ) from error

    async def stop(self, run: TrainingRun, *, save_checkpoint: bool = True) -> None:
        """See `TrainingBackend.stop`."""
        await to_thread.run_sync(self._stop, run, save_checkpoint)

    def _stop(self, run: TrainingRun, save_checkpoint: bool) -> None:  # noqa: FBT001  # for a thread
        directory = self._existing(run)
        if read_ending(directory):
            return
        with reporting_disk(run):
            try:
                directory.request_stop(save_checkpoint=save_checkpoint)
            except OSError:
                # On a full disk the signal alone stops the run.
                if not directory.signal_process(signal.SIGTERM):
                    raise
                return
        # The file alone is enough, even for a process in another container or on another host;
        # the signal only makes it faster.
        directory.signal_process(signal.SIGTERM)

    async def resume(
        self,
        run: TrainingRun,
        new_run: TrainingRun,
        journal: Journal,
        *,
        checkpoint: str | None = None,
    ) -> RunState:
        """Continue in a new run directory; without a checkpoint, from the beginning.

        Args:
            checkpoint: A step, such as `120` or `step-120`.
        """
        await self._require_trainer()
        source = await to_thread.run_sync(self._existing, run)
        target = self._directory(new_run)

        async def copy() -> dict[str, int]:
            copying = partial(self._copy_checkpoint, run, source, target, checkpoint)
            return {"step": await to_thread.run_sync(copying)}

        await journal.step("copy-checkpoint", copy, repeatable=True)
        return await self._start(new_run, journal, source)

    def _copy_checkpoint(
        self, run: TrainingRun, source: RunDir, target: RunDir, requested: str | None
    ) -> int:
        """Give a new run the checkpoint of another; return the step, 0 if none."""
        return copy_checkpoint(run, source, target, requested)

    async def list_remote(self, filters: RemoteFilters) -> Sequence[RemoteRun]:
        """List the runs that have a directory here."""
        return await to_thread.run_sync(find_runs, self._runs, filters, self._opened)

    async def download(self, run: TrainingRun, target: Path) -> Path:
        """Copy the trained model to `target`."""
        return await to_thread.run_sync(self._download, run, target)

    def _download(self, run: TrainingRun, target: Path) -> Path:
        directory = self._existing(run)
        result = self._result(directory, "download")
        with _writing_to(target, run):
            copy_atomically(directory.path / result.path, target, link=False)
        return target

    async def download_checkpoint(self, run: TrainingRun, checkpoint: str, target: Path) -> Path:
        """Write a checkpoint as a model, in a separate process; on the CPU."""
        directory = await to_thread.run_sync(self._existing, run)
        path = await to_thread.run_sync(named_checkpoint, run, directory, checkpoint)
        spec = await to_thread.run_sync(directory.read_spec)
        child_env = await self._hub.child_environment(spec.model)
        command = self._interpreter.command("export", str(directory.path), path.name, str(target))
        with _writing_to(target, run):
            await run_trainer(command, f"Cannot write {path.name} as a model", child_env)
        return target

    async def sample(self, run: TrainingRun, prompt: Prompt, *, max_tokens: int = 64) -> Reply:
        """Generate an answer in a separate process, with greedy decoding."""
        directory = await to_thread.run_sync(self._existing, run)
        result = await to_thread.run_sync(self._result, directory, "prompt")
        child_env = await self._hub.child_environment(result.base_model)
        model = directory.path / result.path
        if self._warm is not None:
            return await self._warm.ask(
                str(model), prompt, max_tokens=max_tokens, child_env=child_env
            )
        return await ask_model(
            str(model),
            prompt,
            max_tokens=max_tokens,
            child_env=child_env,
            interpreter=self._interpreter,
        )

    def _result(self, directory: RunDir, verb: str) -> ResultRecord:
        record = directory.read_exit()
        if record is None or record.result is None:
            raise self.unsupported(
                f"{verb} a model before the run has completed", "Wait for the run to complete."
            )
        return record.result

    async def suspend(self) -> int:
        """Have the training processes of this container save a checkpoint and exit."""
        self._is_ending = True
        suspended = await to_thread.run_sync(self._request_suspension)
        for run in suspended:
            while await to_thread.run_sync(run.is_active):  # noqa: ASYNC110  # a process, no event
                await anyio.sleep(_SUSPENSION_CHECK)
        return len(suspended)

    def _request_suspension(self) -> list[RunDir]:
        found = []
        for path in self._runs.glob("*/spec.json"):
            run = RunDir(path.parent)
            # Not those of other containers or machines with the same home.
            if run.is_active() and not run.stop.exists() and run.signal_process(0):
                run.request_suspension()
                run.signal_process(signal.SIGTERM)
                found.append(run)
        return found

    async def delete(self, run: TrainingRun) -> None:
        """Remove the run directory of a finished run."""
        await to_thread.run_sync(self._delete, run)

    def _delete(self, run: TrainingRun) -> None:
        directory = self._existing(run)
        if not read_ending(directory):
            raise self.unsupported("delete a run that has not finished", "Stop it first.")
        if self._warm is not None:
            self._warm.stop()
        shutil.rmtree(directory.path)

    async def remove_checkpoints(self, run: TrainingRun, steps: Collection[int]) -> None:
        """Remove directories of checkpoints, and optimizer state that a crash has left."""
        directory = await to_thread.run_sync(self._existing, run)

        def remove() -> None:
            for path in directory.checkpoints.glob("step-*"):
                if step_of(path) in steps:
                    # A reader sees a complete checkpoint, or none.
                    gone = path.rename(path.with_name(f".{path.name}.removed"))
                    shutil.rmtree(gone)
            for path in directory.checkpoints.glob(".step-*"):
                shutil.rmtree(path)
            record = directory.read_exit()
            if record is not None and record.status == "completed":
                remove_optimizer_state(directory)

        await to_thread.run_sync(remove)

    async def remove_log(self, run: TrainingRun) -> None:
        """Remove the output of the processes and the metrics of the steps."""
        directory = await to_thread.run_sync(self._existing, run)

        def remove() -> None:
            for path in (directory.log, directory.trackers, directory.metrics):
                path.unlink(missing_ok=True)

        await to_thread.run_sync(remove)

    async def health(self) -> Health:
        """Report whether the training libraries are installed."""
        return await to_thread.run_sync(self._health)

    def _health(self) -> Health:
        try:
            return Health(ok=True, message=self._interpreter.describe())
        except BackendNotInstalled as error:
            if not self._interpreter.is_this:
                return Health(ok=False, message=error.message, hint=error.hint)
            missing = self._interpreter.missing()
            # Optional for a machine that only uses other backends.
            is_used = len(missing) < len(NEEDED) or _has_any(self._runs)
            words = "not installed" if is_used else "not installed (optional)"
            message = f"{words}: {', '.join(missing)}"
            return Health(ok=False, message=message, hint=error.hint, configured=is_used)

    def _directory(self, run: TrainingRun) -> RunDir:
        return self._opened(self._runs / run.id)

    def _opened(self, path: Path) -> RunDir:
        return RunDir(path)

    def _existing(self, run: TrainingRun) -> RunDir:
        directory = self._directory(run)
        if not directory.spec.is_file():
            raise RunNotFound(
                f"Run {run.id} not found on this machine.", backend=self.name, run_id=run.id
            )
        return directory


@contextmanager
def _writing_to(target: Path, run: TrainingRun) -> Iterator[None]:
    """Check that a model can be written to `target`, and report file system errors."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            f"{target} exists and is not empty.", hint="Choose a new directory.", run_id=run.id
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except TrainingBackendError:
        raise  # some are also OSErrors
    except OSError as error:
        raise TrainingBackendError(
            f"Cannot write the model to {target}: {reason_of(error)}.",
            hint="Check free space and write permission.",
            backend=LocalBackend.name,
            run_id=run.id,
        ) from error


def _has_any(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())


def _start_process(
    directory: RunDir,
    spec: RunSpec,
    run: TrainingRun,
    program: Sequence[str],
    child_env: ChildEnvironment,
) -> int:
    """Start the run's process; return 0 if an earlier attempt has just started it."""
    if directory.spec.is_file():
        require_same(directory, spec, run)
        if has_begun(directory):
            return 0
    with reporting_disk(run):
        require_space(directory.path.parent)
        directory.write_spec(spec)
        return spawn(directory, program, child_env)


def require_same(directory: RunDir, spec: RunSpec, run: TrainingRun) -> None:
    """Require that an existing directory belongs to this launch of the run.

    Raises:
        DuplicateRun: It belongs to another run with the same id.
    """
    if not _is_same(directory, spec, run):
        raise DuplicateRun(
            f"The directory of another run {run.id} already exists.",
            other=run.id,
            hint="Choose another id, or delete the earlier run.",
            backend=run.backend,
            run_id=run.id,
        )


def _is_same(directory: RunDir, spec: RunSpec, run: TrainingRun) -> bool:
    try:
        existing = directory.read_spec()
    except ValueError:
        return False
    # slots_dir differs if the home was moved; it is still the same run.
    same = existing.model_copy(update={"slots_dir": spec.slots_dir}) == spec
    record = directory.read_exit()
    return same and (record is None or record.at >= run.created_at)
