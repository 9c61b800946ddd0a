"""What is about to be written holds no secret, and everything else as it was."""

import base64
import json
import re
import string
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from training_backends.core.redaction import (
    REDACTED,
    forget_secrets,
    redact,
    redact_value,
    register_environment,
    register_proxy,
    register_secret,
    register_url,
)
from training_backends.core.run import new_run_id

LETTERS_AND_DIGITS = string.ascii_letters + string.digits
SHA1 = "3f786850e387550fdab836ed7e6dc881de23001b"


@pytest.fixture(autouse=True)
def nothing_registered() -> Iterator[None]:
    """Begin and end without anybody's secrets."""
    forget_secrets()
    yield
    forget_secrets()


def looks_random(text: str) -> bool:
    """Tell whether this could be a key: words and numbers cannot."""
    return any(c.isdigit() for c in text) and any(c.isalpha() for c in text)


def tokens(alphabet: str, least: int, most: int | None = None) -> st.SearchStrategy[str]:
    """Generate keys of an alphabet."""
    return st.text(alphabet, min_size=least, max_size=most or least).filter(looks_random)


KEYS = tokens(LETTERS_AND_DIGITS + "-_", 8, 60)
PASSWORDS = (
    st.text(string.printable.strip(), min_size=8, max_size=40)
    .filter(looks_random)
    .filter(lambda text: text[0] in LETTERS_AND_DIGITS)
)
NAMES = st.sampled_from(
    [
        "api_key",
        "apikey",
        "X-Api-Key",
        "MISTRAL_API_KEY",
        "TRAINING_BACKENDS_GATEWAY__API_KEY",
        "HF_TOKEN",
        "access_token",
        "hubToken",
        "password",
        "PGPASSWORD",
        "client_secret",
        "aws_secret_access_key",
        "private_key",
        "Authorization",
        "proxy-authorization",
        "Cookie",
    ]
)

# How a value may follow its name where nothing limits what it is made of.
QUOTING: list[Callable[[str, str], str]] = [
    lambda name, value: json.dumps({name: value, "next": 1}),
    lambda name, value: json.dumps({"outer": [{name: value}]}, indent=2),
    lambda name, value: json.dumps({"body": json.dumps({name: value, "next": "x"})}),
    lambda name, value: json.dumps(json.dumps(json.dumps({name: value}))),
    lambda name, value: json.dumps({name: value})[:-2],
    lambda name, value: repr({name: value, "next": 1}),
    lambda name, value: repr({name: value.encode()}),
    lambda name, value: repr(ValueError(json.dumps({name: value}))),
    lambda name, value: f"{name}={value!r}",
    lambda name, value: f"Settings({name}={value!r}, port=1)",
    lambda name, value: repr([("accept", "*/*"), (name, value)]),
    lambda name, value: repr([(b"accept", b"*/*"), (name.encode(), value.encode())]),
    lambda name, value: f"https://host/path?x=1&{name}={quote(value, safe='')}&y=2",
    lambda name, value: f"GET /path?{name}={quote_plus(value)} HTTP/1.1",
]
# Where it ends at white space, or at the next parameter.
BARE: list[Callable[[str, str], str]] = [
    lambda name, value: f"{name}={value}",
    lambda name, value: f"export {name}={value}\nnext line",
    lambda name, value: f"{name} = {value} # why",
    lambda name, value: f"{name}: {value}",
    lambda name, value: f"{name}:{value}",
    lambda name, value: f"> {name}: {value}\r\n> Accept: */*",
    lambda name, value: f"{name}: Bearer {value}",
    lambda name, value: f"({name}={value}, x=1)",
    lambda name, value: f"Invalid value: {name}={value}.",
]


def all_forms(secret: str) -> set[str]:
    """Return how a secret may be written in what `redact` was given."""
    return {secret, quote(secret, safe=""), quote_plus(secret), json.dumps(secret)[1:-1]}


@given(name=NAMES, secret=PASSWORDS, shape=st.sampled_from(QUOTING))
def test_a_value_behind_a_secret_name_is_replaced(
    name: str, secret: str, shape: Callable[[str, str], str]
) -> None:
    """In JSON inside JSON, reprs, headers, URLs: the name gives it away."""
    cleaned = redact(shape(name, secret))
    assert REDACTED in cleaned
    assert not any(form in cleaned for form in all_forms(secret))
    assert redact(cleaned) == cleaned


