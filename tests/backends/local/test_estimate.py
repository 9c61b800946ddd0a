"""What a run on this machine is expected to take."""

import json
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from training_backends.backends.local.backend import LocalBackend
from training_backends.backends.local.spec import build_spec
from training_backends.core.dataset import Counting, Dataset, Summary
from training_backends.core.run import TrainingRun, utc_now
from training_backends.rundir.directory import Event, ExitRecord, MetricsRow, RunDir
from training_backends.tokens.encoders import encoder_for
from training_backends.tokens.examples import ExampleReader

pytestmark = pytest.mark.anyio

MakeRun = Callable[..., TrainingRun]
Inspected = Callable[..., Dataset]
NEMO = "mistralai/Mistral-Nemo-Instruct-2407"
"""Its tokenizer comes with mistral-common, so it can be counted without the model."""
EPOCH = {"epochs": 1, "batch_size": 1}


def notes_of(found: Any, word: str) -> list[str]:
    """Return the notes with a word."""
    return [note for note in found.notes if word in note]


async def test_other_models_are_counted_with_their_own_tokenizer(
    backend: LocalBackend, make_run: MakeRun, inspected: Inspected, tmp_path: Path
) -> None:
    """No model is loaded for it, and the count is kept for the next time."""
    run = make_run(model=NEMO, hyperparameters={"epochs": 2, "batch_size": 10})
    counting = Counting(cache=tmp_path / "counts")
    dataset = inspected(run).model_copy(update={"counting": counting})
    found = await backend.estimate(run.config, dataset)
    assert (found.basis, found.steps, found.epochs) == ("exact", 8, 2)
    assert found.data_tokens is not None
    assert 40 * 10 < found.data_tokens < 40 * 30
    assert found.train_tokens == 2 * found.data_tokens
    assert len(list((tmp_path / "counts").iterdir())) == 1


async def test_answers_that_become_examples_of_their_own_are_counted_so(
    backend: LocalBackend, make_run: MakeRun, inspected: Inspected, tmp_path: Path
) -> None:
    """Steps and tokens are those of the examples that the trainer encodes."""
    families: Any = import_module("benchmarks._template_families")
    model = families.family_directory("qwen3", tmp_path / "model")
    (model / "config.json").write_text("{}")
    data = tmp_path / "chats.jsonl"
    lines = [json.dumps(families.CASES[case]) for case in ("single turn", "multi-turn")] * 5
    data.write_text("\n".join(lines))
    run = make_run(model=str(model), data={"train": data}, hyperparameters=EPOCH)
    reader = ExampleReader(encoder_for("qwen3", model), 2048)
    examples = [each for line in lines for each in reader.supervised(line.encode(), "")[0]]
    found = await backend.estimate(run.config, inspected(run))
    assert (found.basis, found.steps) == ("exact", len(examples))
    assert found.steps == 5 * (1 + 3)
    assert found.train_tokens == sum(len(example.ids) for example in examples)


async def test_steps_tell_the_epochs(
    backend: LocalBackend, make_run: MakeRun, inspected: Inspected
) -> None:
    """Twenty steps of four rows go twice through forty."""
    run = make_run(hyperparameters={"training_steps": 20, "batch_size": 4})
    assert (await backend.estimate(run.config, inspected(run))).epochs == 2


async def test_nothing_is_billed(
    backend: LocalBackend, make_run: MakeRun, inspected: Inspected
) -> None:
    """The one part of the cost is nothing, and says where that comes from."""
    run = make_run()
    found = await backend.estimate(run.config, inspected(run))
    assert [(item.name, str(item.amount)) for item in found.costs] == [("training", "0.00 USD")]
    assert found.price_source == found.costs[0].source


async def test_weights_change_what_an_epoch_reads(
    backend: LocalBackend, make_run: MakeRun, inspected: Inspected, data: Path
) -> None:
    """A file of weight 3 is read thrice for one of weight 1; data_tokens counts both once."""
    files = [data / "train.jsonl", {"path": data / "valid.jsonl", "weight": 3}]
    run = make_run(data={"train": files}, hyperparameters=EPOCH)
    plain = make_run(data={"train": [files[0], data / "valid.jsonl"]}, hyperparameters=EPOCH)
    weighted = await backend.estimate(run.config, inspected(run))
    equal = await backend.estimate(plain.config, inspected(plain))
    assert weighted.data_tokens == equal.data_tokens == equal.train_tokens
    assert weighted.train_tokens is not None
    assert equal.train_tokens is not None
    # The rows of the second file are the shorter ones.
    assert weighted.train_tokens < equal.train_tokens


