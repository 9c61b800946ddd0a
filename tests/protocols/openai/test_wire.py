"""Wire models: strict in what they send, tolerant in what they read."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from training_backends.protocols.openai import wire
from training_backends.protocols.openai.requests import (
    AzureFineTuningJobIn,
    FineTuningJobIn,
    NebiusFineTuningJobIn,
    UploadIn,
)

NAMES = st.text("abcXYZ0-_:./é ", min_size=1, max_size=12)
AUTO = st.just("auto")
HYPERPARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "n_epochs": AUTO | st.integers(1, 50),
        "batch_size": AUTO | st.integers(1, 256),
        "learning_rate_multiplier": AUTO | st.floats(1e-6, 100),
    },
)
REQUESTS = st.fixed_dictionaries(
    {"model": NAMES, "training_file": NAMES},
    optional={
        "validation_file": st.none() | NAMES,
        "hyperparameters": HYPERPARAMETERS,
        "method": st.none()
        | st.builds(
            lambda kind, values: {"type": kind, kind: {"hyperparameters": values}},
            st.sampled_from(["supervised", "dpo", "reinforcement"]),
            HYPERPARAMETERS,
        ),
        "suffix": st.none() | NAMES,
        "seed": st.none() | st.integers(0, 2**31 - 1),
        "metadata": st.none() | st.dictionaries(NAMES, NAMES, max_size=4),
        "integrations": st.none()
        | st.lists(
            st.fixed_dictionaries(
                {"type": st.just("wandb"), "wandb": st.fixed_dictionaries({"project": NAMES})}
            ),
            max_size=2,
        ),
    },
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)

FILE: dict[str, Any] = {
    "object": "file",
    "id": "file-1",
    "purpose": "fine-tune",
    "filename": "a.jsonl",
    "bytes": 10,
    "created_at": 1_700_000_000,
    "status": "processed",
}
JOB: dict[str, Any] = {
    "object": "fine_tuning.job",
    "id": "ftjob-1",
    "model": "gpt-4o-mini-2024-07-18",
    "training_file": "file-1",
    "organization_id": "org-1",
    "created_at": 1_700_000_000,
    "status": "queued",
}
EVENT: dict[str, Any] = {"id": "ftevent-1", "created_at": 1, "level": "info", "message": "m"}
CHECKPOINT: dict[str, Any] = {"id": "ftckpt_1", "created_at": 1, "step_number": 5}
UPLOAD: dict[str, Any] = {
    "id": "upload_1",
    "bytes": 1,
    "created_at": 1,
    "expires_at": 2,
    "filename": "a",
    "purpose": "fine-tune",
    "status": "pending",
}
ANSWERS: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (wire.FileObject, FILE),
    (wire.FileDeleted, {"id": "file-1"}),
    (wire.UploadObject, UPLOAD | {"file": FILE}),
    (wire.UploadPart, {"id": "part_1", "created_at": 1, "upload_id": "upload_1"}),
    (wire.FineTuningJob, JOB),
    (wire.FineTuningJobEvent, EVENT),
    (wire.FineTuningJobCheckpoint, CHECKPOINT),
    (wire.ModelObject, {"id": "m"}),
    (wire.ModelDeleted, {"id": "m"}),
]


@given(REQUESTS)
def test_request_is_read_as_it_was_written(body: dict[str, Any]) -> None:
    """What is sent has no null, is read back as the same request, and keeps every value."""
    sent = FineTuningJobIn.model_validate(body).to_wire()
    assert None not in sent.values()
    again = FineTuningJobIn.model_validate_json(json.dumps(sent))
    assert again.to_wire() == sent
    assert {name: body[name] for name in sent} == sent
    assert again.method_type == (body.get("method") or {}).get("type", "supervised")


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": "x" * 65},
        {"suffix": ""},
        {"seed": 2**31},
        {"hyperparameters": {"n_epochs": 51}},
        {"hyperparameters": {"n_epochs": "many"}},
        {"hyperparameters": {"learning_rate": 1e-4}},
        {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}},
        {"method": {"type": "dpo", "supervised": {}}},
        {"method": {"type": "ppo"}},
        {"metadata": {"k" * 65: "v"}},
        {"metadata": {"k": "v" * 513}},
        {"metadata": {str(n): "" for n in range(17)}},
        {"integrations": [{"type": "wandb", "wandb": {"project": "p", "api_key": "secret"}}]},
        {"training_files": ["file-1"]},
    ],
)
def test_request_beyond_the_limits_is_rejected(fields: dict[str, Any]) -> None:
    """Limits of the protocol hold, and a field that it does not have is not sent."""
    with pytest.raises(ValidationError):
        FineTuningJobIn.model_validate({"model": "m", "training_file": "f", **fields})


def test_hyperparameters_of_the_method_win() -> None:
    """A request may carry hyperparameters in two places."""
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1, "n_epochs": 2}}}
    asked = FineTuningJobIn.model_validate(
        {
            "model": "m",
            "training_file": "f",
            "hyperparameters": {"n_epochs": 1, "batch_size": "auto"},
            "method": method,
        }
    )
    assert asked.effective_hyperparameters == {"n_epochs": 2, "batch_size": "auto", "beta": 0.1}


def test_azure_and_nebius_have_fields_of_their_own() -> None:
    """Azure's training type has its spelling; Nebius' learning rate is absolute."""
    base = {"model": "m", "training_file": "f"}
    azure = AzureFineTuningJobIn(model="m", training_file="f", training_type="Standard")
    assert azure.to_wire() == base | {"trainingType": "Standard"}
    assert AzureFineTuningJobIn.model_validate(azure.to_wire()) == azure
    with pytest.raises(ValidationError):
        AzureFineTuningJobIn.model_validate(base | {"suffix": "a.b"})
    values = {"learning_rate": 1e-5, "lora": True, "lora_r": 8}
    body = base | {
        "suffix": "x" * 65,
        "method": {"supervised": {"hyperparameters": values}},
        "from_checkpoint": {"repo": "r", "token": "secret"},
        "tags": ["t"],
    }
    nebius = NebiusFineTuningJobIn.model_validate(body)
    sent = nebius.to_wire()
    assert sent["method"] == {"type": "supervised", "supervised": {"hyperparameters": values}}
    assert sent["from_checkpoint"] == {"type": "hf", "repo": "r", "token": "secret"}
    assert "secret" not in repr(nebius)
    job = wire.FineTuningJob.model_validate(JOB | {"hyperparameters": values, "total_steps": 9})
    assert job.effective_hyperparameters == values


@pytest.mark.parametrize(("model", "document"), ANSWERS)
@given(extra=st.dictionaries(st.text(min_size=1, max_size=6).map("x_".__add__), JSON, max_size=3))
def test_unknown_fields_never_break_an_answer(
    model: type[BaseModel], document: dict[str, Any], extra: dict[str, Any]
) -> None:
    """A field that is added later changes nothing, alone or in a list."""
    read = model.model_validate(document | extra)
    assert read == model.model_validate(document)
    page = wire.ListPage[model].model_validate({"data": [document | extra]} | extra)  # type: ignore[valid-type]
    assert page.data == [read]


@pytest.mark.parametrize(("model", "document"), ANSWERS)
def test_answer_is_read_as_it_was_written(model: type[BaseModel], document: dict[str, Any]) -> None:
    """What a server of ours writes, a client of ours reads as the same."""
    read = model.model_validate(document)
    assert model.model_validate_json(read.model_dump_json(by_alias=True)) == read


@given(st.dictionaries(st.sampled_from(sorted(wire.FineTuningJob.model_fields)), JSON, max_size=3))
def test_misshapen_job_is_read_or_rejected(values: dict[str, Any]) -> None:
    """No value of a field fails in another way than as invalid, and what is read can be written."""
    try:
        job = wire.FineTuningJob.model_validate(JOB | values)
    except ValidationError:
        return
    written = job.to_wire()
    again = wire.FineTuningJob.model_validate_json(json.dumps(written))
    assert again.to_wire() == written


@pytest.mark.parametrize("error", [None, {}, {"code": None, "message": None, "param": None}])
def test_healthy_job_has_no_error(error: Any) -> None:
    """The empty error that the live service sends means none."""
    job = wire.FineTuningJob.model_validate(JOB | {"error": error, "estimated_finish": 0})
    assert (job.error, job.estimated_finish) == (None, None)


def test_job_is_written_with_every_key() -> None:
    """Clients expect null rather than a missing key, and no key of another provider."""
    written = wire.FineTuningJob.model_validate(JOB).to_wire()
    for name in ("fine_tuned_model", "finished_at", "trained_tokens", "validation_file", "error"):
        assert written[name] is None
    assert (written["result_files"], written["hyperparameters"]) == ([], None)
    assert not {"trainingType", "training_type", "method", "total_steps"} & set(written)


def test_words_of_other_providers_are_read() -> None:
    """Azure's spelling of the organization, null lists, and words that are new are kept."""
    document = {name: value for name, value in JOB.items() if name != "organization_id"}
    job = wire.FineTuningJob.model_validate(
        document
        | {
            "organisation_id": "o",
            "status": "thinking",
            "result_files": None,
            "method": {"type": "kto", "kto": {"x": 1}},
            "hyperparameters": None,
            "trainingType": "Standard",
        }
    )
    assert (job.organization_id, job.status, job.result_files) == ("o", "thinking", [])
    assert (job.method_type, job.training_type) == ("kto", "Standard")
    assert job.effective_hyperparameters == {}
    file = wire.FileObject.model_validate(FILE | {"status": "pending", "bytes": None})
    assert (file.status, file.bytes) == ("pending", None)


def test_auto_is_not_a_decided_value() -> None:
    """Values that the service has not chosen yet are left out."""
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1, "n_epochs": "auto"}}}
    job = wire.FineTuningJob.model_validate(JOB | {"method": method})
    assert job.effective_hyperparameters == {"beta": 0.1}


def test_list_without_has_more_goes_on_until_it_is_empty() -> None:
    """The id of the last item is where the next page begins."""
    page = wire.ListPage[wire.FileObject]
    assert page.model_validate({"data": [FILE], "has_more": True}).next_after == "file-1"
    assert page.model_validate({"data": [FILE]}).next_after == "file-1"
    assert page.model_validate({"data": [FILE], "has_more": False}).next_after is None
    assert page.model_validate({"data": None, "has_more": True}).next_after is None


def test_upload_request_has_bounds() -> None:
    """An expiry is between an hour and thirty days."""
    body = {"bytes": 1, "filename": "a", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    UploadIn.model_validate(body | {"expires_after": {"seconds": 3600}})
    with pytest.raises(ValidationError):
        UploadIn.model_validate(body | {"expires_after": {"seconds": 60}})
