"""https on the gateway, and what it does where there is none."""

import ssl
import subprocess
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from pydantic import AnyHttpUrl, SecretStr

from tests.gateway.conftest import KEY, jsonl, scripted, site
from training_backends.core.errors import ConfigError
from training_backends.gateway.server import running
from training_backends.gateway.settings import GatewaySettings

pytestmark = pytest.mark.anyio

PASSWORD = "opens-the-private-key"
HEADERS = {"authorization": f"Bearer {KEY}"}


@dataclass(frozen=True)
class Pair:
    """A certificate that vouches for itself, and its private key, open and encrypted."""

    cert: Path
    key: Path
    encrypted: Path


def openssl(*words: str | Path) -> None:
    """Run openssl."""
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True, timeout=60)


def make_pair(directory: Path, name: str) -> Pair:
    """Make a certificate for this machine."""
    paths = (directory / f"{name}.{kind}.pem" for kind in ("cert", "key", "encrypted"))
    pair = Pair(*paths)
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    names = ("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost")
    openssl("req", "-x509", *curve, *names, "-keyout", pair.key, "-out", pair.cert)
    locked = ("-topk8", "-passout", f"pass:{PASSWORD}")
    openssl("pkcs8", *locked, "-in", pair.key, "-out", pair.encrypted)
    return pair


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The gateway's certificate."""
    return make_pair(tmp_path_factory.mktemp("server"), "gateway")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A client's certificate."""
    return make_pair(tmp_path_factory.mktemp("client"), "client")


def trusting(server: Pair, own: Pair | None = None) -> ssl.SSLContext:
    """Trust the gateway's certificate alone, and show one's own."""
    context = ssl.create_default_context(cafile=server.cert)
    if own:
        context.load_cert_chain(own.cert, own.key)
    return context


async def test_the_api_is_served_over_https(tmp_path: Path, server: Pair) -> None:
    """Uploads, downloads and signed links included; plain http is not answered there."""
    content = jsonl() * 20_000
    async with site(tmp_path, tls_cert=server.cert, tls_key=server.key) as here:
        url = here.served.url
        assert url.startswith("https://127.0.0.1:")
        async with httpx.AsyncClient(
            base_url=url, headers=HEADERS, verify=trusting(server), timeout=30
        ) as http:
            answer = await http.post("/v1/files", files={"file": ("a.jsonl", content)})
            file_id = answer.json()["id"]
            assert (await http.get(f"/v1/files/{file_id}/content")).content == content
            link = (await http.get(f"/v1/files/{file_id}/url")).json()["url"]
            assert link.startswith(f"{url}/files/")
            assert (await http.get(link)).content == content
        with pytest.raises(httpx.ConnectError):
            await here.http.get("/health")  # it does not trust the certificate
        async with httpx.AsyncClient() as http:
            with pytest.raises(httpx.RemoteProtocolError):
                await http.get(url.replace("https", "http") + "/health")


async def test_the_private_key_may_be_encrypted(tmp_path: Path, server: Pair) -> None:
    """Its password comes from the settings and is never shown."""
    options: dict[str, Any] = {"tls_key": server.encrypted, "tls_key_password": SecretStr(PASSWORD)}
    assert PASSWORD not in repr(GatewaySettings(**options))
    async with (
        site(tmp_path, tls_cert=server.cert, **options) as here,
        httpx.AsyncClient(verify=trusting(server)) as http,
    ):
        assert (await http.get(f"{here.served.url}/health")).status_code == 200


async def test_one_file_may_hold_certificate_and_key(tmp_path: Path, server: Pair) -> None:
    """As some programs write them."""
    both = tmp_path / "both.pem"
    both.write_bytes(server.cert.read_bytes() + server.key.read_bytes())
    async with (
        site(tmp_path / "home", tls_cert=both) as here,
        httpx.AsyncClient(verify=trusting(server)) as http,
    ):
        assert (await http.get(f"{here.served.url}/health")).status_code == 200


