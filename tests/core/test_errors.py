"""Errors say what happened, survive pickling and are also what Python calls them."""

import copy
import pickle
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from training_backends.core import errors
from training_backends.core.errors import (
    Issue,
    TrainingBackendError,
    nearest,
    suggest,
    validation_issues,
)
from training_backends.core.redaction import register_secret

CONTEXT: dict[str, Any] = {
    "hint": "do this",
    "backend": "local",
    "run_id": "r-1",
    "retryable": True,
}
OWN: dict[str, dict[str, Any]] = {
    "ConfigError": {"issues": (Issue(code="a", message="b"),)},
    "DatasetError": {"issues": (Issue(code="a", message="b", path="c", line=3),)},
    "DuplicateRun": {"other": "r-2"},
    "RateLimited": {"retry_after": 1.5},
    "BackendUnavailable": {"sent": False},
    "ProtocolError": {"excerpt": "<html>"},
    "BudgetExceeded": {"limit": "1.00 USD", "found": "2.00 USD"},
    "BackendNotInstalled": {"install": "pip install x"},
}


def _family(kind: type[TrainingBackendError]) -> Iterator[type[TrainingBackendError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _family(child)


KINDS = sorted(
    {kind for kind in _family(TrainingBackendError) if kind.__module__ == errors.__name__},
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling(kind: type[TrainingBackendError]) -> None:
    """What crosses a process keeps its text once and all its attributes."""
    error = kind("It broke.", **OWN.get(kind.__name__, {}), **CONTEXT)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error) == copy.message == "It broke."
    assert vars(copy) == vars(error)
    assert copy.hint == "do this"
    for name, value in OWN.get(kind.__name__, {}).items():
        assert getattr(copy, name) == value


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_needs_only_a_message(kind: type[TrainingBackendError]) -> None:
    """Context may be left out."""
    error = kind("It broke.")
    assert (error.hint, error.backend, error.run_id) == (None, None, None)
    assert error.retryable == kind.retryable_by_default


def test_every_error_is_exported_and_drawn_in_the_tree() -> None:
    """The docstring's tree and `__all__` know every class that can be raised."""
    public = {kind.__name__ for kind in KINDS if not kind.__name__.startswith("_")}
    assert public <= set(errors.__all__)
    assert not [name for name in public if name not in (errors.__doc__ or "")]


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.DatasetError, ValueError),
        (errors.CredentialNotFound, LookupError),
        (errors.RunNotFound, LookupError),
        (errors.BackendUnavailable, ConnectionError),
        (errors.UnsupportedOperation, NotImplementedError),
        (errors.BackendNotInstalled, ImportError),
        (errors.WaitTimeout, TimeoutError),
    ],
)
def test_an_error_is_also_the_built_in_that_fits(
    kind: type[TrainingBackendError], builtin: type[Exception]
) -> None:
    """Who does not know this package can still catch it."""
    with pytest.raises(builtin, match="It broke"):
        raise kind("It broke.")


def test_what_may_succeed_later_is_retryable() -> None:
    """Only trouble that passes by itself is tried again."""
    retryable = {kind.__name__ for kind in KINDS if kind("x").retryable}
    assert retryable == {"BackendUnavailable", "RateLimited", "VaultLocked", "WaitTimeout"}
    assert not errors.BackendUnavailable("x", retryable=False).retryable


def test_an_excerpt_is_cut() -> None:
    """A whole page of HTML does not fill the screen."""
    assert len(errors.ProtocolError("x", excerpt="y" * 9999).excerpt) == 500


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "wrong"),
        ({"path": "a.jsonl"}, "a.jsonl: wrong"),
        ({"path": "a.jsonl", "line": 3}, "a.jsonl:3: wrong"),
        ({"path": "a.jsonl", "line": 3, "field": "text"}, "a.jsonl:3: text: wrong"),
        ({"field": "model", "fix": "right it"}, "model: wrong (right it)"),
    ],
)
def test_an_issue_reads_as_a_line(fields: dict[str, Any], text: str) -> None:
    """Place, field, what and fix, as compilers write it."""
    assert str(Issue(code="x", message="wrong", **fields)) == text


