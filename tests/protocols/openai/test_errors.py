"""Error bodies of the protocol, read and written."""

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import training_backends as tb
from training_backends.core.errors import Issue, StoreError
from training_backends.core.redaction import register_secret
from training_backends.protocols.openai import errors
from training_backends.protocols.openai.errors import ErrorAnswer, answer_for, error_from_answer


def read(status: int, body: Any, **headers: str) -> tb.TrainingBackendError:
    """Read an answer."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return error_from_answer(status, named, content, backend="openai")


def reread(answer: ErrorAnswer) -> tb.TrainingBackendError:
    """Read what a server of ours answers."""
    return error_from_answer(
        answer.status, answer.headers, json.dumps(answer.body()).encode(), backend="openai"
    )


@pytest.mark.parametrize(
    ("status", "body", "kind", "said"),
    [
        (401, errors.invalid_key().body(), tb.AuthenticationFailed, "Incorrect API key"),
        (401, {"error": {"code": "401", "message": "Denied"}}, tb.AuthenticationFailed, "Denied"),
        (403, {"error": {"code": "forbidden", "message": "No"}}, tb.PermissionDenied, "No"),
        (404, errors.no_job("j").body(), tb.RunNotFound, "fine tune: j"),
        (404, {"detail": "Not Found"}, tb.RunNotFound, "Not Found"),
        (400, errors.invalid_training_file("f").body(), tb.ConfigError, "f"),
        (400, {"error": "just text"}, tb.ConfigError, "just text"),
        (400, {"error": {"message": "Expected file to have JSONL format"}}, tb.DatasetError, ""),
        (400, {"error": {"code": "jsonlValidationFailed"}}, tb.DatasetError, "jsonlValidation"),
        (409, {"error": {"message": "there is one"}}, tb.DuplicateRun, "there is one"),
        (409, {"error": {"code": "unexpectedEntityState"}}, tb.ConfigError, "EntityState"),
        (410, b"", tb.BackendRetired, "410"),
        (413, {"error": {"message": "large"}}, tb.PayloadTooLarge, "large"),
        (422, {"detail": "Not this way."}, tb.ConfigError, "Not this way"),
        (429, {"error": {"message": "slow"}}, tb.RateLimited, "slow"),
        (500, b"<html>oops</html>", tb.BackendUnavailable, "oops"),
        (501, {"detail": "not here"}, tb.BackendRetired, "not here"),
        (408, {"message": "late"}, tb.BackendUnavailable, "late"),
        (503, b"", tb.BackendUnavailable, "no explanation"),
        (418, b"tea", tb.ProtocolError, "418"),
    ],
)
def test_each_body_gives_its_error(
    status: int, body: Any, kind: type[Exception], said: str
) -> None:
    """Each form of body becomes the error of its meaning, with the provider's message."""
    error = read(status, body)
    assert type(error) is kind
    assert said in error.message
    assert error.backend == "openai"


def test_parameters_are_named() -> None:
    """The field at fault is found in OpenAI's, Azure's and FastAPI's form."""
    openai = reread(errors.model_not_available("m"))
    assert [(i.field, i.code) for i in openai.issues] == [("model", "model_not_available")]
    details = [{"code": "invalidPayload", "message": "No", "target": "suffix"}, "odd"]
    azure = read(400, {"error": {"code": "invalidPayload", "message": "M", "details": details}})
    assert [(i.field, i.message) for i in azure.issues] == [("suffix", "No")]
    loc = ["body", "hyperparameters", "lora_r"]
    fastapi = read(422, {"detail": [{"type": "int", "loc": loc, "msg": "Not a number"}]})
    assert [(i.field, i.message) for i in fastapi.issues] == [
        ("hyperparameters.lora_r", "Not a number")
    ]
    assert "hyperparameters.lora_r: Not a number" in fastapi.message


def test_pause_is_kept() -> None:
    """Milliseconds win over seconds, a date is one too; what waiting does not help is said."""
    body = {"error": {"message": "slow", "code": "rate_limit_exceeded"}}
    for headers, seconds in (
        ({"retry_after": "12"}, 12.0),
        ({"retry_after": "12", "retry_after_ms": "1500"}, 1.5),
        ({"retry_after": "soon"}, None),
        ({"retry_after": "inf"}, None),
        ({}, None),
    ):
        error = read(429, body, **headers)
        assert isinstance(error, tb.RateLimited)
        assert (error.retry_after, error.retryable) == (seconds, True)
    date = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    later = read(429, body, retry_after=date)
    assert isinstance(later, tb.RateLimited)
    assert later.retry_after is not None
    assert 3000 < later.retry_after <= 3600
    for code in ("insufficient_quota", "daily_rate_limit_exceeded", "quotaExceeded"):
        assert not read(429, {"error": {"message": "no", "code": code}}).retryable


def test_end_of_the_service_is_dated() -> None:
    """A service that has ended names the day and another way."""
    hint = str(read(410, b"").hint)
    assert "2027-01-06" in hint
    assert "--backend local" in hint


@pytest.mark.parametrize(
    "error",
    [
        tb.AuthenticationFailed("x"),
        tb.PermissionDenied("x"),
        tb.RunNotFound("x"),
        tb.DuplicateRun("x"),
        tb.BackendRetired("x"),
        tb.PayloadTooLarge("x"),
        tb.RateLimited("x", retry_after=2.5),
        tb.RateLimited("x", retryable=False),
        tb.DatasetError("x", issues=[Issue(code="c", message="m", line=3)]),
        tb.ConfigError("x", issues=[Issue(code="c", message="m", field="suffix")]),
        tb.UnsupportedOperation("x"),
        tb.BackendUnavailable("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_error_is_read_as_it_was_written(error: tb.TrainingBackendError) -> None:
    """A server's exception arrives at a client of ours as the same class, with its field."""
    found = reread(answer_for(error))
    assert type(found) is type(error)
    assert found.retryable == error.retryable
    assert [issue.field for issue in found.issues if issue.field] == [
        issue.field for issue in error.issues if issue.field
    ]
    if isinstance(found, tb.RateLimited) and isinstance(error, tb.RateLimited):
        assert found.retry_after == (3.0 if error.retry_after else None)


def test_answers_spare_useless_retries() -> None:
    """The official clients repeat a 409 and never see a 422 as a bad request."""
    assert answer_for(tb.DuplicateRun("x")).headers["x-should-retry"] == "false"
    assert answer_for(tb.ConfigError("x")).status == 400
    assert errors.wrong_state("x").status == 400


def test_answers_hold_no_secret() -> None:
    """A key in a message is redacted, and an internal error does not show its message."""
    register_secret("sk-very-secret")
    assert "sk-very-secret" not in answer_for(tb.ConfigError("bad sk-very-secret")).message
    answer = answer_for(StoreError("/var/lib/secret.db is damaged"))
    assert answer.status == 500
    assert "secret.db" not in answer.message


@given(st.integers(400, 599), st.binary(max_size=60))
def test_any_answer_gives_an_error(status: int, body: bytes) -> None:
    """Whatever is answered, the result is one of our errors."""
    assert isinstance(read(status, body), tb.TrainingBackendError)


JSON = st.recursive(
    st.none() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["error", "detail", "details", "message", "code", "loc", "msg"]), inner
        )
    ),
    max_leaves=6,
)


@given(st.sampled_from([400, 404, 409, 422, 429]), JSON)
def test_any_document_gives_an_error(status: int, body: Any) -> None:
    """Misshapen error bodies are read as far as they go."""
    assert isinstance(read(status, body), tb.TrainingBackendError)
