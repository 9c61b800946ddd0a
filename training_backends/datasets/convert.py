"""Convert the rows of data files to another provider's format."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from training_backends.core.config import ClassifierTarget
from training_backends.core.data_rules import ProviderFormat
from training_backends.core.escape import plural
from training_backends.datasets.check_fast import RowRules
from training_backends.datasets.findings import Finding
from training_backends.datasets.open_file import opened
from training_backends.datasets.repair_row import mend
from training_backends.datasets.scan_part import BOM
from training_backends.datasets.write import NewFiles, refuse_existing

__all__ = ["Converted", "convert"]

_ROUNDS: Final = 4
"""Maximum number of repairs after a conversion: one may reveal another issue."""

_Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """The result of a conversion.

    Attributes:
        path: The new file; None if no row could be converted, so nothing was written.
        rows: Number of rows.
        invalid: Rows that the provider still does not accept, copied unchanged.
        first_error: The first error of such a row.
        notes: The conversions with their numbers of rows.
    """

    path: Path | None
    rows: int
    invalid: int = 0
    first_error: str = ""
    notes: tuple[str, ...] = ()


def convert(
    paths: Sequence[Path],
    target: Path,
    *,
    provider_format: ProviderFormat,
    targets: Sequence[ClassifierTarget] = (),
) -> Converted:
    """Write the rows of one or several files to a new file in a provider's format.

    Valid rows keep their bytes. Preference pairs and completions change their format, developer
    messages become system messages where there are none, and rows are repaired as by
    `datasets.repair`; texts and labels have no other format.

    Args:
        targets: Allowed classifier targets.

    Raises:
        ConfigError: `target` already exists.
        DatasetError: A file cannot be read.
        TrainingBackendError: `target` cannot be written.
    """
    refuse_existing(target)
    work = _Converting(RowRules(provider_format, targets))
    with NewFiles() as made:
        with made.create(target) as out:
            for path in paths:
                with opened(path) as source:
                    for line in source.lines:
                        if row := line.removeprefix(BOM).strip():
                            out.write(work.row(row) + b"\n")
        is_new = bool(work.counts) or len(paths) > 1
        if not is_new:
            made.discard(target)
    notes = tuple(f"{plural(rows, 'row')} {note}" for note, rows in work.counts.items())
    return Converted(
        path=target if is_new else None,
        rows=work.rows,
        invalid=work.invalid,
        first_error=work.first_error,
        notes=notes,
    )


class _Converting:
    """One pass over the rows."""

    def __init__(self, rules: RowRules) -> None:
        self._rules = rules
        self.rows = self.invalid = 0
        self.first_error = ""
        self.counts: Counter[str] = Counter()

    def row(self, row: bytes) -> bytes:
        """Return the row in the provider's format, or unchanged if that is not possible."""
        self.rows += 1
        errors = self._errors(row)
        if not errors:
            return row
        new, done = _reformatted(row, self._rules.provider_format)
        left = self._errors(new)
        for _ in range(_ROUNDS):
            codes = {finding.code for finding in left}
            new, mends = mend(new, codes, self._rules.provider_format)
            if not mends:
                break
            done += [f"repaired: {each.code.replace('_', ' ')}" for each in mends]
            left = self._errors(new)
        if not left:
            self.counts.update(set(done))
            return new
        self.invalid += 1
        self.first_error = self.first_error or f"row {self.rows}: {left[0].message}"
        return row

    def _errors(self, row: bytes) -> list[Finding]:
        return [finding for finding in self._rules.judge(row)[1] if finding.severity == "error"]


def _reformatted(row: bytes, provider_format: ProviderFormat) -> tuple[bytes, list[str]]:
    """Return the row in an accepted format, and what was done."""
    try:
        values = json.loads(row)
        if not isinstance(values, dict):
            return row, []
        done = []
        for note, change in _CHANGES.items():
            changed = change(values, provider_format)
            if changed is not None:
                values = changed
                done.append(note)
        return (json.dumps(values, ensure_ascii=False).encode() if done else row), done
    except (ValueError, RecursionError):
        return row, []


def _to_preference(row: _Row, provider_format: ProviderFormat) -> _Row | None:
    """Convert `prompt`, `chosen`, `rejected`; complete conversations have no prompt to take."""
    formats = provider_format.formats
    if not row.keys() >= {"prompt", "chosen", "rejected"}:
        return None
    if "chosen" in formats or "preference" not in formats:
        return None
    row = dict(row)
    prompt: _Row = {"messages": _messages("user", row.pop("prompt"))}
    if "tools" in row:
        prompt["tools"] = row.pop("tools")
    chosen, rejected = row.pop("chosen"), row.pop("rejected")
    return {
        "input": prompt,
        "preferred_output": _messages("assistant", chosen),
        "non_preferred_output": _messages("assistant", rejected),
        **row,
    }


def _to_chosen(row: _Row, provider_format: ProviderFormat) -> _Row | None:
    formats, prompt = provider_format.formats, row.get("input")
    if "preference" in formats or "chosen" not in formats or not isinstance(prompt, dict):
        return None
    row = dict(row)
    del row["input"]
    tools = {"tools": prompt["tools"]} if prompt.get("tools") else {}
    return {
        "prompt": prompt.get("messages"),
        "chosen": row.pop("preferred_output", None),
        "rejected": row.pop("non_preferred_output", None),
        **tools,
        **row,
    }


def _to_messages(row: _Row, provider_format: ProviderFormat) -> _Row | None:
    formats = provider_format.formats
    if not row.keys() >= {"prompt", "completion"}:
        return None
    if "completion" in formats or "messages" not in formats:
        return None
    row = dict(row)
    prompt, completion = row.pop("prompt"), row.pop("completion")
    return {
        "messages": [*_messages("user", prompt), *_messages("assistant", completion)],
        **row,
    }


def _to_system(row: _Row, provider_format: ProviderFormat) -> _Row | None:
    """Rename the role `developer`, the newer name of `system`."""
    if "developer" in provider_format.roles or "system" not in provider_format.roles:
        return None
    found = False

    def renamed(value: Any) -> Any:
        nonlocal found
        if isinstance(value, list):
            return [renamed(each) for each in value]
        if isinstance(value, dict) and value.get("role") == "developer":
            found = True
            return {**value, "role": "system"}
        return value

    new = {name: renamed(value) for name, value in row.items() if name != "tools"}
    if isinstance(prompt := row.get("input"), dict):
        new["input"] = {**prompt, "messages": renamed(prompt.get("messages"))}
    return {name: new.get(name, value) for name, value in row.items()} if found else None


_CHANGES: Final[dict[str, Callable[[_Row, ProviderFormat], _Row | None]]] = {
    "from prompt, chosen, rejected to preference": _to_preference,
    "from preference to prompt, chosen, rejected": _to_chosen,
    "from completion to messages": _to_messages,
    "with developer messages as system messages": _to_system,
}
"""The conversions by their description; each returns None if it does not apply."""


def _messages(role: str, value: Any) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value
