"""Launch the same runs from several processes at once, while the database server dies.

    python benchmarks/launchers.py [--launchers 8] [--launches 500] [--restarts 5]

The launchers share a store on PostgreSQL behind PgBouncer in transaction mode (without PgBouncer if
it is not installed); half of them have another home, as on another machine. Each launches every id,
in an order of its own, so all ids collide. Meanwhile the server is killed and started again, at
equal shares of the launches. Each run must exist once and have been started once, whatever its
launchers were told.

Exits with 0 if all of that holds.
"""

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import anyio

ROOT: Final = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks._chaos_backend import QuickBackend  # noqa: E402
from tests.postgres import PgBouncer, Postgres, pgbouncer_program, programs  # noqa: E402
from training_backends import AsyncTrainingClient, StoreError  # noqa: E402
from training_backends.store import RunStore  # noqa: E402

ROW: Final = (
    '{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}\n'
)


def launch_all(number: int, work: str, url: str, ids: list[str], report: tuple[Any, Any]) -> None:
    """Launch every id, each until it is accepted; report how often the store was away.

    Args:
        report: Counts the launches of all launchers; receives what was told, and the CPU seconds.
    """
    done, out = report
    home, trainings = Path(work, f"home-{number % 2}"), Path(work, "trainings")
    data = Path(work, "train.jsonl")
    config = {"model": "m", "data": {"train": [str(data)]}}
    order = random.Random(number).sample(ids, len(ids))
    told: Counter[str] = Counter()

    async def launch() -> None:
        backends = {"quick": QuickBackend(trainings)}
        async with AsyncTrainingClient(home=home, store_url=url, backends=backends) as client:
            for run_id in order:
                while True:
                    try:
                        await client.launch(config, backend="quick", run_id=run_id)
                    except StoreError as error:
                        told["store away" if error.retryable else error.message] += 1
                        await anyio.sleep(0.2)
                    except Exception as error:  # reported and repeated by the caller's count
                        told[f"{type(error).__name__}: {error}"[:200]] += 1
                        break
                    else:
                        break
                with done.get_lock():
                    done.value += 1

    anyio.run(launch)
    out.put((told, time.process_time()))


@contextmanager
def store(server: Postgres) -> Iterator[str]:
    """Return the URL of an empty store."""
    if pgbouncer_program() is None:
        yield server.new_url()
        return
    with PgBouncer(server) as pooler:
        yield pooler.new_url()


def run(options: argparse.Namespace, work: Path, server: Postgres, url: str) -> list[str]:
    """Launch, kill the server meanwhile, and return what is wrong at the end."""
    ids = [f"run-{number}" for number in range(options.launches)]
    (work / "train.jsonl").write_text(ROW * 10)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.launchers"])
    out, done = context.Queue(), context.Value("i", 0)
    began = time.monotonic()
    launchers = [
        context.Process(target=launch_all, args=(number, str(work), url, ids, (done, out)))
        for number in range(options.launchers)
    ]
    for process in launchers:
        process.start()
    share = len(launchers) * len(ids) // (options.restarts + 1)
    for number in range(1, options.restarts + 1):
        while done.value < share * number and any(each.is_alive() for each in launchers):
            time.sleep(0.02)
        server.stop()
        time.sleep(0.5)
        server.start()
    reports = [out.get(timeout=options.timeout) for _ in launchers]
    told: Counter[str] = sum((each for each, _ in reports), Counter())
    for process in launchers:
        process.join()
    runs = RunStore(url)
    stored = Counter(each.id for each in runs.list())
    unlaunched = [run_id for run_id in ids if runs.entry(run_id, "launched") is None]
    runs.close()
    seconds = time.monotonic() - began
    print(
        f"{len(launchers)} launchers, {len(ids)} ids, {len(launchers) * len(ids)} launches in "
        f"{seconds:.0f} s and {sum(cpu for _, cpu in reports):.1f} CPU s, "
        f"restarts: {options.restarts}; {dict(told)}"
    )
    trained = {path.name for path in (work / "trainings").glob("*")}
    wrong = [f"{run_id} is stored {stored[run_id]} times" for run_id in ids if stored[run_id] != 1]
    wrong += [f"{run_id} is not launched" for run_id in unlaunched]
    wrong += [f"{run_id} was not started" for run_id in ids if run_id not in trained]
    wrong += [message for message in told if message != "store away"]
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--launchers", type=int, default=8)
    parser.add_argument("--launches", type=int, default=500)
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=3600.0)
    with ExitStack() as stack:
        assert programs() is not None, "PostgreSQL is not installed"
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres = stack.enter_context(Postgres())
        found = run(parser.parse_args(), directory, postgres, stack.enter_context(store(postgres)))
    print("\n".join(found[:20]) or "PASS")
    sys.exit(bool(found))
