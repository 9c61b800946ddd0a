"""What the environment of a child process may have."""

import os

import pytest

from training_backends.rundir.handover import safe_environment


def test_only_known_and_harmless_variables_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name that is not listed passes, and none that looks like a secret."""
    for name in ("OTHER", "MISTRAL_API_KEY", "HF_TOKEN", "TORCH_SECRET", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "1")
    passed = safe_environment()
    assert passed["CUDA_VISIBLE_DEVICES"] == "1"
    assert passed["PATH"] == os.environ["PATH"]
    assert not {"OTHER", "MISTRAL_API_KEY", "HF_TOKEN", "TORCH_SECRET"} & passed.keys()
