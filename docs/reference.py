"""The reference of settings, capabilities and the routes of the gateway."""

from collections.abc import Iterator
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any

from api import attribute_docs
from fastapi import FastAPI
from pydantic_core import PydanticUndefined
from starlette.routing import BaseRoute

from training_backends import Capabilities, backend_class
from training_backends.client.observe import WatchSettings
from training_backends.core.backend import BackendContext
from training_backends.core.estimate import format_duration
from training_backends.core.registry import create_backend
from training_backends.core.settings import SectionSettings, Settings
from training_backends.credentials.choice import CredentialSettings
from training_backends.credentials.vault import CredentialVault
from training_backends.gateway.routes_chat import chat_router
from training_backends.gateway.routes_files import files_router, links_router
from training_backends.gateway.routes_jobs import jobs_router
from training_backends.gateway.routes_models import models_router
from training_backends.gateway.routes_openai import openai_router
from training_backends.gateway.settings import GatewaySettings
from training_backends.objects.settings import ObjectSettings

OURS = frozenset({"command", "local", "mistral", "openai", "ray", "together"})
"""The backends of this package, whatever else is installed."""


# -- settings ------------------------------------------------------------------------------


def settings() -> str:
    """Return a table of each section of the settings."""
    parts = [
        _section("The whole package", Settings),
        _section("Section `watch`", WatchSettings),
        _section("Section `credentials`", CredentialSettings),
        _section("Section `objects`", ObjectSettings),
    ]
    for name in sorted(OURS):
        kind = backend_class(name).settings_model
        if kind is not None:
            parts.append(_section(f"Section `{kind.section}`", kind))
    parts.append(_section("Section `gateway`", GatewaySettings))
    return "\n\n".join(parts)


def _section(title: str, kind: type[SectionSettings]) -> str:
    described = attribute_docs(kind)
    rows = [f"## {title}", "", "| setting | default | description |", "| --- | --- | --- |"]
    for name, field in kind.model_fields.items():
        text = _flat(field.description or described.get(name, ""))
        default = _default(field.default if field.default is not PydanticUndefined else None)
        if name == "home":
            default = "the platform's directory for user data"
        rows.append(f"| `{name}` | {default} | {text} |")
    return "\n".join(rows)


def _default(value: Any) -> str:
    if value is None or value in ({}, ()):
        return ""
    if isinstance(value, timedelta):
        return f"`{format_duration(value)}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int):
        return f"`{value:,}`" if value >= 10_000 else f"`{value}`"
    return f"`{value.value if isinstance(value, Enum) else value}`"


# -- capabilities --------------------------------------------------------------------------


def capabilities(name: str) -> str:
    """Return a table of what a backend supports, as it declares it without settings."""
    declared = _declared(name)
    rows = [
        f"| `{field}` | {_shown(field, getattr(declared, field))} |"
        for field in Capabilities.model_fields
        if field != "integration_fields" or declared.integrations
    ]
    return "\n".join(["| [capability](api.md#capabilities) | |", "| --- | --- |", *rows])


def _declared(name: str) -> Capabilities:
    home = Path("unused")
    context = BackendContext(home=home, credentials=CredentialVault(home=home))
    return create_backend(name, context).capabilities


def _shown(field: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if field == "hyperparameters" and value is None:
        return "all"
    if value is None:
        return "no limit" if field.startswith("max_") else "no"
    if field == "provider_format":
        return f"`{value.name}`"
    if field == "suffix":
        letters = f" of `{value.alphabet}`" if value.alphabet else ""
        return f"{value.max_length} characters{letters}"
    if isinstance(value, frozenset):
        return ", ".join(f"`{each}`" for each in sorted(value)) or "none"
    return f"`{value}`"


# -- routes --------------------------------------------------------------------------------


def mistral_routes() -> str:
    """Return the operations of the Mistral API."""
    routes = (files_router, links_router, jobs_router, models_router, chat_router)
    return _operations([each for router in routes for each in router.routes], openai=False)


def openai_routes() -> str:
    """Return the operations of the OpenAI API."""
    routes = (*openai_router.routes, *chat_router.routes)
    return _operations(list(routes), openai=True)


def _operations(routes: list[BaseRoute], *, openai: bool) -> str:
    document = FastAPI(routes=routes).openapi()
    schemas = document.get("components", {}).get("schemas", {})
    parts = []
    for path, operations in document["paths"].items():
        if path.startswith("/openai/") is openai:
            for method, operation in operations.items():
                parts.append(_operation(f"{method.upper()} {path}", operation, schemas))
    return "\n\n".join(parts)


def _operation(title: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    description = operation.get("description", "").strip()
    parts = [f"### `{title}`", *filter(None, [description])]
    rows = [
        _row(each["name"], each["in"], {**each["schema"], **each}, schemas)
        for each in operation.get("parameters", ())
        if each["in"] in {"path", "query"}
    ]
    for schema in _bodies(operation, schemas):
        rows.extend(_body_rows(schema, schemas, ""))
    if rows:
        head = "| parameter | in | type | default | description |\n| --- | --- | --- | --- | --- |"
        parts.append("\n".join([head, *rows]))
    return "\n\n".join(parts)


def _body_rows(schema: dict[str, Any], schemas: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, field in schema.get("properties", {}).items():
        options = [each for each in field.get("anyOf", [field]) if each.get("type") != "null"]
        inner = _resolved(options[0], schemas) if len(options) == 1 else {}
        if "properties" in inner:
            yield from _body_rows(inner, schemas, f"{prefix}{name}.")
        else:
            required = name in schema.get("required", ())
            yield _row(prefix + name, "body", {**field, "required": required}, schemas)


def _bodies(operation: dict[str, Any], schemas: dict[str, Any]) -> Iterator[dict[str, Any]]:
    content = operation.get("requestBody", {}).get("content", {})
    for media in list(content.values())[:1]:
        yield _resolved(media.get("schema", {}), schemas)


def _resolved(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    if reference := schema.get("$ref"):
        found: dict[str, Any] = schemas[reference.rpartition("/")[2]]
        return found
    return schema


def _row(name: str, place: str, field: dict[str, Any], schemas: dict[str, Any]) -> str:
    default = field.get("default")
    shown = "" if default in (None, "", [], {}) else f"`{default}`".lower()
    shown = "required" if field.get("required") is True else shown
    text = _flat(field.get("description", ""))
    return f"| `{name}` | {place} | {_kind(field, schemas)} | {shown} | {text} |"


def _kind(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    if reference := schema.get("$ref"):
        name = reference.rpartition("/")[2]
        target = schemas[name]
        return _kind(target, schemas) if "enum" in target else "object"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if options := schema.get("anyOf", schema.get("oneOf")):
        shown = [_kind(each, schemas) for each in options if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(shown))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}), schemas)}"
    return str(schema.get("format") or schema.get("type", "any"))


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
