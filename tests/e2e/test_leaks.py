"""No secret is anywhere but where it was put: not after any command, nor any failure.

Secrets are planted wherever the program takes one. Then every command is run, in every way to
fail that can be reached, with debug logs; and all that came of it is searched: what was written
to the terminal and to programs, logs, stores, run directories, the arguments of processes and
the environment of those that need no secret.
"""

import base64
import json
import os
import pickle
import re
import socket
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from pydantic import SecretStr

from tests.e2e.leaks import (
    API_KEY,
    FILE_PASSWORD,
    GATEWAY_KEY,
    HUB_TOKEN,
    PATIENCE,
    PROXY_PASSWORD,
    SECRETS,
    STORE_PASSWORD,
    STRANGE_KEY,
    WANDB_KEY,
    World,
    command,
    forms_of,
    settings,
    watched_processes,
)
from tests.forking import Program, Trainer
from tests.plugins import install_backend
from tests.waiting import wait_until
from training_backends import AsyncTrainingClient, TrainingBackendError, TrainingConfig
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.backends.mistral.settings import MistralSettings
from training_backends.cli.main import app
from training_backends.core.backend import RemoteFilters
from training_backends.credentials.vault import CredentialVault
from training_backends.gateway.settings import GatewaySettings
from training_backends.testing.faults import CutAnswer, Fault, LoseAnswer, OtherAnswer, SlowAnswer
from training_backends.testing.provider import ScriptedProvider
from training_backends.testing.server import LoopbackServer, StubReply

pytestmark = pytest.mark.e2e


@pytest.fixture
def world(tmp_path: Path, program: Program) -> World:
    """Set the machine up."""
    return World(tmp_path, program.python)


@pytest.fixture
def provider() -> Iterator[ScriptedProvider]:
    """Run a provider that knows the API key."""
    with ScriptedProvider() as provider:
        provider.key = API_KEY
        yield provider


@pytest.mark.parametrize("name", SECRETS)
def test_the_search_finds_what_it_looks_for(name: str, world: World) -> None:
    """In files, names of files and output; quoted, in base64, in part."""
    secret = SECRETS[name]
    for number, text in enumerate(
        (
            f"x{secret}x",
            f"x{secret.upper()}x",
            f"cut {secret[:-3]}",
            f"?key={quote(secret, safe='')}&",
            repr(base64.b64encode(f"u:{secret}".encode())),
            json.dumps({"key": secret}),
        )
    ):
        (world.seen / str(number)).write_text(text)
        world.look_at("it", text.encode())
        assert len(world.found) == number + 1
        assert name in world.found[-1]
    with pytest.raises(AssertionError, match=name):
        world.assert_clean()


# -- every command -----------------------------------------------------------------------------

WITH_SECRETS: dict[str, Any] = {
    "integrations": [{"project": "p"}],
    "options": {
        "repositories": [{"owner": "o", "name": "n", "credential": "huggingface"}],
    },
}

LIFE = [
    command("backends"),
    command("backends", "--json"),
    command("init", "new.yaml", "--backend", "mistral", "--with-schema"),
    command("validate", "run.yaml"),
    command("estimate", "run.yaml", "--json"),
    command("data", "preview", "run.yaml"),
    command("data", "preview", "run.yaml", "--json"),
    command("port", "run.yaml", "--to", "openai", code=3),
    command("launch", "run.yaml", "--id", "first", "--yes"),
    command("launch", "run.yaml", "--id", "first", "--yes", "--json"),
    command("list"),
    command("list", "--json"),
    command("status", "first"),
    command("logs", "first", "--json"),
    command("wait", "first"),
    command("logs", "first", "--follow"),
    command("metrics", "first"),
    command("checkpoints", "first"),
    command("compare", "first", "first", code=2),
    command("pause", "first", code=9),
    command("stop", "first", "--json"),
    command("resume", "first", "--yes", code=9),
    command("download", "first", "model"),
    command("push", "first", "hf://org", code=3),
    command("eval", "first", "train.jsonl", "--output", "answers.jsonl"),
    command("launch", "run.yaml", "--id", "second", "--yes", "--follow", "--json"),
    command(
        *("launch", "run.yaml", "--id", "sweep", "--yes"),
        *("--grid", "hyperparameters.learning_rate=0.001,0.002"),
    ),
    command("delete", "--tag", "grid=sweep", "--yes"),
    command("delete", "first", "--yes", "--json"),
    command("credentials", "test", "mistral"),
    command("credentials", "list"),
    command("projects", "set", "p", "--steps", "5"),
    command("projects", "list"),
    command("projects", "cleanup", "--older-than", "1d", "--yes"),
    command("audit", "export", "--json"),
    command("credentials", "list", "--json"),
    command("doctor", code=(0, 1)),
    command("doctor", "--json", code=(0, 1)),
]


def test_a_whole_life_at_a_provider(world: World, provider: ScriptedProvider) -> None:
    """Every command on a run whose provider is sent all of the keys."""
    world.config(**WITH_SECRETS)
    url = provider.base_url
    world.run_all(LIFE, settings(MISTRAL__BASE_URL=url))
    sent = b"".join(request.body for request in provider.asked("POST", "/jobs"))
    assert WANDB_KEY.encode() in sent
    assert HUB_TOKEN.encode() in sent
    world.assert_clean()


