"""What a request for a job may ask for, and how the rest is refused."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import pytest
import sqlalchemy as sa
from anyio import to_thread
from mistralai.client import Mistral
from pydantic import BaseModel, SecretStr

from tests.gateway.conftest import KEY, Site, jsonl, scripted, shared_site, site
from tests.waiting import until
from training_backends.backends.local.settings import LocalOptions
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.backends.mistral.settings import MistralSettings
from training_backends.core.backend import CredentialSource, Journal
from training_backends.core.config import TrainingConfig, Tuning
from training_backends.core.dataset import Dataset
from training_backends.core.errors import ConfigError, StoreError
from training_backends.core.run import RunState, TrainingRun, ValidationReport, utc_now
from training_backends.credentials.vault import CredentialInfo
from training_backends.datasets.inspect import inspect
from training_backends.gateway.job_request import secret_profile
from training_backends.gateway.store import GatewayStore
from training_backends.testing.backend import ScriptedBackend

pytestmark = pytest.mark.anyio

JOBS = "/v1/fine_tuning/jobs"


class Secrets:
    """Keeps secrets where the test can see them.

    Attributes:
        stuck: Whether deleting one never ends.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str | None], str] = {}
        self.stuck = False
        self.stored_at = utc_now()

    async def set(self, provider: str, secret: Any, profile: str | None = None) -> None:
        """Keep one."""
        self.kept[provider, profile] = secret.get_secret_value()

    async def list(self) -> list[CredentialInfo]:
        """Return the names of what is kept."""
        return [
            CredentialInfo(provider, profile or "default", "keyring", "", self.stored_at)
            for provider, profile in self.kept
        ]

    async def delete(self, provider: str, profile: str | None = None) -> None:
        """Forget one."""
        if self.stuck:
            await anyio.sleep_forever()
        del self.kept[provider, profile]


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"hyperparameters": {"n_epochs": 3}}, ["body", "hyperparameters", "n_epochs"]),
        ({"hyperparameters": {"seq_len": 10**9}}, ["body", "hyperparameters", "seq_len"]),
        ({"hyperparameters": {"epochs": 1e9}}, ["body", "hyperparameters", "epochs"]),
        ({"hyperparameters": {"trainingSteps": 3}}, ["body", "hyperparameters", "trainingSteps"]),
        ({"hyperparameters": {"learning_rate": 2}}, ["body", "hyperparameters", "learning_rate"]),
        (
            {"hyperparameters": {"epochs": 1, "training_steps": 1}},
            ["body", "hyperparameters"],
        ),
        ({"n_epochs": 3}, ["body", "n_epochs"]),
        ({"suffix": "a" * 19}, ["body", "suffix"]),
        ({"suffix": "a:b"}, ["body", "suffix"]),
        ({"training_files": []}, ["body", "training_files"]),
        ({"training_files": [str(uuid4())]}, ["body", "training_files", 0, "file_id"]),
        ({"training_files": ["no-id"]}, ["body", "training_files", 0, "file_id"]),
        ({"validation_files": [str(uuid4())]}, ["body", "validation_files", 0]),
        (
            {"repositories": [{"name": "r", "owner": "o", "token": "secret-token"}]},
            ["body", "repositories"],
        ),
        (
            {"integrations": [{"type": "wandb", "project": "p", "api_key": "k" * 40}]},
            ["body", "integrations", 0],
        ),
        (
            {"integrations": [{"type": "wandb", "project": "p", "api_key": "short-key"}]},
            ["body", "integrations", 0, "api_key"],
        ),
        ({"invalid_sample_skip_percentage": 0.6}, ["body", "invalid_sample_skip_percentage"]),
        ({"classifier_targets": []}, None),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(
    shared: Site, fields: dict[str, Any], place: list[str | int] | None
) -> None:
    """The refusal names the field, and never repeats a secret."""
    before = (await shared.http.get(JOBS)).json()["total"]
    answer = await shared.try_create(**fields)
    if place is None:
        assert answer.status_code == 200
        return
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == place
    assert "secret-token" not in answer.text
    assert "short-key" not in answer.text
    assert (await shared.http.get(JOBS)).json()["total"] == before


