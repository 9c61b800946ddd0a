"""What all tests share."""

import gc
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import structlog

from tests.forking import ForkServer, Preloaded, Program, Trainer
from tests.passwords import remembering
from tests.plugins import Install, install_backend
from tests.postgres import PgBouncer, Postgres, pgbouncer_program, programs
from training_backends import TrainingConfig
from training_backends.core import settings
from training_backends.core.redaction import forget_secrets

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


# Compiled once, not each of the thousand times that a program is started.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Until everything is collected: what modules define stays, and each collection of garbage would
# search it again.
gc.disable()

# Before torch is loaded: so small a model gains nothing from a second thread, and threads that
# wait for each other on a busy machine took four times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Stores sync what they write; in memory that costs nothing. Some tests run what they write.
_SHARED = Path("/dev/shm")
if (
    _SHARED.is_dir()
    and disk_usage(_SHARED).free > 2**31
    and not os.statvfs(_SHARED).f_flag & os.ST_NOEXEC
):
    os.environ.setdefault("TMPDIR", str(_SHARED))
    tempfile.tempdir = None  # chosen again

# A shell's background jobs ignore Ctrl-C, and so would every program that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# In CI, hypothesis has a profile of its own, which tries the same examples each time.
for _name, _parent, _examples, _steps in (
    ("quick", "ci" if "CI" in os.environ else "default", 20, 20),
    ("thorough", "default", 400, 50),
):
    hypothesis.settings.register_profile(
        _name,
        hypothesis.settings.get_profile(_parent),
        max_examples=_examples,
        stateful_step_count=_steps,
        deadline=None,
    )
hypothesis.settings.load_profile("quick")  # --hypothesis-profile chooses another


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start with the modules of long tests, then the large ones, and end with the small.

    So no worker of xdist, which runs whole modules, has much left when the others end. The tests of
    a pretrained model take minutes, and are left out unless `-m` asks for them.
    """
    if "model" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("model")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    sizes = Counter(item.path for item in items)
    slow = ("browser", "e2e", "engine", "slow")
    long = {item.path for item in items if any(map(item.get_closest_marker, slow))}
    items.sort(key=lambda item: (item.path not in long, -sizes[item.path]))


def pytest_collection_finish() -> None:
    """Spare every collection of garbage the search through all modules, torch among them.

    They are as rare as in the program itself.
    """
    gc.freeze()
    gc.set_threshold(50_000)
    gc.enable()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run asynchronous tests on asyncio, the loop that the package runs on.

    An asynchronous fixture that the tests of a module share keeps one loop open for all of them.
    """
    return "asyncio"