def test_every_command_is_run_here() -> None:
    """One that is added later is looked at too."""
    source = Path(__file__).read_text()
    groups = [(group.name, group.typer_instance) for group in app.registered_groups]
    for group, commands in [(None, app), *groups]:
        assert commands is not None
        for each in commands.registered_commands:
            assert each.callback is not None
            name = each.name or each.callback.__name__
            words = ",".join(f'\\s*"{word}"' for word in (group, name) if word)
            assert re.search(rf"\({words}", source), f"{group or ''} {name}"


# -- what a server may answer ------------------------------------------------------------------


def echoes(key: str) -> str:
    """Repeat a key in many ways, as servers and proxies do that mean to help."""
    inner = json.dumps({"headers": {"Authorization": f"Bearer {key}"}, "api_key": key})
    in_base64 = base64.b64encode(f":{key}".encode()).decode()
    return f"bad key {key}, sent {inner}, ?api_key={quote(key, safe='')}, Basic {in_base64}"


def echo(status: int, body: Any = None, **headers: str) -> OtherAnswer:
    """Answer with all of the secrets that the client sends."""
    text = f"{echoes(API_KEY)}; {echoes(WANDB_KEY)}; {echoes(HUB_TOKEN)}"
    return OtherAnswer(status=status, body=body or {"message": text}, headers=headers)


ANSWERS: Mapping[str, tuple[Fault, Sequence[int]]] = {
    "401": (echo(401), (4,)),
    "403": (echo(403), (4,)),
    "404": (echo(404), (5,)),
    "409": (echo(409), (6,)),
    "410": (echo(410), (8,)),
    "413": (echo(413), (3,)),
    "418": (echo(418), (8,)),
    "422": (
        echo(
            422,
            {"detail": [{"type": "x", "loc": ["body", API_KEY], "msg": echoes(API_KEY)}]},
        ),
        (3,),
    ),
    "429": (echo(429, **{"Retry-After": "0"}), (8,)),
    "500": (echo(500), (8,)),
    "500 in plain text": (echo(500, f"panic: {echoes(API_KEY)}"), (8,)),
    "503": (echo(503, **{"Retry-After": "3600"}), (8,)),
    "a web page": (echo(200, f"<html>{echoes(API_KEY)}</html>"), (8,)),
    "another document": (echo(200, {"data": echoes(API_KEY), "total": API_KEY}), (8,)),
    "redirect": (
        echo(302, "moved", Location=f"https://u:{API_KEY}@example.org/{API_KEY}?k={API_KEY}"),
        (8,),
    ),
    "cut": (CutAnswer(), (8,)),
    "lost": (LoseAnswer(), (8,)),
}


def test_whatever_the_server_answers(world: World, provider: ScriptedProvider) -> None:
    """Refusals and nonsense that repeat what was sent, as they come out of a command."""
    world.config(**WITH_SECRETS)
    for fault, _ in ANSWERS.values():
        provider.fail(fault, method="GET", times=1)
        if isinstance(fault, CutAnswer | LoseAnswer) or getattr(fault, "status", 0) in {429, 500}:
            provider.fail(fault, method="GET", times=1)
    tries = [
        command("credentials", "test", "mistral", *(["--json"] if number % 3 else []), code=codes)
        for number, (_, codes) in enumerate(ANSWERS.values())
    ]
    world.run_all(tries, settings(MISTRAL__BASE_URL=provider.base_url))
    assert len(provider.asked("GET")) >= len(ANSWERS) - 2  # a long pause is kept across calls
    world.assert_clean()


def test_whatever_becomes_of_a_launch(world: World, provider: ScriptedProvider) -> None:
    """Its requests hold every key; refused, beyond the budget, retired, unreachable."""
    world.config(**WITH_SECRETS)
    world.config("dear.yaml", **WITH_SECRETS, budget={"max_cost": "0.01 USD"})
    words = {"detail": [{"type": "x", "loc": ["body"], "msg": "no", "input": echoes(WANDB_KEY)}]}
    provider.fail(echo(422, words), method="POST", path="/jobs", times=1)
    provider.fail(echo(500), method="POST", path="/jobs", times=1)
    provider.fail(echo(401), method="POST", path="/files", times=1)
    server = settings(MISTRAL__BASE_URL=provider.base_url)
    proxied = settings(MISTRAL__BASE_URL="https://provider.invalid")
    with LoopbackServer(lambda _: StubReply(status=407)) as proxy:
        password = quote(PROXY_PASSWORD, safe="")
        proxied["HTTPS_PROXY"] = f"http://user:{password}@127.0.0.1:{proxy.port}"
        world.run_all(
            [
                command("launch", "run.yaml", "--id", "refused-key", "--yes", code=4, given=server),
                command("launch", "run.yaml", "--id", "refused-job", "--yes", code=3, given=server),
                command("status", "refused-job", "--json", given=server),
                command("launch", "run.yaml", "--id", "broken", "--yes", code=(0, 8), given=server),
                command("launch", "dear.yaml", "--id", "dear", "--json", code=(6, 7), given=server),
                command("launch", "run.yaml", "--id", "nobody-to-ask", code=2, given=server),
                command("launch", "run.yaml", "--id", "nobody-there", "--yes", "--json", code=8),
                command("list", "--json"),
                command("doctor", code=1),
                command("credentials", "test", "mistral", code=8, given=proxied),
                command("doctor", code=1, given=proxied),
                command("doctor", code=1, given=settings(MISTRAL__BASE_URL="http://h.invalid")),
            ]
        )
    provider.retired = True
    world.run_all(
        [
            command("launch", "run.yaml", "--id", "retired", "--yes", code=8, given=server),
            command("launch", "run.yaml", "--id", "refused-job", "--yes", code=8, given=server),
        ]
    )
    world.assert_clean()


