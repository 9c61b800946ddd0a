"""Train run directories in groups of processes that have loaded torch already.

Each line of standard input is a JSON object: `size` processes train the run directories in `runs`
one after the other, each as `work` does under torch's agent. The answer is one line with the exit
codes of all processes. With `fits`, more rows than that raise an out-of-memory error, and each run
is started again once, as the agent would. With `stored`, the URL of a run, each process has a
directory of its own, as on Ray.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import peft  # noqa: F401  # loads bitsandbytes too
import torch

import training_backends.trainer.run  # noqa: F401  # loads what training needs
from training_backends.rundir.directory import RunDir
from training_backends.trainer.encode import encode_data
from training_backends.trainer.launch import Outcome, loopback_store
from training_backends.trainer.objectives.tokens import TokenObjective
from training_backends.trainer.process import work
from training_backends.trainer.ray_stored import DriverLink, Worker

_DIGITS = 5


def main() -> None:
    """Serve one request after the other."""
    for line in sys.stdin:
        request = json.loads(line)
        size, runs = request["size"], [RunDir(Path(path)) for path in request["runs"]]
        for run in runs:
            Outcome(run).directory.mkdir(exist_ok=True)
            encode_data(run, run.read_spec(), lambda: False)
        ports, told = os.pipe()
        children = []
        for rank in range(size):
            if (child := os.fork()) == 0:
                port = int(os.read(ports, _DIGITS))
                os._exit(_train(rank, size, port, runs, request))
            children.append(child)
        # Not before: its thread may hold a lock of libc, which a process forked then waits for.
        store = loopback_store()
        os.write(told, f"{store.port:{_DIGITS}}".encode() * size)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        del store
        os.close(ports)
        os.close(told)
        for run in runs:
            if record := Outcome(run).read():
                run.write_exit(record)
        sys.stdout.write(json.dumps(codes) + "\n")
        sys.stdout.flush()


def _train(rank: int, size: int, port: int, runs: list[RunDir], request: Any) -> int:
    os.environ |= request.get("environment", {})
    group = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in group.items()}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    if fits := request.get("fits"):
        _limit_memory(fits)
    code = 0
    for number, run in enumerate(runs):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        if url := request.get("stored"):
            return _train_apart(rank, size, run, url)
        code = work(run.path)
        if code and fits:
            code = work(run.path)
        if code:
            break
    return int(code)


def _train_apart(rank: int, size: int, run: RunDir, url: str) -> int:
    worker = Worker(
        url,
        str(run.path / f"node-{rank}"),
        rank=rank,
        processes=size,
        ask=lambda name, *values: getattr(DriverLink(str(run.path)), name)(*values),
    )
    return not worker.work(lambda own: work(own.path, stored=url), lambda _: [])


def _limit_memory(fits: int) -> None:
    compute_loss = TokenObjective.compute_loss

    def limited(objective: TokenObjective, model: Any, batch: Any) -> Any:
        if len(batch["input_ids"]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return compute_loss(objective, model, batch)

    TokenObjective.compute_loss = limited  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    main()
