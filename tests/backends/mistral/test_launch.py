"""Launching: exactly one job, quoted and started, whatever breaks on the way."""

import json
import os
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from training_backends import (
    BackendRetired,
    BudgetExceeded,
    ConfigError,
    ProtocolError,
    RunState,
    TrainingConfig,
    TrainingStatus,
    WaitTimeout,
)
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.protocols.mistral.errors import no_model_message
from training_backends.testing.faults import LoseAnswer, OtherAnswer
from training_backends.testing.journal import Killed, MemoryJournal
from training_backends.testing.provider import ScriptedProvider
from training_backends.testing.server import Received, StubReply

pytestmark = pytest.mark.anyio
MakeJournal = Callable[..., MemoryJournal]
MakeConfig = Callable[..., TrainingConfig]
CREATE: dict[str, Any] = {"method": "POST", "path": "/jobs"}


def created(provider: ScriptedProvider) -> list[dict[str, object]]:
    """Return the bodies of all create requests."""
    return [json.loads(request.body) for request in provider.asked("POST", "/jobs")]


async def test_create_says_exactly_what_was_configured(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    make_config: MakeConfig,
    make_journal: MakeJournal,
    tmp_path: Path,
) -> None:
    """The request holds the specification's names, files as objects, and nothing unasked."""
    other = tmp_path / "other.jsonl"
    other.write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n')
    config = make_config(
        model="open-mistral-7b",
        suffix="mine",
        data={
            "train": [str(tmp_path / "train.jsonl"), {"path": str(other), "weight": 2}],
            "validation": str(other),
        },
        hyperparameters={"epochs": 2, "learning_rate": 1e-5, "seq_len": 2048},
        options={"invalid_sample_skip_percentage": 0.1},
    )
    journal = make_journal(config)
    await backend.launch(journal.run, journal)
    first, second = [file.id for file in provider.files.values()]
    assert created(provider) == [
        {
            "model": "open-mistral-7b",
            "training_files": [
                {"file_id": first, "weight": 1.0},
                {"file_id": second, "weight": 2.0},
            ],
            "validation_files": [second],
            "suffix": "mine",
            "auto_start": False,
            "invalid_sample_skip_percentage": 0.1,
            "job_type": "completion",
            "hyperparameters": {"epochs": 2.0, "learning_rate": 1e-5, "seq_len": 2048},
        }
    ]


