"""A launch creates one job, whatever happens on the way."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.backends.cancelled_launch import check_cancelled_launch
from tests.backends.together.conftest import Secrets
from training_backends import (
    AuthenticationFailed,
    BackendUnavailable,
    BudgetExceeded,
    ConfigError,
    Dataset,
    DatasetError,
    PermissionDenied,
    RateLimited,
    RunNotFound,
    TrainingBackendError,
    TrainingConfig,
)
from training_backends.backends.together.backend import TogetherBackend
from training_backends.core.run import RunState
from training_backends.testing.faults import DropRequest, Fault, LoseAnswer, OtherAnswer
from training_backends.testing.journal import Killed, MemoryJournal
from training_backends.testing.server import Received, StubReply
from training_backends.testing.together_provider import ScriptedTogetherProvider

pytestmark = pytest.mark.anyio

CREATE = "/v1/fine-tunes"


def live(provider: ScriptedTogetherProvider) -> list[str]:
    """Return the jobs that train or will."""
    return [
        job.id
        for job in provider.jobs.values()
        if job.status not in {"cancel_requested", "cancelled"}
    ]


async def test_request_has_what_was_set_and_nothing_else(
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    make_journal: Callable[..., MemoryJournal],
    make_config: Callable[..., TrainingConfig],
) -> None:
    """Names and units are Together's; a field that nobody set is left to it."""
    tuning = {"kind": "lora", "rank": 8, "target_modules": ["q_proj", "v_proj"]}
    hyper = {"epochs": 3, "learning_rate": 2e-5, "batch_size": 8, "seq_len": 512, "seed": 7}
    options = {"dpo_beta": 0.2, "lr_scheduler": "linear", "n_checkpoints": 2}
    full = make_config(
        model=provider.models[0],
        method="dpo",
        tuning=tuning,
        hyperparameters={**hyper, "weight_decay": 0.1, "warmup_fraction": 0.05},
        suffix="mine",
        options=options,
    )
    journal = make_journal(full)
    state = await backend.launch(journal.run, journal)
    asked = dict(provider.jobs[str(state.remote_id)].asked)
    suffix, file_id = asked.pop("suffix"), asked.pop("training_file")
    assert suffix.startswith("mine-")
    assert len(suffix) == 15
    assert list(provider.files) == [file_id]
    assert asked == {
        "model": provider.models[0],
        "n_epochs": 3,
        "learning_rate": 2e-5,
        "batch_size": 8,
        "max_seq_length": 512,
        "random_seed": 7,
        "weight_decay": 0.1,
        "warmup_ratio": 0.05,
        "n_checkpoints": 2,
        "training_type": {
            "type": "Lora",
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
            "lora_trainable_modules": "q_proj,v_proj",
        },
        "training_method": {"method": "dpo", "dpo_beta": 0.2},
        "lr_scheduler": {
            "lr_scheduler_type": "linear",
            "lr_scheduler_args": {"min_lr_ratio": 0.0},
        },
    }
    journal = make_journal(make_config(model=provider.models[0], tuning="full"))
    state = await backend.launch(journal.run, journal)
    asked = provider.jobs[str(state.remote_id)].asked
    assert set(asked) == {"model", "training_file", "suffix", "training_type", "training_method"}
    assert asked["training_type"] == {"type": "Full"}
    assert asked["training_method"] == {"method": "sft", "train_on_inputs": "auto"}


async def test_data_goes_to_the_presigned_url_once_and_without_the_key(
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    make_journal: Callable[..., MemoryJournal],
    train_file: Path,
) -> None:
    """The storage gets the bytes and no key; a checksum that is there is not sent again."""
    for _ in range(2):  # by two stores, which know nothing of each other
        journal = make_journal()
        await backend.launch(journal.run, journal)
    (put,) = provider.storage.requests
    assert (put.method, put.body) == ("PUT", train_file.read_bytes())
    assert "test-key" not in json.dumps(put.headers)
    assert len(provider.files) == 1
    assert journal.sent == []
    asked = len(provider.asked("POST", "/v1/files"))
    again = make_journal()
    again.uploads = journal.uploads
    await backend.launch(again.run, again)
    assert len(provider.asked("POST", "/v1/files")) == asked


