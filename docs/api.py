"""The reference of the Python API, from signatures and docstrings."""

import ast
import re
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import griffe
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import training_backends

PACKAGE = Path(training_backends.__file__).parent
WIDTH = 88
_NO_DEFAULTS: tuple[Any, ...] = (PydanticUndefined, None, "", (), frozenset())
GROUPS: dict[str, tuple[str, ...]] = {
    "Clients": ("client.client", "client.sync", "client.watch"),
    "Functions": (
        "client.config_file",
        "core.logging",
        "core.plugins",
        "core.registry",
    ),
    "Configurations": ("core.config", "core.integrations"),
    "Runs": (
        "core.run",
        "core.status",
        "store",
        "client.evaluation",
        "client.recovery",
    ),
    "Estimates": ("core.estimate",),
    "Data": ("core.dataset",),
    "Credentials": ("credentials.vault",),
    "Backends": ("core.backend", "core.capabilities"),
    "Errors": ("core.errors",),
}
"""The sections of the page, with the modules of their names in `__init__.pyi`."""

TYPES = {
    "client.config_file": ("ConfigLike",),
    "client.journal": ("OnProgress", "OnUpdate", "OnNotice", "Confirm"),
    "client.attempts": ("OnRecord",),
    "client.watch": ("OnEvent",),
    "client.evaluation": ("Scorer",),
    "core.dataset": ("CountProgress",),
    "core.run": ("Prompt", "UtcDatetime", "CleanText", "LogSource", "FailureKind"),
    "core.backend": ("JSONValue",),
}


def api() -> str:
    """Return the documentation of all public names but types, which `types` has.

    Raises:
        KeyError: A name's module is in no group.
    """
    names = _public_names()
    group_of = {module: group for group, modules in GROUPS.items() for module in modules}
    parts: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name, module in names.items():
        if name not in TYPES.get(module, ()):
            parts[group_of[module]].append(_documented(name, module))
    return "\n\n".join(
        f"## {group}\n\n" + "\n\n".join(documented) for group, documented in parts.items()
    )


def toolkit() -> str:
    """Return the documentation of the names of `training_backends.plugins` that `api` lacks."""
    public = _public_names()
    parts: dict[str, list[str]] = {}
    for name, module in _public_names("plugins").items():
        if name not in public and isinstance(_member(name, module), griffe.Class | griffe.Function):
            parts.setdefault(module.partition(".")[0], []).append(_documented(name, module))
    titles = {
        "core": "Contract and helpers",
        "datasets": "Data",
        "http": "HTTP",
        "tokens": "Tokens",
    }
    return "\n\n".join(
        f"## {titles[folder]}\n\n" + "\n\n".join(documented) for folder, documented in parts.items()
    )


def methods() -> str:
    """Return a table of the client's methods."""
    rows = ["| method | description |", "| --- | --- |"]
    client = _member("AsyncTrainingClient", "client.client")
    for name, method in client.members.items():
        if isinstance(method, griffe.Function) and not name.startswith("_"):
            summary = _sections(method)[0].value.partition("\n\n")[0].replace("\n", " ")
            link = f"[`{name}`](api.md#{_anchor(f'AsyncTrainingClient.{name}')})"
            rows.append(f"| {link} | {summary} |")
    return "\n".join(rows)


def types() -> str:
    """Return a table of the types that signatures name."""
    rows = ["| name | type | description |", "| --- | --- | --- |"]
    for module, names in TYPES.items():
        for name in names:
            alias = _module(module).members[name]
            if not isinstance(alias, griffe.Attribute):
                raise TypeError(f"{name} is not a type alias")
            text = _flat(alias.docstring.value) if alias.docstring else ""
            rows.append(f"| `{name}` | {_code(_type(alias.value))} | {text} |")
    return "\n".join(rows)


def _anchor(title: str) -> str:
    return re.sub(r"[^\w-]", "", title.lower())


def _public_names(stub: str = "__init__") -> dict[str, str]:
    """Return the names of a stub with the module of each, in order."""
    text = (PACKAGE / f"{stub}.pyi").read_text()
    found = re.findall(r"^from \.([\w.]+) import (\([^)]*\)|.*)$", text, re.MULTILINE)
    return {name: module for module, names in found for name in re.findall(r"(\w+) as \w+", names)}


