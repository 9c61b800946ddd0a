"""What is set for the server, and what follows from where it is."""

import pytest

from training_backends.backends.mistral.settings import MistralSettings


@pytest.mark.parametrize(
    ("base_url", "seconds"), [("http://127.0.0.1:8321", 3.0), ("https://api.mistral.ai", 60.0)]
)
def test_lost_job_is_looked_for_as_long_as_proxies_take(base_url: str, seconds: float) -> None:
    """On this machine a late create is not so late; elsewhere proxies give up after a minute."""
    assert MistralSettings(base_url=base_url).settling == seconds
    assert MistralSettings(base_url=base_url, settle_timeout=7).settling == 7


def test_scope_tells_servers_and_accounts_apart() -> None:
    """Ids of files hold for one server and one account, however its URL is written."""
    here = MistralSettings(base_url="http://127.0.0.1:8321/v1/")
    assert here.scope == MistralSettings(base_url="http://127.0.0.1:8321").scope
    other = MistralSettings(base_url="http://127.0.0.1:8321", profile="other")
    assert len({here.scope, other.scope, MistralSettings().scope}) == 3