def test_a_launch_that_is_interrupted(world: World, provider: ScriptedProvider) -> None:
    """Ctrl-C in the midst of the request that holds all keys, and while it is followed."""
    world.config(**WITH_SECRETS)
    provider.fail(SlowAnswer(pause=1.0), method="POST", path="/jobs")
    given = settings(MISTRAL__BASE_URL=provider.base_url)
    with (
        watched_processes(world),
        world.started("launch", "run.yaml", "--id", "cut", "--yes", given=given) as launch,
    ):
        wait_until(lambda: provider.asked("POST", "/jobs"))
        world.look_everywhere()  # with the store open, its log beside it
        assert launch.interrupt() == 130
    world.assert_clean()


def test_what_a_provider_says_of_a_job(world: World, provider: ScriptedProvider) -> None:
    """Its events may repeat the keys that it was sent; they end in logs and in the store."""
    world.config(**WITH_SECRETS)
    given = settings(MISTRAL__BASE_URL=provider.base_url)
    provider.auto = "validate"
    world.run_all([command("launch", "run.yaml", "--id", "told", "--yes")], given)
    (job,) = provider.jobs
    said = f"{echoes(API_KEY)}; wandb: login failed for {WANDB_KEY}, {echoes(HUB_TOKEN)}"
    provider.set_status(job, "RUNNING", message=said, api_key=WANDB_KEY)
    provider.set_status(job, "FAILED", error={"message": said, "request": {"body": said}})
    world.run_all(
        [
            command("logs", "told"),
            command("logs", "told", "--json"),
            command("status", "told", "--json"),
            command("wait", "told", code=10),
            command("list", "--json"),
        ],
        given,
    )
    assert "login failed" in (world.seen / "output-2" / "0.out").read_text()
    world.assert_clean()


# -- what a user may get wrong -----------------------------------------------------------------


def test_a_secret_where_it_does_not_belong(world: World) -> None:
    """Typed as an argument or option, or written into a configuration: it is not repeated."""
    world.config()
    configs: dict[str, dict[str, Any]] = {
        "no-such-field.yaml": {"integrations": [{"project": "p", "api_key": STRANGE_KEY}]},
        "in-place-of-name.yaml": {"integrations": [{"project": "p", "credential": WANDB_KEY}]},
        "upper-case.yaml": {"integrations": [{"project": "p", "credential": API_KEY}]},
        "option.yaml": {"options": {"api_key": STRANGE_KEY}},
        "token.yaml": {
            "options": {"repositories": [{"owner": "o", "name": "n", "token": HUB_TOKEN}]}
        },
        "number.yaml": {"budget": {"max_cost": API_KEY}, "hyperparameters": {"epochs": API_KEY}},
    }
    for name, fields in configs.items():
        world.config(name, **fields)
    broken = world.planted / "broken.yaml"
    broken.write_text(f'backend: mistral\nintegrations:\n  - api_key: "{STRANGE_KEY}\n')
    world.run_all(
        [
            command("credentials", "set", "mistral", STRANGE_KEY, code=2),
            command("credentials", "set", "mistral", STRANGE_KEY, "--json", code=2),
            command("credentials", "set", "mistral", f"--key={STRANGE_KEY}", code=2),
            command("credentials", "set", f"mistral={STRANGE_KEY}", code=(2, 3)),
            command("credentials", "test", "mistral", API_KEY, code=2),
            command("credentials", "delete", "mistral", HUB_TOKEN, "--json", code=2),
            command("keys", "create", API_KEY, code=2),
            command("keys", "revoke", GATEWAY_KEY, code=4),
            command("serve", f"--api-key={STRANGE_KEY}", code=2),
            command("serve", "--port", API_KEY, code=2),
            command("status", API_KEY, "--json", code=5),
            command("launch", "run.yaml", API_KEY, code=2),
            command("launch", "run.yaml", "--set", f"api_key={STRANGE_KEY}", "--yes", code=(2, 3)),
            command("launch", "run.yaml", "--set", f"options.api_key={STRANGE_KEY}", code=(2, 3)),
            command("launch", f"{HUB_TOKEN}.yaml", code=(2, 3)),
            *(command("validate", name, code=3) for name in configs),
            *(command("launch", name, "--yes", "--json", code=(3, 4)) for name in configs),
            command("validate", "broken.yaml", "--json", code=3),
            command("list", "--json"),
        ]
    )
    world.assert_clean()


