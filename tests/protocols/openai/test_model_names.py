"""Names of fine-tuned models."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training_backends.protocols.openai.model_names import (
    AzureModelName,
    TunedModelName,
    read_model_name,
)

PARTS = st.text("abcXYZ019-_./", min_size=1, max_size=8)
OPENAI = st.builds(
    TunedModelName,
    base=PARTS | st.just("ft:base:org::abcdefgh"),
    organization=PARTS,
    suffix=st.just("") | PARTS,
    tag=st.text("abcXYZ019", min_size=8, max_size=8),
    step=st.none() | st.integers(0, 10**9),
)
AZURE = st.builds(
    AzureModelName,
    base=st.text("abc019-.", min_size=1, max_size=12),
    suffix=st.just("") | st.text("abc019-_", min_size=1, max_size=8),
    tag=st.text("0123456789abcdef", min_size=32, max_size=32),
)


@given(OPENAI | AZURE)
def test_name_is_read_as_it_was_written(name: TunedModelName | AzureModelName) -> None:
    """A name holds all its parts."""
    assert read_model_name(str(name)) == name


@pytest.mark.parametrize(
    ("text", "suffix", "tag", "step"),
    [
        ("ft:gpt-4o-mini-2024-07-18:personal::9z5uyT9b", "", "9z5uyT9b", None),
        ("ft:gpt-4o-2024-08-06:org:s:AbCdEfGh:ckpt-step-100", "s", "AbCdEfGh", 100),
        ("ft:org/model:o:s:AbCdEfGh", "s", "AbCdEfGh", None),
    ],
)
def test_recorded_names_are_read(text: str, suffix: str, tag: str, step: int | None) -> None:
    """Names of the live service have these parts."""
    name = read_model_name(text)
    assert isinstance(name, TunedModelName)
    assert (name.suffix, name.tag, name.step, str(name)) == (suffix, tag, step, text)


@given(st.text(max_size=20))
def test_other_names_are_no_tuned_models(text: str) -> None:
    """Any text can be asked for."""
    assert read_model_name(text) is None or text.startswith("ft:")


@pytest.mark.parametrize("text", ["ft:", "ft:a:b", "ft:a:b:c:ckpt-step-1", "gpt-4.1.ft-12", "ft"])
def test_incomplete_names_are_not_read(text: str) -> None:
    """A part that is missing is not guessed."""
    assert read_model_name(text) is None
