"""The gateway's projects and audit log on the command line."""

import json
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.gateway.conftest import ROWS, jsonl, site

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


def test_a_project_keeps_what_it_says(run: Run) -> None:
    """Each kind for its own time, or as the gateway does."""
    words = ("--keep", "failed=12h", "--keep", "files=forever", "--steps", "5")
    assert run("projects", "set", "p", *words).err == (
        "Project p: steps 5, keeps failed 0.5d, keeps files forever.\n"
    )
    changed = run("projects", "set", "p", "--keep", "failed=default", "--json").document
    assert changed["keep"] == {"files": "forever"}
    assert changed["limits"]["steps"] == 5
    assert "files forever" in run("projects", "list").out
    refused = run("projects", "set", "p", "--keep", "files")
    assert (refused.code, "KIND=AGE" in refused.err) == (2, True)


async def _filled(home: Path) -> list[str]:
    """Upload two files to a gateway and stop it; return their ids."""
    async with site(home) as here:
        return [await here.upload(jsonl([ROWS[n]]), name=f"{n}.jsonl") for n in range(2)]


def test_a_cleanup_shows_what_it_deletes_and_asks_before(run: Run, tmp_path: Path) -> None:
    """With --dry-run it deletes nothing."""
    home = tmp_path / "home"
    ids = anyio.run(_filled, home)
    there = {"TRAINING_BACKENDS_HOME": str(home)}
    size = sum(len(jsonl([ROWS[n]])) for n in range(2))
    words = ("projects", "cleanup", "default", "--older-than", "0.001s")
    planned = run(*words, "--dry-run", "--json", **there).document
    assert {each["id"] for each in planned["deleted"]} == {*ids}
    assert (planned["dry_run"], planned["freed_bytes"]) == (True, size)
    assert run(*words, **there).code == 2
    kept = run(*words, "--yes", "--only", "logs", **there)
    assert kept.err == "Nothing to delete.\n"
    done = run(*words, "--yes", **there)
    assert done.out.splitlines()[1].split() == ["default", "files", "2", str(size), "bytes"]
    assert done.err == f"Freed {size} bytes.\n"
    assert run(*words, "--yes", **there).err == "Nothing to delete.\n"
    exported = run("audit", "export", "--json", **there).out.splitlines()
    actions = [json.loads(line) for line in exported[-2:]]
    assert {each["target"] for each in actions if each["action"] == "file.expire"} == {*ids}
    assert all(each["actor"].startswith("local:") for each in actions)


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
