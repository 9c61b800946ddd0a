"""Two processes launch the same run at the same instant, again and again: one job each time.

    python benchmarks/twins.py [TIMES]

Both are programs that use the library, on one store, against one gateway that is a process of
its own. They are told an instant and launch when it has come. Afterwards the gateway is asked
what it has: one job a run, started once, on one upload of each content.

Ends with 0 if every launch of both gave the same one job.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

import anyio

from benchmarks._chaos_site import Site, environment, install_quick_backend
from training_backends import TrainingBackendError, TrainingClient, TrainingConfig

_NOTICE: Final = 0.05
"""Seconds from telling the instant until it has come."""


def _launch_when_told() -> None:
    """Be one of the two: read instants and configurations, launch, say what came of it."""
    with TrainingClient() as client:
        client.backend("mistral")
        print("ready", flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            config = TrainingConfig.model_validate(order["config"])
            time.sleep(max(0.0, order["at"] - time.time()))
            began = time.time()
            try:
                run = client.launch(config, backend="mistral", run_id=order["id"])
                said: dict[str, Any] = {"job": run.remote_id}
            except TrainingBackendError as error:
                said = {"error": f"{type(error).__name__}: {error.message}"}
            print(json.dumps({**said, "began": began}), flush=True)


def _twin(settings: dict[str, str]) -> "subprocess.Popen[str]":
    twin = subprocess.Popen(
        [sys.executable, __file__, "--twin"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=settings,
    )
    _hear(twin)
    return twin


def _tell(twin: "subprocess.Popen[str]", order: dict[str, Any]) -> None:
    assert twin.stdin is not None
    twin.stdin.write(json.dumps(order) + "\n")
    twin.stdin.flush()


def _hear(twin: "subprocess.Popen[str]") -> str:
    assert twin.stdout is not None
    line = twin.stdout.readline()
    if not line:
        raise RuntimeError("one of the two has died")
    return line


def _order(work: Path, number: int) -> dict[str, Any]:
    data = work / f"train-{number}.jsonl"
    turns = [
        {"role": "user", "content": f"What is run {number}?"},
        {"role": "assistant", "content": "One of two."},
    ]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    config = {
        "model": "tiny-mistral",
        "data": {"train": str(data)},
        "hyperparameters": {"training_steps": 1},
    }
    return {"id": f"run-{number}", "config": config}


async def _run(times: int, work: Path) -> int:
    install_quick_backend(work)
    site = Site(work, "gateway", backend="quick")
    async with site.serving():
        settings = environment(
            work,
            work / "home",
            MISTRAL_API_KEY=site.key,
            TRAINING_BACKENDS_MISTRAL__BASE_URL=f"http://127.0.0.1:{site.port}",
            TRAINING_BACKENDS_MISTRAL__POLL_MIN="0.02",
        )
        twins = [await anyio.to_thread.run_sync(_twin, settings) for _ in range(2)]
        apart, wrong = [], Counter[str]()
        for number in range(times):
            order = {**_order(work, number), "at": time.time() + _NOTICE}
            for twin in twins:
                _tell(twin, order)
            said = [json.loads(await anyio.to_thread.run_sync(_hear, twin)) for twin in twins]
            apart.append(abs(said[0]["began"] - said[1]["began"]))
            for each in said:
                if "error" in each:
                    print(f"  run {number}: {each['error']}")
                    wrong["errors"] += 1
            if len({each.get("job") for each in said}) != 1:
                wrong["runs with two jobs"] += 1
        for twin in twins:
            assert twin.stdin is not None
            twin.stdin.close()
            twin.wait()
        jobs, files = await site.jobs(), await site.files()
    wrong["jobs too many or too few"] += abs(len(jobs) - times)
    wrong["starts too many or too few"] += abs(len(site.trainings()) - times)
    wrong["uploads too many or too few"] += abs(len(files) - times)
    print(f"launches of the same id at the same instant  {times}")
    print(f"median time between the two                  {statistics.median(apart) * 1000:.2f} ms")
    for what, count in wrong.items():
        print(f"{what:<44} {count}")
    failed = any(wrong.values())
    print("FAIL" if failed else "PASS")
    return int(failed)


def main() -> int:
    """Launch as often as the command line says."""
    if sys.argv[1:] == ["--twin"]:
        _launch_when_told()
        return 0
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory(prefix="twins-") as directory:
        return anyio.run(_run, times, Path(directory))


if __name__ == "__main__":
    sys.exit(main())
