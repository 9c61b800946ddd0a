"""Generate the parts of the documentation that come from the code, and docs/llms.txt.

Replaces the text between `<!-- generated: NAME -->` and `<!-- end -->` in each page and keeps
the rest. `--check` changes nothing and exits with 1 if a page is out of date. `--site DIRECTORY`
adds to a built site what only language models read: the sources of the pages and llms-full.txt.
"""

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from api import api, methods, toolkit, types
from llms import full_text, index
from reference import OURS, capabilities, mistral_routes, openai_routes, settings
from typer.testing import CliRunner

from training_backends import backend_class, installed_backends
from training_backends.cli.exit_codes import ExitCode
from training_backends.cli.main import app
from training_backends.core.config import TrainingConfig
from training_backends.testing.conformance import BackendConformance
from training_backends.testing.subject import Subject

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
LLMS = ROOT / "docs" / "llms.txt"
BLOCK = re.compile(r"(<!-- generated: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


CAPABILITIES = {
    "weights": "file weights",
    "quotes": "price quote",
    "stops": "stop",
    "keeps_checkpoint_on_stop": "checkpoint on stop",
    "resumes": "resume",
    "downloads": "model download",
    "downloads_checkpoints": "download of any checkpoint",
    "samples": "generate",
    "samples_chats": "generate from conversations",
    "deletes": "delete",
    "pauses": "pause",
    "lists_remote": "run listing",
    "validation_files": "validation files",
    "suffix": "model name suffix",
    "chat_template": "chat template",
}
"""What the table calls each flag of `Capabilities`."""


def backends() -> str:
    """Return a table with one row per installed backend."""
    rows = ["| backend | description | methods | supports |", "| --- | --- | --- | --- |"]
    for name in installed_backends():
        kind = backend_class(name)
        capabilities = _capabilities(name)
        methods = ", ".join(f"`{method}`" for method in sorted(capabilities["methods"]))
        flags = [flag for flag in CAPABILITIES if capabilities[flag] not in (None, False, "no")]
        supported = ", ".join(CAPABILITIES[flag] for flag in flags)
        rows.append(f"| `{name}` | {kind.summary} | {methods} | {supported} |")
    return "\n".join(rows)


def _capabilities(name: str) -> dict[str, Any]:
    from training_backends.core.backend import BackendContext
    from training_backends.core.registry import create_backend
    from training_backends.credentials.vault import CredentialVault

    home = Path("unused")
    context = BackendContext(home=home, credentials=CredentialVault(home=home))
    return create_backend(name, context).capabilities.model_dump(mode="json")


def exit_codes() -> str:
    """Return a table of all exit codes."""
    meaning = {
        ExitCode.DONE: "success",
        ExitCode.UNEXPECTED: "unexpected error, or an unusable store or disk",
        ExitCode.USAGE: "invalid command line",
        ExitCode.INVALID: "invalid configuration or data",
        ExitCode.CREDENTIALS: "missing or rejected API key, or a locked keyring",
        ExitCode.NOT_FOUND: "run not found",
        ExitCode.CONFLICT: "duplicate run or other conflict",
        ExitCode.BUDGET: "budget exceeded, or price not confirmed",
        ExitCode.UNAVAILABLE: "backend unreachable, retired, not installed or broken",
        ExitCode.UNSUPPORTED: "not supported by the backend",
        ExitCode.RUN_FAILED: "run failed",
        ExitCode.RUN_CANCELLED: "run cancelled",
        ExitCode.TIMEOUT: "`wait` timed out; the run keeps running",
        ExitCode.INTERRUPTED: "Ctrl-C; the run keeps running and its id is printed",
    }
    rows = [f"| {code.value} | {meaning[code]} |" for code in ExitCode]
    return "\n".join(["| code | meaning |", "| --- | --- |", *rows])


def commands() -> str:
    """Return the help text of every command."""
    parts = []
    for words in _command_names():
        title = " ".join(("training-backends", *words))
        parts.append(f"### `{title}`\n\n```text\n{_help(*words)}\n```")
    return "\n\n".join(parts)


def _command_names() -> Iterator[tuple[str, ...]]:
    for name in _listed(_help()):
        inner = _listed(_help(name))
        if inner:
            yield from ((name, sub) for sub in inner)
        else:
            yield (name,)


def _listed(text: str) -> list[str]:
    _, _, listing = text.partition("Commands:\n")
    return re.findall(r"^  ([a-z]+)", listing, re.MULTILINE)


def _help(*words: str) -> str:
    done = CliRunner().invoke(
        app, [*words, "--help"], prog_name="training-backends", terminal_width=98
    )
    return done.output.strip()


def config_fields() -> str:
    """Return a table of all configuration fields, from the JSON schema."""
    schema = TrainingConfig.model_json_schema()
    rows = ["| field | type | default | description |", "| --- | --- | --- | --- |"]
    rows.extend(_rows(schema, schema, ""))
    return "\n".join(rows)


def _rows(schema: dict[str, Any], root: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, field in schema.get("properties", {}).items():
        inner = _object_in(field, root)
        if inner is not None and "properties" in inner:
            mark = "[]" if _is_list(field) else ""
            yield from _rows(inner, root, f"{prefix}{name}{mark}.")
            continue
        default = field.get("default")
        shown = "" if default in (None, "", [], {}) else f"`{default}`"
        if name in schema.get("required", ()):
            shown = "required"
        description = " ".join(field.get("description", "").split())
        yield f"| `{prefix}{name}` | {_type(field, root)} | {shown} | {description} |"


def _object_in(field: dict[str, Any], root: dict[str, Any]) -> dict[str, Any] | None:
    for option in (field, *field.get("anyOf", ()), field.get("items", {})):
        if reference := option.get("$ref"):
            found: dict[str, Any] = root["$defs"][reference.rpartition("/")[2]]
            return found
    return None


def _is_list(field: dict[str, Any]) -> bool:
    return field.get("type") == "array"


def _type(field: dict[str, Any], root: dict[str, Any]) -> str:
    if "enum" in field:
        return " \\| ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "anyOf" in field:
        options = [_type(option, root) for option in field["anyOf"] if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(options))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}), root)}"
    return str(field.get("format") or field.get("type", "any"))