def isolate(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Keep the user's own settings, keys and state out of what is done from now on."""
    for name in list(os.environ):
        if name.startswith("TRAINING_BACKENDS_") or name.endswith("_API_KEY"):
            patch.delenv(name)
    patch.setenv("TRAINING_BACKENDS_HOME", str(root / "home"))
    # No test leaves a process behind.
    patch.setenv("TRAINING_BACKENDS_LOCAL__GENERATE_IDLE", "0")
    patch.setenv("XDG_CONFIG_HOME", str(root / "config"))
    patch.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.fail.Keyring")
    patch.setattr(settings, "config_file", lambda: root / "config" / "config.toml")


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's own settings, keys and state out of the tests."""
    isolate(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def no_known_secrets() -> Iterator[None]:
    """Have no test's secret taken out of the texts of another, nor its logging applied to it.

    Structlog stays configured after `capture_logs` and after a command; its renderer would then
    draw every traceback, which takes up to a second.
    """
    forget_secrets()
    yield
    forget_secrets()
    structlog.reset_defaults()


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> "Iterator[InMemorySpanExporter]":
    """Let OpenTelemetry keep what it is told; a provider can be set only once otherwise."""
    # Not above: a program that has imported it gets spans, and most tests are none.
    from opentelemetry import trace  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: PLC0415
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import (  # noqa: PLC0415
        InMemorySpanExporter,
    )

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    yield exporter
    provider.shutdown()


@pytest.fixture
def remembered_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Derive the key of a password once per salt, for that is meant to be slow."""
    argon2 = pytest.importorskip("cryptography.hazmat.primitives.kdf.argon2")
    monkeypatch.setattr(argon2, "Argon2id", remembering(argon2.Argon2id))


@pytest.fixture(scope="session")
def trainer(pytestconfig: pytest.Config) -> Iterator[Trainer]:
    """Start training processes that have torch loaded already."""
    found = Trainer(_address(Trainer, pytestconfig))
    yield found
    found.close()


@pytest.fixture(scope="session")
def program(pytestconfig: pytest.Config) -> Program:
    """Start the command line, where the start of the interpreter is not what is tested."""
    return Program(_address(Program, pytestconfig))


@pytest.fixture(scope="session")
def preloaded(pytestconfig: pytest.Config) -> Preloaded:
    """Start programs that need the libraries of the tests."""
    return Preloaded(_address(Preloaded, pytestconfig))


_ADDRESSES = pytest.StashKey[dict[str, str]]()
_FORK_SERVERS = (Preloaded, Trainer, Program)


def _address(kind: type[ForkServer], config: pytest.Config, *, at_once: bool = False) -> str:
    """Return the address of a fork server, which all workers of xdist share."""
    if given := getattr(config, "workerinput", {}).get(kind.__name__):
        return str(given)
    addresses = config.stash.setdefault(_ADDRESSES, {})
    if kind.__name__ not in addresses:
        stack = ExitStack()
        addresses[kind.__name__] = stack.enter_context(kind.serving(at_once=at_once))
        config.add_cleanup(stack.close)
    return addresses[kind.__name__]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Fork the workers from a process that has loaded the libraries, if they run all tests."""
    if config.args == config.getini("testpaths"):
        preloaded, _, _ = (_address(kind, config, at_once=True) for kind in _FORK_SERVERS)
        for spec in specs:
            spec.python = str(Preloaded(preloaded).python)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of xdist, before it starts, where the fork servers are."""
    for kind in _FORK_SERVERS:
        node.workerinput[kind.__name__] = _address(kind, node.config)


@pytest.fixture
def forked(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this program, and those that this test starts, train in processes of that server."""
    monkeypatch.setenv("TRAINING_BACKENDS_LOCAL__PYTHON", str(trainer.python))


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """Start a PostgreSQL server of our own."""
    if programs() is None:
        pytest.skip("not installed: the server of PostgreSQL (package postgresql)")
    if find_spec("psycopg") is None:
        pytest.skip("not installed: psycopg (extra postgres)")
    with Postgres() as server:
        yield server


@pytest.fixture(scope="session")
def pgbouncer(postgres: Postgres) -> Iterator[PgBouncer]:
    """Start a pooler in transaction mode before the server of our own."""
    if pgbouncer_program() is None:
        pytest.skip("not installed: PgBouncer (package pgbouncer)")
    with PgBouncer(postgres) as pooler:
        yield pooler


def chat(question: str, answer: str) -> dict[str, object]:
    """Make a chat row."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    """Write a small training file."""
    path = tmp_path / "train.jsonl"
    rows = [chat(f"What is {n} plus {n}?", f"It is {n + n}.") for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install packages with a backend each, for this test and the processes that it starts."""
    packages: list[str] = []

    def add(package: str, backend: str, source: str) -> Path:
        site = tmp_path / "sites" / package
        install_backend(site, package, backend, source)
        monkeypatch.syspath_prepend(site)
        monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
        packages.append(package)
        return site

    yield add
    for package in packages:
        sys.modules.pop(package, None)


@pytest.fixture
def make_config(train_file: Path) -> Callable[..., TrainingConfig]:
    """Make a configuration over the small training file."""

    def make(**fields: object) -> TrainingConfig:
        values = {"model": "tiny-mistral", "data": {"train": train_file}, **fields}
        return TrainingConfig.model_validate(values)

    return make
