"""Launch the same run from two processes at the same instant, repeatedly; expect one job each time.

    python benchmarks/twins.py [TIMES]

Both processes use the library with the same store and the same gateway, which runs in its own
process. They receive a point in time and launch at that time. Afterwards the gateway must have one
job per run, started once, with one upload of each content.

Exits with 0 if both processes got the same job in every round.
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
"""Seconds between sending an order and the time of the launch."""


def _launch_on_order() -> None:
    """Run as one of the two processes: read orders, launch, print the results."""
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
                result: dict[str, Any] = {"job": run.remote_id}
            except TrainingBackendError as error:
                result = {"error": f"{type(error).__name__}: {error.message}"}
            print(json.dumps({**result, "began": began}), flush=True)


def _twin(settings: dict[str, str]) -> "subprocess.Popen[str]":
    twin = subprocess.Popen(
        [sys.executable, __file__, "--twin"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=settings,
    )
    _receive(twin)
    return twin


def _send(twin: "subprocess.Popen[str]", order: dict[str, Any]) -> None:
    assert twin.stdin is not None
    twin.stdin.write(json.dumps(order) + "\n")
    twin.stdin.flush()


def _receive(twin: "subprocess.Popen[str]") -> str:
    assert twin.stdout is not None
    line = twin.stdout.readline()
    if not line:
        raise RuntimeError("one of the two processes died")
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
                _send(twin, order)
            results = [json.loads(await anyio.to_thread.run_sync(_receive, twin)) for twin in twins]
            apart.append(abs(results[0]["began"] - results[1]["began"]))
            for each in results:
                if "error" in each:
                    print(f"  run {number}: {each['error']}")
                    wrong["errors"] += 1
            if len({each.get("job") for each in results}) != 1:
                wrong["runs with two jobs"] += 1
        for twin in twins:
            assert twin.stdin is not None
            twin.stdin.close()
            twin.wait()
        jobs, files = await site.jobs(), await site.files()
    wrong["missing or extra jobs"] += abs(len(jobs) - times)
    wrong["missing or extra starts"] += abs(len(site.trainings()) - times)
    wrong["missing or extra uploads"] += abs(len(files) - times)
    print(f"concurrent launches of the same id           {times}")
    print(f"median time between the two launches         {statistics.median(apart) * 1000:.2f} ms")
    for what, count in wrong.items():
        print(f"{what:<44} {count}")
    failed = any(wrong.values())
    print("FAIL" if failed else "PASS")
    return int(failed)


def main() -> int:
    """Run as often as the command line says."""
    if sys.argv[1:] == ["--twin"]:
        _launch_on_order()
        return 0
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory(prefix="twins-") as directory:
        return anyio.run(_run, times, Path(directory))


if __name__ == "__main__":
    sys.exit(main())
