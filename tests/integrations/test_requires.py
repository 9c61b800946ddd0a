"""Integrations where their tools are not installed; with them, see e2e/test_orchestrators.py."""

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

from training_backends import BackendNotInstalled
from training_backends.integrations import requires

_PACKAGES = {"airflow": "apache-airflow>=3", "dagster": "dagster", "dspy": "dspy"}


@pytest.mark.parametrize("name", [name for name in _PACKAGES if find_spec(name) is None])
def test_a_missing_tool_is_named(name: str) -> None:
    """As an `ImportError`, with the command that installs it."""
    with pytest.raises(ImportError) as error:
        import_module(f"training_backends.integrations.{name}")
    assert isinstance(error.value, BackendNotInstalled)
    assert error.value.install == f"pip install '{_PACKAGES[name]}'"


def test_what_a_tool_itself_lacks_is_its_own_error() -> None:
    """Installing the tool again would not help."""
    with pytest.raises(ModuleNotFoundError, match="its_dependency"), requires("tool", "tool"):
        import_module("its_dependency")


def test_programs_that_use_none_load_none() -> None:
    """Neither with the package nor with a client."""
    script = (
        "import sys; from training_backends import TrainingClient; "
        "sys.exit(any('training_backends.integrations' in name for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
