"""The Python environment that trains: this program's own, or another with packages of its own."""

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

from training_backends.core.errors import BackendNotInstalled
from training_backends.core.files import make_private_directory, write_atomic
from training_backends.rundir.handover import safe_environment

__all__ = ["NEEDED", "THIS_INTERPRETER", "Interpreter"]

NEEDED: Final = ("torch", "transformers", "peft", "accelerate")
_PACKAGE: Final = "training-backends"
_INSTALL: Final = "pip install 'training-backends[local]'"
_PATIENCE: Final = 300.0
"""Seconds; importing torch and transformers takes a while on a cold disk."""
_OF_THIS_ENVIRONMENT: Final = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
_PROBE: Final = """
import gc, importlib, json, os, sys
from importlib import metadata, util
gc.disable()
found = {"versions": {}, "broken": {}, "transformers": None}
for name in ("training-backends", "bitsandbytes", "fastapi", "uvicorn", "openai", *sys.argv[1:]):
    try:
        found["versions"][name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
for name in sys.argv[1:]:
    if name in found["versions"]:
        try:
            importlib.import_module(name)
        except Exception as error:
            found["broken"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
spec = util.find_spec("transformers")
found["transformers"] = spec and spec.origin
print(json.dumps(found), flush=True)
os._exit(0)
"""
"""Collects no garbage and frees nothing, which takes torch as long as half of its import."""


class _Report(NamedTuple):
    """What is installed.

    Attributes:
        versions: Version of each package that was found.
        broken: Error of each package that cannot be imported.
        transformers: Path of that package's `__init__.py`.
    """

    versions: Mapping[str, str]
    broken: Mapping[str, str]
    transformers: str | None


class Interpreter:
    """A Python interpreter and the packages of its environment.

    Another interpreter is asked once, in a process that imports the training libraries; the answer
    is kept until that environment changes.

    Args:
        python: Another interpreter; None for the one that runs this program.
        cache: File in which the answer is kept.
    """

    def __init__(self, python: Path | None = None, cache: Path | None = None) -> None:
        self._python = python and python.expanduser()
        self._cache = cache
        self._known: tuple[list[int], _Report] | None = None

    def command(self, *arguments: str) -> tuple[str, ...]:
        """Return the command line of the trainer."""
        python = str(self._python or sys.executable)
        return (python, "-P", "-m", "training_backends.trainer", *arguments)

    def variables(self, given: Mapping[str, str]) -> dict[str, str]:
        """Return environment variables without those that belong to another environment."""
        if self._python is None:
            return dict(given)
        return {name: value for name, value in given.items() if name not in _OF_THIS_ENVIRONMENT}

    def has(self, package: str) -> bool:
        """Return whether a package is installed; False if the interpreter cannot be asked."""
        if self._python is None:
            return find_spec(package) is not None
        with suppress(BackendNotInstalled):
            return package in self._report().versions
        return False

    def transformers(self) -> Path | None:
        """Return the directory of the transformers package, or None."""
        if self._python is None:
            spec = find_spec("transformers")
            origin = spec and spec.origin
        else:
            origin = None
            with suppress(BackendNotInstalled):
                origin = self._report().transformers
        return Path(origin).parent if origin else None

    def missing(self) -> list[str]:
        """Return the training libraries that are not installed."""
        return [name for name in NEEDED if not self.has(name)]

    def require(self) -> None:
        """Check that the trainer can run; blocks, the first time for some seconds.

        Raises:
            BackendNotInstalled: It cannot; the error says what to install where.
        """
        if self._python is None:
            if missing := self.missing():
                raise _not_installed(
                    f"The local backend requires {', '.join(missing)}; install "
                    "training-backends[local], or set local.python to an environment that has it.",
                    _INSTALL,
                )
            return
        report = self._report()
        install = f"{self._python} -m pip install 'training-backends[local]=={version(_PACKAGE)}'"
        missing = [name for name in (_PACKAGE, *NEEDED) if name not in report.versions]
        if missing:
            names = ", ".join(missing)
            raise _not_installed(f"{self._python} (local.python) lacks {names}.", install)
        if (theirs := report.versions[_PACKAGE]) != (ours := version(_PACKAGE)):
            raise _not_installed(
                f"{self._python} (local.python) has training-backends {theirs}, but this is "
                f"{ours}: they must be the same.",
                install,
            )
        for name, reason in report.broken.items():
            raise _not_installed(
                f"{self._python} (local.python) cannot import {name}: {reason}", install
            )

    def describe(self) -> str:
        """Return the interpreter and the versions of its training libraries, as one line.

        Raises:
            BackendNotInstalled: The trainer cannot run.
        """
        self.require()
        if self._python is None:
            return "the training libraries are installed"
        versions = self._report().versions
        named = ", ".join(f"{name} {versions[name]}" for name in NEEDED)
        return f"trains with {self._python}: {named}"

    @property
    def is_this(self) -> bool:
        """Whether it is the one that runs this program."""
        return self._python is None

    def _report(self) -> _Report:
        state = self._state()
        if self._known is None or self._known[0] != state:
            report = self._cached(state)
            if report is None:
                report = self._ask()
                self._keep(state, report)
            self._known = (state, report)
        return self._known[1]

    def _state(self) -> list[int]:
        """Return what changes with each installation: modification times, in nanoseconds."""
        python = self._python or Path(sys.executable)
        root = python.parent.parent
        watched = [python, root / "pyvenv.cfg", *sorted(root.glob("lib/python3*/site-packages"))]
        try:
            python.stat()
            return [path.stat().st_mtime_ns for path in watched if path.exists()]
        except OSError as error:
            reason = (error.strerror or "cannot be read").lower()
            raise _not_installed(f"local.python: {python}: {reason}.", None) from error

    def _cached(self, state: list[int]) -> _Report | None:
        try:
            kept: dict[str, Any] = json.loads(self._cache.read_bytes()) if self._cache else {}
            is_same = kept["python"] == str(self._python) and kept["probe"] == _PROBE
            if is_same and kept["state"] == state:
                return _Report(**kept["report"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def _keep(self, state: list[int], report: _Report) -> None:
        if self._cache is None or report.broken or len(report.versions) < len(NEEDED):
            return  # asked again, so that a repair is noticed
        kept = {
            "python": str(self._python),
            "probe": _PROBE,
            "state": state,
            "report": report._asdict(),
        }
        with suppress(OSError):
            make_private_directory(self._cache.parent)
            write_atomic(self._cache, json.dumps(kept))

    def _ask(self) -> _Report:
        try:
            done = subprocess.run(  # noqa: S603  # the interpreter from the user's settings
                [str(self._python), "-P", "-c", _PROBE, *NEEDED],
                capture_output=True,
                text=True,
                timeout=_PATIENCE,
                check=True,
                env=self.variables(safe_environment()),
            )
            return _Report(**json.loads(done.stdout.strip().rpartition("\n")[2]))
        except subprocess.CalledProcessError as error:
            reason = (error.stderr or "").strip().rpartition("\n")[2] or f"exit {error.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"no answer within {_PATIENCE:.0f} s"
        except OSError as error:
            reason = error.strerror or str(error)
        except (ValueError, TypeError):
            reason = "it is not a Python interpreter"
        raise _not_installed(
            f"{self._python} (local.python) cannot be used: {reason[:300]}.",
            None,
            "Set local.python to a Python of at least 3.11 with training-backends[local].",
        )


def _not_installed(
    message: str, install: str | None, hint: str | None = None
) -> BackendNotInstalled:
    return BackendNotInstalled(message, install=install, hint=hint or install, backend="local")


THIS_INTERPRETER: Final = Interpreter()
