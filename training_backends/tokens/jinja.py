"""Compile and render chat templates, which are untrusted, as transformers 5.23 does."""

import ctypes
import json
import threading
import time
from collections.abc import Callable
from datetime import datetime
from functools import cache, lru_cache
from typing import Any, Final, TypeVar

__all__ = ["RENDER_SECONDS", "EndlessTemplate", "TimeLimit", "compile_template"]

T = TypeVar("T")

RENDER_SECONDS: Final = 5.0
"""Time limit of a chat template per row; common templates take a millisecond."""

_CHECKS: Final = 10
"""Checks per time limit."""

_JSON_OPTIONS: Final = ("ensure_ascii", "indent", "separators", "sort_keys")
"""Positional arguments of the filter `tojson`."""


class EndlessTemplate(Exception):
    """A chat template exceeded its time limit."""


class _Interrupt(BaseException):
    """Raised asynchronously in a rendering thread; not caught by `except Exception`."""


class TimeLimit:
    """Interrupts chat templates after `RENDER_SECONDS`.

    Templates are untrusted. Jinja's sandbox limits each loop, but nested loops multiply and can
    run for years. They run as Python code, which another thread can interrupt: one for all
    templates, because starting a thread takes longer than rendering.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._deadlines: dict[int, float] = {}
        self._watcher: threading.Thread | None = None

    def run(self, render: Callable[[], T]) -> T:
        """Render a template in this thread, and return the result.

        Raises:
            EndlessTemplate: The time limit was exceeded.
        """
        thread = threading.get_ident()
        is_late = False
        try:
            with self._guard:
                if self._watcher is None or not self._watcher.is_alive():
                    self._deadlines.clear()  # in a fork: those of threads that it lacks, too
                    self._watcher = threading.Thread(target=self._watch, daemon=True)
                    self._watcher.start()
                self._deadlines[thread] = time.monotonic() + RENDER_SECONDS
            try:
                return render()
            finally:
                with self._guard:
                    is_late = self._deadlines.pop(thread) < 0
                if is_late:
                    _raise_in(thread, None)  # cancel, so that it is not raised in other code
                    raise _Interrupt  # replaces the result
        except _Interrupt:
            raise EndlessTemplate(
                f"the chat template did not finish within {RENDER_SECONDS:g} s for a row"
            ) from None

    def _watch(self) -> None:
        """Interrupt threads at their deadlines; end when nothing has been rendered for long."""
        idle = 0
        while True:
            time.sleep(RENDER_SECONDS / _CHECKS)
            with self._guard:
                idle = 0 if self._deadlines else idle + 1
                if idle > _CHECKS:
                    self._watcher = None
                    return
                now = time.monotonic()
                for thread, deadline in self._deadlines.items():
                    if 0 <= deadline < now:
                        self._deadlines[thread] = -1.0
                        _raise_in(thread, _Interrupt)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an exception in another thread; None cancels one that is still pending."""
    raised = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


@cache
def _environment() -> Any:
    """Return the environment of transformers 5.23 (`utils/chat_template_utils.py`)."""
    from jinja2 import TemplateError, nodes  # noqa: PLC0415  # comes with transformers
    from jinja2.exceptions import SecurityError  # noqa: PLC0415
    from jinja2.ext import Extension, loopcontrols  # noqa: PLC0415
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415
    from jinja2.utils import Namespace as BaseNamespace  # noqa: PLC0415

    class Generation(Extension):
        """The tag around answers in templates for training; it renders its content."""

        tags = {"generation"}  # noqa: RUF012  # as in the base class

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, *given: Any, **options: Any) -> str:
        # Jinja's own filter escapes HTML.
        named = dict(zip(_JSON_OPTIONS, given, strict=False))
        return json.dumps(value, **{"ensure_ascii": False, **named, **options})

    class Namespace(BaseNamespace):
        """Without private names, which lead out of the sandbox."""

        def __init__(self, *pairs: Any, **values: Any) -> None:
            given = dict(*pairs, **values)
            for name in given:
                refuse_private(name)
            super().__init__(given)

        def __setitem__(self, name: str, value: Any) -> None:
            refuse_private(name)
            super().__setitem__(name, value)

    def refuse_private(name: str) -> None:
        if name.startswith("_"):
            raise SecurityError(f"the template sets the private name {name!r}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["namespace"] = Namespace
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)  # noqa: DTZ005
    return environment


@lru_cache(maxsize=16)  # compiling a long one takes up to 50 ms, and a file is read several times
def compile_template(text: str) -> Any:
    """Return a Jinja template; raises whatever jinja2 does, and ImportError without it."""
    return _environment().from_string(text)
