"""The launch journal: a step happens at most once, whatever is lost on the way."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training_backends import (
    AmbiguousLaunch,
    AuthenticationFailed,
    BackendUnavailable,
    Budget,
    BudgetExceeded,
    DuplicateRun,
    Estimate,
    Money,
    ProtocolError,
    RunState,
    TrainingBackendError,
    TrainingConfig,
    TrainingRun,
    TrainingStatus,
    WaitTimeout,
)
from training_backends.client.boundary import callers_own
from training_backends.client.journal import JournalSteps, LaunchWatch, StoreJournal
from training_backends.client.leases import Leases
from training_backends.core.run import new_run_id
from training_backends.store import RunStore
from training_backends.testing.journal import MemoryJournal

pytestmark = pytest.mark.anyio


class World:
    """Counts what was done to it, and loses answers on demand."""

    def __init__(self) -> None:
        self.done = 0
        self.lose: BaseException | None = None

    async def do(self) -> int:
        self.done += 1
        if self.lose:
            raise self.lose
        return self.done

    async def find(self) -> int | None:
        return self.done or None


def make_journal(
    path: Path, config: TrainingConfig, watch: LaunchWatch | None = None
) -> StoreJournal:
    store = RunStore(f"sqlite:///{path}")
    if not store.list():
        store.insert(TrainingRun(id="r", backend="scripted", config=config))
    return StoreJournal(store, "r", watch or LaunchWatch())


@pytest.fixture(params=["store", "memory"])
def again(
    request: pytest.FixtureRequest, tmp_path: Path, make_config: Callable[..., TrainingConfig]
) -> Callable[[], JournalSteps]:
    """Open the journal as a new process would; the kit's journal keeps the same rule."""
    config = make_config()
    if request.param == "store":
        return lambda: make_journal(tmp_path / "runs.db", config)
    kept = MemoryJournal(TrainingRun(id="r", backend="scripted", config=config))
    return lambda: kept


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """A store for many runs."""
    return RunStore(f"sqlite:///{tmp_path_factory.mktemp('journal') / 'runs.db'}")


async def test_a_finished_step_is_remembered(again: Callable[[], JournalSteps]) -> None:
    """Its result comes back and nothing is done."""
    world = World()
    await again().step("create", world.do)
    assert await again().step("create", world.do) == 1
    assert world.done == 1


async def test_a_lost_answer_is_found(again: Callable[[], JournalSteps]) -> None:
    """When the request got through and the answer did not, the effect is adopted."""
    world = World()
    world.lose = BackendUnavailable("reset", sent=True)
    assert await again().step("create", world.do, world.find) == 1


async def test_a_killed_step_is_found_by_the_next_process(
    again: Callable[[], JournalSteps],
) -> None:
    """A process that died after sending leaves one effect, not two."""
    world = World()
    world.lose = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        await again().step("create", world.do, world.find)
    assert await again().step("create", world.do, world.find) == 1
    assert world.done == 1


async def test_a_step_is_remembered_though_it_is_cancelled_at_its_end(
    again: Callable[[], JournalSteps],
) -> None:
    """What has happened is known, even where it could not be found."""
    world = World()
    with anyio.CancelScope() as scope:

        async def do() -> int:
            scope.cancel()
            return await world.do()

        await again().step("create", do)
    assert await again().step("create", world.do) == 1
    assert world.done == 1


async def test_a_clear_refusal_is_remembered_though_it_is_cancelled(
    again: Callable[[], JournalSteps],
) -> None:
    """What certainly did not happen is tried again, even where it could not be found."""
    world = World()
    with anyio.CancelScope() as scope, suppress(AuthenticationFailed):

        async def refuse() -> int:
            scope.cancel()
            raise AuthenticationFailed("no")

        await again().step("create", refuse)
    assert await again().step("create", world.do) == 1


async def test_a_step_that_cannot_be_found_is_ambiguous(
    again: Callable[[], JournalSteps],
) -> None:
    """Without a way to look, an unsafe step is not tried again."""
    world = World()
    world.lose = BackendUnavailable("timeout", sent=True)
    with pytest.raises(BackendUnavailable):
        await again().step("create", world.do)
    with pytest.raises(AmbiguousLaunch, match="create"):
        await again().step("create", world.do)


async def test_a_repeatable_step_is_repeated(again: Callable[[], JournalSteps]) -> None:
    """What does no harm twice is simply done again."""
    world = World()
    world.lose = BackendUnavailable("timeout", sent=True)
    with pytest.raises(BackendUnavailable):
        await again().step("start", world.do, repeatable=True)
    world.lose = None
    assert await again().step("start", world.do, repeatable=True) == 2