def test_settings_that_cannot_be_used(world: World) -> None:
    """Misspelt, broken, of the wrong kind: what stands in them is not repeated."""
    user = f"user:{quote(STORE_PASSWORD, safe='')}"
    plain = f"user:{STORE_PASSWORD}"
    urls = [
        f"postgresql+psycopg://{user}@127.0.0.1:1/runs",
        f"postgresql://{user}@127.0.0.1:1/runs",
        f"mysql://{plain}@127.0.0.1/runs",
        f"nothing://{user}@host/runs",
        f"sqlite://{user}@host/runs.db",
        f"postgresql//{plain}@host",
        f"postgresql://{plain}@host:port/runs",
    ]
    world.run_all(
        [
            *(command("list", code=(1, 3, 8), given=settings(STORE_URL=url)) for url in urls),
            *(
                command("doctor", "--json", code=(1, 3, 8), given=settings(STORE_URL=url))
                for url in urls[:2]
            ),
            *(
                command("doctor", code=(0, 1, 3), given=settings(MISTRAL__BASE_URL=url))
                for url in (
                    f"https://user:{STRANGE_KEY}@host",
                    f"https://host/?api_key={STRANGE_KEY}",
                    f"{STRANGE_KEY}",
                    f"https://host:{STRANGE_KEY}",
                )
            ),
            command("list", code=(0, 3), given=settings(GATEWAY__APIKEY=STRANGE_KEY)),
            command("serve", code=3, given=settings(GATEWAY__APIKEY=STRANGE_KEY)),
            command("serve", code=3, given=settings(GATEWAY__PORT=STRANGE_KEY)),
            command("list", code=3, given=settings(LOG_LEVEL=STRANGE_KEY)),
        ]
    )
    world.assert_clean()


PIECES = ("leftcanary", "rightcanary")
BROKEN = [delimiter.join(PIECES) for delimiter in ("/", "#", "?", "@", ":", "%", "%zz", "/@:#")]
"""Passwords that were not percent-encoded, so that a parser takes a piece for a host or port."""


def know_pieces(world: World) -> None:
    world.secrets |= {piece: frozenset({piece[:8].encode()}) for piece in PIECES}


def proxies(url: str) -> dict[str, str]:
    return {"HTTPS_PROXY": url, "https_proxy": url, "ALL_PROXY": url}


def test_no_piece_of_a_proxy_password_is_shown(world: World) -> None:
    """Neither by a command, nor in what a failed launch leaves, nor by the training process."""
    know_pieces(world)
    world.config()
    world.config("hub.yaml", backend="local", model="owner/model")
    elsewhere = settings(MISTRAL__BASE_URL="https://provider.invalid", MISTRAL__ATTEMPTS="1")
    commands = []
    for number, password in enumerate(BROKEN):
        given = {**elsewhere, **proxies(f"http://user:{password}@127.0.0.1:9")}
        commands += [
            command("credentials", "test", "mistral", code=(3, 8), given=given),
            command("launch", "run.yaml", "--id", f"m{number}", "--yes", code=(3, 8), given=given),
            command("validate", "hub.yaml", code=(0, 3), given=given),
            command("doctor", "--json", code=1, given=given),
        ]
        if password[len(PIECES[0])] in "/#?":  # else it is a proxy, and a process would train
            launch = command("launch", "hub.yaml", "--id", f"l{number}", code=3, given=given)
            commands.append(launch)
    for url in ("ftp://{}@h", "socks4://u:{}@h:1", "u:{}@h:port", "http://{}@h/path", "{}"):
        given = {**elsewhere, **proxies(url.format(BROKEN[0]))}
        commands.append(command("credentials", "test", "mistral", code=(3, 8), given=given))
    commands += [command("list", "--json"), command("logs", "m0", code=(0, 5))]
    world.run_all(commands)
    assert "HTTPS_PROXY" in (world.seen / "output-1" / "0.err").read_text().upper()
    world.assert_clean()


def test_no_piece_of_a_proxy_password_is_sent_to_clients_of_the_gateway(world: World) -> None:
    """A job that needs the model hub fails; its events are sent to whoever has a key."""
    know_pieces(world)
    given = proxies(f"http://user:{BROKEN[0]}@127.0.0.1:9")
    with world.started("serve", "--port", "0", "--json", given=given) as served:
        wait_until(lambda: b"\n" in served.out.read_bytes())
        url = json.loads(served.out.read_bytes())["url"]
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {GATEWAY_KEY}"}) as http:
            data = (world.planted / "train.jsonl").read_bytes()
            files = {"file": ("train.jsonl", data, "application/jsonl")}
            file_id = http.post("/v1/files", files=files, data={"purpose": "fine-tune"}).json()[
                "id"
            ]
            job = {
                "model": "open-mistral-7b",
                "training_files": [{"file_id": file_id}],
                "hyperparameters": {"training_steps": 4},
                "auto_start": True,
            }
            made = http.post("/v1/fine_tuning/jobs", json=job).json()
            path = f"/v1/fine_tuning/jobs/{made['id']}"
            ended = {"FAILED", "FAILED_VALIDATION"}
            wait_until(lambda: http.get(path).json()["status"] in ended)
            world.look_at("the job at the gateway", http.get(path).content)
            assert "PROXY" in http.get(path).text.upper()
        assert served.interrupt() == 0
    world.assert_clean()


