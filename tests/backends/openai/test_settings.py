"""Which server, variant, header and query the settings choose."""

from collections.abc import Callable

import pytest
from pydantic import ValidationError

from training_backends import ConfigError
from training_backends.backends.openai.backend import OpenAIBackend
from training_backends.backends.openai.settings import HOSTED_URL, OpenAISettings

DATED = {"api-version": "2024-10-21"}


@pytest.mark.parametrize(
    ("given", "url", "variant", "header"),
    [
        ({}, HOSTED_URL, "openai", "Authorization"),
        ({"base_url": "https://api.openai.com/"}, HOSTED_URL, "openai", "Authorization"),
        (
            {"base_url": "https://me.openai.azure.com"},
            "https://me.openai.azure.com/openai/v1",
            "azure",
            "api-key",
        ),
        (
            {"base_url": "https://me.openai.azure.com", "query": DATED, "key_header": "bearer"},
            "https://me.openai.azure.com/openai",
            "azure",
            "Authorization",
        ),
        (
            {"base_url": "https://me.openai.azure.com", "query": {"api-version": "preview"}},
            "https://me.openai.azure.com/openai/v1",
            "azure",
            "api-key",
        ),
        (
            {"base_url": "https://me.services.ai.azure.com/openai/v1"},
            "https://me.services.ai.azure.com/openai/v1",
            "azure",
            "api-key",
        ),
        (
            {"base_url": "https://api.tokenfactory.nebius.com/v1/"},
            "https://api.tokenfactory.nebius.com/v1",
            "nebius",
            "Authorization",
        ),
        (
            {"base_url": "http://127.0.0.1:8321/openai/v1"},
            "http://127.0.0.1:8321/openai/v1",
            "openai",
            "Authorization",
        ),
    ],
)
def test_server_decides_variant_and_header(
    given: dict[str, object], url: str, variant: str, header: str
) -> None:
    """A host's name tells its variant, and the path that was left out."""
    settings = OpenAISettings.model_validate(given)
    assert (settings.base_url, settings.variant, settings.header.name) == (url, variant, header)
    assert settings.sends_metadata is (variant == "openai")


def test_environment_sets_query_and_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mappings are given as JSON."""
    monkeypatch.setenv("TRAINING_BACKENDS_OPENAI__QUERY", '{"api-version": "preview"}')
    monkeypatch.setenv("TRAINING_BACKENDS_OPENAI__PRICES", '{"m": "3 USD"}')
    settings = OpenAISettings()
    assert settings.query == {"api-version": "preview"}
    assert str(settings.prices["m"]) == "3.00 USD"


def test_key_in_the_url_is_rejected() -> None:
    """A base URL contains no credentials."""
    with pytest.raises(ValidationError, match="store the key as a credential"):
        OpenAISettings(base_url="https://user:secret@host/v1")


def test_key_never_travels_in_plain_http(make_backend: Callable[..., OpenAIBackend]) -> None:
    """Plain HTTP is for loopback only."""
    with pytest.raises(ConfigError, match="plain HTTP"):
        _ = make_backend(base_url="http://example.com/v1").api
