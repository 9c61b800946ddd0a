"""A configuration says what it takes, and refuses what it does not."""

from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from training_backends import ChatTemplate, ConfigError, TrainingConfig
from training_backends.core.config import given_options, option_issues

FULL: dict[str, Any] = {
    "model": "open-mistral-7b",
    "method": "classifier",
    "tuning": {"kind": "lora", "rank": 8, "alpha": 16, "target_modules": ["q_proj"]},
    "data": {"train": ["a.jsonl", {"path": "b.jsonl", "weight": 2}], "validation": "c.jsonl"},
    "chat_template": "chat.jinja",
    "result": {"checkpoint": "best"},
    "hyperparameters": {"learning_rate": 1e-4, "epochs": 2, "batch_size": 8, "seed": 1},
    "suffix": "mine",
    "classifier_targets": [{"name": "mood", "labels": ["happy", "sad"]}],
    "resources": {"workers": 2, "gpus": 1, "accelerator": "a100", "max_duration": "2h"},
    "integrations": [{"project": "p", "credential": "wandb/team"}],
    "budget": {"max_cost": "25 USD", "max_duration": "2h 30m"},
    "tags": {"team": "a"},
    "options": {"anything": [1, {"a": None}]},
}


def make(**fields: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({"model": "m", "data": {"train": "a.jsonl"}, **fields})


def test_short_forms_mean_the_long_ones() -> None:
    """One path, and just the kind of tuning, may be written as they are."""
    short = make(tuning="lora", data={"train": "a.jsonl", "validation": ["b.jsonl"]})
    long = make(
        tuning={"kind": "lora"},
        data={"train": [{"path": "a.jsonl", "weight": 1.0}], "validation": [{"path": "b.jsonl"}]},
    )
    assert short == long
    assert make(data={"train": {"path": "a.jsonl"}}).data.train[0].path == Path("a.jsonl")


def test_a_configuration_survives_json() -> None:
    """What the store keeps is what was given, money and durations too."""
    config = TrainingConfig.model_validate(FULL)
    assert TrainingConfig.model_validate_json(config.model_dump_json()) == config
    assert TrainingConfig.model_validate(config.model_dump(mode="json")) == config
    assert config.budget.max_cost
    assert config.budget.max_cost.amount == Decimal(25)
    assert config.budget.max_duration == timedelta(hours=2, minutes=30)


def test_the_schema_can_be_exported() -> None:
    """Editors complete and check with it."""
    schema = TrainingConfig.model_json_schema()
    assert set(schema["properties"]) == set(FULL)
    assert "required" not in schema, "which fields are needed depends on the backend"


def test_a_configuration_does_not_change() -> None:
    """It is frozen, so that a run's record stays true."""
    with pytest.raises(ValidationError):
        make().model = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"n_epochs": 3}, "n_epochs"),
        ({"hyperparameters": {"n_epochs": 3}}, "n_epochs"),
        ({"hyperparameters": {"epochs": 1, "training_steps": 2}}, "hyperparameters"),
        ({"hyperparameters": {"learning_rate": 2}}, "learning_rate"),
        ({"hyperparameters": {"learning_rate": 0}}, "learning_rate"),
        ({"hyperparameters": {"epochs": 0}}, "epochs"),
        ({"hyperparameters": {"training_steps": 0}}, "training_steps"),
        ({"hyperparameters": {"epochs": float("inf")}}, "epochs"),
        ({"hyperparameters": {"epochs": float("nan")}}, "epochs"),
        ({"hyperparameters": {"training_steps": 10**24}}, "training_steps"),
        ({"hyperparameters": {"batch_size": 10**14}}, "batch_size"),
        ({"budget": {"max_duration": "99999999999d"}}, "max_duration"),
        ({"resources": {"gpus": -1}}, "gpus"),
        ({"data": {"train": [{"uri": "no-scheme"}]}}, "uri"),
        ({"data": {"train": [{"path": "a", "weight": 0}]}}, "weight"),
        ({"suffix": ""}, "suffix"),
        ({"result": {"checkpoint": "first"}}, "checkpoint"),
        ({"chat_template": {"path": "a", "sha256": "x"}}, "sha256"),
        ({"model": ""}, "model"),
        ({"method": ""}, "method"),
        ({"tuning": "prefix"}, "kind"),
        ({"tuning": {"kind": "lora", "dropout": 1}}, "dropout"),
        ({"integrations": [{"project": "p", "api_key": "x"}]}, "api_key"),
        ({"budget": {"max_cost": "25"}}, "max_cost"),
        ({"budget": {"max_duration": "soon"}}, "max_duration"),
        ({"budget": {"max_duration": 0}}, "max_duration"),
        ({"tags": {"a": None}}, "a"),
        ({"hyperparameters": {"training_steps": True}}, "training_steps"),
        ({"hyperparameters": {"learning_rate": True}}, "learning_rate"),
        ({"tuning": {"kind": "lora", "rank": True}}, "rank"),
        ({"data": {"train": [{"path": "a", "weight": True}]}}, "weight"),
        ({"budget": {"max_duration": True}}, "max_duration"),
        ({"budget": {"max_cost": {"amount": True, "currency": "USD"}}}, "amount"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(fields: dict[str, Any], place: str) -> None:
    """The error names the field, so that the command line can point at it."""
    with pytest.raises(ValidationError) as caught:
        make(**fields)
    assert place in [error["loc"][-1] for error in caught.value.errors()]


def test_data_is_a_file_a_uri_or_a_file_of_the_provider() -> None:
    """Exactly one of them; a URI may be written as it is, and is not a path."""
    sources = make(data={"train": ["a", "s3://b/c", {"remote_id": "file-1"}]}).data.train
    assert [source.kind for source in sources] == ["file", "uri", "remote"]
    assert [str(source) for source in sources] == ["a", "s3://b/c", "file-1"]
    assert sources[0].local_path == Path("a")
    with pytest.raises(ValueError, match="not a file on this machine"):
        _ = sources[1].local_path
    for wrong in ({}, {"weight": 2}, {"path": "a", "uri": "s3://b/c"}):
        with pytest.raises(ValidationError, match="exactly one of path, uri and remote_id"):
            make(data={"train": [wrong]})


def test_method_and_model_are_open() -> None:
    """A backend may have methods of its own, and need neither model nor data."""
    config = TrainingConfig.model_validate({"method": "distillation"})
    assert (config.model, config.data.train) == (None, ())
    with pytest.raises(ConfigError, match="no model"):
        _ = config.base_model


def test_ids_in_paths_of_stored_json_are_ids() -> None:
    """Earlier versions stored a provider's file id as a path; a path that looks so stays one."""
    stored = '{"model": "m", "data": {"train": [{"path": "remote:abc", "weight": 2.0}]}}'
    (source,) = TrainingConfig.model_validate_json(stored).data.train
    assert (source.remote_id, source.weight) == ("abc", 2.0)
    assert make(data={"train": "remote:abc"}).data.train[0].path == Path("remote:abc")


def test_labels_in_stored_json_are_tags() -> None:
    """Earlier versions stored the tags as labels; a new configuration cannot write them so."""
    stored = '{"model": "m", "data": {"train": ["a.jsonl"]}, "labels": {"team": "a"}}'
    assert TrainingConfig.model_validate_json(stored) == make(tags={"team": "a"})
    with pytest.raises(ValidationError, match="labels"):
        make(labels={"team": "a"})


def test_classifier_targets_need_the_method() -> None:
    """Targets that would be silently left out are refused."""
    with pytest.raises(ValidationError, match="method: classifier"):
        make(classifier_targets=FULL["classifier_targets"])


def test_paths_are_resolved_against_the_file_they_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative, home and absolute paths each become what their writer meant."""
    monkeypatch.setenv("HOME", "/home/someone")
    config = make(data={"train": ["a.jsonl", "~/b.jsonl"], "validation": "/data/c.jsonl"})
    resolved = config.resolved(tmp_path)
    paths = [source.path for source in (*resolved.data.train, *resolved.data.validation)]
    assert paths == [tmp_path / "a.jsonl", Path("/home/someone/b.jsonl"), Path("/data/c.jsonl")]
    assert resolved.resolved(Path("/elsewhere")) == resolved
    elsewhere = make(data={"train": ["s3://b/c"]})
    assert elsewhere.resolved(tmp_path) == elsewhere


class Options(BaseModel, extra="forbid"):
    """Those of some backend."""

    max_runs: int = Field(default=1, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"


class Nothing(BaseModel, extra="forbid"):
    """Those of a backend without any."""


@pytest.mark.parametrize(
    ("options", "field", "message", "fix"),
    [
        ({"max_run": 2}, "options.max_run", "unknown option", "did you mean 'max_runs'?"),
        ({"gpus": 2}, "options.gpus", "unknown option", "known options: max_runs, device"),
        ({"max_runs": 0}, "options.max_runs", "greater than or equal to 1", None),
        ({"device": "tpu"}, "options.device", "'cpu' or 'cuda'", None),
        ({"max_runs": True}, "options.max_runs", "expected a number", None),
    ],
)
def test_the_option_is_named_and_what_there_is_instead(
    options: dict[str, Any], field: str, message: str, fix: str | None
) -> None:
    """Names are offered for a name that does not exist, not for a value."""
    (issue,) = option_issues(Options, options)
    assert (issue.field, issue.fix) == (field, fix)
    assert message in issue.message


def test_every_invalid_option_is_reported() -> None:
    """All at once, not one per attempt."""
    issues = list(option_issues(Options, {"a": 1, "max_runs": 0}))
    assert sorted(str(issue.field) for issue in issues) == ["options.a", "options.max_runs"]
    assert list(option_issues(Options, {"max_runs": 3})) == []


def test_a_backend_may_have_no_options() -> None:
    """The fix says that none are known."""
    (issue,) = option_issues(Nothing, {"a": 1})
    assert issue.fix == "known options: none"


def test_only_known_options_may_be_left_empty() -> None:
    """A misspelt option is found whether or not it has a value."""
    given = given_options(Options, {"max_runs": None, "max_run": None, "device": "cpu"})
    assert given == {"max_run": None, "device": "cpu"}


def test_a_chat_template_is_pinned_by_its_digest(tmp_path: Path) -> None:
    """Its path is relative to the file, and another text is rejected."""
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages }}")
    template = make(chat_template="chat.jinja").resolved(tmp_path).chat_template
    assert template is not None
    pinned = template.pinned()
    assert (pinned.path, pinned.read()) == (file, "{{ messages }}")
    config = make(chat_template=pinned)
    assert TrainingConfig.model_validate_json(config.model_dump_json()) == config
    file.write_text("{{ other }}")
    with pytest.raises(ConfigError) as caught:
        pinned.read()
    (issue,) = caught.value.issues
    assert (issue.field, issue.code) == ("chat_template", "changed_file")
    assert template.read() == "{{ other }}"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "unreadable_file"),
        (b"", "empty_file"),
        (b"\xff", "not_utf8"),
        (b"x" * 1_000_001, "too_large"),
    ],
)
def test_an_unusable_chat_template_is_an_error(
    tmp_path: Path, content: bytes | None, code: str
) -> None:
    """The issue names the field and the file."""
    file = tmp_path / "chat.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        ChatTemplate(path=file).read()
    (issue,) = caught.value.issues
    assert (issue.field, issue.code) == ("chat_template", code)
    assert str(file) in issue.message
    with pytest.raises(ConfigError) as caught:
        ChatTemplate(path=tmp_path).read()
    assert caught.value.issues[0].code == "not_a_file"
