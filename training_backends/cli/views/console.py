"""Consoles of the command line, and the shapes printed on them: tables, fields and JSON.

Results go to standard output; progress, notes, prompts and errors go to standard error. Only a
terminal gets colors and is wrapped or cut to its width; pipes and files get complete lines.
"""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from textwrap import wrap
from typing import IO, Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.filesize import decimal
from rich.progress import Progress, ProgressColumn
from rich.segment import Segment
from rich.text import Text

from training_backends.cli.exit_codes import PipeClosed
from training_backends.core.escape import escape_controls, escape_json
from training_backends.core.estimate import Money
from training_backends.core.run import utc_now

__all__ = [
    "Column",
    "ago",
    "metric_text",
    "money_text",
    "progress",
    "show_fields",
    "show_table",
    "show_text",
    "stderr",
    "stdout",
    "time_text",
    "write",
    "write_json",
    "write_json_line",
]

_NARROWEST = 8
"""Columns to which a table cell is cut at most."""
_GAP = 2
"""Spaces between the columns of a table."""


class _SafeConsole(Console):
    """A console that prevents terminal injection.

    Escapes control characters in everything it prints, including line breaks; use `show_text`
    for multi-line text.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape before the width of the text is measured."""
        return super().render_str(escape_controls(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Escape text that bypasses `render_str`, such as progress bar columns."""
        if isinstance(renderable, Text):
            plain = renderable.plain
            escaped = escape_controls(plain, keep="\n")
            if escaped != plain:
                renderable = renderable.copy()
                renderable.plain = escaped
        return super().render(renderable, options)

    def on_broken_pipe(self) -> None:
        """End the command if its results have no reader; drop notes that have none."""
        if not self.stderr:
            raise PipeClosed
        self.quiet = True


def stdout() -> Console:
    """Return a console for results."""
    return _SafeConsole(highlight=False, soft_wrap=True, emoji=False)


def stderr() -> Console:
    """Return a console for progress, notes and errors."""
    return _SafeConsole(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def write(text: str, file: IO[str] | None = None, *, flush: bool = False) -> None:
    """Write text as it is, to standard output unless a file is given.

    Raises:
        PipeClosed: The reader has closed the pipe.
    """
    file = file or sys.stdout
    try:
        file.write(text)
        if flush:
            file.flush()
    except BrokenPipeError:
        raise PipeClosed from None


def progress(
    *columns: str | ProgressColumn,
    quiet: bool,
    transient: bool = True,
    out: Console | None = None,
) -> Progress:
    """Return progress bars on standard error; shown only on a terminal."""
    out = out or stderr()
    return Progress(
        *columns,
        console=out,
        transient=transient,
        disable=quiet or not out.is_terminal,
        # Redirected results would end up on standard error.
        redirect_stdout=sys.stdout.isatty(),
    )


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        drop: Columns with the highest value go first where the table is too wide; 0 stays.
        cut: Cut the cells before the column goes.
    """

    name: str
    drop: int = 0
    cut: bool = False
    right: bool = False


def show_table(
    columns: Sequence[Column], rows: Iterable[Sequence[str | Text]], out: Console
) -> list[str]:
    """Print a table, cut to the width of a terminal, and return the columns that were dropped.

    A column without content is not printed, nor is a table without rows.
    """
    cells = [[_text(cell) for cell in row] for row in rows]
    if not cells:
        return []
    widths = {
        number: max(cell_len(column.name), *(row[number].cell_len for row in cells))
        for number, column in enumerate(columns)
        if any(row[number].plain for row in cells)
    }
    dropped: list[str] = []
    while out.is_terminal and (over := _width(widths) - out.width) > 0:
        number = max(widths, key=lambda each: columns[each].drop)
        if not columns[number].drop:
            break
        if columns[number].cut and widths[number] - over >= _NARROWEST:
            widths[number] -= over
        else:
            del widths[number]
            dropped.append(columns[number].name)
    heads = [Text(column.name, "bold") for column in columns]
    for row in (heads, *cells):
        line = Text()
        for number, width in widths.items():
            cell = row[number].copy()
            cell.truncate(width, overflow="ellipsis")
            cell.align("right" if columns[number].right else "left", width)
            line.append_text(cell).append(" " * _GAP)
        line.rstrip()
        out.print(line)
    return dropped


def _width(widths: dict[int, int]) -> int:
    return sum(widths.values()) + _GAP * (len(widths) - 1)


def _text(value: str | Text) -> Text:
    return value if isinstance(value, Text) else Text(escape_controls(value))


def show_fields(
    rows: Iterable[tuple[str | Text, str | None]], out: Console, *, style: str = ""
) -> None:
    """Print names with values; a terminal wraps the values between words. Empty ones are left out.

    Args:
        style: Style of the names.
    """
    filled = [(_text(name), escape_controls(value)) for name, value in rows if value]
    width = max((name.cell_len for name, _ in filled), default=0)
    for name, value in filled:
        head = Text("  ", style).append_text(name).append(" " * (width - name.cell_len + 2))
        room = max(out.width - width - 4, _NARROWEST)
        lines = [value]
        if out.is_terminal:
            # Longer words, such as ids and paths, stay in one piece.
            lines = wrap(value, room, break_long_words=False, break_on_hyphens=False)
        for line in lines:
            out.print(Text().append_text(head).append(line))
            head = Text(" " * (width + 4))


def show_text(text: str, out: Console) -> None:
    """Print text that may have several lines, such as a model's answer."""
    for line in text.split("\n"):
        out.print(line.expandtabs(), markup=False)


def ago(moment: datetime) -> str:
    """Return the age of a moment in its largest unit, such as `6m ago`."""
    seconds = max(utc_now() - moment, timedelta(0)) // timedelta(seconds=1)
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit} ago"
    return f"{seconds}s ago" if seconds else "just now"


def time_text(moment: datetime | None) -> str:
    """Return the age of a moment and its local time; empty for None."""
    return f"{ago(moment)} ({moment.astimezone():%Y-%m-%d %H:%M:%S})" if moment else ""


def money_text(money: Money) -> str:
    """Return an amount as text, such as `$3.20` and `3.20 EUR`."""
    return f"${money.amount:,.2f}" if money.currency == "USD" else str(money)


def metric_text(name: str, value: float) -> str:
    """Return a metric with its unit, or with 4 significant digits."""
    if not math.isfinite(value):
        return str(value)
    if name.endswith("_bytes"):
        return decimal(int(value))
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def write_json(document: Any) -> None:
    """Write the JSON document of a command."""
    write(f"{_json(document, indent=2)}\n")


def write_json_line(document: Any) -> None:
    """Write one document of a JSON Lines stream and flush."""
    write(f"{_json(document)}\n", flush=True)


def _json(document: Any, *, indent: int | None = None) -> str:
    text = json.dumps(document, indent=indent, ensure_ascii=False, default=str)
    text = escape_json(text)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        # Standard output is not UTF-8: escape all non-ASCII characters.
        text = json.dumps(document, indent=indent, default=str)
    return text
