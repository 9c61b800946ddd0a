"""The JSON Schema of a configuration file, for editors."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from pydantic import BaseModel

from training_backends.client.config_file import FileModel
from training_backends.core.backend import TrainingBackend
from training_backends.core.capabilities import Capabilities

__all__ = ["config_schema"]

_DIALECT: Final = "http://json-schema.org/draft-07/schema#"
"""What editors support best; a later dialect adds nothing that is used here."""
_PREFIX: Final = "#/definitions/"
_WRITTEN_AS_TEXT: Final = ("DataSource", "ChatTemplate", "Money")
"""Models that may be text, too; their validators are not part of pydantic's schema."""
_DURATION: Final = {"anyOf": [{"type": "string"}, {"type": "number", "exclusiveMinimum": 0}]}


def config_schema(backend: TrainingBackend | None = None) -> dict[str, Any]:
    """Return the JSON Schema (draft 7) of a configuration file.

    It accepts every file that `load_config` accepts, short forms included.

    Args:
        backend: Only the fields and values that this backend supports, and its options.
    """
    schema = _generated(FileModel)
    parts = schema["definitions"]
    parts["PluginIntegration"]["properties"]["type"]["not"] = {"enum": [*_tracker_types(parts)]}
    for name in ("train", "validation"):
        listed = parts["Data"]["properties"][name]
        listed["anyOf"] = [{"type": "array", "items": listed.pop("items")}]
        listed["anyOf"].append({"$ref": f"{_PREFIX}DataSource"})
        del listed["type"]
    if backend is not None:
        _restrict(schema, backend.capabilities)
        options = _generated(backend.options_model, "Options.")
        parts |= options.pop("definitions", {})
        schema["properties"]["options"] = options
    for part in (schema, *parts.values(), schema["properties"]["options"]):
        _let_empty(part)
    kinds = parts["Tuning"]["properties"]["kind"]["enum"]
    parts["Tuning"] = {"anyOf": [{"enum": kinds}, parts["Tuning"]]}
    for name in _WRITTEN_AS_TEXT:
        parts[name] = {"anyOf": [{"type": "string"}, parts[name]]}
    about = "Configuration of a training run" + (f" on {backend.name}" if backend else "")
    return {"$schema": _DIALECT, **schema, "description": f"{about}."}


def _generated(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    schema = model.model_json_schema(ref_template=f"{_PREFIX}{prefix}{{model}}")
    if parts := schema.pop("$defs", None):
        schema["definitions"] = {f"{prefix}{name}": part for name, part in parts.items()}
    cleaned: dict[str, Any] = _cleaned(schema)
    return cleaned


def _cleaned(value: Any, *, names: bool = False) -> Any:
    """Drop what no editor shows or can check, and write durations as they may be written.

    Args:
        names: The keys are names of fields or models, not keywords.
    """
    if isinstance(value, list):
        return [_cleaned(each) for each in value]
    if not isinstance(value, dict):
        return value
    if not names and value.get("format") == "duration":
        rest = {key: each for key, each in value.items() if key in {"description", "default"}}
        return {**_DURATION, **rest}
    return {
        key: _cleaned(each, names=not names and key in {"properties", "definitions"})
        for key, each in value.items()
        if names or not (key in {"title", "format"} or _is_noise(key, each))
    }


def _is_noise(key: str, value: Any) -> bool:
    return key == "default" and (value is None or isinstance(value, dict | list))


def _tracker_types(parts: Mapping[str, Any]) -> Iterator[str]:
    for part in parts.values():
        if kind := part.get("properties", {}).get("type", {}).get("const"):
            yield kind


def _let_empty(model: dict[str, Any]) -> None:
    """Accept optional fields without a value: they keep their defaults."""
    required = model.get("required", ())
    for name, field in model.get("properties", {}).items():
        if name in required or {"type": "null"} in field.get("anyOf", ()):
            continue
        about = {key: field.pop(key) for key in ("description", "default") if key in field}
        model["properties"][name] = {"anyOf": [dict(field), {"type": "null"}], **about}


def _restrict(schema: dict[str, Any], known: Capabilities) -> None:
    """Remove the fields and values that a backend does not support; see `config_issues`."""
    fields, parts = schema["properties"], schema["definitions"]
    if known.methods:
        fields["method"]["enum"] = sorted(known.methods)
    if known.tunings:
        parts["Tuning"]["properties"]["kind"]["enum"] = sorted(known.tunings)
    supported: dict[str, object] = {
        "method": known.methods,
        "tuning": known.tunings,
        "suffix": known.suffix,
        "chat_template": known.chat_template,
        "resources": known.resources,
        "integrations": known.integrations,
        "classifier_targets": "classifier" in known.methods,
    }
    for name in [name for name, value in supported.items() if not value]:
        del fields[name]
    _keep(parts["Hyperparameters"], known.hyperparameters)
    _keep(parts["Resources"], known.resources)
    if not known.validation_files:
        _keep(parts["Data"], {"train"})
    parts["Result"]["properties"]["checkpoint"]["enum"] = sorted(known.result_checkpoints)


def _keep(model: dict[str, Any], names: Collection[str] | None) -> None:
    if names is not None:
        fields = model["properties"]
        model["properties"] = {name: each for name, each in fields.items() if name in names}
