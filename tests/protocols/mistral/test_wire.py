"""Wire models: exact in what they send, tolerant in what they read."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from training_backends.core.logging import redact
from training_backends.protocols.mistral import wire

NAMES = st.text(min_size=1, max_size=30)
WEIGHTS = st.floats(min_value=1e-6, max_value=1e6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
HYPERPARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "training_steps": st.integers(1, 10**6),
        "learning_rate": st.floats(1e-8, 1),
        "weight_decay": st.floats(0, 1),
        "warmup_fraction": st.floats(0, 1),
        "epochs": st.floats(0.01, 100),
        "seq_len": st.integers(100, 10**6),
        "fim_ratio": st.floats(0, 1),
    },
)
REQUESTS = st.fixed_dictionaries(
    {
        "model": NAMES,
        "training_files": st.lists(
            st.fixed_dictionaries({"file_id": NAMES}, optional={"weight": WEIGHTS}), max_size=3
        ),
        "hyperparameters": HYPERPARAMETERS,
    },
    optional={
        "validation_files": st.lists(NAMES, max_size=3),
        "suffix": st.text(max_size=18),
        "auto_start": st.booleans(),
        "invalid_sample_skip_percentage": st.floats(0, 0.5),
        "job_type": st.sampled_from(["completion", "classifier"]),
        "integrations": st.lists(
            st.fixed_dictionaries(
                {"project": NAMES, "api_key": st.just("k" * 40)},
                optional={"name": NAMES, "run_name": NAMES, "type": st.just("wandb")},
            ),
            max_size=2,
        ),
        "repositories": st.lists(
            st.fixed_dictionaries(
                {"name": NAMES, "owner": NAMES, "token": NAMES},
                optional={"ref": NAMES, "weight": WEIGHTS, "type": st.just("github")},
            ),
            max_size=2,
        ),
        "classifier_targets": st.lists(
            st.fixed_dictionaries(
                {"name": NAMES, "labels": st.lists(NAMES, max_size=3)},
                optional={
                    "weight": st.floats(0, 10),
                    "loss_function": st.sampled_from(["single_class", "multi_class"]),
                },
            ),
            max_size=2,
        ),
    },
)


def job_document(**fields: Any) -> dict[str, Any]:
    """Return what the specification requires of a job."""
    return {
        "id": "j",
        "auto_start": False,
        "model": "m",
        "status": "QUEUED",
        "created_at": 1,
        "modified_at": 2,
        "training_files": ["f"],
        "hyperparameters": {},
        **fields,
    }


@given(REQUESTS)
def test_request_says_what_was_set(values: dict[str, Any]) -> None:
    """A create request says all that was set, and reads back to the same request."""
    job = wire.JobIn.model_validate(values)
    body = json.loads(json.dumps(job.to_wire()))
    assert wire.JobIn.model_validate(body).to_wire() == job.to_wire()
    assert body["hyperparameters"] == values["hyperparameters"]
    assert body["auto_start"] is values.get("auto_start", False)
    for name in values.keys() - {"training_files", "integrations", "repositories"}:
        assert body[name] == values[name]


@given(REQUESTS)
def test_request_has_nothing_null_and_no_bare_strings(values: dict[str, Any]) -> None:
    """Nothing that is sent is null; training files are objects; kinds are named."""
    body = wire.JobIn.model_validate(values).to_wire()
    assert "null" not in json.dumps(_without_texts(body))
    assert all({"file_id", "weight"} == set(entry) for entry in body["training_files"])
    assert all(entry["type"] == "wandb" for entry in body.get("integrations", ()))
    assert all(entry["type"] == "github" for entry in body.get("repositories", ()))


def _without_texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_texts(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_texts(inner) for inner in value]
    return 0 if isinstance(value, str) else value


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {"n_epochs": 3},
        {"trainingSteps": 10},
        {"learning_rate": 2},
        {"learning_rate": 1e-9},
        {"learning_rate": None},
        {"epochs": 0},
        {"training_steps": 0},
        {"seq_len": 99},
        {"fim_ratio": 1.1},
    ],
)
def test_bad_hyperparameter_is_refused_by_name(hyperparameters: dict[str, Any]) -> None:
    """A hyperparameter that is unknown or out of range is refused, and named."""
    with pytest.raises(ValidationError) as caught:
        wire.JobIn.model_validate({"model": "m", "hyperparameters": hyperparameters})
    assert caught.value.errors()[0]["loc"] == ("hyperparameters", *hyperparameters)


def test_bare_training_files_are_read() -> None:
    """A server reads training files as bare ids too, as the documentation shows them."""
    job = wire.JobIn.model_validate({"model": "m", "training_files": ["a"], "hyperparameters": {}})
    assert job.to_wire()["training_files"] == [{"file_id": "a", "weight": 1.0}]


WANDB_KEYS = [
    "0123456789abcdef" * 2 + "01234567",
    "local-" + "0123456789abcdef" * 2 + "01234567",
    "wandb_v1_" + "Ab1_z" * 15 + "xy",
]


@pytest.mark.parametrize("key", WANDB_KEYS)
def test_wandb_keys_of_every_shape_are_taken(key: str) -> None:
    """Those of 40 characters, of a server of one's own, and of 86 characters since 2026.

    None of them is ever shown.
    """
    assert wire.is_wandb_key(key)
    assert wire.WandbIntegrationIn(project="p", api_key=key).api_key == key
    assert key.removeprefix("local-") not in redact(f"the key is {key}.")


NO_WANDB_KEYS = [
    *("", "k" * 39, "k" * 41, "k" * 80, "k" * 39 + "\n", "k k" * 13 + "k", "\u00e9" * 40),
    *(
        "wandb_v1_short",
        "wandb_v1_" + "a-b" * 20,
        "wandb_v1_" + "k" * 120,
        "wandb_v1_" + "k" * 76 + "\n",
    ),
]


@pytest.mark.parametrize("key", NO_WANDB_KEYS)
def test_what_is_no_wandb_key_is_refused_and_not_repeated(key: str) -> None:
    """The error says what one looks like."""
    assert not wire.is_wandb_key(key)
    with pytest.raises(ValidationError) as caught:
        wire.WandbIntegrationIn(project="p", api_key=key)
    (detail,) = caught.value.errors(include_input=False)
    assert detail["loc"] == ("api_key",)


def test_secrets_are_not_shown() -> None:
    """The keys in a request do not show in its text."""
    job = wire.JobIn.model_validate(
        {
            "model": "m",
            "hyperparameters": {},
            "integrations": [{"project": "p", "api_key": "w" * 40}],
            "repositories": [{"owner": "o", "name": "n", "token": "secret-token"}],
        }
    )
    assert "www" not in repr(job)
    assert "secret-token" not in repr(job)


KNOWN = frozenset(wire.CompletionDetailedJobOut.model_fields)


@given(
    st.dictionaries(st.text(max_size=12).filter(lambda name: name not in KNOWN), JSON, max_size=5)
)
def test_unknown_fields_are_ignored(extra: dict[str, Any]) -> None:
    """A job with fields that nobody knows yet is read like one without."""
    known = job_document()
    read = wire.read_detailed_job({**extra, **known})
    plain = wire.read_detailed_job(known)
    assert read == plain


@pytest.mark.parametrize("name", ["repositories", "events", "checkpoints", "training_files"])
def test_null_lists_are_read_as_empty(name: str) -> None:
    """Where a list may be missing, null is read as no entries."""
    assert getattr(wire.read_detailed_job(job_document(**{name: None})), name) == []


def test_job_kinds_are_told_apart() -> None:
    """job_type says which kind of job is read, alone and in a list."""
    classifier = job_document(job_type="classifier", classifier_targets=[])
    assert isinstance(wire.read_job(classifier), wire.ClassifierJobOut)
    assert isinstance(wire.read_detailed_job(classifier), wire.ClassifierDetailedJobOut)
    page = wire.JobsOut.model_validate({"total": 2, "data": [classifier, job_document()]})
    assert [type(job) for job in page.data] == [wire.ClassifierJobOut, wire.CompletionJobOut]


@pytest.mark.parametrize("key", ["type", "TYPE"])
def test_tuned_model_is_told_from_a_base(key: str) -> None:
    """The kind of a model is read from `type`, spelt either way."""
    card = {"id": "ft:x", "capabilities": {}, key: "fine-tuned", "job": "j", "root": "m"}
    read = wire.read_model_card(card)
    assert isinstance(read, wire.FTModelCard)
    assert read.job == "j"
    assert isinstance(wire.read_model_card({"id": "m", "capabilities": {}}), wire.BaseModelCard)


@given(st.floats(0, 100))
def test_accuracy_is_not_bounded(value: float) -> None:
    """The service's accuracy above 1 is read as it is."""
    assert wire.MetricOut(valid_mean_token_accuracy=value).valid_mean_token_accuracy == value


@pytest.mark.parametrize(
    "target", [{"name": "x" * 257, "labels": ["a"]}, {"name": "x", "labels": ["a" * 257]}]
)
def test_names_of_targets_are_bounded(target: dict[str, Any]) -> None:
    """They become names of metrics, which are written in each log record."""
    with pytest.raises(ValidationError, match="at most 256"):
        wire.ClassifierTargetIn.model_validate(target)