async def test_a_model_that_is_not_offered_is_refused_with_those_that_are(shared: Site) -> None:
    """The service's words, with a list that is not empty."""
    answer = await shared.try_create(model="gpt-4")
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(
        "Model not available for this type of fine-tuning (completion). Available model(s): "
        "tiny-mistral, open-mistral-7b"
    )


async def test_a_kind_of_job_that_the_backend_lacks_is_refused_in_a_sentence(shared: Site) -> None:
    """Not in the words that clients read as: retired."""
    targets = [{"name": "mood", "labels": ["good", "bad"]}]
    answer = await shared.try_create(job_type="classifier", classifier_targets=targets)
    assert answer.status_code == 422
    assert "classifier" in answer.json()["detail"]
    assert "Available model(s)" not in answer.json()["detail"]


async def test_files_for_another_purpose_are_no_training_files(shared: Site) -> None:
    """A batch file is refused by its place."""
    batch = await shared.upload(b"{}\n", "b.jsonl", purpose="batch")
    answer = await shared.try_create(files=[batch])
    assert answer.json()["detail"][0]["type"] == "file_purpose"


class Noting(ScriptedBackend):
    """Keeps what it is told to train; takes the options of the local backend."""

    options_model = LocalOptions

    def __init__(self) -> None:
        super().__init__()
        self.configs: list[TrainingConfig] = []

    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        self.configs.append(run.config)
        return await super().launch(run, journal)


@pytest.fixture(scope="module")
async def noting(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """A gateway in front of that backend."""
    async with shared_site(tmp_path_factory, backend=Noting()) as opened:
        yield opened


@pytest.fixture(scope="module")
async def limited(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """A gateway in front of a backend that declares little."""
    backend = scripted(
        hyperparameters=frozenset({"epochs"}),
        weights=False,
        validation_files=False,
        max_train_files=1,
    )
    async with shared_site(tmp_path_factory, backend=backend) as opened:
        yield opened


async def test_a_job_is_trained_as_the_catalogue_says(tmp_path: Path) -> None:
    """Clients cannot ask for it: the protocol has no words for such things."""
    catalogue = tmp_path / "catalogue.toml"
    catalogue.write_text(
        '[models.small]\ntarget = "small"\ntuning = "qlora"\noptions.num_processes = 2\n'
    )
    backend = Noting()
    async with site(tmp_path / "home", backend, catalogue=catalogue) as here:
        await here.finished(model="small")
        await here.finished()
    asked, plain = backend.configs
    assert asked.tuning == Tuning(kind="qlora")
    assert asked.options == {"num_processes": 2}
    assert (plain.tuning, plain.options) == (None, {})


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        ({"epochs": 1}, {"epochs": 1.0}),
        ({"epochs": 1, "weight_decay": None, "fim_ratio": None}, {"epochs": 1.0}),
        ({"training_steps": 5, "fim_ratio": 0.5}, {"training_steps": 5, "fim_ratio": 0.5}),
        ({}, {"epochs": 3.0}),
    ],
)
async def test_the_backend_receives_the_hyperparameters_that_were_set_and_no_others(
    noting: Site, sent: dict[str, Any], received: dict[str, Any]
) -> None:
    """A strict backend would reject a value that the client never set."""
    await noting.finished(hyperparameters=sent)
    assert isinstance(noting.backend, Noting)
    config = noting.backend.configs[-1]
    assert config.hyperparameters.model_dump(exclude_none=True) == received