def test_no_piece_of_a_password_in_a_setting_is_shown(world: World) -> None:
    """Of a base URL, a hub, a store, given by a variable or in the settings file."""
    know_pieces(world)
    commands = []
    for password in BROKEN:
        for name, url in (
            ("MISTRAL__BASE_URL", f"https://user:{password}@host.invalid"),
            ("LOCAL__HUB_URL", f"https://user:{password}@host.invalid:443"),
            ("STORE_URL", f"postgresql://user:{password}@127.0.0.1:1/runs"),
            ("GATEWAY__PUBLIC_URL", f"https://user:{password}@host.invalid"),
        ):
            given = settings(**{name: url})
            commands.append(command("doctor", code=(0, 1, 3, 8), given=given))
            if name == "STORE_URL":
                commands.append(command("list", "--json", code=(1, 3, 8), given=given))
    world.run_all(commands)
    world.assert_clean()


def test_a_dotenv_of_somebody_else_sends_no_key_away(world: World) -> None:
    """The directory is a cloned repository that names its own servers."""
    with LoopbackServer(lambda _: StubReply(status=401, content=b"{}")) as attacker:
        (world.planted / ".env").write_text(
            f"TRAINING_BACKENDS_MISTRAL__BASE_URL={attacker.base_url}\n"
            f"TRAINING_BACKENDS_LOCAL__HUB_URL={attacker.base_url}\n"
            f"ALL_PROXY={attacker.base_url}\nTRAINING_BACKENDS_GATEWAY__PORT={STRANGE_KEY}\n"
            f"broken line {STRANGE_KEY}\n"
        )
        world.run_all(
            [
                command("credentials", "test", "mistral", code=8),
                command("doctor", code=1),
                command("serve", "--port", "0", "--tls-cert", "password", code=3),
            ]
        )
        assert attacker.requests == []
    world.assert_clean()


def test_settings_files_that_cannot_be_used(world: World) -> None:
    """`config.toml`, with a secret in the line that is wrong, or beside it."""
    commands = []
    for number, text in enumerate(
        (
            f'[gateway]\napi_key = "{STRANGE_KEY}',
            f'[gateway]\nkey = "{STRANGE_KEY}"\n',
            f'[gateway]\nport = "{STRANGE_KEY}"\n',
            f'[gateway]\napi_key = "{STRANGE_KEY}"\nport = -1\n',
            f'gateway = "{STRANGE_KEY}"\n',
            f'store_url = "postgresql://user:{STRANGE_KEY}@127.0.0.1:1/runs"\n',
        )
    ):
        file = world.planted / str(number) / "training-backends" / "config.toml"
        file.parent.mkdir(parents=True)
        file.write_text(text)
        given = {"XDG_CONFIG_HOME": str(file.parent.parent)}
        commands.append(command("list", "--json", code=(0, 1, 3, 8), given=given))
        commands.append(command("doctor", code=(0, 1, 3, 8), given=given))
    world.run_all(commands)
    world.assert_clean()


# -- where secrets are kept --------------------------------------------------------------------


def test_the_encrypted_keyring(world: World, provider: ScriptedProvider) -> None:
    """Stored, used, tried with the wrong password, locked, broken, deleted."""
    (world.planted / "wrong").write_text(STRANGE_KEY)
    (world.planted / "wrong").chmod(0o600)
    (world.planted / "open").write_text(FILE_PASSWORD)
    (world.planted / "open").chmod(0o644)
    file = "TRAINING_BACKENDS_CREDENTIALS__PASSWORD_FILE"
    locked = {**settings(CREDENTIALS__KEYRING="file"), "MISTRAL_API_KEY": ""}
    locked |= settings(MISTRAL__BASE_URL=provider.base_url)
    opened = {**locked, file: "password"}
    store, trial = ("credentials", "set", "mistral"), ("credentials", "test", "mistral")
    world.run_all(
        [
            command(*store, stdin=f"{API_KEY}\n", given=opened),
            command("credentials", "set", "wandb", "--json", stdin=WANDB_KEY, given=opened),
            command("credentials", "list", "--json", given=opened),
            command(*trial, given=opened),
            command("doctor", code=(0, 1), given=opened),
            command(*store, code=3, stdin=f"{API_KEY} {STRANGE_KEY}\n", given=opened),
            command(*trial, code=4, given=locked),
            command(*trial, code=4, given={**opened, file: "wrong"}),
            command(*trial, code=4, given={**opened, file: "open"}),
            command("doctor", "--json", code=(0, 1), given={**opened, file: "wrong"}),
            command("credentials", "delete", "wandb", given=opened),
            command("credentials", "delete", "wandb", "--json", code=(4, 5), given=opened),
            command(*store, code=4, stdin=f"{STRANGE_KEY}\n"),
        ]
    )
    reading, writing = os.pipe()
    os.write(writing, f"{FILE_PASSWORD}\n".encode())
    os.close(writing)
    given = {**locked, **settings(CREDENTIALS__PASSWORD_FD=str(reading))}
    with (
        watched_processes(world),
        world.started(*trial, given=given, pass_fds=(reading,)) as started,
    ):
        assert started.process.wait(PATIENCE) == 0
    os.close(reading)
    keyrings = [path for path in (world.seen / "home").rglob("*") if "keyring" in path.name]
    assert keyrings
    for path in keyrings:
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-20] + b"x" * 20)
    world.run_all([command(*trial, code=4, given=opened)])
    world.assert_clean()


