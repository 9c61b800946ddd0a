"""Measure the time from the start of a training process to its first step.

    python benchmarks/engine_startup.py [RUNS]

Trains `tiny-mistral` on the sample data and prints median wall times of this run by phase,
relative to merely importing the training libraries.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from statistics import median

from training_backends.core.config import DataSource, Tuning
from training_backends.rundir.directory import RunDir, RunSpec

# Keep peft from importing bitsandbytes, which this model does not need.
NOT_NEEDED = "import sys; sys.modules['bitsandbytes'] = None; "
LIBRARIES = NOT_NEEDED + "import torch, peft; from transformers import MistralForCausalLM, Trainer"
OURS = NOT_NEEDED + "import training_backends.trainer.run"


def imports(code: str) -> float:
    """Time a process that only runs imports."""
    start = time.perf_counter()
    # Like the trainer, exit without interpreter shutdown.
    subprocess.run([sys.executable, "-c", f"{code}; import os; os._exit(0)"], check=True)
    return time.perf_counter() - start


def first_step(directory: Path) -> dict[str, float]:
    """Start a run; return the seconds until each status and until the first step."""
    run = RunDir(directory)
    data = Path(str(files("training_backends") / "samples" / "train.jsonl"))
    spec = RunSpec(
        run_id=directory.name,
        model="tiny-mistral",
        tuning=Tuning(kind="full"),
        train=(DataSource(path=data),),
        training_steps=1000,
        batch_size=16,
        device="cpu",
        slots_dir=directory.parent / "slots",
    )
    run.write_spec(spec)
    start = datetime.now(UTC)
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "training_backends.trainer", "train", str(directory)],
        env={**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1"},
    ) as process:
        while not (rows := run.read_metrics()):
            if process.poll() is not None:
                raise SystemExit(f"the trainer exited with {process.returncode}")
            time.sleep(0.01)
        process.kill()
    reported = {str(event.data.get("status")): event.at for event, _ in run.read_events()}
    reported["first step"] = rows[0][0].at
    return {name: (at - start).total_seconds() for name, at in reported.items()}


def main() -> None:
    """Alternate the measurements, so that a slow moment affects all of them."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    measured: dict[str, Callable[[], float]] = {
        "bare python": lambda: imports("pass"),
        "libraries": lambda: imports(LIBRARIES),
        "ours": lambda: imports(OURS),
    }
    times: dict[str, list[float]] = {name: [] for name in measured}
    reported: dict[str, list[float]] = {}
    imports(OURS)  # warm the caches
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(runs):
            for name, measure in measured.items():
                times[name].append(measure())
            for name, at in first_step(Path(temporary) / f"run-{number}").items():
                reported.setdefault(name, []).append(at)
    libraries, ours = median(times["libraries"]), median(times["ours"])
    queue, ready, step = (median(reported[n]) for n in ("initializing", "running", "first step"))
    lines = [
        ("bare imports of the libraries", libraries),
        ("start to first step", step),
        ("  until it has a slot", queue),
        ("  remaining imports", ours - queue),
        ("  model, data, trainer", ready - ours),
        ("  first step", step - ready),
    ]
    for name, seconds in lines:
        print(f"{name:<34} {seconds:>6.2f} s {seconds / libraries:>6.2f} × bare imports")


if __name__ == "__main__":
    main()
