"""What the local backend says of a configuration, and the spec that it makes of it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training_backends.backends.local import interpreter
from training_backends.backends.local.backend import LocalBackend
from training_backends.backends.local.spec import build_spec, config_of
from training_backends.core.config import ChatTemplate
from training_backends.core.errors import BackendNotInstalled, ConfigError
from training_backends.core.run import TrainingRun
from training_backends.testing.journal import MemoryJournal

pytestmark = pytest.mark.anyio

MakeRun = Callable[..., TrainingRun]


async def test_a_plain_configuration_has_no_issues(
    backend: LocalBackend, make_run: MakeRun, inspected: Callable[..., Any]
) -> None:
    """What the examples use is fine."""
    run = make_run()
    assert (await backend.validate(run.config, inspected(run))).issues == ()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": "tiny-mistrel"}, ("model", "did you mean 'tiny-mistral'?")),
        ({"model": "open-mistral-7b"}, ("model", "supported")),
        ({"tuning": "lora"}, ("tuning.kind", "use full")),
        ({"tuning": "qlora"}, ("tuning.kind", "use full")),
        ({"hyperparameters": {"fim_ratio": 0.5}}, ("hyperparameters.fim_ratio", "remove it")),
        (
            {
                "hyperparameters": {"early_stopping_patience": 3},
                "data": {"train": "/dev/null"},
            },
            ("hyperparameters.early_stopping_patience", "set data.validation"),
        ),
        ({"hyperparameters": {"seed": 2**32}}, ("hyperparameters.seed", "2^32")),
        ({"hyperparameters": {"seq_len": 99999}}, ("hyperparameters.seq_len", "32768")),
        ({"options": {"micro_batch_size": 3}}, ("options.micro_batch_size", "divisor")),
        ({"options": {"num_processes": 17}}, ("options.num_processes", "or a larger")),
    ],
)
async def test_what_cannot_be_honoured_is_an_issue(
    backend: LocalBackend,
    make_run: MakeRun,
    inspected: Callable[..., Any],
    changes: dict[str, Any],
    expected: tuple[str, str],
) -> None:
    """Nothing is dropped in silence: the field is named, with what to do."""
    run = make_run(**changes)
    report = await backend.validate(run.config, inspected(run))
    (issue,) = report.errors
    field, fix = expected
    assert issue.field == field
    assert issue.fix is not None
    assert fix in issue.fix


async def test_processes_without_gpus_are_a_warning(
    backend: LocalBackend, make_run: MakeRun, inspected: Callable[..., Any]
) -> None:
    """They train, and gain nothing."""
    run = make_run(options={"num_processes": 2, "device": "cpu"})
    report = await backend.validate(run.config, inspected(run))
    assert report.ok
    assert [issue.field for issue in report.issues] == ["options.num_processes"]


TARGET = {"name": "topic", "labels": ["a", "b"]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"method": "classifier"}, ("classifier_targets", "list each target")),
        (
            {"method": "classifier", "classifier_targets": [TARGET, TARGET]},
            ("classifier_targets[0].name", "rename"),
        ),
        (
            {"method": "classifier", "classifier_targets": [{**TARGET, "labels": ["a", "b", "a"]}]},
            ("classifier_targets[0].labels", "remove one"),
        ),
        (
            {"method": "classifier", "classifier_targets": [{**TARGET, "labels": ["a"]}]},
            ("classifier_targets[0].labels", "at least two labels"),
        ),
        (
            {"method": "classifier", "classifier_targets": [{**TARGET, "weight": 0}]},
            ("classifier_targets", "set the weight"),
        ),
        (
            {
                "method": "dpo",
                "model": "org/model",
                "hyperparameters": {"fim_ratio": 0.1},
            },
            ("hyperparameters.fim_ratio", "remove it"),
        ),
        ({"method": "dpo", "options": {"packing": True}}, ("options.packing", "remove it")),
    ],
)
async def test_what_a_method_cannot_use_is_an_issue(
    backend: LocalBackend,
    make_run: MakeRun,
    inspected: Callable[..., Any],
    changes: dict[str, Any],
    expected: tuple[str, str],
) -> None:
    """Each method says what it lacks, and what it has no use for."""
    run = make_run(**changes)
    rows = {"classifier": "classifier", "dpo": "preference"}[changes["method"]]
    report = await backend.validate(run.config, inspected(run, sample_type=rows))
    field, fix = expected
    issue = report.errors[0]
    assert issue.field == field
    assert issue.fix is not None
    assert fix in issue.fix


@pytest.mark.parametrize("method", ["sft", "dpo", "classifier"])
@pytest.mark.parametrize("rows", ["instruct", "pretrain", "preference", "classifier"])
async def test_each_method_takes_its_own_rows(
    backend: LocalBackend,
    make_run: MakeRun,
    inspected: Callable[..., Any],
    method: str,
    rows: str,
) -> None:
    """Rows of another method are refused in whichever file, with the method that takes them."""
    methods = {"instruct": "sft", "pretrain": "sft", "preference": "dpo"}
    targets = {"classifier_targets": [TARGET]} if method == "classifier" else {}
    run = make_run(method=method, **targets)
    report = await backend.validate(run.config, inspected(run, sample_type=rows))
    takes = methods.get(rows, rows)
    if takes == method:
        assert report.ok
        return
    assert len(report.errors) == 2
    for issue in report.errors:
        assert issue.fix is not None
        assert f"method: {takes}" in issue.fix


async def test_options_without_effect_are_warnings(
    backend: LocalBackend, make_run: MakeRun, inspected: Callable[..., Any]
) -> None:
    """What another method or tuning would use is said to be unused."""
    run = make_run(options={"dpo_beta": 0.2, "result": "both"})
    report = await backend.validate(run.config, inspected(run))
    assert report.ok
    assert {issue.field for issue in report.issues} == {"options.dpo_beta", "options.result"}


async def test_qlora_is_taken_where_it_can_run(
    backend: LocalBackend,
    make_run: MakeRun,
    inspected: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever bitsandbytes is installed, with any result."""
    run = make_run(tuning="qlora", model="org/model", options={"result": "merged"})
    monkeypatch.setattr(interpreter, "find_spec", lambda name: name != "bitsandbytes" or None)
    (issue,) = (await backend.validate(run.config, inspected(run))).errors
    assert issue.field == "tuning.kind"
    assert issue.fix is not None
    assert "pip install 'training-backends[qlora]'" in issue.fix
    monkeypatch.setattr(interpreter, "find_spec", lambda name: name)
    assert (await backend.validate(run.config, inspected(run))).ok


