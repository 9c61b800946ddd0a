"""Provider formats are data: they can be written down, read back and compared."""

import re
from typing import Any

import pytest
from pydantic import TypeAdapter

from training_backends.core.capabilities import Capabilities
from training_backends.core.data_rules import ProviderFormat
from training_backends.datasets.provider_formats import PROVIDER_FORMATS

_JSON = TypeAdapter(ProviderFormat)

ALL = pytest.mark.parametrize(
    "provider_format", PROVIDER_FORMATS.values(), ids=list(PROVIDER_FORMATS)
)


@ALL
def test_a_provider_format_survives_json(provider_format: ProviderFormat) -> None:
    """What is written down is all that there is."""
    assert _JSON.validate_json(_JSON.dump_json(provider_format)) == provider_format


@ALL
def test_a_provider_format_speaks_of_its_own_roles_only(provider_format: ProviderFormat) -> None:
    """Every role has its turn, and the order leads from the start to the end."""
    known = {*provider_format.roles, "start", "end"}
    assert provider_format.order.keys() == {*provider_format.roles, "start"}
    assert {one for nexts in provider_format.order.values() for one in nexts} <= known - {
        "tool",
        "start",
    }
    assert "end" in provider_format.order["assistant"]
    assert {*provider_format.weighted_roles} <= known
    assert {*provider_format.roles} <= provider_format.parts.keys()


@ALL
def test_the_patterns_of_a_provider_format_can_be_compiled(provider_format: ProviderFormat) -> None:
    """A pattern that is wrong would be found only by the first row with a tool."""
    assert re.compile(provider_format.function_name).fullmatch("look_up")
    assert re.compile(provider_format.call_id or "").pattern == (provider_format.call_id or "")


def test_each_provider_format_is_found_by_its_name() -> None:
    """The names are those of the providers."""
    assert {name: one.name for name, one in PROVIDER_FORMATS.items()} == {
        name: name for name in ("mistral", "openai", "together", "local")
    }


def test_a_misspelt_rule_is_refused() -> None:
    """A rule that nobody reads would hold nobody."""
    misspelt: Any = {"max_file_byte": 1}
    with pytest.raises(TypeError, match="max_file_byte"):
        ProviderFormat(name="x", **misspelt)


def test_a_backend_that_names_no_provider_format_has_the_common_one() -> None:
    """Plugins that know nothing of provider formats still have rules."""
    assert Capabilities().provider_format == ProviderFormat()