@pytest.mark.parametrize(
    "again",
    [lambda error: error, copy.copy, lambda error: pickle.loads(pickle.dumps(error))],
    ids=["raised", "copied", "pickled"],
)
def test_a_traceback_shows_issues_hint_and_notes_once(again: Any) -> None:
    """What an orchestrator logs is enough to correct the configuration."""
    error = errors.ConfigError(
        "It broke.", issues=[Issue(code="a", message="wrong", field="model")], hint="Do this."
    )
    error.add_note("step 3 of the flow")
    printed = "".join(traceback.format_exception(again(error))).splitlines()
    assert printed[-3:] == ["- model: wrong", "Hint: Do this.", "step 3 of the flow"]


def test_notes_hold_no_secret() -> None:
    """A key typed in the wrong place is not repeated, nor a hint as it was before a change."""
    issue = Issue(code="a", message="no model 'a-secret-word'", fix="not a-secret-word")
    error = errors.ConfigError("It broke.", issues=[issue], hint="replaced")
    error.hint = "with a-secret-word"
    error.add_note("sent a-secret-word")
    register_secret("a-secret-word")
    printed = "".join(traceback.format_exception(error))
    assert printed.count("[redacted]") == 4
    assert "a-secret-word" not in printed
    assert "replaced" not in printed


def test_a_traceback_lists_a_limited_number_of_issues() -> None:
    """Thousands of bad rows do not fill a log."""
    issues = [Issue(code="a", message=str(number)) for number in range(1000)]
    notes = errors.DatasetError("It broke.", issues=issues).__notes__
    assert (len(notes), notes[-1]) == (21, "- and 980 more")


def test_a_missing_package_shows_its_command_in_the_traceback() -> None:
    """The command that installs it is the way on."""
    error = errors.BackendNotInstalled("Not here.", install="pip install x")
    assert error.__notes__ == ["Hint: pip install x"]


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("learning_rat", "did you mean 'learning_rate'?"),
        ("x", "known: epochs, learning_rate"),
        ("learning_rate" * 10_000, "known: epochs, learning_rate"),
    ],
)
def test_the_nearest_known_word_is_suggested(word: str, fix: str) -> None:
    """Or else all known words; a very long one is not compared."""
    known = {"learning_rate", "epochs"}
    assert suggest(word, known, "known: epochs, learning_rate") == fix
    assert nearest("seed", known) is None


def test_a_validation_error_becomes_issues() -> None:
    """Each names its field below the document's place; the input may be secret and is left out."""

    class Inner(BaseModel, extra="forbid"):
        count: int

    class Document(BaseModel):
        parts: list[Inner]

    with pytest.raises(ValidationError) as caught:
        Document.model_validate({"parts": [{"count": "sk-secret", "cuont": 1}]})
    assert validation_issues(caught.value, ["body"], unknown="no such field") == [
        Issue(
            code="int_parsing",
            message="Input should be a valid integer, unable to parse string as an integer",
            field="body.parts.0.count",
        ),
        Issue(code="unknown_field", message="no such field", field="body.parts.0.cuont"),
    ]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.BackendUnavailable("no response"), True),
        (errors.BackendUnavailable("no connection", sent=False), False),
        (errors.ProtocolError("half of a response"), True),
        (errors.RateLimited("slow down"), False),
        (errors.AuthenticationFailed("wrong key"), False),
        (errors.DuplicateRun("it exists"), False),
        (errors.ConfigError("a rejected field"), False),
        (errors.CredentialNotFound("no key"), False),
        (errors.WaitTimeout("too slow"), True),
        (errors.TrainingBackendError("anything"), True),
        (KeyError("a bug"), True),
    ],
)
def test_anything_but_a_clear_refusal_may_have_happened(
    error: Exception, *, expected: bool
) -> None:
    """A lost or unreadable response leaves the outcome open; a rejection does not."""
    assert errors.may_have_happened(error) is expected


def test_a_service_can_answer_with_the_status_of_an_error() -> None:
    """What its caller did wrong is 4xx, what is wrong behind it 5xx."""
    assert [kind.http_status for kind in (errors.DatasetError, errors.RunNotFound)] == [422, 404]
    assert [kind.http_status for kind in (errors.StoreError, errors.BackendBroken)] == [503, 500]