def test_a_damaged_store(world: World, provider: ScriptedProvider) -> None:
    """Looked at, recovered from the provider, and looked at again."""
    world.config(**WITH_SECRETS)
    given = settings(MISTRAL__BASE_URL=provider.base_url)
    world.run_all([command("launch", "run.yaml", "--id", "lost", "--yes", given=given)])
    store = world.seen / "home" / "runs.db"
    store.write_bytes(b"\0" * 100 + store.read_bytes()[100:2000] + API_KEY.encode()[:3] * 3000)
    world.run_all(
        [
            command("list", code=(1, 8), given=given),
            command("status", "lost", "--json", code=(1, 8), given=given),
            command("doctor", "--json", code=1, given=given),
            command("doctor", "--recover", code=(0, 1), given=given),
            command("list", "--json", given=given),
        ]
    )
    world.assert_clean()


# -- the gateway -------------------------------------------------------------------------------


def test_the_gateway(world: World) -> None:
    """Its keys are made, used and revoked; others' keys come in and are not written down."""
    home = world.seen / "home"
    world.run_all([command("keys", "create", "--json"), command("keys", "create")])
    directory = world.seen / "output-1"
    made = json.loads((directory / "0.out").read_text())
    shown = next(
        line.strip()
        for line in (directory / "1.out").read_text().splitlines()
        if line.strip().startswith("tb-")
    )
    for path in directory.iterdir():  # here they are shown, this once
        path.unlink()
    world.secrets |= {"key made": forms_of(made["key"]), "key shown": forms_of(shown)}
    given = settings(CREDENTIALS__KEYRING="file", CREDENTIALS__PASSWORD_FILE="password")
    with (
        watched_processes(world),
        world.started("serve", "--port", "0", "--json", given=given) as served,
    ):
        wait_until(lambda: b"\n" in served.out.read_bytes())
        url = json.loads(served.out.read_bytes())["url"]
        for key in (made["key"], shown, GATEWAY_KEY):
            _use(world, url, key)
        for wrong in (STRANGE_KEY, made["key"][:-1] + "x"):
            with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {wrong}"}) as http:
                assert http.get("/v1/models").status_code == 401
                assert http.get(f"/v1/models?api_key={wrong}").status_code == 401
        _break(url)
        world.look_everywhere()
        assert served.interrupt() == 0
    world.run_all(
        [
            command("keys", "list"),
            command("keys", "list", "--json"),
            command("keys", "revoke", made["id"], "--json"),
            command("serve", "--port", "0", "--tls-cert", "password", code=3),
            command("serve", "--host", "192.0.2.1", code=3),
        ]
    )
    assert (home / "gateway" / "runs.db").is_file()
    world.assert_clean()


def _use(world: World, url: str, key: str) -> None:
    """Send what clients send, keys inside bodies included."""
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}) as http:
        data = (world.planted / "train.jsonl").read_bytes()
        files = {"file": ("train.jsonl", data, "application/jsonl")}
        uploaded = http.post("/v1/files", files=files, data={"purpose": "fine-tune"})
        assert uploaded.status_code == 200
        job: dict[str, Any] = {
            "model": "tiny-mistral",
            "training_files": [{"file_id": uploaded.json()["id"]}],
            "hyperparameters": {"training_steps": 4},
            "integrations": [{"type": "wandb", "project": "p", "api_key": WANDB_KEY}],
            "auto_start": False,
        }
        answers = [http.post("/v1/fine_tuning/jobs", json=job)]
        job["integrations"][0]["api_key"] = WANDB_KEY + WANDB_KEY[:3]
        answers.append(http.post("/v1/fine_tuning/jobs", json=job))
        assert answers[-1].status_code == 422
        job["integrations"] = [{"type": WANDB_KEY, "api_key": STRANGE_KEY}]
        job["repositories"] = [{"type": "github", "token": HUB_TOKEN}]
        answers.append(http.post("/v1/fine_tuning/jobs", json=job))
        answers.append(http.post("/v1/fine_tuning/jobs", content=f'{{"api_key": "{API_KEY}'))
        answers.append(http.get("/v1/fine_tuning/jobs"))
        answers += [http.get(f"/v1/files/{uploaded.json()['id']}/url")]
        answers += [http.get(f"/v1/fine_tuning/jobs/{each['id']}") for each in _listed(answers[-2])]
        for answer in answers:
            world.look_at(f"answer {answer.status_code} of the gateway", answer.content)


def _listed(answer: httpx.Response) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


def _break(url: str) -> None:
    """Send what is no HTTP, with a key in it."""
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port or 0)) as connection:
        connection.sendall(f"GET /{API_KEY}\r\nAuthorization: Bearer {API_KEY}\r\n\r\n".encode())
        connection.recv(1000)


# -- data files --------------------------------------------------------------------------------


def test_keys_that_lie_in_data_files(world: World) -> None:
    """What is wrong with a row is told without the keys in it; they stay in the user's files."""
    bad = world.planted / "bad.jsonl"
    row = {
        "messages": [{"role": API_KEY, "content": "x"}, {"role": "tool", "tool_call_id": API_KEY}]
    }
    bad.write_text("".join(json.dumps(each) + "\n" for each in (row, {API_KEY: 1}, {"text": "a"})))
    good = "".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(9))
    (world.planted / "good.jsonl").write_text(good)
    world.run_all(
        [
            command("data", "inspect", "bad.jsonl", code=3),
            command("data", "inspect", "bad.jsonl", "--json", code=3),
            command("data", "inspect", "bad.jsonl", "--provider-format", API_KEY, code=2),
            command("data", "repair", "bad.jsonl", code=3),
            command("data", "repair", "bad.jsonl", "--force", "--drop-invalid", "--json"),
            command("data", "convert", "bad.jsonl", "--output", "out.jsonl", code=3),
            command("data", "convert", "good.jsonl", "--output", "out.jsonl"),
            command("data", "split", "good.jsonl", "--rows", "1"),
            command("data", "shard", "bad.jsonl", "--limit", "1kB"),
            command("data", "shard", "bad.jsonl", "--limit", "10", code=3),
            command("data", "shard", "bad.jsonl", "--limit", API_KEY, code=2),
        ]
    )
    world.assert_clean()


