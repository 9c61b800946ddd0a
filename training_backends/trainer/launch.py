"""Start a run's processes on this machine with torch's elastic agent, and restart them.

The process that holds the run directory's lock runs the agent; the processes it starts train
(`python -m training_backends.trainer work RUN_DIR`). If one of them dies, or runs out of memory,
the agent ends the others and starts all of them again; they continue from the newest checkpoint.
How the run ended is reported in `.processes/`, never by an exit code.
"""

import logging
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Final, Self

from torch import distributed
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous.api import (
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from training_backends.rundir.directory import Event, ExitRecord, RunDir, RunSpec
from training_backends.trainer.control import StopRequest
from training_backends.trainer.environment import show_in_turn
from training_backends.trainer.errors import TrainerError
from training_backends.trainer.queue import Device

__all__ = ["Outcome", "launch", "loopback_store"]

_PROGRAM: Final = (sys.executable, "-P", "-m", "training_backends.trainer", "work")
_MAX_RESTARTS: Final = 8
_POLL: Final = 0.2
_HERE: Final = "127.0.0.1"
_DIRECTORY: Final = ".processes"


class Outcome:
    """What a run's processes report to the process that started them.

    Attributes:
        directory: Contains the report, and the number of rows that fits into memory.
    """

    def __init__(self, run: RunDir) -> None:
        self.directory = run.path / _DIRECTORY
        self._reserve = run.reserve
        self._record = self.directory / "exit.json"
        self._rows = self.directory / "micro_batch_size"

    @contextmanager
    def collected(self) -> Iterator[Self]:
        """Collect reports for the block, and forget earlier ones."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()
        try:
            yield self
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def report(self, record: ExitRecord) -> None:
        """Report how the run ended; the first report counts."""
        temporary = self.directory / f"{os.getpid()}.tmp"
        content = record.model_dump_json()
        try:
            temporary.write_text(content, encoding="utf-8")
        except OSError:  # the disk is full
            self._reserve.unlink(missing_ok=True)
            temporary.write_text(content, encoding="utf-8")
        with suppress(FileExistsError):
            self._record.hardlink_to(temporary)
        temporary.unlink()

    def read(self) -> ExitRecord | None:
        """Return how the run ended; None if no process has reported it."""
        try:
            return ExitRecord.model_validate_json(self._record.read_bytes())
        except FileNotFoundError:
            return None

    def limit_rows(self, size: int) -> None:
        """Set the number of rows per forward pass of the processes that start next."""
        temporary = self.directory / f"{os.getpid()}.rows"
        temporary.write_text(str(size), encoding="ascii")
        temporary.replace(self._rows)

    def max_rows(self) -> int | None:
        """Return the number of rows per forward pass, if it was limited."""
        try:
            return int(self._rows.read_text(encoding="ascii"))
        except FileNotFoundError:
            return None


def launch(
    run: RunDir,
    spec: RunSpec,
    stop: StopRequest,
    devices: Sequence[Device] = (),
    program: Sequence[str] = _PROGRAM,
) -> ExitRecord:
    """Train in `num_processes` processes; return how the run ended.

    Args:
        devices: A GPU for each process; empty for the CPU.
        program: What each process runs, with the run directory and this process's id appended.

    Raises:
        TrainerError: Processes died too often, or the model cannot be fetched.
    """
    # The model is on this machine: the processes receive no token, and do not ask the Hub.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("HF_TOKEN", None)
    if devices:
        show_in_turn(devices)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    with Outcome(run).collected() as outcome:
        agent = LocalElasticAgent(
            WorkerSpec(
                role="trainer",
                local_world_size=spec.num_processes,
                rdzv_handler=_Meeting(run, outcome),
                entrypoint=program[0],
                args=(*program[1:], str(run.path), str(os.getpid())),
                max_restarts=_MAX_RESTARTS,
                virtual_local_rank=bool(devices),
            ),
            DefaultLogsSpecs(log_dir=os.devnull),
        )
        result = _run(agent, run, stop)
        record = outcome.read()
    if record is None:
        raise _lost(result, spec.num_processes)
    return record


def _run(agent: LocalElasticAgent, run: RunDir, stop: StopRequest) -> RunResult | None:
    """Run the agent in a thread, where it handles no signals, and pass stop requests on."""
    with ThreadPoolExecutor(1, thread_name_prefix="agent") as pool:
        future = pool.submit(agent.run)
        while True:
            if stop.requested and not run.stop.exists():
                run.request_stop()
            with suppress(NotYet):
                result: RunResult | None = future.result(_POLL)
                return result


class _Meeting(RendezvousHandler):
    """Lets the processes of this machine meet at a store that only this machine can reach."""

    def __init__(self, run: RunDir, outcome: Outcome) -> None:
        self._run = run
        self._outcome = outcome
        self._rows: int | None = None
        self._has_started = False

    def next_rendezvous(self) -> RendezvousInfo:
        """Return a new store, unless the run has ended."""
        if self._outcome.read():
            raise RendezvousGracefulExitError
        if self._has_started:
            self._report_restart()
        self._has_started = True
        store = loopback_store()
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(_HERE, store.port))

    def _report_restart(self) -> None:
        rows = self._outcome.max_rows()
        message = "A training process exited unexpectedly"
        data: dict[str, Any] = {}
        if rows != self._rows:
            self._rows, data = rows, {"micro_batch_size": rows}
            message = f"Out of memory: retrying with {rows} rows at a time"
        message += ". Restarting from the last checkpoint."
        self._run.add_event(Event(name="message", level="warning", message=message, data=data))

    @property
    def use_agent_store(self) -> bool:
        """The processes connect to the store of the agent."""
        return True

    def get_backend(self) -> str:
        """Return the name that torch logs."""
        return "loopback"

    def get_run_id(self) -> str:
        """Return the name of the processes' part of the store."""
        return "run"

    def is_closed(self) -> bool:
        """Return False: there is only one agent."""
        return False

    def set_closed(self) -> None:
        """Do nothing: there is only one agent."""

    def num_nodes_waiting(self) -> int:
        """Return 0: there is only one agent."""
        return 0

    def shutdown(self) -> bool:
        """Do nothing: the store is closed with this process."""
        return True


def loopback_store() -> Any:
    """Return a new store that listens on loopback only; by default it would on all interfaces."""
    with socket.create_server((_HERE, 0)) as listener:
        port = listener.getsockname()[1]
        return distributed.TCPStore(  # type: ignore[attr-defined]  # missing from the stubs
            _HERE,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
            timeout=timedelta(minutes=5),
        )


def _lost(result: RunResult | None, size: int) -> TrainerError:
    rank, failure = next(iter(result.failures.items())) if result and result.failures else (0, None)
    code = failure.exitcode if failure else 1
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return TrainerError(
        f"Training process {rank + 1} of {size} exited unexpectedly ({how}), also after "
        f"{_MAX_RESTARTS} restarts: killed, or out of memory. See log.txt for its last output.",
        kind="lost",
        retryable=True,
    )
