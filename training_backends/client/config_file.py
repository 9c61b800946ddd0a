"""Read a run's YAML configuration and report errors by line and field."""

import re
import types
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Final, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError

from training_backends.core.config import TrainingConfig, absolute_options
from training_backends.core.errors import ConfigError, Issue, suggest
from training_backends.core.escape import plural

__all__ = ["ConfigFile", "ConfigLike", "FileModel", "load_config", "to_config"]

_MOST_NODES = 100_000
_MOST_BYTES = 4_000_000
_NO_TEXT = {"Cc", "Cs"}
_OTHER_BASE = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
"""Octal and sexagesimal numbers; hexadecimal and binary numbers are intentional."""
_OVERRIDDEN = "--set"
_IN_GRID = "--grid"
"""Both are used in place of a file name in issues about values of the command line."""


class _Loader(yaml.SafeLoader):
    """YAML without dates: no field is a date, and `2026-11-21` may be a tag."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


_FORMERLY: Final = {"tags": "labels"}
"""Renamed fields, and what earlier versions called them."""


class FileModel(TrainingConfig):
    """The schema of a configuration file."""

    backend: str | None = Field(default=None, description="Name of the backend.")


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A configuration read from a file.

    Attributes:
        path: The file.
        config: The configuration, with paths resolved against the file's directory.
        backend: The backend named in the file, or None.
    """

    path: Path
    config: TrainingConfig
    backend: str | None
    _places: "_Places" = field(repr=False)

    def located(self, issues: Iterable[Issue]) -> list[Issue]:
        """Add file and line to issues that only name a field of the configuration."""
        return [self._located(issue) for issue in issues]

    def resolved(self, options: type[BaseModel] | None) -> TrainingConfig:
        """Return the configuration with the paths in its options resolved, too."""
        return _resolved(self.config, self._places, options)

    def _located(self, issue: Issue) -> Issue:
        location = issue.field.split(".") if issue.field else []
        if issue.path is not None or not location or location[0] not in FileModel.model_fields:
            return issue
        path, line = self._places.of(location)
        return replace(issue, path=path, line=line)


ConfigLike = TrainingConfig | ConfigFile | Mapping[str, Any] | str | PathLike[str]
"""A configuration, its fields as a mapping, its YAML file, or the path of that file."""


@dataclass(frozen=True, slots=True)
class _Places:
    """Maps fields of a configuration to file and line."""

    path: Path | None
    root: yaml.Node | None
    overridden: dict[tuple[str, ...], str]

    def of(self, location: Sequence[int | str]) -> tuple[str | None, int | None]:
        """Return the file and line of a field, or the option that overrides it."""
        names = tuple(str(part) for part in location)
        for key, option in reversed(self.overridden.items()):
            if names[: len(key)] == key or key[: len(names)] == names:
                return option, None
        return str(self.path) if self.path else None, _line(self.root, location)


def to_config(config: object, options: type[BaseModel] | None = None) -> TrainingConfig:
    """Convert any `ConfigLike` to a configuration with absolute paths.

    Paths in a file are resolved against the file, others against the working directory.

    Args:
        options: The schema of its options, which may have paths; see `ConfigPath`.

    Raises:
        ConfigError: The file or mapping is not a valid configuration.
        TypeError: `config` has another type.
    """
    if isinstance(config, str | PathLike):
        config = load_config(Path(config))
    if isinstance(config, ConfigFile):
        return config.resolved(options)
    places = _Places(None, None, {})
    if isinstance(config, Mapping):
        config, _ = _checked(dict(config), places)
    if isinstance(config, TrainingConfig):
        return _resolved(config, places, options)
    kind = type(config).__name__
    raise TypeError(f"config must be a TrainingConfig, a mapping or a path, not {kind}")