# -- training on this machine ------------------------------------------------------------------


@pytest.mark.engine
def test_training_on_this_machine(world: World, trainer: Trainer) -> None:
    """The process that trains needs no secret: it is given none, by argument or environment."""
    world.config(backend="local")
    with watched_processes(world) as children:
        world.run_all(
            [
                command("launch", "run.yaml", "--id", "here"),
                command("wait", "here", "--timeout", "60"),
                command("logs", "here", "--json"),
                command("generate", "here", "What is it?"),
                command("download", "here", str(world.seen / "model")),
                command("resume", "here", "--yes", code=9),
            ],
            settings(LOCAL__PYTHON=str(trainer.python)),
        )
    assert children
    world.assert_clean()


@pytest.mark.engine
def test_a_quickstart_that_is_interrupted(world: World, trainer: Trainer) -> None:
    """It makes a key of its own, which nobody needs to see."""
    with (
        watched_processes(world) as children,
        world.started(
            *("quickstart", "--dir", str(world.seen / "quick")),
            given=settings(LOCAL__PYTHON=str(trainer.python)),
        ) as quick,
    ):
        wait_until(lambda: children)  # one of them samples an answer
        assert quick.interrupt() == 130
    world.assert_clean()


# -- what nobody has foreseen ------------------------------------------------------------------

PLUGIN = """
import os
from training_backends import *
from training_backends.testing.backend import ScriptedBackend

def said():
    return "the key " + os.environ["MISTRAL_API_KEY"] + " broke it: " + repr(dict(os.environ))

def fail(verb):
    if verb not in os.environ.get("FAILING", "").split():
        return
    if os.environ.get("HOW") == "own":
        raise PermissionDenied(said(), hint=said())
    try:
        raise ConnectionError("cannot reach " + os.environ["HTTPS_PROXY"])
    except ConnectionError as error:
        error.add_note("sent " + os.environ["TRAINING_BACKENDS_GATEWAY__API_KEY"])
        raise RuntimeError(said()) from error

def failing(verb):
    async def work(self, *args, **kwargs):
        fail(verb)
        return await getattr(super(Plugin, self), verb)(*args, **kwargs)
    return work

class Plugin(ScriptedBackend):
    name = "leaky"

    @classmethod
    def create(cls, context):
        fail("create")
        return cls()

    @property
    def capabilities(self):
        fail("capabilities")
        return Capabilities(hyperparameters=None, weights=True, validation_files=True,
                            resumes="checkpoint", downloads=True, samples=True, deletes=True,
                            lists_remote=True)

    async def validate(self, config, dataset):
        fail("validate")
        if "issue" in os.environ.get("FAILING", ""):
            return ValidationReport(issues=(Issue(code="x", message=said(), fix=said()),))
        return ValidationReport()

    async def launch(self, run, journal):
        fail("launch")
        return RunState(status="running", remote_id=run.id)

    async def observe(self, run, *, after=None):
        fail("observe")
        status = os.environ.get("STATUS", "running")
        failure = Failure(kind="provider", message=said()) if status == "failed" else None
        record = LogRecord(at="2026-01-01T00:00:00Z", message=said(), source="event",
                           fields={"reason": said()}, cursor="1")
        state = RunState(status=status, raw_status=said(), failure=failure)
        return Observation(state, (record,) if after is None else (), "1")

    async def health(self):
        fail("health")
        return Health(ok=False, message=said(), hint=said())

    estimate = failing("estimate")
    stop = failing("stop")
    resume = failing("resume")
    download = failing("download")
    sample = failing("sample")
    delete = failing("delete")
    list_remote = failing("list_remote")
    aclose = failing("aclose")
"""


def _leaky(world: World) -> dict[str, str]:
    """Install the plugin and return the environment in which it is found."""
    install_backend(world.planted / "plugins", "leaky", "leaky", PLUGIN)
    world.config(backend="leaky")
    return {"PYTHONPATH": str(world.planted / "plugins")}


