"""The gateway's keys on the command line: made, shown once, listed, revoked."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

Run = Any


def test_a_key_is_shown_once_and_listed_with_what_it_may_do(run: Run) -> None:
    """Scope, times and state are there for people and for programs; the key never again."""
    words = ("--name", "dash [board]", "--scope", "read", "--project", "ops", "--expires", "30d")
    made = run("keys", "create", *words, "--json").document
    assert made["key"].startswith(f"tb-{made['id']}-")
    assert (made["name"], made["scope"], made["state"]) == ("dash [board]", "read", "active")
    assert made["project"] == "ops"
    span = datetime.fromisoformat(made["expires_at"]) - datetime.now(UTC)
    assert timedelta(days=29, hours=23) < span < timedelta(days=30)
    plain = run("keys", "create")
    assert "(write, project default), valid until it is revoked; shown only once" in plain.err
    listed = run("keys", "list", "--json")
    first, second = listed.document
    key = made.pop("key")
    assert first == made
    assert (second["scope"], second["expires_at"], second["last_used_at"]) == ("write", None, None)
    table = run("keys", "list")
    head, row, _ = table.out.splitlines()
    assert head.split()[:5] == ["key", "state", "scope", "project", "created"]
    assert head.split()[5:] == ["expires", "last", "used", "name"]
    for word in (
        made["id"],
        "active",
        "read",
        "ops",
        made["expires_at"][:4],
        "never",
        "dash [board]",
    ):
        assert word in row
    for secret in (key, plain.out.strip()):
        assert secret not in listed.out + listed.err + table.out + table.err


def test_a_shell_variable_gets_the_key_alone(run: Run) -> None:
    """`KEY=$(training-backends keys create --quiet)` says nothing else, even to the terminal."""
    made = run("keys", "create", "--quiet")
    assert made.out.startswith("tb-")
    assert (len(made.out.split()), made.err) == (1, "")


def test_a_revoked_key_is_listed_as_such(run: Run) -> None:
    """Revoking says what the key is now."""
    key_id = run("keys", "create", "--json").document["id"]
    revoked = run("keys", "revoke", key_id, "--json").document
    assert (revoked["id"], revoked["state"]) == (key_id, "revoked")
    assert run("keys", "list", "--json").document == [revoked]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("create", "--expires", "2020-01-31"), 3, "2020-01-31 23:59 is in the past"),
        (("create", "--expires", "30"), 3, "such as 30d or 12h, or a date such as"),
        (
            ("create", "--scope", "root"),
            2,
            "'--scope': 'root' is not one of 'read', 'write', 'admin'",
        ),
        (("create", "--project", "A b"), 3, "Invalid project name 'A b'"),
        (("revoke", "00000000"), 4, "Gateway key '00000000' not found"),
    ],
)
def test_what_cannot_be_done_says_why(
    run: Run, words: tuple[str, ...], code: int, said: str
) -> None:
    """And makes no key."""
    done = run("keys", *words)
    assert done.code == code
    assert said in done.err
    assert run("keys", "list", "--json").document == []