async def test_created_job_is_started(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A launch waits for the quote, has it judged, and starts the job, once."""
    journal = make_journal()
    state = await backend.launch(journal.run, journal)
    job = next(iter(provider.jobs.values()))
    assert (job.started, job.starts) == (True, 1)
    assert state.remote_id == job.id
    assert not state.status.is_terminal
    quote = journal.quotes[0]
    assert (quote.basis, quote.train_tokens, quote.steps) == ("quote", 1_310_720, 10)
    assert quote.cost is not None
    assert (quote.cost.amount, quote.cost.currency) == (Decimal("2.5"), "USD")


async def test_remote_id_is_recorded_before_the_quote(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """The first thing recorded after the create is the job's id."""
    journal = make_journal()
    await backend.launch(journal.run, journal)
    assert journal.states[0].remote_id == next(iter(provider.jobs))
    assert [state.status for state in journal.states[:2]] == [
        TrainingStatus.PENDING,
        TrainingStatus.VALIDATING,
    ]


async def test_quote_above_the_budget_starts_nothing(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    make_config: MakeConfig,
    make_journal: MakeJournal,
) -> None:
    """A quote above the budget cancels the job, which costs nothing until it is started."""
    config = make_config(model="open-mistral-7b", budget={"max_cost": "2 USD"})
    journal = make_journal(config)
    with pytest.raises(BudgetExceeded):
        await backend.launch(journal.run, journal)
    job = next(iter(provider.jobs.values()))
    assert (job.status, job.starts) == ("CANCELLED", 0)
    assert journal.run.status is TrainingStatus.CANCELLED


async def test_a_quote_without_a_price_is_not_within_a_budget(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    make_config: MakeConfig,
    make_journal: MakeJournal,
) -> None:
    """A job whose price cannot be compared with the limit is cancelled, not started."""
    provider.cost = None
    journal = make_journal(make_config(budget={"max_cost": "2 USD"}))
    with pytest.raises(BudgetExceeded, match="unknown"):
        await backend.launch(journal.run, journal)
    job = next(iter(provider.jobs.values()))
    assert (job.status, job.starts) == ("CANCELLED", 0)


async def test_uncancellable_job_is_named(
    make_backend: Callable[..., MistralAPIBackend],
    provider: ScriptedProvider,
    make_config: MakeConfig,
    make_journal: MakeJournal,
) -> None:
    """If the job above the budget cannot be cancelled, the error says which one it is."""
    backend = make_backend(attempts=1)
    provider.fail(OtherAnswer(status=500), method="POST", path="/cancel", times=99)
    config = make_config(model="open-mistral-7b", budget={"max_cost": "2 USD"})
    journal = make_journal(config)
    with pytest.raises(BudgetExceeded) as caught:
        await backend.launch(journal.run, journal)
    await backend.aclose()
    job = next(iter(provider.jobs.values()))
    assert job.id in str(caught.value.hint)
    assert (caught.value.limit, caught.value.found) == ("2.00 USD", "2.50 USD")
    assert job.starts == 0


async def test_no_price_is_said(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A server that names no price leaves the cost unknown, with a note."""
    provider.cost = None
    journal = make_journal()
    await backend.launch(journal.run, journal)
    assert journal.quotes[0].cost is None
    assert any("no price" in note for note in journal.quotes[0].notes)


async def test_missing_quote_is_judged_too(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    make_journal: MakeJournal,
) -> None:
    """A server that gives no quote at all does not get around whoever decides on it."""
    provider.quotes = False
    journal = make_journal()
    await backend.launch(journal.run, journal)
    (quote,) = journal.quotes
    assert (quote.basis, quote.cost) == ("quote", None)
    assert "no quote" in quote.notes[0]


async def test_failed_validation_is_told_with_its_reasons(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A job that fails validation ends the launch as failed, with what the events say."""
    provider.auto = "none"
    journal = make_journal()

    async def record(state: RunState) -> None:
        job_id = str(state.remote_id)
        if provider.jobs[job_id].status == "QUEUED":
            provider.set_status(job_id, "FAILED_VALIDATION", error="line 3: no messages")

    journal.record = record  # type: ignore[method-assign]
    state = await backend.launch(journal.run, journal)
    assert state.status is TrainingStatus.FAILED
    assert state.failure is not None
    assert (state.failure.kind, state.failure.message) == ("validation", "line 3: no messages")


async def test_unknown_word_is_waited_through(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A status never heard of before validation is neither started nor given up on."""
    provider.auto = "none"
    journal = make_journal()
    words = iter(["PREPARING", "VALIDATED"])
    record = journal.record

    async def go_on(state: RunState) -> None:
        await record(state)
        if word := next(words, None):
            provider.set_status(str(state.remote_id), word)

    journal.record = go_on  # type: ignore[method-assign]
    await backend.launch(journal.run, journal)
    assert [state.status for state in journal.states] == ["pending", "unknown", "ready"]
    assert [job.starts for job in provider.jobs.values()] == [1]


async def test_endless_validation_times_out_and_goes_on(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    make_config: MakeConfig,
    make_journal: MakeJournal,
) -> None:
    """Validation that takes too long is an error; the same launch repeated goes on."""
    provider.auto = "none"
    config = make_config(model="open-mistral-7b", options={"validate_timeout": 1})
    journal = make_journal(config)
    with pytest.raises(WaitTimeout, match="QUEUED") as caught:
        await backend.launch(journal.run, journal)
    assert journal.run.id in str(caught.value.hint)
    provider.auto = "complete"
    await backend.launch(journal.run, journal)
    assert [job.starts for job in provider.jobs.values()] == [1]


async def test_validation_is_waited_for_through_an_outage(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A server that fails for longer than a call's attempts does not end the launch."""
    journal = make_journal()
    record = journal.record

    async def then_fail(state: RunState) -> None:
        await record(state)
        if len(journal.states) == 1:
            provider.fail(OtherAnswer(status=503), method="GET", times=7)

    journal.record = then_fail  # type: ignore[method-assign]
    await backend.launch(journal.run, journal)
    assert [job.starts for job in provider.jobs.values()] == [1]


async def test_a_job_that_stays_unreadable_ends_the_launch(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A response that never matches the protocol is an error long before the timeout."""
    journal = make_journal()
    record = journal.record

    async def then_garble(state: RunState) -> None:
        await record(state)
        provider.fail(OtherAnswer(status=200, body={"id": "j"}), method="GET", times=99)

    journal.record = then_garble  # type: ignore[method-assign]
    with pytest.raises(ProtocolError):
        await backend.launch(journal.run, journal)


async def test_job_that_was_queued_again_is_not_started_twice(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """QUEUED after the start is told from QUEUED before validation, by the events."""
    provider.auto = "validate"
    journal = make_journal()
    await backend.launch(journal.run, journal)
    assert journal.run.remote_id is not None
    assert provider.jobs[journal.run.remote_id].status == "QUEUED"
    journal.rows.clear()
    state = await backend.launch(journal.run, journal)
    assert provider.jobs[journal.run.remote_id].starts == 1
    assert state.status is TrainingStatus.PENDING


async def test_retired_service_is_told_before_the_upload(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """410 is told as a retired service: since when, what else can run it; nothing uploaded."""
    provider.retired = True
    journal = make_journal()
    with pytest.raises(BackendRetired, match="shut down its fine-tuning API") as caught:
        await backend.launch(journal.run, journal)
    assert "2026-07-13" in str(caught.value.hint)
    assert "serve" in str(caught.value.hint)
    assert provider.files == {}


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/files"), ("GET", "/files"), ("POST", "/jobs"), ("POST", "/start")],
)
@pytest.mark.parametrize(
    "answer",
    [
        OtherAnswer(status=410, body={"detail": "Gone"}),
        OtherAnswer(status=422, body={"detail": no_model_message("completion", [])}),
    ],
)
async def test_service_that_ends_during_a_launch_is_told(
    *,
    answer: OtherAnswer,
    method: str,
    path: str,
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    make_journal: MakeJournal,
) -> None:
    """Both signs of a retired service are told as such at every step, and nothing is repeated."""
    provider.fail(answer, method=method, path=path, times=99)
    journal = make_journal()
    with pytest.raises(BackendRetired):
        await backend.launch(journal.run, journal)
    assert len(provider.asked(method, path)) == 1


async def test_started_run_is_no_failure(
    make_backend: Callable[..., MistralAPIBackend],
    provider: ScriptedProvider,
    make_journal: MakeJournal,
) -> None:
    """A server that is away right after it took the start does not make the launch fail."""
    backend = make_backend(attempts=1)
    answer = provider.answer

    def and_be_away(request: Received) -> StubReply:
        reply = answer(request)
        if request.path.endswith("/start"):
            provider.fail(OtherAnswer(status=503), times=99)
        return reply

    provider.answer = and_be_away  # type: ignore[method-assign]
    journal = make_journal()
    state = await backend.launch(journal.run, journal)
    await backend.aclose()
    assert (state.status, state.raw_status) == (TrainingStatus.PENDING, "QUEUED")
    assert [job.starts for job in provider.jobs.values()] == [1]


async def test_cancel_of_a_job_over_budget_is_tried_again(
    make_backend: Callable[..., MistralAPIBackend],
    provider: ScriptedProvider,
    make_config: MakeConfig,
    make_journal: MakeJournal,
) -> None:
    """Trouble that passes does not leave the job above the budget waiting."""
    backend = make_backend(attempts=1)
    provider.fail(LoseAnswer(), method="POST", path="/cancel")
    provider.fail(OtherAnswer(status=502), method="POST", path="/cancel", times=2)
    journal = make_journal(make_config(model="open-mistral-7b", budget={"max_cost": "2 USD"}))
    with pytest.raises(BudgetExceeded) as caught:
        await backend.launch(journal.run, journal)
    await backend.aclose()
    assert [job.status for job in provider.jobs.values()] == ["CANCELLED"]
    assert "may have failed" not in str(caught.value.hint)


async def test_empty_list_of_models_means_retired(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """The 422 that offers no model at all is told as a retired service too."""
    provider.offers_no_model = True
    journal = make_journal()
    with pytest.raises(BackendRetired):
        await backend.launch(journal.run, journal)


async def test_model_that_is_not_offered_is_a_config_error(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    make_config: MakeConfig,
    make_journal: MakeJournal,
) -> None:
    """The same 422 with models in its list is an error of the configuration that shows them."""
    journal = make_journal(make_config(model="gpt-5"))
    with pytest.raises(ConfigError, match="tiny-mistral"):
        await backend.launch(journal.run, journal)


async def test_memory_is_not_needed_to_go_on(
    make_backend: Callable[..., MistralAPIBackend],
    provider: ScriptedProvider,
    make_journal: MakeJournal,
) -> None:
    """Killed after the create, another backend object starts the job from the record alone."""
    journal = make_journal()
    points = 0
    while not provider.jobs:
        journal.kill_at, journal.points = points, 0
        first = make_backend()
        with pytest.raises(Killed):
            await first.launch(journal.run, journal)
        await first.aclose()
        points += 1
    second = make_backend()
    journal.kill_at = None
    await second.launch(journal.run, journal)
    await second.aclose()
    assert [job.starts for job in provider.jobs.values()] == [1]


async def test_missing_file_is_told_before_anything_is_made(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    make_journal: MakeJournal,
    train_file: Path,
) -> None:
    """A data file that is gone is an error that names it; there is no job."""
    os.unlink(train_file)  # noqa: PTH108
    journal = make_journal()
    with pytest.raises(Exception, match=r"Cannot upload train\.jsonl"):
        await backend.launch(journal.run, journal)
    assert provider.jobs == {}
