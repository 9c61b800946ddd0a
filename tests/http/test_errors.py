"""Transport errors in our words."""

import httpx
import pytest

from training_backends import BackendUnavailable, ConfigError, ProtocolError, TrainingBackendError
from training_backends.http.errors import error_from_transport

CALL = "POST https://host/v1/files"


def kinds_of(base: type[httpx.HTTPError]) -> list[type[httpx.HTTPError]]:
    """Return all errors of httpx that can be raised by themselves."""
    found = [kind for child in base.__subclasses__() for kind in kinds_of(child)]
    return found or [base]


@pytest.mark.parametrize("sent", [True, False])
@pytest.mark.parametrize("kind", kinds_of(httpx.TransportError))
def test_each_error_is_translated(kind: type[httpx.TransportError], sent: bool) -> None:
    """Every transport error that httpx has becomes one of ours that names the call."""
    error = error_from_transport(kind("why"), call=CALL, sent=sent, backend="mistral")
    assert isinstance(error, TrainingBackendError)
    assert error.message.startswith(CALL)
    assert error.backend == "mistral"
    if isinstance(error, BackendUnavailable):
        assert error.sent is sent
        assert "request failed" not in error.message


def test_bad_certificate_is_not_tried_again() -> None:
    """A certificate that cannot be trusted will not get better; the hint says what may help."""
    error = error_from_transport(
        httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"), call=CALL, sent=False
    )
    assert isinstance(error, BackendUnavailable)
    assert (error.retryable, error.sent) == (False, False)
    assert "SSL_CERT_FILE" in str(error.hint)


def test_what_is_not_the_network_is_told_apart() -> None:
    """A bad URL and a broken encoding are no network trouble."""
    assert isinstance(
        error_from_transport(httpx.UnsupportedProtocol("x"), call=CALL, sent=False), ConfigError
    )
    assert isinstance(
        error_from_transport(httpx.DecodingError("x"), call=CALL, sent=True), ProtocolError
    )