@pytest.mark.parametrize(
    ("fields", "place", "message"),
    [
        (
            {"hyperparameters": {"learning_rate": 1e-3}},
            ["hyperparameters", "learning_rate"],
            "rate",
        ),
        ({"training_files": [{"file_id": "f", "weight": 2}]}, ["training_files", 0, "weight"], ""),
        ({"training_files": ["f", "g"]}, ["training_files"], "one training file, not 2"),
        ({"validation_files": ["g"]}, ["validation_files"], "validation data"),
    ],
)
async def test_what_the_backend_does_not_declare_is_refused_at_once(
    limited: Site, fields: dict[str, Any], place: list[str | int], message: str
) -> None:
    """By its place in the request, before the job exists."""
    answer = await limited.try_create(**{"hyperparameters": {}, **fields})
    assert answer.status_code == 422
    (detail,) = answer.json()["detail"]
    assert detail["loc"] == ["body", *place]
    assert message in detail["msg"]


async def test_a_learning_rate_that_only_the_sdk_has_set_is_ignored(tmp_path: Path) -> None:
    """The Python SDK sends 0.0001 with every job; an event says that it is not used."""
    backend = Noting()
    backend._capabilities = backend.capabilities.model_copy(
        update={"hyperparameters": frozenset({"training_steps"})}
    )
    async with site(tmp_path, backend) as here:
        mistral = Mistral(api_key=KEY, server_url=here.served.url)
        made: Any = await mistral.fine_tuning.jobs.create_async(
            model="tiny-mistral",
            training_files=[{"file_id": await here.upload(), "weight": 1}],
            hyperparameters={"training_steps": 5},
            auto_start=True,
        )
        job = await here.until(made.id, "STARTED", "RUNNING")
        (note,) = [event for event in job["events"] if event["name"] == "note"]
    assert "learning rate 0.0001" in note["data"]["message"]
    (config,) = backend.configs
    assert config.hyperparameters.model_dump(exclude_none=True) == {"training_steps": 5}


async def test_a_backend_receives_neither_an_undeclared_suffix_nor_a_default_length(
    tmp_path: Path,
) -> None:
    """The gateway itself names the model, and its default length is for backends with epochs."""
    backend = Noting()
    backend._capabilities = backend.capabilities.model_copy(
        update={"suffix": None, "hyperparameters": frozenset({"training_steps"})}
    )
    async with site(tmp_path, backend) as here:
        job = await here.finished(suffix="mine", hyperparameters={})
    (config,) = backend.configs
    assert config.suffix is None
    assert config.hyperparameters.model_dump(exclude_none=True) == {}
    assert (job["suffix"], ":mine:" in job["fine_tuned_model"]) == ("mine", True)


async def test_a_gateway_with_a_wrong_catalogue_does_not_start(tmp_path: Path) -> None:
    """An option that its backend does not have would fail every job."""
    catalogue = tmp_path / "catalogue.toml"
    catalogue.write_text('[models.small]\ntarget = "small"\noptions.gpus = 2\n')
    with pytest.raises(ConfigError) as caught:
        async with site(tmp_path / "home", Noting(), catalogue=catalogue):
            pytest.fail("it started")
    assert caught.value.issues[0].field == "models.small.options.gpus"


async def test_a_classifier_job_has_its_targets(tmp_path: Path) -> None:
    """Where the backend can, a classifier is trained and named as one."""
    catalogue = tmp_path / "catalogue.toml"
    catalogue.write_text('[models.small]\ntarget = "small"\njob_types = ["classifier"]\n')
    backend = scripted(methods=frozenset({"sft", "classifier"}))
    async with site(tmp_path / "home", backend, catalogue=catalogue) as here:
        rows = [{"text": "fine", "labels": {"mood": "good"}}]
        fields: dict[str, Any] = {
            "files": [await here.upload(jsonl(rows))],
            "model": "small",
            "classifier_targets": [{"name": "mood", "labels": ["good", "bad"]}],
        }
        wrong = {"hyperparameters": {"training_steps": 1, "fim_ratio": 0.5}}
        refused = await here.try_create(**{**fields, **wrong})
        assert refused.json()["detail"][0]["loc"] == ["body", "hyperparameters", "fim_ratio"]
        done = await here.finished(**fields)
        assert done["job_type"] == "classifier"
        assert done["fine_tuned_model"].startswith("ft:classifier:small:")
        assert done["classifier_targets"] == [
            {
                "name": "mood",
                "labels": ["good", "bad"],
                "weight": 1.0,
                "loss_function": "single_class",
            }
        ]
        renamed = await here.http.patch(
            f"/v1/fine_tuning/models/{done['fine_tuned_model']}", json={"name": "n"}
        )
        assert renamed.json()["model_type"] == "classifier"
        assert renamed.json()["classifier_targets"][0]["name"] == "mood"


