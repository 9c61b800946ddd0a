"""Error responses become exceptions, by the provider's codes and by status."""

from functools import partial

import pytest

from training_backends import (
    AuthenticationFailed,
    BackendRetired,
    BackendUnavailable,
    ConfigError,
    DatasetError,
    DuplicateRun,
    PayloadTooLarge,
    PermissionDenied,
    ProtocolError,
    RateLimited,
    RunNotFound,
    TrainingBackendError,
)
from training_backends.http.error_table import ErrorTable

TABLE = ErrorTable(
    backend="example",
    codes={
        "bad_file": DatasetError,
        "spent": partial(RateLimited, retryable=False),
        "invalid_request_error": ConfigError,
    },
    statuses={409: ConfigError, 418: BackendUnavailable},
    hints={AuthenticationFailed: "Store a key."},
)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ConfigError),
        (401, AuthenticationFailed),
        (402, PermissionDenied),
        (403, PermissionDenied),
        (404, RunNotFound),
        (408, BackendUnavailable),
        (409, DuplicateRun),
        (410, BackendRetired),
        (413, PayloadTooLarge),
        (418, ProtocolError),
        (422, ConfigError),
        (429, RateLimited),
        (500, BackendUnavailable),
        (501, BackendRetired),
        (599, BackendUnavailable),
    ],
)
def test_statuses(status: int, kind: type[TrainingBackendError]) -> None:
    """Each status has a class, and a table of its own does not lose the others."""
    assert type(ErrorTable()(status, {}, b"{}")) is kind
    if status not in {409, 418}:
        assert type(TABLE(status, {}, b"{}")) is kind


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "M.", "code": "c"}}', "M)"),
        (b'{"error": "M"}', "M)"),
        (b'{"message": "M"}', "M)"),
        (b'{"detail": "M"}', "M)"),
        (b'{"detail": [{"loc": ["body", "a", 0], "msg": "M", "type": "t"}]}', "a.0: M)"),
        (b'{"error": {"code": "C"}}', "C)"),
        (b"<Error><Code>C</Code><Message>M</Message></Error>", "C: M)"),
        (b"plain", "plain)"),
        (b"[1]", "[1])"),
        (b"", "no explanation)"),
        (b"\xff" * 3, "\ufffd\ufffd\ufffd)"),
    ],
)
def test_forms_of_bodies(body: bytes, said: str) -> None:
    """Whatever form a body has, its message is in the error."""
    assert said in str(TABLE(403, {}, body))


def test_codes_come_first() -> None:
    """A code decides before a status, and a type counts as one."""
    assert type(TABLE(400, {}, b'{"error": {"code": "bad_file", "message": "m"}}')) is DatasetError
    spent = TABLE(403, {}, b'{"code": "spent"}')
    assert isinstance(spent, RateLimited)
    assert not spent.retryable
    typed = b'{"error": {"type": "invalid_request_error", "message": "m", "param": "lr"}}'
    error = TABLE(404, {}, typed)
    assert [issue.field for issue in error.issues] == ["lr"]
    assert type(TABLE(409, {}, b"")) is ConfigError
    assert type(TABLE(418, {}, b"")) is BackendUnavailable


def test_what_an_error_carries() -> None:
    """The backend, hints, the fields at fault and the id of what exists already."""
    error = TABLE(401, {}, b"")
    assert (error.backend, error.hint) == ("example", "Store a key.")
    fields = b'{"detail": [{"loc": ["body", "n"], "msg": "too large", "type": "t"}]}'
    (issue,) = TABLE(422, {}, fields).issues
    assert (issue.code, issue.field, issue.message) == ("t", "n", "too large")
    known = ErrorTable()(409, {}, b'{"job_id": "j1", "error": {"message": "exists"}}')
    assert isinstance(known, DuplicateRun)
    assert known.other == "j1"
