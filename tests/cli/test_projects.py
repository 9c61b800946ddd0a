"""The gateway's projects and audit log on the command line."""

import json
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

Run = Any


def test_limits_are_set_listed_and_lifted(run: Run) -> None:
    """What a limit does not name stays; the table has what is used and what may be."""
    run("keys", "create", "--project", "other")
    words = ("--jobs-running", "2", "--bytes", "1.5GB", "--requests-per-second", "0.5")
    made = run("projects", "set", "p", *words, "--json").document
    assert made["limits"] == {
        "jobs_running": 2,
        "jobs_queued": None,
        "bytes": 1_500_000_000,
        "requests_per_second": 0.5,
        "steps": None,
    }
    changed = run("projects", "set", "p", "--steps", "1000", "--lift", "bytes")
    assert changed.err == "Project p: steps 1,000, bytes lifted.\n"
    other, mine = run("projects", "list", "--json").document
    assert (other["name"], set(other["limits"].values())) == ("other", {None})
    assert mine["limits"] == {**made["limits"], "steps": 1000, "bytes": None}
    table = run("projects", "list").out.splitlines()
    assert table[2].split() == ["p", "0", "of", "2", "0", "0", "bytes", "0.5", "1,000"]


def test_the_audit_log_is_exported_as_lines(run: Run) -> None:
    """Who made and revoked keys on this machine is in it, too; no key is."""
    made = run("keys", "create", "--project", "p", "--json").document
    run("keys", "revoke", made["id"])
    run("keys", "revoke", made["id"])  # changes nothing
    run("projects", "set", "q", "--steps", "5")
    exported = run("audit", "export", "--since", "1h", "--json").out
    entries = [json.loads(line) for line in exported.splitlines()]
    assert [(each["action"], each["target"], each["project"]) for each in entries] == [
        ("key.create", made["id"], "p"),
        ("key.revoke", made["id"], "p"),
        ("project.set", "q", "q"),
    ]
    assert all(each["actor"].startswith("local:") for each in entries)
    assert made["key"] not in exported
    assert run("audit", "export", "--until", "1h").out == ""
    assert run("audit", "export", "--project", "q").out.split()[1:5] == [
        entries[0]["actor"],
        "q",
        "project.set",
        "q",
    ]