@given(
    name=NAMES, secret=PASSWORDS.filter(lambda text: "&" not in text), shape=st.sampled_from(BARE)
)
def test_a_value_without_quotes_is_replaced_up_to_its_end(
    name: str, secret: str, shape: Callable[[str, str], str]
) -> None:
    """`key=value` and `key: value`, in a line, a header or a sentence."""
    cleaned = redact(shape(name, secret))
    assert REDACTED in cleaned
    assert secret not in cleaned
    assert redact(cleaned) == cleaned


@pytest.mark.parametrize("value", ['r"000000', '"abcdef123"', "b'abcdef123'", "'abcdef123"])
def test_a_quote_after_a_scheme_hides_nothing(value: str) -> None:
    """`Bearer r"KEY` is replaced like `Bearer KEY`, closed or not."""
    cleaned = redact(f"api_key: Bearer {value}")
    assert REDACTED in cleaned
    assert "000000" not in cleaned
    assert "abcdef123" not in cleaned


@given(
    name=NAMES,
    secret=KEYS,
    shape=st.sampled_from(BARE),
    depth=st.integers(1, 3),
    separators=st.sampled_from([(",", ":"), (", ", ": ")]),
)
def test_json_stays_json(
    name: str,
    secret: str,
    shape: Callable[[str, str], str],
    depth: int,
    separators: tuple[str, str],
) -> None:
    """What a server answered can still be read after it was cleaned."""
    text = f"{shape(name, secret)} and {shape(name, secret)} Bearer {secret}"
    for _ in range(depth):
        document = {"x": [text, {"y": f"https://u:{secret}@h/?key={secret}"}], "z": 1}
        text = json.dumps(document, separators=separators)
    cleaned = redact(text)
    assert secret not in cleaned
    read = json.loads(cleaned)
    assert read["z"] == 1
    assert read["x"][1]["y"].startswith(f"https://{REDACTED}@h/")


@given(
    secret=PASSWORDS,
    user=st.text(LETTERS_AND_DIGITS, max_size=10),
    scheme=st.sampled_from(["https", "postgresql+psycopg", "socks5"]),
    rest=st.sampled_from(["host", "host:5432/db", "127.0.0.1:3128/?a=b@c", "[::1]:80"]),
)
def test_a_password_inside_a_url_is_replaced(
    secret: str, user: str, scheme: str, rest: str
) -> None:
    """Its place gives it away, and the rest of the URL stays."""
    cleaned = redact(f"cannot reach {scheme}://{user}:{quote(secret, safe='')}@{rest} now")
    assert cleaned == f"cannot reach {scheme}://{REDACTED}@{rest} now"


@pytest.mark.parametrize("password", ["with/slash", "with@sign", "with:colon", "päss", "p"])
def test_a_password_that_should_have_been_quoted_is_replaced_too(password: str) -> None:
    """Database URLs are taken with such passwords."""
    assert password not in redact(f"postgresql://user:{password}@host/db")[14:]


@given(
    secret=st.one_of(
        tokens(LETTERS_AND_DIGITS + "-_", 20, 60).map("sk-".__add__),
        tokens(LETTERS_AND_DIGITS + "-_", 43).map("tb-0a1b2c3d-".__add__),
        tokens(LETTERS_AND_DIGITS, 34).map("hf_".__add__),
        tokens(LETTERS_AND_DIGITS, 36).map("ghp_".__add__),
        tokens(LETTERS_AND_DIGITS + "_", 77).map("wandb_v1_".__add__),
        tokens("0123456789abcdef", 40),
        tokens(LETTERS_AND_DIGITS, 40),
        tokens(LETTERS_AND_DIGITS, 32).filter(
            lambda text: any(c.isupper() for c in text) and any(c.islower() for c in text)
        ),
    ),
    shape=st.sampled_from(
        ["{}", "the key {} is wrong", "'{}'", '["{}"]', "/keys/{}/", "<{}>", "a={};", "x:{}\n"]
    ),
)
def test_what_has_the_shape_of_a_key_is_replaced(secret: str, shape: str) -> None:
    """Wherever it stands, and whatever it is called."""
    cleaned = redact(shape.format(secret))
    assert REDACTED in cleaned
    assert secret not in cleaned


def test_a_key_of_small_letters_is_told_from_a_sentence() -> None:
    """Both follow the same word; the sentence goes on."""
    assert redact('{"note": "Bearer abcdefgh"}') == f'{{"note": "Bearer {REDACTED}"}}'
    assert redact("bearer authentication is used here").startswith("bearer authentication")