@pytest.mark.parametrize(
    "refusal", [AuthenticationFailed("no"), BackendUnavailable("no route", sent=False)]
)
async def test_a_clear_refusal_leaves_nothing_behind(
    again: Callable[[], JournalSteps], refusal: Exception
) -> None:
    """What certainly did not happen may be tried again without asking."""
    world = World()
    world.lose = refusal
    with pytest.raises(type(refusal)):
        await again().step("create", world.do)
    world.lose = None
    assert await again().step("create", world.do) == 2


async def test_a_refusal_does_not_undo_an_earlier_doubt(
    again: Callable[[], JournalSteps],
) -> None:
    """A first try may have got through though the second one was refused: it is looked for."""
    world = World()
    looked: list[str] = []

    async def lagging() -> int | None:
        looked.append("look")
        return world.done if len(looked) > 2 else None

    world.lose = BackendUnavailable("reset", sent=True)
    with pytest.raises(BackendUnavailable):
        await again().step("create", world.do, lagging)
    world.lose = DuplicateRun("there is one like it")
    with pytest.raises(DuplicateRun):
        await again().step("create", world.do, lagging)
    assert await again().step("create", world.do, lagging) == world.done


@pytest.mark.parametrize(
    "error",
    [
        ProtocolError("truncated"),
        WaitTimeout("too slow"),
        TrainingBackendError("something else"),
        RuntimeError("a bug"),
    ],
)
async def test_anything_but_a_clear_refusal_may_have_happened(
    again: Callable[[], JournalSteps], error: Exception
) -> None:
    """The effect is looked for at once, and otherwise the step stays open."""
    world = World()
    world.lose = error
    assert await again().step("create", world.do, world.find) == 1
    with pytest.raises(type(error)):
        await again().step("start", world.do)
    with pytest.raises(AmbiguousLaunch):
        await again().step("start", world.do)


async def test_the_error_of_a_callers_callback_is_not_swallowed(
    again: Callable[[], JournalSteps],
) -> None:
    """It ends the launch even if the step took effect."""
    world = World()

    async def do() -> int:
        await world.do()
        with callers_own():
            raise RuntimeError("from on_progress")

    with pytest.raises(RuntimeError, match="from on_progress"):
        await again().step("create", do, world.find)
    assert await again().step("create", do, world.find) == 1


async def test_a_token_is_random_and_stays_the_same(again: Callable[[], JournalSteps]) -> None:
    """One for each name, in every process."""
    token = await again().token("key")
    assert await again().token("key") == token
    assert await again().token("other") != token
    assert len(bytes.fromhex(token)) == 16


