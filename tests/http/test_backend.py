"""What the backends over HTTP share."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.backends.openai.backend import OpenAIBackend
from training_backends.backends.together.backend import TogetherBackend
from training_backends.core.backend import BackendContext
from training_backends.credentials.vault import CredentialVault
from training_backends.http.backend import ServerBackend

BACKENDS = [OpenAIBackend, MistralAPIBackend, TogetherBackend]


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        ({"base_url": "https://example.com/v1", "poll_max": None}, 10),
        ({"base_url": "http://127.0.0.1:9/v1", "poll_max": None}, 2),
        ({"poll_max": 33}, 33),
    ],
)
def test_runs_are_polled_as_the_settings_say(
    tmp_path: Path, kind: type[ServerBackend[Any, Any]], fields: dict[str, Any], longest: float
) -> None:
    """Every 10 seconds at the latest, 2 on this machine, or as set."""
    assert kind.settings_model is not None
    settings = kind.settings_model.model_validate({"poll_min": 0.25, **fields})
    context = BackendContext(
        home=tmp_path, credentials=CredentialVault(home=tmp_path), settings=settings
    )
    expected = timedelta(seconds=0.25), timedelta(seconds=longest)
    assert kind.create(context).poll_interval == expected