async def test_a_similar_job_is_refused_while_the_first_is_under_way(here: Site) -> None:
    """409 names the other; once it is over the same is welcome again."""
    file_id = await here.upload()
    first = await here.create(files=[file_id])
    answer = await here.try_create(files=[file_id])
    assert (answer.status_code, answer.json()["job_id"]) == (409, first["id"])
    await here.create(files=[file_id], suffix="else")
    await here.http.post(f"{JOBS}/{first['id']}/cancel")
    await here.create(files=[file_id])


async def test_of_many_similar_jobs_at_once_one_is_made(here: Site) -> None:
    """Whoever comes first; the others hear of it."""
    file_id = await here.upload()
    codes: list[int] = []

    async def one() -> None:
        codes.append((await here.try_create(files=[file_id])).status_code)

    async with anyio.create_task_group() as tasks:
        for _ in range(6):
            tasks.start_soon(one)
    assert sorted(codes) == [200, 409, 409, 409, 409, 409]


async def test_a_key_for_reports_is_kept_in_the_vault_for_as_long_as_the_job(
    tmp_path: Path,
) -> None:
    """The key is named in the configuration and written nowhere in the gateway's home."""
    secrets = Secrets()
    backend = scripted(integrations=frozenset({"wandb"}))
    async with site(tmp_path, backend, vault=secrets) as here:
        key = "wandb_v1_" + "w" * 77
        wandb = {"type": "wandb", "project": "p", "name": "n", "api_key": key}
        job_id, remote = await here.started(integrations=[wandb])
        assert secrets.kept == {("wandb", secret_profile(job_id)): key}
        job = await here.get(job_id)
        assert job["integrations"][0]["project"] == "p"
        for query, total in (("wandb_project=p", 1), ("wandb_name=n", 1), ("wandb_name=x", 0)):
            assert (await here.http.get(f"{JOBS}?{query}")).json()["total"] == total
        here.backend.finish(remote)
        await here.until(job_id, "SUCCESS")
        for path in (tmp_path / "gateway").glob("runs.db*"):
            assert key.encode() not in path.read_bytes()
        await until(lambda: not secrets.kept)


async def test_a_key_for_reports_that_a_crash_left_is_deleted_at_the_next_start(
    tmp_path: Path,
) -> None:
    """The gateway may end between the end of a job and its clean-up."""
    secrets = Secrets()
    secrets.stuck = True
    backend = scripted(integrations=frozenset({"wandb"}))
    wandb = {"type": "wandb", "project": "p", "api_key": "w" * 40}
    async with site(tmp_path, backend, vault=secrets) as here:
        await here.finished(integrations=[wandb])
    assert secrets.kept
    secrets.stuck = False
    async with site(tmp_path, backend, vault=secrets):
        await until(lambda: not secrets.kept)


async def test_a_key_for_reports_whose_job_was_never_stored_is_deleted_at_the_next_start(
    tmp_path: Path,
) -> None:
    """The gateway may end between storing the key and the job; other keys stay."""
    secrets = Secrets()
    backend = scripted(integrations=frozenset({"wandb"}))
    wandb = {"type": "wandb", "project": "p", "api_key": "w" * 40}
    async with site(tmp_path, backend, vault=secrets) as here:
        job_id, _ = await here.started(integrations=[wandb])
    own = {("wandb", secret_profile(job_id)), ("wandb", "job-of-mine"), ("wandb", "team")}
    await secrets.set("wandb", SecretStr("mine"), "job-of-mine")
    await secrets.set("wandb", SecretStr("mine"), "team")
    await secrets.set("wandb", SecretStr("orphan"), secret_profile(str(uuid4())))
    async with site(tmp_path, backend, vault=secrets):
        await until(lambda: secrets.kept.keys() == own)


