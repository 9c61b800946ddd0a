"""Error bodies of the service, read."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import training_backends as tb
from training_backends.protocols.mistral.errors import error_from_answer, no_model_message


def read(status: int, body: Any, **headers: str) -> tb.TrainingBackendError:
    """Read an answer."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return error_from_answer(status, headers, content, backend="mistral")


@pytest.mark.parametrize(
    ("status", "body", "kind", "said"),
    [
        (
            401,
            {"message": "Unauthorized", "request_id": "r"},
            tb.AuthenticationFailed,
            "Unauthorized",
        ),
        (401, {"detail": "Unauthorized"}, tb.AuthenticationFailed, "Unauthorized"),
        (403, {"detail": "Forbidden"}, tb.PermissionDenied, "Forbidden"),
        (404, {"detail": "No fine tuning job matches."}, tb.RunNotFound, "No fine tuning job"),
        (409, {"detail": "similar"}, tb.DuplicateRun, "similar"),
        (410, b"", tb.BackendRetired, "410"),
        (413, {"detail": "too large"}, tb.PayloadTooLarge, "too large"),
        (422, {"detail": "Not this way."}, tb.ConfigError, "Not this way"),
        (429, {"message": "Requests rate limit exceeded"}, tb.RateLimited, "rate limit"),
        (500, b"<html>oops</html>", tb.BackendUnavailable, "oops"),
        (501, {"detail": "gone"}, tb.BackendRetired, "gone"),
        (503, b"", tb.BackendUnavailable, "no explanation"),
        (418, b"tea", tb.ProtocolError, "418"),
    ],
)
def test_each_body_gives_its_error(
    status: int, body: Any, kind: type[Exception], said: str
) -> None:
    """Every body that was seen becomes the error of its meaning, with the service's words."""
    error = read(status, body)
    assert type(error) is kind
    assert said in error.message
    assert error.backend == "mistral"


def test_fields_are_named() -> None:
    """A 422 with a list names each field."""
    detail = [
        {"type": "extra_forbidden", "loc": ["body", "hyperparameters", "n_epochs"], "msg": "No"}
    ]
    error = read(422, {"detail": detail})
    assert isinstance(error, tb.ConfigError)
    assert [(issue.field, issue.message) for issue in error.issues] == [
        ("hyperparameters.n_epochs", "No")
    ]


@pytest.mark.parametrize(
    ("loc", "field"),
    [(5, "5"), ("seed", "seed"), (["body", "a", 0], "a.0"), (None, None), ([], None), ({}, None)],
)
def test_misshapen_places_are_read(loc: Any, field: str | None) -> None:
    """A place that is not the list it should be is shown as it is, or left out."""
    error = read(422, {"detail": [{"loc": loc, "msg": "No"}]})
    assert isinstance(error, tb.ConfigError)
    assert [issue.field for issue in error.issues] == [field]


def test_message_is_found_behind_an_empty_detail() -> None:
    """An empty detail does not hide the message."""
    assert "come back later" in read(422, {"detail": [], "message": "come back later"}).message


def test_lines_are_named() -> None:
    """A refused file names each line."""
    body = {
        "detail": "Invalid file format.",
        "description": "Found 1 error in this file",
        "errors": [{"message": "No messages", "line_number": 3}],
    }
    error = read(422, body)
    assert isinstance(error, tb.DatasetError)
    assert [(issue.line, issue.message) for issue in error.issues] == [(3, "No messages")]


def test_no_model_at_all_means_retired() -> None:
    """The refusal that lists no model means that the service has ended; one with some does not."""
    assert isinstance(read(422, {"detail": no_model_message("completion", [])}), tb.BackendRetired)
    other = read(422, {"detail": no_model_message("completion", ["a", "b"])})
    assert isinstance(other, tb.ConfigError)
    assert "a, b" in other.message


def test_retired_service_says_what_else_there_is() -> None:
    """A retired service is dated, and the ways on are named."""
    hint = str(read(410, b"").hint)
    assert "2026-07-13" in hint
    assert "serve" in hint
    assert "--backend local" in hint


def test_pause_is_kept() -> None:
    """The seconds of a 429 are kept."""
    error = read(429, {"message": "slow"}, **{"retry-after": "12"})
    assert isinstance(error, tb.RateLimited)
    assert error.retry_after == 12.0


@given(st.integers(400, 599), st.binary(max_size=80))
def test_any_answer_gives_an_error(status: int, body: bytes) -> None:
    """Whatever is answered, the result is one of our errors, never a failure to read it."""
    assert isinstance(read(status, body), tb.TrainingBackendError)


@given(
    st.integers(400, 599),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["detail", "errors", "loc", "msg", "message", "line_number"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ),
)
def test_any_json_gives_an_error(status: int, body: Any) -> None:
    """Whatever JSON is answered, however misshapen, the result is one of our errors."""
    assert isinstance(read(status, body), tb.TrainingBackendError)
