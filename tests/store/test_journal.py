"""What the store keeps of launches: steps, and contents that were uploaded."""

from tests.store.conftest import MakeRun
from training_backends.store import JournalEntry, RunStore


def test_a_step_is_unknown_then_begun_then_finished(store: RunStore, make_run: MakeRun) -> None:
    """These are the three things that a repeated launch must tell apart."""
    store.insert(make_run("a"))
    assert store.entry("a", "create") is None
    store.begin("a", "create")
    assert store.entry("a", "create") == JournalEntry(finished=False, result=None)
    store.finish("a", "create", {"id": "job-1"})
    assert store.entry("a", "create") == JournalEntry(finished=True, result={"id": "job-1"})


def test_a_step_that_certainly_did_not_happen_is_forgotten(
    store: RunStore, make_run: MakeRun
) -> None:
    """It may be done as if for the first time."""
    store.insert(make_run("a"))
    store.begin("a", "create")
    store.forget("a", "create")
    assert store.entry("a", "create") is None


def test_deleting_a_run_deletes_its_journal(store: RunStore, make_run: MakeRun) -> None:
    """A new run with the same id starts from nothing."""
    store.insert(make_run("a"))
    store.begin("a", "create")
    store.delete("a")
    store.insert(make_run("a"))
    assert store.entry("a", "create") is None


def test_a_content_is_known_by_its_hash_on_one_account(store: RunStore) -> None:
    """The id of a file means nothing to another server or account; the newest id counts."""
    store.uploaded("server a", "hash", "file-1")
    store.uploaded("server b", "hash", "file-9")
    store.uploaded("server a", "hash", "file-2")
    assert store.known_upload("server a", "hash") == "file-2"
    assert store.known_upload("server a", "another hash") is None


def test_uploads_outlive_the_run_that_made_them(store: RunStore, make_run: MakeRun) -> None:
    """What lies at the provider can serve the next run."""
    store.insert(make_run("a"))
    store.uploaded("server", "hash", "file-1")
    store.delete("a")
    assert store.known_upload("server", "hash") == "file-1"
