"""`serve` as a process: its options, and keys that others revoke meanwhile."""

import json
import os
import signal
import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.forking import Program

pytestmark = pytest.mark.e2e

Run = Any


def test_a_key_that_another_process_revokes_stops_at_once(
    run: Run, tmp_path: Path, program: Program
) -> None:
    """Over https, as a server in another process serves it."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=x"
    )
    names = ("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert)
    subprocess.run([*make.split(), *names], check=True, capture_output=True, timeout=60)
    made = run("keys", "create", "--json").document
    files = ("--tls-cert", str(cert), "--tls-key", str(key))
    command = [*program.command, "serve", "--port", "0", "--json", *files]
    trusting = ssl.create_default_context(cafile=cert)
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as server,
        httpx.Client(verify=trusting, headers={"authorization": f"Bearer {made['key']}"}) as http,
    ):
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            assert url.startswith("https://127.0.0.1:")
            assert http.get(f"{url}/v1/models").status_code == 200
            listed = run("keys", "list", "--json").document
            assert listed[0]["last_used_at"] is not None
            assert run("keys", "revoke", made["id"]).code == 0
            answer = http.get(f"{url}/v1/models")
            refused = {"detail": "This API key is revoked."}
            assert (answer.status_code, answer.json()) == (401, refused)
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(30) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tls-cert", "none.pem"), "none.pem: gateway.tls_cert: cannot be read"),
        (("--tls-key", "none.pem"), "TLS needs a certificate"),
        (("--host", "0.0.0.0"), "pass --plain-http"),
    ],
)
def test_what_cannot_be_served_safely_is_not(run: Run, words: tuple[str, ...], said: str) -> None:
    """Exit code 3, with what to do, before anything is begun."""
    done = run("serve", "--port", "0", *words)
    assert done.code == 3
    assert said in done.err
