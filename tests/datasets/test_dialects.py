"""Dialects are data: they can be written down, read back and compared."""

import re
from typing import Any

import pytest
from pydantic import TypeAdapter

from training_backends.core.capabilities import Capabilities
from training_backends.core.data_rules import Dialect
from training_backends.datasets.dialects import DIALECTS

_JSON = TypeAdapter(Dialect)

ALL = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=list(DIALECTS))


@ALL
def test_a_dialect_survives_json(dialect: Dialect) -> None:
    """What is written down is all that there is."""
    assert _JSON.validate_json(_JSON.dump_json(dialect)) == dialect


@ALL
def test_a_dialect_speaks_of_its_own_roles_only(dialect: Dialect) -> None:
    """Every role has its turn, and the order leads from the start to the end."""
    known = {*dialect.roles, "start", "end"}
    assert dialect.order.keys() == {*dialect.roles, "start"}
    assert {one for nexts in dialect.order.values() for one in nexts} <= known - {"tool", "start"}
    assert "end" in dialect.order["assistant"]
    assert {*dialect.weighted_roles} <= known
    assert {*dialect.roles} <= dialect.parts.keys()


@ALL
def test_the_patterns_of_a_dialect_can_be_compiled(dialect: Dialect) -> None:
    """A pattern that is wrong would be found only by the first row with a tool."""
    assert re.compile(dialect.function_name).fullmatch("look_up")
    assert re.compile(dialect.call_id or "").pattern == (dialect.call_id or "")


def test_each_dialect_is_found_by_its_name() -> None:
    """The names are those of the providers."""
    assert {name: one.name for name, one in DIALECTS.items()} == {
        name: name for name in ("mistral", "openai", "together", "local")
    }


def test_a_misspelt_rule_is_refused() -> None:
    """A rule that nobody reads would hold nobody."""
    misspelt: Any = {"max_file_byte": 1}
    with pytest.raises(TypeError, match="max_file_byte"):
        Dialect(name="x", **misspelt)


def test_a_backend_that_names_no_dialect_has_the_common_one() -> None:
    """Plugins that know nothing of dialects still have rules."""
    assert Capabilities().dialect == Dialect()