@pytest.mark.parametrize("how", ["foreign", "own"])
def test_a_plugin_that_fails_with_secrets_in_its_error(how: str, world: World) -> None:
    """In any of its verbs: what is shown, logged and stored of it is cleaned."""
    given = _leaky(world)
    codes = (8,) if how == "foreign" else (4,)

    def failing(*arguments: str, verb: str, code: Sequence[int] = codes) -> Any:
        return command(*arguments, code=code, given={"FAILING": verb, "HOW": how})

    world.run_all(
        [
            failing("validate", "run.yaml", verb="validate"),
            failing("validate", "run.yaml", "--json", verb="issue", code=[3]),
            failing("estimate", "run.yaml", verb="estimate"),
            failing("launch", "run.yaml", "--yes", "--json", verb="validate"),
            failing("launch", "run.yaml", "--yes", "--id", "cut", verb="launch"),
            failing("status", "cut", "--json", verb="", code=[0]),
            failing("launch", "run.yaml", "--yes", "--id", "runs", verb="aclose", code=[0]),
            failing("status", "runs", "--json", verb="observe"),
            failing("status", "runs", "--json", verb="create"),
            failing("logs", "runs", verb="observe"),
            failing("wait", "runs", verb="observe"),
            failing("stop", "runs", verb="stop"),
            failing("list", "--json", verb="observe", code=[0]),
            failing("list", verb="observe", code=[0]),
            failing("backends", verb="create", code=[0]),
            failing("backends", "--json", verb="capabilities", code=[0]),
            failing("doctor", "--json", verb="create", code=[1]),
            failing("doctor", verb="capabilities", code=[1]),
            failing("doctor", "--json", verb="health", code=[1]),
        ],
        given,
    )
    errors = (world.seen / "output-1" / "0.err").read_text()
    assert "the key [redacted] broke it" in errors
    assert ("cannot reach" in errors) == (how == "foreign"), "the log has the traceback"
    world.assert_clean()


@pytest.mark.parametrize("how", ["foreign", "own"])
def test_a_plugin_whose_provider_repeats_secrets(how: str, world: World) -> None:
    """In a run's status, failure and log, in its health, and in what is done after the end."""
    given = _leaky(world)
    codes = (8,) if how == "foreign" else (4,)

    def failing(*arguments: str, verb: str, status: str) -> Any:
        return command(
            *arguments, code=codes, given={"FAILING": verb, "HOW": how, "STATUS": status}
        )

    world.run_all(
        [
            command("launch", "run.yaml", "--yes", "--id", "fails"),
            command("logs", "fails", "--json"),
            command("status", "fails", given={"STATUS": "failed"}),
            command("logs", "fails"),
            command("list", "--json"),
            command("list"),
            failing("resume", "fails", "--yes", "--id", "again", verb="resume", status="failed"),
            failing("delete", "fails", "--yes", verb="delete", status="failed"),
            command("launch", "run.yaml", "--yes", "--id", "ends"),
            command("status", "ends", "--json", given={"STATUS": "completed"}),
            failing("download", "ends", "model", verb="download", status="completed"),
            failing("generate", "ends", "hello", verb="sample", status="completed"),
            command("doctor", code=1),
            command("doctor", "--json", code=1),
        ],
        given,
    )
    world.assert_clean()
    (world.seen / "home" / "runs.db").write_bytes(b"no database" * 500)
    world.run_all(
        [
            command("doctor", "--recover", code=1, given={"FAILING": "list_remote", "HOW": how}),
        ],
        given,
    )
    assert "Could not list the jobs of leaky" in (world.seen / "output-2" / "0.out").read_text()
    world.assert_clean()


# -- in a program that uses the package --------------------------------------------------------

_LAUNCHES = {"401": "/files", "422": "/jobs", "500 in plain text": "/jobs", "redirect": "/jobs"}


@pytest.mark.anyio
@pytest.mark.parametrize("name", ANSWERS)
async def test_no_error_holds_a_secret(
    name: str, world: World, provider: ScriptedProvider, tmp_path: Path
) -> None:
    """Neither in its words, its repr, its attributes, its causes nor its pickle."""
    vault = CredentialVault(
        {"mistral": API_KEY, "wandb": WANDB_KEY, "huggingface": SecretStr(HUB_TOKEN)}
    )
    patience = MistralSettings(base_url=provider.base_url, attempts=1, settle_timeout=0.1)
    backend = MistralAPIBackend(settings=patience, credentials=vault)
    config = TrainingConfig.model_validate(
        {
            "model": "tiny-mistral",
            "data": {"train": str(world.planted / "train.jsonl")},
            **WITH_SECRETS,
        }
    )
    errors: list[BaseException] = []
    async with AsyncTrainingClient(home=tmp_path / "home", backends={"mistral": backend}) as client:
        provider.fail(ANSWERS[name][0], method="GET", times=1)
        with pytest.raises(TrainingBackendError) as caught:
            await backend.list_remote(RemoteFilters())
        errors.append(caught.value)
        provider.heal()
        if name in _LAUNCHES:
            # The request before held the API key alone, this one holds all of them.
            provider.fail(ANSWERS[name][0], method="POST", path=_LAUNCHES[name], times=9)
            with pytest.raises(TrainingBackendError) as caught:
                await client.launch(config, backend="mistral", run_id="refused")
            errors.append(caught.value)
        runs = [run.model_dump_json() for run in await client.list()]
        holders = [client, backend, vault, patience, config]
    await backend.aclose()
    for error in errors:
        texts = [
            str(error),
            repr(error),
            repr(vars(error)),
            "".join(traceback.format_exception(error)),
            repr(pickle.dumps(error)),
        ]
        for text in texts:
            world.look_at(f"{type(error).__name__} of {name}", text.encode())
    for text in (*runs, *map(repr, holders), *map(str, holders)):
        world.look_at("what is kept of it", text.encode())
    world.look_at("the settings", repr(GatewaySettings(api_key=SecretStr(GATEWAY_KEY))).encode())
    assert not world.found, "\n".join(dict.fromkeys(world.found))
