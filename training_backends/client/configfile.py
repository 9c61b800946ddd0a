"""Read a run's YAML file, and say what is wrong with it by line and field."""

import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from training_backends.core.config import TrainingConfig
from training_backends.core.errors import ConfigError, Issue

__all__ = ["ConfigFile", "load_config"]


_MOST_NODES = 100_000


class _FileModel(TrainingConfig):
    """The fields of a configuration file."""

    backend: str | None = None


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A configuration read from a file.

    Attributes:
        config: With every path made absolute from the file's own directory.
        backend: The backend that the file names, or None.
    """

    path: Path
    config: TrainingConfig
    backend: str | None


def load_config(path: Path, overrides: Sequence[str] = ()) -> ConfigFile:
    """Read a configuration file.

    Args:
        overrides: `key=value` with a dotted key and a YAML value, for example
            `hyperparameters.epochs=2`; they win over the file.

    Raises:
        ConfigError: The file cannot be read, is not YAML or does not fit; the issues name
            line and field, and the nearest right name for one that is not known.
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
    for override in overrides:
        _apply(values, override)
    try:
        loaded = _FileModel.model_validate(_given(values))
    except ValidationError as error:
        raise _error(path, *_issues(path, error, root)) from None
    config = TrainingConfig.model_validate(loaded.model_dump(exclude={"backend"}))
    return ConfigFile(path, config.resolved(path.absolute().parent), loaded.backend)


def _read(path: Path) -> str:
    reasons = {
        FileNotFoundError: ("missing_file", "there is no such file", "check the path"),
        IsADirectoryError: ("not_a_file", "this is a directory", "give the YAML file in it"),
        PermissionError: ("unreadable_file", "no permission to read it", "check its mode"),
    }
    try:
        return path.read_text(encoding="utf-8")
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
    """Return the file's nodes, which know their lines, and its values."""
    root: yaml.Node | None = _yaml(path, lambda: yaml.compose(text, Loader=yaml.SafeLoader))
    if issue := next(_structure_issues(path, root), None):
        raise _error(path, issue)
    return root, _yaml(path, lambda: yaml.safe_load(text))


def _yaml(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        message = str(getattr(error, "problem", None) or error)
        line = mark.line + 1 if mark else None
    except (ValueError, RecursionError) as error:
        # A date that does not exist, or brackets nested without end.
        message, line = str(error), None
    issue = Issue(
        code="not_yaml", message=message, path=str(path), line=line, fix="correct the YAML"
    )
    raise _error(path, issue)


def _structure_issues(path: Path, root: yaml.Node | None) -> Iterator[Issue]:
    """Find what YAML allows and a configuration does not need."""
    pending = [root] if root else []
    seen = 0
    while pending:
        node = pending.pop()
        seen += 1
        if seen > _MOST_NODES:
            # Aliases of aliases make a small file endless.
            message, fix = "the file has too many values", "write it without nested aliases"
            yield Issue(code="too_large", message=message, path=str(path), fix=fix)
            return
        if isinstance(node, yaml.MappingNode):
            yield from _key_issues(path, node)
            pending.extend(value for _, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            pending.extend(node.value)


def _key_issues(path: Path, node: yaml.MappingNode) -> Iterator[Issue]:
    seen: set[str] = set()
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            message, fix = "a field's name is a plain word", "correct the YAML"
            yield Issue(code="not_yaml", message=message, path=str(path), line=line, fix=fix)
        elif key.value in seen:
            message, fix = f"{key.value!r} is given twice", "remove one of them"
            yield Issue(code="duplicate_key", message=message, path=str(path), line=line, fix=fix)
        else:
            seen.add(key.value)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out fields with nothing behind them: they are not given."""
    return {
        key: _given(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(
            f"{override!r} is not key=value.", hint="For example hyperparameters.epochs=2."
        )
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"The value in {override!r} is not YAML: {error}") from None
    place = values
    for part in parts[:-1]:
        inner = place.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{override!r} goes into {part!r}, which has no fields.")
        place = inner
    place[parts[-1]] = value


def _issues(path: Path, error: ValidationError, root: yaml.Node | None) -> list[Issue]:
    issues = []
    for detail in error.errors(include_url=False):
        location = [part for part in detail["loc"] if not str(part).startswith("function-")]
        message, fix = detail["msg"].removeprefix("Value error, "), None
        if detail["type"] == "extra_forbidden":
            message = "no such field"
            known = _fields_at(location[:-1])
            near = get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
            fix = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        elif detail["type"] == "missing":
            message = "this field is needed"
        issues.append(
            Issue(
                code="unknown_field" if detail["type"] == "extra_forbidden" else detail["type"],
                message=message,
                path=str(path),
                line=_line(root, location),
                field=".".join(str(part) for part in location) or None,
                fix=fix,
            )
        )
    return issues


def _line(root: yaml.Node | None, location: Sequence[int | str]) -> int | None:
    """Find the line of a field, or of the nearest thing around it that is in the file."""
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
    """Return the field names of the model that lies at `location`."""
    model: type[BaseModel] | None = _FileModel
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


def _error(path: Path, *issues: Issue) -> ConfigError:
    count = len(issues)
    return ConfigError(
        f"The configuration {path} has {count} {'problem' if count == 1 else 'problems'}.",
        issues=issues,
    )