class Files:
    """A provider's files."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}
        self.uploads = 0

    async def upload(self, journal: JournalSteps, content: str = "x") -> str:
        """Upload a content through a journal."""

        async def do() -> str:
            self.uploads += 1
            name = f"file-{self.uploads}"
            await anyio.lowlevel.checkpoint()  # others may run
            self.kept[name] = content
            return name

        async def find() -> str | None:
            return next((name for name, known in self.kept.items() if known == content), None)

        async def has(name: str) -> bool:
            return name in self.kept

        return await journal.upload("here", content * 64, do, find, has)


async def test_an_upload_is_known_until_the_provider_loses_it(
    again: Callable[[], JournalSteps],
) -> None:
    """Then it is repeated; another content is another upload."""
    files = Files()
    first = await files.upload(again())
    assert await files.upload(again()) == first
    assert await files.upload(again(), "y") != first
    assert files.uploads == 2
    files.kept.clear()
    second = await files.upload(again())
    assert second not in {first, "file-2"}
    assert await files.upload(again()) == second
    assert files.uploads == 3


async def test_a_file_that_the_provider_keeps_losing_ends_the_upload(
    again: Callable[[], JournalSteps],
) -> None:
    """Rather than in a loop."""

    async def find() -> None:
        return None

    async def do() -> str:
        return "file"

    async def has(_: str) -> bool:
        return False

    for _ in range(10):
        assert await again().upload("here", "x", do, find, has) == "file"
    with pytest.raises(ProtocolError, match="repeatedly lost"):
        await again().upload("here", "x", do, find, has)


async def test_parallel_launches_share_an_upload(
    tmp_path: Path, make_config: Callable[..., TrainingConfig]
) -> None:
    """The others wait for it, in this and in other processes."""
    store = RunStore(f"sqlite:///{tmp_path / 'runs.db'}")
    all_leases = [Leases(store, tmp_path / "leases") for _ in range(2)]
    journals = []
    for number in range(6):
        store.insert(TrainingRun(id=f"r{number}", backend="scripted", config=make_config()))
        leases = all_leases[number % 2]
        journals.append(StoreJournal(store, f"r{number}", LaunchWatch(), leases=leases))
    files = Files()
    async with anyio.create_task_group() as tasks:
        for journal in journals:
            tasks.start_soon(files.upload, journal)
    assert (files.uploads, len(files.kept)) == (1, 1)
    for leases in all_leases:
        leases.close()


async def test_a_quote_over_budget_is_refused_and_kept(
    tmp_path: Path, make_config: Callable[..., TrainingConfig]
) -> None:
    """The numbers stay with the run, so that people see why."""
    budget = Budget(max_cost=Money.model_validate("1 USD"))
    journal = make_journal(tmp_path / "runs.db", make_config(budget=budget))
    with pytest.raises(BudgetExceeded, match=r"4\.00 USD.*1\.00 USD"):
        await journal.quote(Estimate(cost=Money.model_validate("4 USD"), basis="quote"))
    stored = RunStore(f"sqlite:///{tmp_path / 'runs.db'}").get("r")
    assert str(stored.cost) == "4.00 USD"


async def test_a_quote_stands_beside_what_was_estimated(
    tmp_path: Path, make_config: Callable[..., TrainingConfig]
) -> None:
    """Whoever is asked sees both; the record keeps both however often the quote comes."""
    asked: list[Estimate] = []

    async def agree(estimate: Estimate) -> bool:
        asked.append(estimate)
        return True

    ours = Estimate(train_tokens=100, cost=Money.model_validate("3 USD"))
    quote = Estimate(train_tokens=110, cost=Money.model_validate("4 USD"), basis="quote")
    journal = make_journal(tmp_path / "runs.db", make_config(), LaunchWatch(confirm=agree))
    store = RunStore(f"sqlite:///{tmp_path / 'runs.db'}")
    store.update("r", lambda run: run.model_copy(update={"estimate": ours}))
    for _ in range(2):
        await journal.record(RunState(status=TrainingStatus.READY, estimate=quote))
        await journal.quote(quote)
    stored = store.get("r").estimate
    assert stored is not None
    assert stored.model_copy(update={"ours": None}) == quote
    assert stored.ours == ours
    assert asked == [stored, stored]
    assert "1.00 USD more" in stored.differences[1]


async def test_a_free_quote_is_not_asked_about(
    tmp_path: Path, make_config: Callable[..., TrainingConfig]
) -> None:
    """Nobody is asked to spend nothing."""

    async def never(_: Estimate) -> bool:
        raise AssertionError("asked about a free run")

    watch = LaunchWatch(confirm=never)
    journal = make_journal(tmp_path / "runs.db", make_config(), watch)
    await journal.quote(Estimate(cost=Money.model_validate("0 EUR"), basis="quote"))


async def test_a_quote_without_a_price_is_not_covered_by_a_budget(
    tmp_path: Path, make_config: Callable[..., TrainingConfig]
) -> None:
    """A server that names no price does not spend under a limit unless somebody agrees."""
    config = make_config(budget={"max_cost": "5 USD"})
    journal = make_journal(tmp_path / "runs.db", config)
    with pytest.raises(BudgetExceeded, match="unknown"):
        await journal.quote(Estimate(basis="quote"))

    async def agree(_: Estimate) -> bool:
        return True

    asking = make_journal(tmp_path / "runs.db", config, LaunchWatch(confirm=agree))
    await asking.quote(Estimate(basis="quote"))


@given(faults=st.lists(st.sampled_from(["none", "lost", "killed", "refused"]), max_size=8))
async def test_no_sequence_of_faults_does_a_step_twice(store: RunStore, faults: list[str]) -> None:
    """However often a launch is cut off and repeated, the world changes once."""
    config = TrainingConfig.model_validate({"model": "m", "data": {"train": "never-read.jsonl"}})
    run = TrainingRun(id=new_run_id(), backend="scripted", config=config)
    store.insert(run)
    effects = 0

    for fault in [*faults, "none"]:

        async def do(fault: str = fault) -> int:
            nonlocal effects
            if fault == "refused":
                raise AuthenticationFailed("no")
            effects += 1
            if fault == "lost":
                raise BackendUnavailable("reset", sent=True)
            if fault == "killed":
                raise KeyboardInterrupt
            return effects

        async def find() -> int | None:
            return effects or None

        await _swallow(StoreJournal(store, run.id, LaunchWatch()).step("create", do, find))
    assert effects == 1


async def _swallow(step: Awaitable[object]) -> None:
    try:
        await step
    except (AuthenticationFailed, BackendUnavailable, KeyboardInterrupt):
        return
