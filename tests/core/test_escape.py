"""Control characters become visible and harmless; all else stays as it is."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training_backends.core.escape import escape_controls, escape_json, plural

BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def is_control(character: str) -> bool:
    """Tell by Unicode's own tables what a terminal or a reader takes for a command."""
    marks = "\u061c\u200e\u200f"
    is_bidi = unicodedata.bidirectional(character) in BIDI or character in marks
    return is_bidi or unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"}


@given(st.text(st.characters()))
def test_nothing_is_left_that_commands_a_terminal(text: str) -> None:
    """Escaped text has no control character, and text without one is not changed."""
    escaped = escape_controls(text)
    assert not any(map(is_control, escaped))
    assert (escaped == text) is not any(map(is_control, text))
    assert escape_controls(escaped) == escaped


@given(st.text(st.characters()))
def test_every_character_has_one_verdict(text: str) -> None:
    """Only what is kept stays raw."""
    kept = escape_controls(text, keep="\n\t")
    assert {one for one in kept if is_control(one)} <= {"\n", "\t"}
    assert kept.count("\n") == text.count("\n")


@given(st.dictionaries(st.text(), st.text() | st.lists(st.text())))
def test_an_escaped_json_document_is_the_same_document(document: dict[str, object]) -> None:
    """Programs read what was written, terminals see no control but the line ends."""
    escaped = escape_json(json.dumps(document, ensure_ascii=False, indent=2))
    assert json.loads(escaped) == document
    assert {one for one in escaped if is_control(one)} <= {"\n"}


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1200, "1,200 rows")]
)
def test_one_is_not_many(count: int, text: str) -> None:
    """A count agrees with its noun, and thousands are separated."""
    assert plural(count, "row") == text
