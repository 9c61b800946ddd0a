"""The package's front: one list of names, loaded on first use."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import training_backends
from training_backends import plugins

HEAVY = (
    "pydantic",
    "httpx",
    "structlog",
    "keyring",
    "asyncio",
    "rich",
    "typer",
    "sqlalchemy",
    "torch",
    "ray",
    "fsspec",
)


def names_in_the_stub(stub: str = "__init__") -> dict[str, str]:
    """Return each public name with the module that the stub takes it from."""
    tree = ast.parse(Path(training_backends.__file__).with_name(f"{stub}.pyi").read_text())
    return {
        alias.name: f"training_backends.{node.module}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_the_program_has_the_names_of_the_stub() -> None:
    """Type checkers, `import *`, `dir` and the running program see the same names."""
    names = [*names_in_the_stub(), "__version__"]
    assert sorted(vars(training_backends)["__all__"]) == sorted(names)
    assert set(dir(training_backends)) >= set(names_in_the_stub())


@pytest.mark.parametrize(("name", "home"), sorted(names_in_the_stub().items()))
def test_every_name_can_be_loaded_and_is_public_at_home(name: str, home: str) -> None:
    """A name leads to the object of its module, which exports it."""
    module = import_module(home)
    assert getattr(training_backends, name) is getattr(module, name)
    assert name in module.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    """Misspelling a name fails as for any module."""
    with pytest.raises(AttributeError, match="Trainer"):
        getattr(training_backends, "Trainer")  # noqa: B009  # as a user's code would


def test_importing_the_package_loads_nothing_heavy() -> None:
    """The import costs next to nothing because it loads none of these."""
    program = (
        "import sys, training_backends\n"
        "training_backends.TrainingStatus, training_backends.RunNotFound\n"
        f"loaded = sorted(set({HEAVY!r}) & set(sys.modules))\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_client_loads_no_library_that_it_may_not_need() -> None:
    """Neither that of HTTP nor those of object stores, before a backend or a URL needs them."""
    program = (
        "import sys, training_backends.client.client, training_backends.objects.store\n"
        "loaded = sorted({'httpx', 'fsspec', 's3fs', 'aiohttp', 'starlette'} & set(sys.modules))\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_module_exports_what_it_has() -> None:
    """`__all__` names nothing that is not there, in every module that imports here."""
    package = Path(training_backends.__file__).parent
    for path in sorted((package / "core").glob("[a-z]*.py")):
        module = import_module(f"training_backends.core.{path.stem}")
        missing = [name for name in module.__all__ if not hasattr(module, name)]
        assert not missing, (path.name, missing)


def test_the_toolkit_has_the_names_of_its_stub() -> None:
    """Each name of `plugins` is its home's public object, the same as in the package's front."""
    stub = names_in_the_stub("plugins")
    assert sorted(vars(plugins)["__all__"]) == sorted(stub)
    for name, home in stub.items():
        module = import_module(home)
        assert getattr(plugins, name) is getattr(module, name)
        assert name in module.__all__
    for name in set(stub) & set(names_in_the_stub()):
        assert getattr(plugins, name) is getattr(training_backends, name)


def test_importing_the_toolkit_loads_nothing_heavy() -> None:
    """A backend's module is imported to be named; its parts are loaded when they are used."""
    program = (
        "import sys, training_backends.plugins\n"
        f"loaded = sorted(set({HEAVY!r}) & set(sys.modules))\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