async def test_file_that_together_has_is_named_by_its_id(
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    make_journal: Callable[..., MemoryJournal],
    config: TrainingConfig,
) -> None:
    """Nothing is uploaded, and the price is known in advance."""
    file_id = provider.add_file(b'{"text": "a"}\n' * 100)
    data = {"train": {"remote_id": file_id}}
    chosen = TrainingConfig.model_validate({**config.model_dump(), "data": data})
    estimate = await backend.estimate(chosen, Dataset(files=()))
    journal = make_journal(chosen)
    state = await backend.launch(journal.run, journal)
    assert provider.jobs[str(state.remote_id)].asked["training_file"] == file_id
    assert list(provider.files) == [file_id]
    assert estimate.cost == journal.quotes[0].cost


@pytest.mark.parametrize("path", ["/v1/files", "/preprocess", "estimate-price"])
async def test_lost_answer_before_the_create_is_harmless(
    path: str,
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    make_journal: Callable[..., MemoryJournal],
) -> None:
    """Uploads, checks and prices are repeated."""
    provider.fail(LoseAnswer(), method="POST", path=path)
    journal = make_journal()
    await backend.launch(journal.run, journal)
    assert len(provider.jobs) == 1


@pytest.mark.parametrize(
    ("fault", "lag"),
    [(LoseAnswer(), 0), (LoseAnswer(), 1), (DropRequest(), 0), (OtherAnswer(status=502), 0)],
)
async def test_create_without_an_answer_makes_one_job(
    fault: Fault,
    lag: int,
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    make_journal: Callable[..., MemoryJournal],
) -> None:
    """The job is found by its token, even if lists lag, or else created again."""
    stranger = provider.add_job(suffix="mine")
    provider.lists_lag = lag
    provider.fail(fault, method="POST", path=CREATE)
    journal = make_journal()
    state = await backend.launch(journal.run, journal)
    assert set(provider.jobs) == {stranger, state.remote_id}
    assert provider.jobs[stranger].status == "pending"
    assert len(journal.quotes) == 1


@pytest.mark.parametrize(("lists", "jobs"), [(1, 1), (4, 2)])
async def test_late_create_leaves_one_job(
    lists: int,
    jobs: int,
    make_backend: Callable[..., TogetherBackend],
    provider: ScriptedTogetherProvider,
    make_journal: Callable[..., MemoryJournal],
) -> None:
    """A create that seemed lost is carried out after all: its job is adopted or cancelled."""
    backend = make_backend(poll_min=0.02, poll_max=0.02)  # two lists for each search
    provider.late_creates = [lists]
    journal = make_journal()
    state = await backend.launch(journal.run, journal)
    await backend.aclose()
    assert live(provider) == [state.remote_id]
    assert len(provider.jobs) == jobs


async def test_create_that_a_proxy_delivers_twice_leaves_one_job(
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    make_journal: Callable[..., MemoryJournal],
) -> None:
    """The job whose response was replaced by the second one is cancelled."""
    answer = provider.answer

    def twice(request: Received) -> StubReply:
        if (request.method, request.path) == ("POST", CREATE):
            answer(request)
        return answer(request)

    provider.answer = twice  # type: ignore[method-assign]
    journal = make_journal()
    state = await backend.launch(journal.run, journal)
    assert live(provider) == [state.remote_id]
    assert len(provider.jobs) == 2


async def test_job_that_appears_after_the_process_died_is_cancelled(
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    make_journal: Callable[..., MemoryJournal],
) -> None:
    """That a create was sent again is remembered until its twin was looked for."""
    provider.late_creates = [1000]
    journal = make_journal()
    record = journal.record

    async def die(state: RunState) -> None:
        raise Killed

    journal.record = die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        await backend.launch(journal.run, journal)
    journal.record = record  # type: ignore[method-assign]
    (body,) = [job.asked for job in provider.jobs.values()]
    late = provider.add_job(**body)
    state = await backend.launch(journal.run, journal)
    assert live(provider) == [state.remote_id]
    assert provider.jobs[late].status == "cancel_requested"