def conformance_checks() -> str:
    """Return a table of all checks of the conformance kit, with the hooks that each needs."""
    rows = ["| check | what must hold | hooks |", "| --- | --- | --- |"]
    for name in BackendConformance.checks():
        check = getattr(BackendConformance, name)
        hooks = ", ".join(f"`{hook}`" for hook in getattr(check, "hooks", ()) if hook != "heal")
        title = name.removeprefix("check_").replace("_", " ")
        rows.append(f"| {title} | {_summary(check)} | {hooks} |")
    return "\n".join(rows)


def conformance_hooks() -> str:
    """Return a table of the optional hooks of a subject."""
    checks = [getattr(BackendConformance, name) for name in BackendConformance.checks()]
    names = {hook for check in checks for hook in getattr(check, "hooks", ())}
    rows = ["| hook | what it does | checks |", "| --- | --- | --- |"]
    for name, hook in vars(Subject).items():
        if name in names:
            parameters = ", ".join([*signature(hook).parameters][1:])
            count = sum(name in getattr(check, "hooks", ()) for check in checks)
            rows.append(f"| `{name}({parameters})` | {_summary(hook)} | {count} |")
    return "\n".join(rows)


def _summary(documented: object) -> str:
    return (documented.__doc__ or "").partition("\n")[0]


GENERATORS: dict[str, Callable[[], str]] = {
    "api": api,
    "backends": backends,
    "client-methods": methods,
    "toolkit": toolkit,
    "types": types,
    "settings": settings,
    "mistral-routes": mistral_routes,
    "openai-routes": openai_routes,
    **{f"capabilities-{name}": partial(capabilities, name) for name in sorted(OURS)},
    "commands": commands,
    "conformance-checks": conformance_checks,
    "conformance-hooks": conformance_hooks,
    "config-fields": config_fields,
    "exit-codes": exit_codes,
}


def complete(site: Path) -> None:
    """Add the sources of the pages and llms-full.txt to a built site."""
    for page in (ROOT / "docs").glob("*.md"):
        shutil.copy(page, site)
    (site / "llms-full.txt").write_text(full_text(), encoding="utf-8")


def main() -> int:
    """Update or check all pages; return the exit code."""
    if sys.argv[1:2] == ["--site"]:
        complete(Path(sys.argv[2]))
        return 0
    check = "--check" in sys.argv[1:]
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fresh = BLOCK.sub(lambda m: f"{m[1]}{GENERATORS[m['name']]()}\n{m[3]}", text)
        if fresh != text:
            stale.append(page.relative_to(ROOT))
            if not check:
                page.write_text(fresh, encoding="utf-8")
    if not LLMS.exists() or LLMS.read_text(encoding="utf-8") != index():
        stale.append(LLMS.relative_to(ROOT))
        if not check:
            LLMS.write_text(index(), encoding="utf-8")
    for page in stale:
        print(f"{page}: {'out of date; run python docs/generate.py' if check else 'updated'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
