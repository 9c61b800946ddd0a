"""Proxies and certificates of the environment: what curl accepts works, the rest is named."""

import os
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training_backends import BackendNotInstalled, ConfigError, TrainingBackendError
from training_backends.core.redaction import redact
from training_backends.http import environment
from training_backends.http.client import HttpClient
from training_backends.http.environment import proxy_environment, proxy_for, tls_context
from training_backends.http.policy import HttpPolicy, make_pool
from training_backends.protocols.mistral.errors import error_from_answer
from training_backends.testing.server import LoopbackServer, StubReply

HOST = "https://api.provider.example"
PASSWORD = "hunter2hunter"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin without any network variable."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("SSL"):
            monkeypatch.delenv(name)


def url_of(proxy: httpx.Proxy | None) -> str | None:
    return None if proxy is None else str(proxy.url).rstrip("/")


@pytest.mark.parametrize(
    ("value", "url", "auth"),
    [
        ("http://proxy.example:3128", "http://proxy.example:3128", None),
        ("proxy.example:3128", "http://proxy.example:3128", None),
        ("HTTP://proxy.example/", "http://proxy.example", None),
        ("https://u:p%40ss@proxy.example:1", "https://proxy.example:1", ("u", "p@ss")),
        ("http://u:p@ss@proxy.example:1", "http://proxy.example:1", ("u", "p@ss")),
        ("http://u:p:a%zz@proxy.example:1", "http://proxy.example:1", ("u", "p:a%zz")),
        ("u:@[2001:db8::1]:8080", "http://[2001:db8::1]:8080", ("u", "")),
        ("socks5h://u:pw@proxy.example:1080", "socks5h://proxy.example:1080", ("u", "pw")),
    ],
)
@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_proxy_that_curl_accepts_is_used(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, url: str, auth: tuple[str, str] | None
) -> None:
    """With and without a scheme, with a password that is not escaped where that is clear."""
    monkeypatch.setenv(name, value)
    proxy = proxy_for(HOST)
    assert proxy is not None
    assert (url_of(proxy), proxy.auth) == (url, auth)


BAD_PROXIES = [
    f"http://corp:{PASSWORD}/x@proxy.example:8080",
    f"http://corp:{PASSWORD}#x@proxy.example:8080",
    f"http://corp:{PASSWORD}?x@proxy.example:8080",
    f"http://corp:x/{PASSWORD}@proxy.example:8080",
    f"corp:{PASSWORD}/x@proxy.example:8080",
    f"http://corp:{PASSWORD}",
    f"http://u:{PASSWORD}@proxy.example:port",
    f"http://u:{PASSWORD}@proxy.example:99999",
    f"http://u:{PASSWORD}@",
    f"http://u:{PASSWORD}@[::1",
    f"http://u:{PASSWORD}@a..example:1",
    f"http://u:{PASSWORD}@pro xy:1",
    f"ftp://u:{PASSWORD}@proxy.example",
    f"socks4://u:{PASSWORD}@proxy.example:1080",
    f"http://proxy.example/{PASSWORD}",
]