def load_config(
    path: Path, overrides: Sequence[str] = (), *, grid: Sequence[str] = ()
) -> ConfigFile:
    """Read a configuration file.

    Args:
        overrides: `key=value` with a dotted key and a YAML value, for example
            `hyperparameters.epochs=2`; they take precedence over the file.
        grid: The same from `--grid`; it takes precedence over `overrides`.

    Raises:
        ConfigError: The file cannot be read, is not YAML or is invalid; the issues name line and
            field, and suggest a name for an unknown field.
    """
    root, values = _parse(path, _read(path))
    if not isinstance(values, dict):
        found = "empty" if values is None else f"a {type(values).__name__}"
        raise _error(
            path,
            Issue(
                code="not_a_mapping",
                message=f"the file is {found}; expected fields such as model and data",
                path=str(path),
                fix="see the examples in configs/",
            ),
        )
    given = [(each, _OVERRIDDEN) for each in overrides] + [(each, _IN_GRID) for each in grid]
    places = _Places(path, root, {_apply(values, each): option for each, option in given})
    config, backend = _checked(values, places)
    return ConfigFile(path, _resolved(config, places), backend, places)


def _checked(values: dict[str, Any], places: _Places) -> tuple[TrainingConfig, str | None]:
    """Validate a file's values; return the configuration and the backend they name."""
    if issues := list(_control_issues(places, values)):
        raise _error(places.path, *issues)
    try:
        loaded = FileModel.model_validate(_given(values))
    except ValidationError as error:
        raise _error(places.path, *_issues(error, places)) from None
    config = TrainingConfig.model_validate(loaded.model_dump(exclude={"backend"}))
    return config, loaded.backend


def _resolved(
    config: TrainingConfig, places: _Places, options: type[BaseModel] | None = None
) -> TrainingConfig:
    base = places.path.absolute().parent if places.path else Path.cwd()
    field = "data"
    try:
        config = config.resolved(base)
        if options is None or not config.options:
            return config
        field = "options"
        absolute = absolute_options(options, config.options, base)
        return config.model_copy(update={"options": absolute})
    except RuntimeError as error:
        # `~user` for a user that does not exist on this machine.
        where, line = places.of([field])
        issue = Issue(
            code="no_such_home",
            message=f"cannot expand ~ in a path: {error}",
            path=where,
            line=line,
            field=field,
            fix="write the full path",
        )
        raise _error(places.path, issue) from None


def _read(path: Path) -> str:
    reasons = {
        FileNotFoundError: ("missing_file", "no such file", "check the path"),
        IsADirectoryError: ("not_a_file", "is a directory", "pass the YAML file in it"),
        PermissionError: ("unreadable_file", "permission denied", "check the file permissions"),
    }
    try:
        # Reading devices and pipes may block or never end.
        if path.exists() and not (path.is_file() or path.is_dir()):
            message, fix = "not a regular file", "copy the configuration to a regular file"
            issue = Issue(code="not_a_file", message=message, path=str(path), fix=fix)
            raise _error(path, issue)
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            message = f"the file is larger than {_MOST_BYTES:,} bytes"
            fix = "pass the configuration, not a data file"
            raise _error(path, Issue(code="too_large", message=message, path=str(path), fix=fix))
        return content.decode("utf-8")
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        code, message, fix = reasons[type(error)]
        raise _error(path, Issue(code=code, message=message, path=str(path), fix=fix)) from None
    except UnicodeDecodeError as error:
        issue = Issue(
            code="not_utf8",
            message=f"byte {error.start} is not UTF-8",
            path=str(path),
            fix="save the file as UTF-8",
        )
        raise _error(path, issue) from None
    except OSError as error:
        issue = Issue(code="unreadable_file", message=str(error.strerror), path=str(path))
        raise _error(path, issue) from None


def _parse(path: Path, text: str) -> tuple[yaml.Node | None, Any]:
    """Return the YAML nodes, which have line numbers, and the values."""
    root: yaml.Node | None = _yaml(path, lambda: yaml.compose(text, Loader=_Loader))
    if issue := next(_structure_issues(path, root), None):
        raise _error(path, issue)
    return root, _yaml(path, lambda: yaml.load(text, Loader=_Loader))  # noqa: S506


