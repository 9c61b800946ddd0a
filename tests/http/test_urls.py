"""Base URLs and where a key may travel."""

import pytest

from training_backends import ConfigError
from training_backends.http.urls import is_loopback, normalize_base_url, require_private_transport


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("https://api.mistral.ai", "https://api.mistral.ai"),
        ("https://api.mistral.ai/", "https://api.mistral.ai"),
        ("https://api.mistral.ai/v1", "https://api.mistral.ai"),
        (" https://api.mistral.ai/v1/ ", "https://api.mistral.ai"),
        ("https://API.mistral.ai:8443/proxy/v1", "https://api.mistral.ai:8443/proxy"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
        ("https://h/v10", "https://h/v10"),
    ],
)
def test_base_url_is_normalized(given: str, meant: str) -> None:
    """A trailing slash and a trailing /v1 make no difference."""
    assert normalize_base_url(given, drop_suffix="v1") == meant


@pytest.mark.parametrize(
    "given",
    [
        "",
        "api.mistral.ai",
        "ftp://h",
        "https://",
        "https://h:port",
        "https://user:secret@h",
        "https://h?key=secret",
        "https://[::1",
    ],
)
def test_unusable_base_url_is_refused(given: str) -> None:
    """What is no plain http(s) URL is refused, and a password in it is not repeated."""
    with pytest.raises(ConfigError) as caught:
        normalize_base_url(given)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:1", True),
        ("http://127.8.9.10", True),
        ("http://[::1]:8000", True),
        ("http://localhost:8000", True),
        ("http://localhost.example.com", False),
        ("http://128.0.0.1", False),
        ("http://0.0.0.0", False),
        ("http://[::ffff:10.0.0.1]", False),
    ],
)
def test_loopback_is_this_machine_only(url: str, local: bool) -> None:
    """Loopback is 127.0.0.0/8, ::1 and localhost, and nothing that looks like it."""
    assert is_loopback(url) is local


def test_https_carries_a_key_anywhere() -> None:
    """Https to any host is fine."""
    require_private_transport("https://gpu.example.com")


def test_refusal_says_what_to_use() -> None:
    """The refusal of plain http names the https URL to use."""
    with pytest.raises(ConfigError) as caught:
        require_private_transport("http://gpu.example.com:8000", backend="mistral")
    assert caught.value.issues[0].code == "key_over_http"
    assert "https://gpu.example.com" in str(caught.value.hint)