async def test_continued_launch_does_not_ask_for_consent_again(
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    make_journal: Callable[..., MemoryJournal],
    train_file: Path,
) -> None:
    """The price was agreed to before the create failed."""
    provider.fail(OtherAnswer(status=403), method="POST", path=CREATE)
    journal = make_journal()
    with pytest.raises(PermissionDenied):
        await backend.launch(journal.run, journal)
    await backend.launch(journal.run, journal)
    dollars = 2 * train_file.stat().st_size * provider.dollars_per_byte
    assert [str(quote.cost) for quote in journal.quotes] == [f"{dollars:.2f} USD"]
    assert journal.quotes[0].basis == "quote"


async def test_price_beyond_a_limit_creates_no_job(
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    make_journal: Callable[..., MemoryJournal],
    config: TrainingConfig,
) -> None:
    """The budget of the run and the account's own limit are checked before the create."""
    budget = {"max_cost": "1 USD"}
    journal = make_journal(TrainingConfig.model_validate({**config.model_dump(), "budget": budget}))
    with pytest.raises(BudgetExceeded, match="budget allows"):
        await backend.launch(journal.run, journal)
    provider.credit = 2.0
    journal = make_journal()
    with pytest.raises(BudgetExceeded, match="account's limit is 2"):
        await backend.launch(journal.run, journal)
    assert provider.jobs == {}


async def test_rejected_data_creates_no_job(
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    make_journal: Callable[..., MemoryJournal],
    train_file: Path,
) -> None:
    """Together's own check of the file is awaited, and its message shown."""
    train_file.write_text("not json\n")
    journal = make_journal()
    with pytest.raises(DatasetError, match="Line 1 is not valid JSON"):
        await backend.launch(journal.run, journal)
    assert provider.jobs == {}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ConfigError),
        (401, AuthenticationFailed),
        (402, PermissionDenied),
        (403, PermissionDenied),
        (404, RunNotFound),
        (429, RateLimited),
        (503, BackendUnavailable),
    ],
)
async def test_errors_have_their_classes_and_no_secret(
    *,
    status: int,
    kind: type[TrainingBackendError],
    make_backend: Callable[..., TogetherBackend],
    secrets: Secrets,
    provider: ScriptedTogetherProvider,
    make_journal: Callable[..., MemoryJournal],
    config: TrainingConfig,
) -> None:
    """A server that repeats the keys of a request in its error does not reveal them."""
    key, wandb = "tgp-0123456789abcdef", "wandb-fedcba9876543210"
    provider.key = key
    secrets.values |= {"together": key, "wandb": wandb}
    body = {"error": {"message": f"bad request by {key} with {wandb}"}}
    headers = {"retry-after": "600"} if status == 429 else {}
    fault = OtherAnswer(status=status, body=body, headers=headers)
    provider.fail(fault, method="POST", path=CREATE, times=9)
    tracked = {**config.model_dump(), "integrations": [{"type": "wandb", "project": "mine"}]}
    journal = make_journal(TrainingConfig.model_validate(tracked))
    backend = make_backend()
    with pytest.raises(kind) as caught:
        await backend.launch(journal.run, journal)
    await backend.aclose()
    error = caught.value
    assert (error.backend, error.run_id) == ("together", journal.run.id)
    shown = f"{error} {error!r} {error.hint} {error.__notes__} {error.issues}"
    assert key not in shown
    assert wandb not in shown
    sent = json.loads(provider.asked("POST", CREATE)[0].body)
    assert (sent["wandb_key"], sent["wandb_project_name"]) == (wandb, "mine")
    assert wandb not in json.dumps(list(journal.rows.values()))


async def test_a_launch_cancelled_while_its_job_is_created_stops_that_job(
    tmp_path: Path,
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    config: TrainingConfig,
) -> None:
    """Nothing trains on, though the id of the job never arrived."""
    await check_cancelled_launch(tmp_path, backend, provider, config, path=CREATE)