def _yaml(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        message = str(getattr(error, "problem", None) or error)
        line = mark.line + 1 if mark else None
    except RecursionError:
        message, line = "the values are nested too deeply", None
    except ValueError as error:
        # An explicit `!!timestamp` with an invalid date.
        message, line = str(error), None
    issue = Issue(
        code="not_yaml", message=message, path=str(path), line=line, fix="correct the YAML"
    )
    raise _error(path, issue)


def _structure_issues(path: Path, root: yaml.Node | None) -> Iterator[Issue]:
    """Find YAML features that a configuration must not use."""
    pending = [root] if root else []
    seen = 0
    while pending:
        node = pending.pop()
        seen += 1
        if seen > _MOST_NODES:
            # Nested aliases can expand a small file to any size.
            message, fix = "the file has too many values", "remove nested aliases"
            yield Issue(code="too_large", message=message, path=str(path), fix=fix)
            return
        if isinstance(node, yaml.MappingNode):
            yield from _key_issues(path, node)
            pending.extend(value for _, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            pending.extend(node.value)
        elif isinstance(node, yaml.ScalarNode) and (found := _misread(node)):
            message, fix = found
            line = node.start_mark.line + 1
            yield Issue(code="misread_number", message=message, path=str(path), line=line, fix=fix)


def _key_issues(path: Path, node: yaml.MappingNode) -> Iterator[Issue]:
    seen: set[str] = set()
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            message, fix = "a field name must be a plain string", "correct the YAML"
            yield Issue(code="not_yaml", message=message, path=str(path), line=line, fix=fix)
        elif key.value in seen:
            message, fix = f"duplicate field {key.value!r}", "remove one of them"
            yield Issue(code="duplicate_key", message=message, path=str(path), line=line, fix=fix)
        else:
            seen.add(key.value)


def _misread(node: yaml.ScalarNode) -> tuple[str, str] | None:
    """Find text that YAML 1.1 reads as a number in another base: `010` is 8, `12:30` is 750."""
    if not node.tag.endswith((":int", ":float")) or not _OTHER_BASE.fullmatch(node.value):
        return None
    value = yaml.load(node.value, Loader=_Loader)  # noqa: S506
    return f"YAML reads {node.value} as {value}", f"write {value}, or put the text in quotes"


def _given(values: Mapping[str, Any], location: tuple[str, ...] = ()) -> dict[str, Any]:
    """Drop known fields without a value; keep unknown fields, so that they are rejected."""
    known = _fields_at(location)
    return {
        key: _given(value, (*location, key)) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None or key not in known
    }


def _control_issues(
    places: _Places, value: Any, location: tuple[int | str, ...] = ()
) -> Iterator[Issue]:
    """Find control characters, such as NUL, which names and paths must not contain."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, below in inner:
            yield from _control_issues(places, below, (*location, key))
    elif isinstance(value, str):
        found = next((char for char in value if unicodedata.category(char) in _NO_TEXT), None)
        if found and location[0] != "options" and found not in "\n\r\t":
            where, line = places.of(location)
            yield Issue(
                code="control_character",
                message=f"the character U+{ord(found):04X} is not allowed here",
                path=where,
                line=line,
                field=".".join(str(part) for part in location),
                fix="remove it",
            )


def _apply(values: dict[str, Any], override: str) -> tuple[str, ...]:
    """Apply one override to `values` and return its key."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(
            f"Invalid override {override!r}: expected KEY=VALUE.",
            hint="Example: --set hyperparameters.epochs=2.",
        )
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = yaml.load(text, Loader=_Loader)  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = getattr(error, "problem", None) or error
        raise ConfigError(
            f"The value in {override!r} is not valid YAML: {reason}",
            hint="Quote values that contain brackets, braces or colons.",
        ) from None
    if issue := next(_structure_issues(Path(_OVERRIDDEN), node), None):
        field = ".".join(parts)
        raise _error(None, replace(issue, line=None, field=field))
    place = values
    for part in parts[:-1]:
        inner = place.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"{override!r} sets a field of {part!r}, which has no fields.",
                hint="Lists can only be replaced entirely: data.train=[a.jsonl, b.jsonl].",
            )
        place = inner
    place[parts[-1]] = value
    return tuple(parts)


