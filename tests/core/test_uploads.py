"""Each content is uploaded once, and again only if the provider has lost it."""

from collections.abc import Callable

import pytest

from training_backends import BackendUnavailable, ProtocolError, TrainingConfig, TrainingRun
from training_backends.core.uploads import upload_once
from training_backends.testing.journal import MemoryJournal

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


class Store:
    """A provider's files."""

    def __init__(self, *, forgets: bool = False) -> None:
        self.files: list[str] = []
        self.forgets = forgets
        self.lose_answer = False

    async def upload(self) -> str:
        """Add a file."""
        self.files.append(f"f{len(self.files)}")
        if self.lose_answer:
            self.lose_answer = False
            raise BackendUnavailable("lost", sent=True)
        return self.files[-1]

    async def has(self, file_id: str) -> bool:
        """Look a file up."""
        return file_id in self.files and not self.forgets

    async def find(self) -> str | None:
        """Look for a file of this content."""
        kept = [each for each in self.files if each != "deleted" and not self.forgets]
        return kept[-1] if kept else None


@pytest.fixture
def journal(make_config: Callable[..., TrainingConfig]) -> MemoryJournal:
    return MemoryJournal(TrainingRun(id="r1", backend="b", config=make_config()))


async def ask(journal: MemoryJournal, store: Store, *, finds: bool = True) -> str:
    """Upload the one content."""
    find = store.find if finds else None
    return await upload_once(
        journal, scope="s", sha256="0" * 64, do=store.upload, has=store.has, find=find
    )


async def test_a_known_upload_is_used(journal: MemoryJournal) -> None:
    """The second launch uploads nothing, in the same run or another."""
    store = Store()
    assert [await ask(journal, store), await ask(journal, store)] == ["f0", "f0"]
    journal.rows.clear()
    assert await ask(journal, store) == "f0"
    assert store.files == ["f0"]


async def test_a_lost_file_is_uploaded_again(journal: MemoryJournal) -> None:
    """An id that the provider no longer knows is not used."""
    store = Store()
    await ask(journal, store)
    store.files[0] = "deleted"
    assert await ask(journal, store) == "f1"


async def test_a_provider_that_forgets_is_not_sent_the_file_for_ever(
    journal: MemoryJournal,
) -> None:
    """Ten uploads of a run have been lost: that is the provider's fault."""
    store = Store(forgets=True)
    for _ in range(10):
        await ask(journal, store)
    with pytest.raises(ProtocolError, match="repeatedly lost"):
        await ask(journal, store)
    assert len(store.files) == 10


@pytest.mark.parametrize(("finds", "files"), [(True, 1), (False, 2)])
async def test_a_lost_answer(journal: MemoryJournal, finds: bool, files: int) -> None:
    """The upload is found if the provider's files can be searched, else repeated."""
    store = Store()
    store.lose_answer = True
    await ask(journal, store, finds=finds)
    assert len(store.files) == files