@given(secret=KEYS, user=st.text(LETTERS_AND_DIGITS, max_size=10))
def test_an_authorization_is_replaced(secret: str, user: str) -> None:
    """Bearer and Basic give it away without the header's name."""
    basic = base64.b64encode(f"{user}:{secret}".encode()).decode()
    for text in (f"sent Bearer {secret}", f"sent 'bearer {secret}'", f"curl -H 'Basic {basic}'"):
        cleaned = redact(text)
        assert secret not in cleaned
        assert basic not in cleaned


@given(
    secret=st.text(min_size=6, max_size=60)
    .map(str.strip)
    .filter(lambda text: len(text) > 5 and text not in REDACTED)
)
def test_a_registered_secret_is_replaced_however_it_is_written(secret: str) -> None:
    """No name and no shape is needed for what this process has read."""
    if any(0xD800 <= ord(char) < 0xE000 for char in secret):
        return
    register_secret(SecretStr(secret))
    ways: list[Callable[[str], str]] = [
        str,
        quote,
        quote_plus,
        lambda text: quote(text, safe=""),
        lambda text: quote(quote(text, safe=""), safe=""),
        lambda text: re.sub("%..", lambda hexed: hexed[0].lower(), quote(text, safe="")),
        lambda text: json.dumps(text)[1:-1],
        lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
        lambda text: json.dumps(json.dumps({"x": text}))[1:-1],
    ]
    for way in ways:
        written = way(secret)
        cleaned = redact(f"before <{written}> after")
        assert written not in cleaned
        assert REDACTED in cleaned


@given(
    secret=tokens(string.printable.strip(), 12, 60),
    before=st.text(max_size=5),
    after=st.text(max_size=5),
    encode=st.sampled_from([base64.b64encode, base64.urlsafe_b64encode]),
)
def test_a_registered_secret_is_found_inside_base64(
    secret: str, before: str, after: str, encode: Callable[[bytes], bytes]
) -> None:
    """As in a header made of user and password; at whichever place it begins."""
    register_secret(secret)
    whole = (before + secret + after).encode("utf-8", "replace")
    cleaned = redact(f"x{encode(whole).decode()}")
    assert REDACTED in cleaned
    padding = "=" * (-len(cleaned.partition("[")[0][1:]) % 4)
    assert secret.encode() not in base64.urlsafe_b64decode(
        cleaned.partition("[")[0][1:] + padding + "=="
    )


def test_only_the_latest_registered_secrets_are_remembered() -> None:
    """A program that runs for months does not collect every key it ever had."""
    for number in range(200):
        register_secret(f"password-{number:04}")
        register_secret("read-again-and-again")
    assert redact("password-0000") == "password-0000"
    assert redact("password-0199") == REDACTED
    assert redact("read-again-and-again") == REDACTED


def test_a_registered_text_that_is_too_short_hides_nothing() -> None:
    """It would be found in half of all words."""
    register_secret("a")
    register_secret(" ")
    register_secret("")
    assert redact("a cat") == "a cat"


def test_the_longer_of_two_registered_secrets_is_replaced_whole() -> None:
    """One may be the beginning of the other."""
    register_secret("beginning")
    register_secret("beginning-and-end")
    assert redact("<beginning-and-end>") == f"<{REDACTED}>"


def test_secrets_of_the_environment_are_found_by_their_names() -> None:
    """Keys by the end of the name, passwords by their place in a URL."""
    register_environment(
        {
            "SOME_API_KEY": "one-secret",
            "HUB_TOKEN": "two-secret",
            "HTTPS_PROXY": "http://user:three%20secret@proxy:3128",
            "STORE_URL": "postgresql://user:four-secret@host/db",
            "TOKENIZERS_PARALLELISM": "nothing",
            "EDITOR": "http://[broken@",
        }
    )
    for secret in ("one-secret", "two-secret", "three secret", "three%20secret", "four-secret"):
        assert redact(f"-{secret}-") == f"-{REDACTED}-"
    assert redact("nothing") == "nothing"


@pytest.mark.parametrize(
    "url",
    [
        "http://corp:hunter2hunter/x@proxy.example:8080",
        "http://corp:hunter2hunter#x@proxy.example:8080",
        "http://corp:hunter2hunter?x@proxy.example:8080",
        "http://corp:x@hunter2hunter@proxy.example:8080",
        "http://corp:x/hunter2hunter:1@proxy.example:8080",
        "http://corp:hunter2hunter%zz@proxy.example:8080",
        "corp:hunter2hunter/x@proxy.example:8080",
        "http://8080/hunter2hunter@proxy.example",
        "http://corp:8080/hunter2hunter@proxy.example",
    ],
)
def test_a_proxy_password_that_breaks_its_url_is_found_in_pieces(url: str) -> None:
    """A parser that takes the password for a host or port quotes a piece of it."""
    register_environment({"Https_Proxy": url})
    assert redact("Invalid port: 'hunter2hunter'") == f"Invalid port: '{REDACTED}'"
    assert redact("cannot resolve proxy.example") == "cannot resolve proxy.example"