def _issues(error: ValidationError, places: _Places) -> list[Issue]:
    issues = []
    details = error.errors(include_url=False)
    for detail in details:
        location = [part for part in detail["loc"] if not str(part).startswith("function-")]
        if detail["type"] == "too_short" and _is_below(location, details):
            # The list is only empty because its entries are invalid, which is reported.
            continue
        message, fix = _explained(detail, location)
        where, line = places.of(location)
        issues.append(
            Issue(
                code="unknown_field" if detail["type"] == "extra_forbidden" else detail["type"],
                message=message,
                path=where,
                line=line,
                field=".".join(str(part) for part in location) or None,
                fix=fix,
            )
        )
    return issues


def _is_below(location: Sequence[int | str], details: Iterable[Any]) -> bool:
    depth = len(location)
    return any(
        len(other["loc"]) > depth and list(other["loc"][:depth]) == list(location)
        for other in details
    )


def _explained(detail: Any, location: Sequence[int | str]) -> tuple[str, str | None]:
    """Return a message and a fix for a pydantic error, without Python terms."""
    match detail["type"]:
        case "extra_forbidden":
            known = _fields_at(location[:-1])
            name = str(location[-1])
            # A field that was renamed is suggested by its former name.
            name = next((it for it in known if _FORMERLY.get(it) == name), name)
            otherwise = f"known fields: {', '.join(known)}"
            return "unknown field", suggest(name, known, otherwise, cutoff=0.5)
        case "missing":
            return "required field is missing", None
        case "model_type" | "model_attributes_type" | "dict_type":
            known = _fields_at(location)
            fix = f"known fields: {', '.join(known)}" if known else "write it as name: value"
            return "expected a mapping", fix
        case "string_type":
            return "expected text", "put it in quotes"
        case "path_type":
            return "expected a path", "put it in quotes"
        case "too_short":
            return "the list is empty", "give at least one entry"
        case "tuple_type" | "list_type":
            return "expected a list", "write it as [a, b]"
        case "invalid_key":
            return "a field name must be text", "put it in quotes"
        case "greater_than" if "timedelta" in detail["msg"]:
            return "must be greater than zero", None
        case _:
            return detail["msg"].removeprefix("Value error, "), None


def _line(root: yaml.Node | None, location: Sequence[int | str]) -> int | None:
    """Return the line of a field, or of its nearest parent in the file."""
    node, line = root, None
    for part in location:
        step: tuple[yaml.Node, yaml.Node] | None = None
        if isinstance(node, yaml.MappingNode):
            step = next(((k, v) for k, v in node.value if k.value == str(part)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            step = (node.value[part],) * 2 if part < len(node.value) else None
        if step is None:
            break
        line, node = step[0].start_mark.line + 1, step[1]
    return line


def _fields_at(location: Sequence[int | str]) -> list[str]:
    """Return the field names of the model at `location`."""
    model: type[BaseModel] | None = FileModel
    for part in location:
        if isinstance(part, int) or model is None:
            continue
        field = model.model_fields.get(part)
        model = _model_in(field.annotation) if field else None
    return list(model.model_fields) if model else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in {Union, types.UnionType, tuple, list}:
        found = (_model_in(inner) for inner in get_args(annotation))
        return next((model for model in found if model), None)
    return None


def _error(path: Path | None, *issues: Issue) -> ConfigError:
    name = f"configuration {path}" if path else "configuration"
    return ConfigError(f"The {name} has {plural(len(issues), 'error')}.", issues=issues)