@cache
def _module(name: str) -> griffe.Module:
    path = PACKAGE.joinpath(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return griffe.visit(name, filepath=path, code=path.read_text())


def _member(name: str, module: str) -> griffe.Object:
    found = _module(module).members[name]
    if isinstance(found, griffe.Alias):  # a package that takes the name from one of its modules
        home = found.target_path.rpartition(".")[0]
        return _member(name, home.removeprefix("training_backends."))
    return found


def attribute_docs(kind: type[Any]) -> dict[str, str]:
    """Return what a class says of its attributes, in its docstring or below each of them."""
    member = _member(kind.__name__, kind.__module__.removeprefix("training_backends."))
    if not isinstance(member, griffe.Class):
        raise TypeError(f"{kind} is no class")
    found = {
        name: str(each.docstring.value)
        for name, each in member.members.items()
        if isinstance(each, griffe.Attribute) and each.docstring
    }
    for section in _sections(member):
        if section.kind is griffe.DocstringSectionKind.attributes:
            found |= {each.name: each.description for each in section.value}
    return found


def _documented(name: str, module: str) -> str:
    member = _member(name, module)
    if isinstance(member, griffe.Function):
        return _function(name, member)
    if not isinstance(member, griffe.Class):
        raise TypeError(f"{name} is neither a class nor a function")
    bases = [str(base) for base in member.bases if not str(base).startswith("_")]
    hidden = {"BaseModel", "ABC", "Protocol", "NamedTuple", "StrEnum", "object"}
    shown = [f"`{base}`" for base in bases if base.partition("[")[0] not in hidden]
    parts = [f"### `{name}`"]
    if shown:
        parts.append(f"Bases: {', '.join(shown)}.")
    kind = getattr(import_module(f"training_backends.{module}"), name)
    attributes: dict[str, str] = {}
    for section in _sections(member):
        if section.kind is griffe.DocstringSectionKind.attributes:
            attributes = {each.name: _flat(each.description) for each in section.value}
        else:
            parts.append(_section(section))
    constructor = member.members.get("__init__")
    if isinstance(constructor, griffe.Function) and not issubclass(kind, BaseException):
        parts.insert(1, _signature(name, constructor, keyword=""))
    parts.extend(_attributes(member, kind, attributes))
    parts.extend(
        _function(f"{name}.{each.name}", each)
        for each in member.members.values()
        if isinstance(each, griffe.Function) and each.name[0] != "_" and each.docstring
    )
    return "\n\n".join(filter(None, parts))


def _attributes(member: griffe.Class, kind: Any, described: dict[str, str]) -> Iterator[str]:
    rows = []
    fields = kind.model_fields if issubclass(kind, BaseModel) else {}
    for name, each in member.members.items():
        if not isinstance(each, griffe.Attribute) or name.startswith("_") or name == "model_config":
            continue
        if "module-attribute" in each.labels:
            continue
        text = described.get(name, "")
        if not text and each.docstring:
            text = _flat(str(_sections(each)[0].value))
        if not text and name in fields:
            text = _flat(fields[name].description or "")
        annotation = _type(each.annotation)
        default = ""
        if name in fields:
            value = fields[name].default
            if value not in _NO_DEFAULTS and not isinstance(value, BaseModel):
                default = f"`{_type(_literal(value))}`"
        if issubclass(kind, Enum):
            annotation = _type(each.value)
        rows.append((f"`{name}`", _code(annotation), default, text))
    if not rows:
        return
    head = ("attribute", "type", "default", "description")
    used = [at for at in range(4) if any(row[at] for row in rows)]
    lines = [head, ("---",) * 4, *rows]
    yield "\n".join(f"| {' | '.join(line[at] for at in used)} |" for line in lines)


def _literal(value: Any) -> str:
    if isinstance(value, frozenset):
        return "{" + ", ".join(map(repr, sorted(value))) + "}"
    return repr(getattr(value, "value", value))


class _Plain(ast.NodeTransformer):
    """Takes what is only for validation out of an annotation."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        if ast.unparse(node.value) == "Annotated" and isinstance(node.slice, ast.Tuple):
            return node.slice.elts[0]
        return node.slice if ast.unparse(node.value) == "ClassVar" else node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        text = node.value
        return ast.Name(text) if isinstance(text, str) and text[:1].isupper() else node


def _type(annotation: object) -> str:
    """Return an annotation, or the value of a default, as formatted source."""
    if annotation is None:
        return ""
    tree = _Plain().visit(ast.parse(str(annotation), mode="eval"))
    return ast.unparse(tree).replace("'", '"')


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def _function(title: str, function: griffe.Function) -> str:
    level = "####" if "." in title else "###"
    keyword = "async def " if "async" in function.labels else "def "
    parts = [f"{level} `{title}`"]
    if "property" not in function.labels:
        parts.append(_signature(function.name, function, keyword=keyword))
    return "\n\n".join([*parts, *map(_section, _sections(function))])


def _signature(name: str, function: griffe.Function, *, keyword: str) -> str:
    """Return a signature on one line, or with one parameter on each."""
    words: list[str] = []
    starred = False
    for each in function.parameters:
        if each.name in {"self", "cls"}:
            continue
        if each.kind is griffe.ParameterKind.keyword_only and not starred:
            words.append("*")
            starred = True
        star = {
            griffe.ParameterKind.var_positional: "*",
            griffe.ParameterKind.var_keyword: "**",
        }.get(each.kind or griffe.ParameterKind.keyword_only, "")
        starred = starred or star == "*"
        text = f"{star}{each.name}"
        if each.annotation is not None:
            text += f": {_type(each.annotation)}"
        if each.default is not None and not star:
            text += f" = {_type(each.default)}"
        words.append(text)
    returned = _type(function.returns)
    end = f") -> {returned}" if returned and keyword else ")"
    line = f"{keyword}{name}({', '.join(words)}{end}"
    if len(line) > WIDTH:
        inner = "".join(f"    {word},\n" for word in words)
        line = f"{keyword}{name}(\n{inner}{end}"
    return f"```python\n{line}{': ...' if keyword else ''}\n```"


def _sections(member: griffe.Object) -> list[Any]:
    if member.docstring is None:
        return []
    return list(griffe.parse_google(member.docstring, warn_unknown_params=False, warnings=False))


def _section(section: Any) -> str:
    kinds: dict[Any, Callable[[Any], str]] = {
        griffe.DocstringSectionKind.text: str,
        griffe.DocstringSectionKind.parameters: lambda value: _list("Arguments", value, "name"),
        griffe.DocstringSectionKind.raises: lambda value: _list("Raises", value, "annotation"),
        griffe.DocstringSectionKind.returns: lambda value: (
            "Returns: " + " ".join(_flat(each.description) for each in value)
        ),
        griffe.DocstringSectionKind.yields: lambda value: (
            "Yields: " + " ".join(_flat(each.description) for each in value)
        ),
    }
    return kinds[section.kind](section.value)


def _list(title: str, entries: Any, key: str) -> str:
    lines = [f"- `{getattr(each, key)}`: {_flat(each.description)}" for each in entries]
    return f"{title}:\n\n" + "\n".join(lines)


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