async def test_packed_runs_know_their_tokens_but_no_steps(
    backend: LocalBackend, make_run: MakeRun, inspected: Inspected
) -> None:
    """How many rows fit into a sequence shows when they are packed, which is said."""
    options = {"device": "cpu", "packing": True}
    run = make_run(hyperparameters={"epochs": 2}, options=options)
    found = await backend.estimate(run.config, inspected(run))
    assert found.data_tokens is not None
    assert (found.steps, found.train_tokens) == (None, 2 * found.data_tokens)
    assert notes_of(found, "packed")
    by_steps = make_run(hyperparameters={"training_steps": 5}, options=options)
    found = await backend.estimate(by_steps.config, inspected(by_steps))
    assert (found.steps, found.train_tokens, found.epochs) == (5, None, None)


def measured(home: Path, run: TrainingRun, *, tokens: int, seconds: float) -> None:
    """Leave what a finished run leaves."""
    directory = RunDir(home / "runs" / run.id)
    directory.path.mkdir(parents=True)
    directory.write_spec(build_spec(run.id, run.config, home / "slots"))
    ended = utc_now()
    began = Event(name="status", at=ended - timedelta(seconds=seconds), data={"status": "running"})
    directory.events.write_text(began.model_dump_json() + "\n")
    row = MetricsRow(
        at=ended,
        step=20,
        total_steps=20,
        epoch=2.0,
        train_loss=1.0,
        learning_rate=1e-3,
        tokens=tokens,
    )
    directory.metrics.write_text(row.model_dump_json() + "\n")
    record = ExitRecord(status="completed", code=0, step=20)
    directory.exit.write_text(record.model_dump_json())


async def test_duration_rests_on_a_run_like_this_one(
    home: Path, backend: LocalBackend, make_run: MakeRun, inspected: Inspected
) -> None:
    """The speed of the newest one with the same model, method and tuning is taken."""
    measured(home, make_run("fast"), tokens=10_000, seconds=10)
    measured(home, make_run("nemo", model=NEMO), tokens=1_000, seconds=10)
    run = make_run(model=NEMO)
    found = await backend.estimate(run.config, inspected(run))
    assert found.train_tokens is not None
    assert found.duration is not None
    assert found.duration.total_seconds() == pytest.approx(found.train_tokens / 100)
    assert notes_of(found, "run nemo (100 tokens/s)")
    other = make_run(model=NEMO, tuning="full")
    assert (await backend.estimate(other.config, inspected(other))).duration is None


async def test_rows_beyond_the_sequence_are_told_before_the_launch(
    backend: LocalBackend, make_run: MakeRun, inspected: Inspected, data: Path, tmp_path: Path
) -> None:
    """A warning says how many, from a count; without a long row nothing is counted."""
    long = json.loads((data / "train.jsonl").read_text().splitlines()[0])
    long["messages"][0]["content"] = "word " * 400
    path = tmp_path / "long.jsonl"
    path.write_text((data / "train.jsonl").read_text() + json.dumps(long) + "\n")
    run = make_run(data={"train": path}, hyperparameters={"seq_len": 1000})
    summary = Summary(longest_row=len(json.dumps(long)))
    report = await backend.validate(run.config, inspected(run, summary=summary))
    (issue,) = report.issues
    assert (issue.code, issue.severity) == ("overlong_rows", "warning")
    assert "1 of 41 rows is longer than 1,000 tokens" in issue.message
    short = await backend.validate(run.config, inspected(run, summary=Summary(longest_row=1000)))
    assert short.issues == ()


async def test_an_estimate_has_every_hyperparameter_as_the_run_will(
    backend: LocalBackend, make_run: MakeRun, inspected: Inspected
) -> None:
    """Chosen or defaulted, as numbers that a tracker can record."""
    run = make_run(hyperparameters={"training_steps": 3, "seq_len": 200})
    found = await backend.estimate(run.config, inspected(run))
    assert found.hyperparameters == {
        "learning_rate": 2e-3,
        "weight_decay": 0.1,
        "warmup_fraction": 0.05,
        "batch_size": 16,
        "seq_len": 200,
        "seed": 0,
        "training_steps": 3,
    }