@given(
    st.text(string.ascii_letters + "/#?@:%", min_size=1, max_size=30).filter(lambda t: t[0] != ":"),
    st.sampled_from(["http://u:{}@h", "u:{}@h:3128", "socks5://u:{}@[::1]:1"]),
)
def test_every_long_piece_of_a_proxy_password_is_found(password: str, form: str) -> None:
    """Whichever delimiters it holds, escaped or not."""
    register_proxy(form.format(password))
    for piece in re.split("[/#?@:%]", password):
        if len(piece) >= 6:
            assert piece not in redact(f"Invalid port: '{piece}'")


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("postgresql://u:first/second@host/db", "second"),
        ("postgresql://u:p%20assword@host/db?application_name=a@b", "p assword"),
        ("http://one.example,http://u:second-one@two.example", "second-one"),
    ],
)
def test_a_password_inside_any_url_is_found(url: str, secret: str) -> None:
    """Also where it makes the URL unreadable, or the URL is not the first one."""
    register_url(url)
    assert redact(f"<{secret}>") == f"<{REDACTED}>"


@pytest.mark.parametrize(
    "text",
    [
        "https://registry.example:8080/@scope/package",
        "https://example.org/a:b, write to admin@example.org",
        "postgresql://u@host.example/database?application_name=some@thing",
    ],
)
def test_a_url_without_a_password_registers_nothing(text: str) -> None:
    """An @ in a path or behind the URL makes no password of what is before it."""
    register_url(text)
    assert redact(text) == text


# -- time --------------------------------------------------------------------------------------

HEAVY = [
    *("hf_", "eyJ-", "eyJ_a.", "sk-", "gho_", "wandb_v1_", "a1B-", "A1"),
    *(
        "token",
        "token=",
        "token=\\",
        "token={",
        "token: ",
        "password: x ",
        "api_key='",
        '("token",',
    ),
    *("bearer ", "bearer\t", "basic ", "://", "://a:", "?x-amz-", "&key=", "%25", "%5C", "\\", '"'),
    *(" ", "ab\\", "secret_"),
]


@pytest.mark.parametrize("before", ["", "token=", "x \\"])
@pytest.mark.parametrize("atom", HEAVY)
def test_four_times_the_text_takes_about_four_times_as_long(before: str, atom: str) -> None:
    """A request's path or an error's body must not hold a process: time is linear."""
    for secret in ('ab\\"cd"efgh', '\\\\"secret"', "hf_hf_hf_secret", "% % % %", "\\n\n\\n\n\\n"):
        register_secret(secret)
    short = (before + atom * 4096)[:4096]
    long = (before + atom * 16384)[:16384]
    best = dict.fromkeys((short, long), float("inf"))
    for attempt in range(4):
        for text in best:
            began = time.thread_time()
            redact(text)
            best[text] = min(best[text], time.thread_time() - began)
        if attempt and best[long] < 9 * best[short]:
            break
    assert best[long] < 9 * best[short]  # 16 where it is quadratic