async def test_a_missing_library_names_the_extra(
    backend: LocalBackend,
    make_run: MakeRun,
    inspected: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the engine's libraries the message says what to install."""
    monkeypatch.setattr(interpreter, "find_spec", lambda name: None if name == "peft" else name)
    run = make_run()
    with pytest.raises(BackendNotInstalled, match="peft") as raised:
        await backend.validate(run.config, inspected(run))
    assert raised.value.install == "pip install 'training-backends[local]'"
    with pytest.raises(BackendNotInstalled):
        await backend.launch(run, MemoryJournal(run))
    health = await backend.health()
    assert not health.ok


async def test_an_estimate_without_any_run_knows_no_duration(
    backend: LocalBackend, make_run: MakeRun, inspected: Callable[..., Any]
) -> None:
    """What is not known is None, with the reason; defaults that were taken are named."""
    run = make_run(hyperparameters={"epochs": 1})
    estimate = await backend.estimate(run.config, inspected(run))
    assert estimate.duration is None
    assert any("no similar run" in note for note in estimate.notes)
    assert any("learning_rate 0.002" in note for note in estimate.notes)
    assert estimate.steps == 3, "forty rows in batches of sixteen"


async def test_other_models_are_counted_when_they_are_loaded(
    backend: LocalBackend, make_run: MakeRun, inspected: Callable[..., Any]
) -> None:
    """Steps follow from the rows; tokens need the model's own tokenizer."""
    run = make_run(model="org/model", hyperparameters={"epochs": 2, "batch_size": 10})
    estimate = await backend.estimate(run.config, inspected(run))
    assert (estimate.steps, estimate.data_tokens, estimate.train_tokens) == (8, None, None)
    assert any("org/model" in note for note in estimate.notes)


def test_a_spec_settles_every_default(make_run: MakeRun, tmp_path: Path) -> None:
    """Full tuning for the built-in model, an adapter for others, no relative model path."""
    spec = build_spec("r", make_run().config, tmp_path)
    assert (spec.tuning.kind, spec.training_steps, spec.epochs) == ("full", 20, None)
    assert (spec.slots, spec.slots_dir) == (None, tmp_path)
    other = build_spec("r", make_run(model="org/model", hyperparameters={}).config, tmp_path)
    assert (other.tuning.kind, other.epochs, other.learning_rate) == ("lora", 3.0, 1e-4)
    dpo = build_spec(
        "r", make_run(model="org/model", method="dpo", hyperparameters={}).config, tmp_path
    )
    assert dpo.method == "dpo"
    assert dpo.learning_rate == pytest.approx(1e-5)


def test_a_configuration_can_be_had_back_from_its_spec(make_run: MakeRun, tmp_path: Path) -> None:
    """Method, targets and options come back as they were."""
    config = make_run(
        model="org/model",
        method="classifier",
        classifier_targets=[TARGET],
        options={"attention": "eager", "dtype": "float32", "result": "merged"},
    ).config
    found = config_of(build_spec("r", config, tmp_path))
    assert found is not None
    assert found.options == config.options
    assert (found.method, found.classifier_targets) == (config.method, config.classifier_targets)


def test_importing_the_backend_loads_no_torch() -> None:
    """The class can be named, listed and asked without the engine."""
    code = (
        "import sys, training_backends.backends.local.backend as b; "
        "heavy = {'torch', 'transformers', 'peft', 'training_backends.trainer'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_resumed_run_uses_the_template_of_the_run_it_continues(
    make_run: MakeRun, tmp_path: Path
) -> None:
    """The spec has the text, so that the file may change or disappear; a launch rejects that."""
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages }}")
    template = ChatTemplate(path=file).pinned()
    config = make_run(chat_template=template, result={"checkpoint": "best"}).config
    first = build_spec("first", config, tmp_path)
    assert (first.chat_template_text, first.result_checkpoint) == ("{{ messages }}", "best")
    restored = config_of(first)
    assert restored is not None
    assert (restored.chat_template, restored.result) == (template, config.result)
    file.unlink()
    second = build_spec("second", config, tmp_path, source=first)
    assert second.chat_template_text == "{{ messages }}"
    with pytest.raises(ConfigError, match="chat template"):
        build_spec("third", config, tmp_path)
