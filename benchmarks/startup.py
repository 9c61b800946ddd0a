"""Measure importing the package and printing its help, relative to bare Python.

    python benchmarks/startup.py [RUNS]

Prints median wall times and their ratios, all from this run.
"""

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "bare python": ["-c", "pass"],
    "import training_backends": ["-c", "import training_backends"],
    "… and an error class": ["-c", "from training_backends import RunNotFound"],
    "training-backends --help": ["-m", "training_backends", "--help"],
    "… rendered with rich": [
        "-c",
        (
            "from training_backends.cli.main import app\n"
            "app.rich_markup_mode = 'rich'\n"
            "app(['--help'])"
        ),
    ],
    "import httpx": ["-c", "import httpx"],
    "import mistralai.client": ["-c", "import mistralai.client"],
}


def seconds(arguments: list[str]) -> float:
    """Time one process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Alternate the commands, so that a slow moment affects all of them."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for arguments in COMMANDS.values():
        seconds(arguments)  # warm the caches
    for _ in range(runs):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    bare = statistics.median(times["bare python"])
    print(f"{'':<26} {'median':>9} {'× bare':>7} {'above bare':>11}")
    for name, samples in times.items():
        median = statistics.median(samples)
        above = (median - bare) * 1000
        print(f"{name:<26} {median * 1000:>6.1f} ms {median / bare:>7.1f} {above:>8.1f} ms")


if __name__ == "__main__":
    main()