@given(
    secret=tokens(LETTERS_AND_DIGITS + "/ '\\", 12, 60).map(str.strip).filter(lambda t: len(t) > 8),
    where=st.integers(-70, 5000),
    register=st.booleans(),
)
def test_no_half_of_a_secret_remains_where_a_long_text_is_cut(
    secret: str, where: int, register: bool
) -> None:
    """The end of what is kept is left out too, as a secret may have been cut there."""
    shown = secret if register else SHA1
    if register:
        register_secret(secret)
    text = f"{'. ' * 2**15}"[: 2**16 - where] + f" {shown} " + ". " * 5000
    cleaned = redact(text)
    assert len(cleaned) < 2**16
    assert shown[: len(shown) // 2] not in cleaned
    assert cleaned.endswith(f"[truncated: {len(text)} characters]")
    assert redact(cleaned) == cleaned


WORDS = st.text(string.ascii_lowercase, min_size=1, max_size=12)
ORDINARY = st.one_of(
    WORDS,
    WORDS.map(str.capitalize),
    WORDS.map(str.upper),
    st.uuids().map(str),
    st.binary(min_size=32, max_size=32).map(bytes.hex),
    st.binary(min_size=16, max_size=16).map(bytes.hex),
    st.binary(min_size=20, max_size=20).map(lambda raw: f"revision {raw.hex()}"),
    st.integers().map(str),
    st.floats().map(str),
    st.datetimes().map(datetime.isoformat),
    st.builds(new_run_id),
    st.lists(WORDS, min_size=1, max_size=6).map(lambda parts: "/" + "/".join(parts)),
    st.lists(WORDS, min_size=1, max_size=6).map("_".join),
    st.lists(WORDS, min_size=1, max_size=6).map("-".join).filter(lambda text: "-" not in text[2:3]),
    st.lists(WORDS, min_size=1, max_size=3).map(".".join),
    st.tuples(WORDS, st.integers(0, 9999)).map(lambda pair: f"{pair[0]}={pair[1]}"),
    st.tuples(WORDS, WORDS).map(lambda pair: f"{pair[0]}: {pair[1]}"),
    st.integers(1, 65535).map(
        lambda port: f"http://127.0.0.1:{port}/v1/files?page=0&page_size=100"
    ),
    st.emails(domains=st.just("example.org")).filter(lambda text: "=" not in text),
)


@given(st.lists(ORDINARY, min_size=1, max_size=8).map(" ".join))
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    """Words, numbers, ids, hashes, paths and times are no secrets."""
    assert redact(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "train_tokens=17440, max_token=512, cost per token: 0.000002 USD",
        "risk-averse-strategy-here",
        "ft:open-mistral-7b:587a6b29:20240514:7e773925",
        "the bearer of news; bearer authentication is used. Basic configuration of it",
        'WWW-Authenticate: Bearer realm="gateway"',
        "integrations.0.api_key: Field required",
        "password: must not be empty",
        "There is no key for mistral: set MISTRAL_API_KEY, or store it with `credentials set`.",
        "known: 'api_key', 'token', 'name'",
        "api_key=None, token=null, secret: false",
        "git@github.com:owner/name.git, ssh://git@github.com/owner/name",
        f"~/.cache/huggingface/hub/models--a--b/snapshots/{SHA1}/config.json",
        f"commit {SHA1}, owner/name@{SHA1}, 'sha1': '{SHA1}', commit_id={SHA1}",
        "hf_checkpoints_of_mine, hf_hub_download, HF_HUB_OFFLINE=1",
        "hub/models--mistralai--Mistral-7B-Instruct-v0.3",
        "POST https://api.mistral.ai/v1/fine_tuning/jobs?dry_run=true 200",
        '  File "/usr/lib/python3.11/site-packages/httpx/_client.py", line 10, in send',
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    """A log that hides everything helps nobody."""
    assert redact(text) == text


@given(st.text(max_size=300))
def test_any_text_can_be_cleaned_twice(text: str) -> None:
    """What was cleaned before it was logged is not mangled by the log."""
    assert redact(redact(text)) == redact(text)


def test_values_become_plain_data_without_secrets() -> None:
    """Nested, as objects, as keys, under a name that gives them away."""
    secret = "s3cr3t-Canary-Value"

    class Holder:
        def __repr__(self) -> str:
            return f"Holder(password={secret!r})"

    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError(secret)

    value: dict[Any, Any] = {
        "api_key": secret,
        "hubToken": [secret],
        b"authorization": secret.encode(),
        "password": 123456,
        "nested": {"deep": [{"secret": secret}], "url": f"http://u:{secret}@h"},
        "headers": [("accept", "*/*"), (b"Authorization", secret.encode()), [b"cookie", b"a=b"]],
        "objects": {Holder(), ValueError(f"token={secret}")},
        f"password={secret}": 1,
        "broken": Broken(),
    }
    value["itself"] = value
    cleaned = redact_value(value)
    assert secret not in json.dumps(cleaned)
    assert "123456" not in json.dumps(cleaned)


def test_ordinary_values_stay_what_they_are() -> None:
    """Numbers stay numbers; what JSON does not know becomes text."""
    at = datetime(2026, 1, 2, tzinfo=UTC)
    run = UUID(int=7)
    assert redact_value(
        {
            "step": 3,
            "loss": 0.5,
            "done": True,
            "api_key": None,
            "tokens": 17,
            "cost_per_token": 0.1,
            "commit": SHA1,
            "names": ["api_key", "token"],
            "at": at,
            "run": run,
            "path": Path("/a/b"),
        }
    ) == {
        "step": 3,
        "loss": 0.5,
        "done": True,
        "api_key": None,
        "tokens": 17,
        "cost_per_token": 0.1,
        "commit": SHA1,
        "names": ["api_key", "token"],
        "at": str(at),
        "run": str(run),
        "path": "/a/b",
    }