class Share(BaseModel):
    """Options of the backend below."""

    share: float = 0.0


class Lenient(ScriptedBackend):
    """Can leave unusable rows out; keeps the options that it is given."""

    options_model = Share

    def __init__(self) -> None:
        super().__init__()
        self.options: list[dict[str, Any]] = []

    def options_tolerating(self, fraction: float) -> dict[str, Any]:
        return {"share": fraction}

    async def validate(self, config: TrainingConfig, dataset: Dataset) -> ValidationReport:
        self.options.append(config.options)
        return await super().validate(config, dataset)


@pytest.mark.parametrize(("asked", "given"), [(0.25, {"share": 0.25}), (0, {})])
async def test_the_backend_is_told_how_many_unusable_rows_to_leave_out(
    tmp_path: Path, asked: float, given: dict[str, Any]
) -> None:
    """In its own words, and only if the job asks for it."""
    backend = Lenient()
    async with site(tmp_path, backend) as here:
        job = await here.create(invalid_sample_skip_percentage=asked)
        await here.until(job["id"], "VALIDATED")
    assert backend.options == [given]


async def test_a_job_that_cannot_be_stored_leaves_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would ever delete the key of a job that there is not."""
    secrets = Secrets()
    backend = scripted(integrations=frozenset({"wandb"}))
    async with site(tmp_path, backend, vault=secrets) as here:
        file_id = await here.upload()

        async def full(store: GatewayStore, work: Callable[[sa.Connection], Any]) -> Any:
            raise StoreError("The database cannot be used: disk is full")

        monkeypatch.setattr(GatewayStore, "awrite", full)
        wandb = {"type": "wandb", "project": "p", "api_key": "w" * 40}
        answer = await here.try_create(files=[file_id], integrations=[wandb])
        assert (answer.status_code, secrets.kept) == (503, {})


@pytest.mark.parametrize("served", [frozenset(), frozenset({"wandb"})])
async def test_our_own_client_learns_of_a_report_that_cannot_be_before_it_uploads(
    tmp_path: Path, served: frozenset[str]
) -> None:
    """The gateway says what its backend reports to, and `validate` asks it."""
    (tmp_path / "train.jsonl").write_bytes(jsonl())
    config = TrainingConfig.model_validate(
        {
            "model": "tiny-mistral",
            "data": {"train": tmp_path / "train.jsonl"},
            "integrations": [{"project": "p"}],
        }
    )

    class Keys(CredentialSource):
        async def get(self, provider: str, profile: str | None = None) -> SecretStr:
            del profile
            return SecretStr(KEY if provider == "mistral" else "w" * 40)

    async with site(tmp_path / "home", scripted(integrations=served)) as here:
        settings = MistralSettings(base_url=here.served.url)
        backend = MistralAPIBackend(credentials=Keys(), settings=settings)
        report = await backend.validate(config, await to_thread.run_sync(inspect, config))
        await backend.aclose()
    fields = [issue.field for issue in report.errors]
    assert fields == ([] if served else ["integrations.0"])


@pytest.mark.parametrize("query", ["", "?dry_run=true"])
async def test_a_report_that_cannot_be_is_refused_before_the_files_are_looked_for(
    shared: Site, query: str
) -> None:
    """By its place, and with what cannot be done."""
    wandb = {"type": "wandb", "project": "p", "api_key": "wandb_v1_" + "k" * 77}
    body = {
        "model": "tiny-mistral",
        "training_files": [str(uuid4())],
        "hyperparameters": {},
        "integrations": [wandb],
    }
    answer = await shared.http.post(JOBS + query, json=body)
    assert answer.status_code == 422
    (detail,) = answer.json()["detail"]
    assert detail["loc"] == ["body", "integrations", 0]
    assert "does not support wandb" in detail["msg"]


async def test_a_key_that_cannot_be_kept_safely_is_refused(tmp_path: Path) -> None:
    """Without a keyring the job is refused instead of writing the key down."""
    async with site(tmp_path, scripted(integrations=frozenset({"wandb"}))) as here:
        wandb = {"type": "wandb", "project": "p", "api_key": "w" * 40}
        answer = await here.try_create(integrations=[wandb])
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["body", "integrations", 0, "api_key"]


def unknown(count: int) -> dict[str, Any]:
    """Return a job's body with so many fields that there are not."""
    return {"model": "tiny-mistral", "hyperparameters": {}} | {f"f{n}": 1 for n in range(count)}