async def test_clients_can_be_asked_for_a_certificate(
    tmp_path: Path, server: Pair, client: Pair
) -> None:
    """Without one of the authorities named nobody gets as far as a request."""
    files: dict[str, Any] = {
        "tls_cert": server.cert,
        "tls_key": server.key,
        "tls_client_ca": client.cert,
    }
    async with site(tmp_path, **files) as here:
        url = f"{here.served.url}/v1/models"
        async with httpx.AsyncClient(verify=trusting(server, client), headers=HEADERS) as http:
            assert (await http.get(url)).status_code == 200
        for stranger in (None, server):
            async with httpx.AsyncClient(verify=trusting(server, stranger)) as http:
                with pytest.raises(httpx.TransportError):
                    await http.get(url, headers=HEADERS)
        async with httpx.AsyncClient(verify=trusting(server, client)) as http:
            assert (await http.get(url)).status_code == 401  # a certificate is no key


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tls_key": "key"}, ["TLS needs a certificate"]),
        ({"tls_client_ca": "cert"}, ["TLS needs a certificate"]),
        ({"tls_cert": "none", "tls_key": "key"}, ["none", "gateway.tls_cert", "No such file"]),
        ({"tls_cert": "cert", "tls_key": "none"}, ["none", "gateway.tls_key", "No such file"]),
        (
            {"tls_cert": "junk", "tls_key": "key"},
            ["junk", "gateway.tls_cert", "no PEM certificate"],
        ),
        (
            {"tls_cert": "cert", "tls_key": "junk"},
            ["junk", "gateway.tls_key", "no PEM private key"],
        ),
        ({"tls_cert": "cert"}, ["gateway.tls_cert", "no PEM private key"]),
        ({"tls_cert": "cert", "tls_key": "other"}, ["gateway.tls_key", "does not match"]),
        ({"tls_cert": "cert", "tls_key": "encrypted"}, ["encrypted", "tls_key_password"]),
        (
            {"tls_cert": "cert", "tls_key": "key", "tls_client_ca": "junk"},
            ["junk", "gateway.tls_client_ca", "no PEM certificate"],
        ),
    ],
)
async def test_files_that_cannot_be_used_are_named(
    tmp_path: Path, server: Pair, client: Pair, files: dict[str, str], said: list[str]
) -> None:
    """Before anything is begun, with what is wrong, and never with a prompt."""
    junk = tmp_path / "junk"
    junk.write_text("junk\n")
    known: dict[str, Any] = {
        "cert": server.cert,
        "key": server.key,
        "encrypted": server.encrypted,
        "other": client.key,
        "junk": junk,
        "none": tmp_path / "none",
    }
    settings = GatewaySettings(**{name: known[file] for name, file in files.items()})
    with pytest.raises(ConfigError) as raised:
        async with running(settings, home=tmp_path / "home", backend="scripted", port=0):
            pass
    told = " ".join((raised.value.message, *map(str, raised.value.issues)))
    for words in said:
        assert words in told
    assert not (tmp_path / "home").exists()


async def test_a_wrong_password_is_told_but_not_repeated(tmp_path: Path, server: Pair) -> None:
    """The error names the setting."""
    wrong = SecretStr("a-wrong-password")
    settings = GatewaySettings(
        tls_cert=server.cert, tls_key=server.encrypted, tls_key_password=wrong
    )
    with pytest.raises(ConfigError) as raised:
        async with running(settings, home=tmp_path, backend="scripted", port=0):
            pass
    told = str(raised.value.issues[0])
    assert "cannot decrypt the private key" in told
    assert "a-wrong-password" not in told


def beyond(home: Path, **options: Any) -> Any:
    """Serve on every address of this machine."""
    return running(
        GatewaySettings(**options),
        home=home,
        backend="scripted",
        host="0.0.0.0",
        port=0,
        backends={"scripted": scripted()},
    )


async def test_plain_http_beyond_this_machine_is_refused(tmp_path: Path) -> None:
    """Keys would cross the network in the clear; the hint names the ways on."""
    with pytest.raises(ConfigError, match="would be sent unencrypted") as raised:
        async with beyond(tmp_path):
            pass
    for way in ("--tls-cert", "PUBLIC_URL", "--plain-http"):
        assert way in str(raised.value.hint)
    assert not (tmp_path / "gateway").exists()


async def test_plain_http_beyond_this_machine_can_be_asked_for(
    tmp_path: Path, logs: list[Any]
) -> None:
    """And is logged."""
    async with beyond(tmp_path, plain_http=True) as served:
        assert served.url.startswith("http://")
    assert any("plain HTTP" in entry["event"] for entry in logs)


async def test_behind_a_proxy_with_tls_plain_http_is_fine(tmp_path: Path, logs: list[Any]) -> None:
    """An https address for clients says that there is one."""
    async with beyond(tmp_path, public_url=AnyHttpUrl("https://tuning.example.org")):
        pass
    assert not any("plain HTTP" in entry["event"] for entry in logs)
    with pytest.raises(ConfigError):
        async with beyond(tmp_path, public_url=AnyHttpUrl("http://tuning.example.org")):
            pass


async def test_with_tls_every_address_may_be_served(tmp_path: Path, server: Pair) -> None:
    """Nothing has to be said twice."""
    async with beyond(tmp_path, tls_cert=server.cert, tls_key=server.key) as served:
        assert served.url.startswith("https://")


async def test_connections_that_never_begin_a_handshake_count_towards_the_limit(
    tmp_path: Path, server: Pair
) -> None:
    """The one above the limit is closed at once."""
    async with (
        site(tmp_path, max_connections=4, tls_cert=server.cert, tls_key=server.key) as here,
        AsyncExitStack() as stack,
    ):
        url = httpx.URL(here.served.url)
        for _ in range(5):
            last = await anyio.connect_tcp(url.host, url.port or 443)
            await stack.enter_async_context(last)
        with anyio.fail_after(20), pytest.raises(anyio.EndOfStream):
            await last.receive()