@pytest.mark.parametrize("value", BAD_PROXIES)
@pytest.mark.parametrize("name", ["HTTPS_PROXY", "all_proxy"])
def test_a_proxy_that_cannot_be_used_is_named_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """The message says which variable to correct; a piece of the value may be a password."""
    monkeypatch.setenv(name, value)
    for read in (lambda: make_pool(HOST, HttpPolicy()), proxy_environment):
        with pytest.raises(ConfigError, match=name) as caught:
            read()
        text = f"{caught.value} {caught.value.hint}"
        assert redact(text) == text
        assert not any(text.count(piece) for piece in (PASSWORD, PASSWORD[:7], "corp"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_no_value_is_more_than_a_named_error(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Whatever a proxy variable or NO_PROXY holds."""
    for name, form in (("HTTPS_PROXY", "{}"), ("HTTPS_PROXY", "http://{}@h"), ("NO_PROXY", "{}")):
        monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:1")
        monkeypatch.setenv(name, form.format(value))
        for read in (lambda: proxy_for(HOST), proxy_environment):
            try:
                read()
            except TrainingBackendError as error:
                assert "HTTPS_PROXY" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("base_url", "no_proxy", "direct"),
    [
        ("https://a.example", "[::1]", False),
        ("https://a.example", "localhost,fd00::/8", False),
        ("https://a.example", "a.example", True),
        ("https://a.example", ".example", True),
        ("https://a.example", "*.example", True),
        ("https://a.example.", "other, a.example", True),
        ("https://a.example", "x.a.example ample", False),
        ("https://a.example", "*", True),
        ("https://a.example:8443", "a.example:8443", True),
        ("https://a.example:8443", "a.example:443", False),
        ("https://a.example", "a.example:443", True),
        ("https://10.1.2.3", "10.0.0.0/8", True),
        ("https://10.1.2.3", "10.1.2.3", True),
        ("https://11.1.2.3", "10.0.0.0/8,10.1.2.3/99", False),
        ("https://[fd00::5]", "fd00::/8", True),
        ("https://[fd00::5]", "[fd00::5]", True),
        ("https://[fe80::5]", "fd00::/8", False),
        ("http://127.0.0.1:8321", "", True),
        ("http://localhost:8321", "", True),
        ("http://[::1]:8321", "", True),
    ],
)
def test_no_proxy_is_read_as_curl_reads_it(
    monkeypatch: pytest.MonkeyPatch, base_url: str, no_proxy: str, direct: bool
) -> None:
    """Names with what is below them, addresses, networks; this machine never has a proxy."""
    monkeypatch.setenv("ALL_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert (proxy_for(base_url) is None) is direct


def test_a_variable_that_is_not_needed_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway on this machine works whatever the proxies are."""
    monkeypatch.setenv("HTTPS_PROXY", BAD_PROXIES[0])
    monkeypatch.setenv("FTP_PROXY", BAD_PROXIES[0])
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    assert url_of(proxy_for("http://a.example")) == "http://proxy.example:3128"
    make_pool("http://127.0.0.1:8321", HttpPolicy())


def test_a_programs_variables_are_those_that_httpx_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training process is given the same proxies in a form that its libraries accept."""
    monkeypatch.setenv("HTTPS_PROXY", "u:p@ss%zz@proxy.example:1")
    monkeypatch.setenv("NO_PROXY", "[::1] 10.0.0.0/8, fd00::/8,.example")
    given = proxy_environment()
    assert given == {
        "https_proxy": "http://u:p%40ss%25zz@proxy.example:1",
        "no_proxy": "::1,10.0.0.0/8,.example",
    }
    for name in ("HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    httpx.Client().close()


def test_a_proxy_password_is_known_once_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a program that never set logs up."""
    monkeypatch.setenv("HTTPS_PROXY", f"http://u:{PASSWORD}@proxy.example:1")
    proxy_for(HOST)
    assert PASSWORD not in redact(f"the proxy said: {PASSWORD}")


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"])
def test_certificates_that_cannot_be_read_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """Missing, or without a certificate in it."""
    (tmp_path / "empty.pem").write_text("no certificate\n")
    paths = ["missing/x.pem", "empty.pem"] if name == "SSL_CERT_FILE" else ["missing/x"]
    for path in paths:
        monkeypatch.setenv(name, str(tmp_path / path))
        with pytest.raises(ConfigError, match=name):
            make_pool(HOST, HttpPolicy())
    make_pool("http://127.0.0.1:8321", HttpPolicy())


def test_empty_network_variables_are_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell script leaves them."""
    for name in ("HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.setenv(name, "")
    assert proxy_for(HOST) is None
    assert tls_context().check_hostname


def test_a_socks_proxy_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package that speaks it is missing."""
    monkeypatch.setenv("ALL_PROXY", "socks5://proxy.example:1080")
    monkeypatch.setattr(environment, "find_spec", lambda _: None)
    with pytest.raises(BackendNotInstalled, match="ALL_PROXY") as caught:
        proxy_for(HOST)
    assert caught.value.install == "pip install 'training-backends[socks]'"


class _Socks(socketserver.BaseRequestHandler):
    """SOCKS 5 without a password: connects to one server, whatever host is asked for."""

    target = ("127.0.0.1", 0)

    def handle(self) -> None:
        """Serve one connection with one request."""
        self.request.recv(100)
        self.request.sendall(b"\5\0")
        asked = self.request.recv(300)
        assert b"provider.invalid" in asked
        self.request.sendall(b"\5\0\0\1\0\0\0\0\0\0")
        with socket.create_connection(self.target) as server:
            server.sendall(self.request.recv(65536))
            while piece := server.recv(65536):
                self.request.sendall(piece)


@contextmanager
def socks_proxy(target: int) -> Iterator[int]:
    handler = type("Handler", (_Socks,), {"target": ("127.0.0.1", target)})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield proxy.server_address[1]
        proxy.shutdown()


@pytest.mark.anyio
async def test_a_socks_proxy_is_used(
    monkeypatch: pytest.MonkeyPatch, server: LoopbackServer
) -> None:
    """Host names are looked up by it."""
    pytest.importorskip("socksio")
    server._answer = lambda _: StubReply(content=b'{"ok": true}', headers={"Connection": "close"})
    with socks_proxy(server.port) as port:
        monkeypatch.setenv("ALL_PROXY", f"socks5h://127.0.0.1:{port}")
        client = HttpClient("http://provider.invalid", key=None, decode_error=error_from_answer)
        assert await client.json("GET", "/a") == {"ok": True}
        await client.aclose()


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["a" * 70 + ".example", "a..example", "xn--a.example"])
async def test_a_host_that_cannot_be_looked_up_is_an_error_of_ours(host: str) -> None:
    """A name that IDNA does not allow raises UnicodeError in the socket library."""
    client = HttpClient(
        f"https://{host}", key=None, decode_error=error_from_answer, policy=HttpPolicy(attempts=1)
    )
    with pytest.raises(TrainingBackendError):
        await client.json("GET", "/a")
    await client.aclose()