async def test_a_body_with_many_mistakes_gets_a_short_answer(shared: Site) -> None:
    """The first ones are named, the others counted."""
    answer = await shared.http.post(JOBS, json=unknown(500))
    detail = answer.json()["detail"]
    assert (answer.status_code, len(detail)) == (422, 21)
    assert detail[0]["loc"] == ["body", "f0"]
    assert detail[-1]["msg"] == "480 more errors are not shown."


@pytest.mark.parametrize(
    "body",
    [
        unknown(80_000),
        {"model": "m", "hyperparameters": {"epochs": [[1] * 200] * 100}},
        {"model": "m", "training_files": [{}] * 20_000},
    ],
    ids=["fields", "nested", "items"],
)
async def test_a_body_with_too_many_values_is_not_validated_one_by_one(
    shared: Site, body: Any
) -> None:
    """It is rejected in one sentence, before anything is made of each value."""
    answer = await shared.http.post(JOBS, json=body)
    assert answer.status_code == 413
    assert "the limit is 10000" in answer.json()["detail"]
    patched = await shared.http.patch("/v1/fine_tuning/models/x", json=body)
    assert patched.status_code == 413


@pytest.mark.parametrize("depth", [20, 900, 100_000])
async def test_a_body_nested_deeply_is_the_client_s_mistake(shared: Site, depth: int) -> None:
    """However deeply, and whether or not the parser still reads it."""
    content = b'{"model": ' + b"[" * depth + b"]" * depth + b"}"
    headers = {"content-type": "application/json"}
    answer = await shared.http.post(JOBS, content=content, headers=headers)
    assert 400 <= answer.status_code < 500
    assert answer.json()["detail"]


async def test_an_answer_repeats_no_long_value(shared: Site) -> None:
    """Such as the name of an unknown field."""
    answer = await shared.http.post(JOBS, json=unknown(1) | {"x" * 900_000: 1})
    assert answer.status_code == 422
    assert len(answer.content) < 5000


async def test_a_key_has_so_many_unfinished_jobs_at_most(tmp_path: Path) -> None:
    """429 with the time after which to try again; a job that ends makes room."""
    async with site(tmp_path, max_open_jobs=2) as here:
        here.backend.gate = anyio.Event()  # none of them ends by itself
        first = await here.create(suffix="a")
        await here.create(suffix="b")
        rejected = await here.try_create(suffix="c")
        assert rejected.status_code == 429, rejected.text
        assert rejected.headers["retry-after"] == "60"
        assert "2 unfinished jobs" in rejected.json()["detail"]
        await here.http.post(f"{JOBS}/{first['id']}/cancel")
        await here.create(suffix="c")


async def test_a_job_has_so_many_steps_at_most(tmp_path: Path) -> None:
    """What the settings say, named as any other bound."""
    async with site(tmp_path, max_training_steps=100) as here:
        rejected = await here.try_create(hyperparameters={"training_steps": 101})
        assert rejected.status_code == 422
        place = ["body", "hyperparameters", "training_steps"]
        assert rejected.json()["detail"][0]["loc"] == place
        await here.create(hyperparameters={"training_steps": 100})
