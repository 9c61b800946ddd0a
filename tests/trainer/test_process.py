"""Real training runs of the built-in model, from the spec to the result."""

import json
import random
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training_backends.core.files import hold_lock
from training_backends.datasets.rows import byte_encode, parse_row
from training_backends.rundir.checkpoints import damage_of
from training_backends.rundir.directory import MetricsRow, RunDir, TrainerExitCode
from training_backends.trainer.__main__ import main
from training_backends.trainer.objectives.tokens import TokenObjective
from training_backends.trainer.process import train
from training_backends.trainer.queue import host_key

pytestmark = pytest.mark.engine

MakeRun = Callable[..., RunDir]


def metrics(run: RunDir) -> dict[int, MetricsRow]:
    """Return the last row of each step."""
    return {row.step: row for row, _ in run.read_metrics()}


@pytest.fixture(scope="module")
def finished(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that was trained from beginning to end without a break."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    run = make_run(path, training_steps=20, sample_prompt="3 plus 4?", sample_max_tokens=16)
    assert train(run.path) is TrainerExitCode.DONE
    return run


def test_loss_falls_and_the_end_is_told(finished: RunDir) -> None:
    """A run of twenty steps learns, writes a row a step, and says where its result lies."""
    rows = metrics(finished)
    assert list(rows) == list(range(1, 21))
    assert rows[20].train_loss < 0.7 * rows[1].train_loss
    record = finished.read_exit()
    assert record is not None
    assert (record.status, record.code, record.step) == ("completed", 0, 20)
    assert record.result is not None
    assert (record.result.format, record.result.base_model) == ("full", "tiny-mistral")
    assert not finished.is_active()


def test_learning_rate_rises_and_falls(finished: RunDir) -> None:
    """The rate given is the peak, behind a linear warm-up and before a cosine decay."""
    rates = [row.learning_rate for row in metrics(finished).values()]
    assert max(rates) == pytest.approx(3e-3)
    assert rates[-1] < 0.1 * max(rates)


def test_checkpoints_are_told_with_their_metrics(finished: RunDir) -> None:
    """Each checkpoint that was due is an event; the newest three lie on disk."""
    events = [e for e, _ in finished.read_events() if e.name == "checkpoint"]
    assert [e.step for e in events] == [5, 10, 15, 20]
    for event in events:
        found = event.data["metrics"]
        names = {"train_loss", "mean_train_loss", "valid_loss", "valid_mean_token_accuracy"}
        assert set(found) == names
        assert 0 <= found["valid_mean_token_accuracy"] <= 1
    losses = [row.train_loss for row in metrics(finished).values()][5:10]
    assert events[1].data["metrics"]["train_loss"] == losses[-1]
    assert events[1].data["metrics"]["mean_train_loss"] == pytest.approx(sum(losses) / 5)
    assert [state.step for _, state in finished.read_checkpoints()] == [10, 15, 20]


def test_a_completed_run_keeps_no_optimizer_state(finished: RunDir) -> None:
    """Its checkpoints have weights, about 4 MB each, and list exactly the files that they have."""
    for path, state in finished.read_checkpoints():
        assert damage_of(path) is None
        files = {each.relative_to(path).as_posix() for each in path.rglob("*")}
        assert files == {"state.json", *state.files}
        assert sum(state.files.values()) < 4.5e6


def test_validation_is_what_the_result_gives(finished: RunDir, data: Path) -> None:
    """Loss and accuracy at the end equal those counted by hand, row by row."""
    model = AutoModelForCausalLM.from_pretrained(finished.result)
    loss, right, count = 0.0, 0, 0
    for line in (data / "valid.jsonl").read_bytes().splitlines():
        ids, trained = byte_encode(parse_row(line))
        with torch.no_grad():
            said = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in range(1, len(ids)):
            if trained[position]:
                loss -= float(said[position - 1, ids[position]])
                right += int(said[position - 1].argmax()) == ids[position]
                count += 1
    last = metrics(finished)[20]
    assert last.valid_loss == pytest.approx(loss / count, rel=1e-4)
    assert last.valid_mean_token_accuracy == pytest.approx(right / count)


def test_samples_before_and_after(finished: RunDir) -> None:
    """The prompt is answered by the untrained and by the trained model."""
    samples = [e.data for e, _ in finished.read_events() if e.name == "sample"]
    assert [(s["stage"], s["prompt"]) for s in samples] == [
        ("before", "3 plus 4?"),
        ("after", "3 plus 4?"),
    ]
    assert samples[0]["answer"] != samples[1]["answer"]


def test_result_loads_in_transformers_and_says_the_same(finished: RunDir) -> None:
    """Tokenizer, template and weights of the result give the answer of the sample event."""
    tokenizer = AutoTokenizer.from_pretrained(finished.result)
    model = AutoModelForCausalLM.from_pretrained(finished.result)
    chat = [{"role": "user", "content": "3 plus 4?"}]
    inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    said = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    after = [e.data["answer"] for e, _ in finished.read_events() if e.name == "sample"][-1]
    assert said == after


def test_a_completed_run_is_left_as_it_is(finished: RunDir) -> None:
    """Repeating the command changes nothing."""
    before = {p: p.read_bytes() for p in finished.path.rglob("*") if p.is_file()}
    del before[finished.lock]
    assert train(finished.path) is TrainerExitCode.DONE
    after = {p: p.read_bytes() for p in finished.path.rglob("*") if p.is_file()}
    del after[finished.lock]
    assert after == before


def test_stop_file_without_saving(make_run: MakeRun, tmp_path: Path) -> None:
    """A stop that was there before the start ends the run at once, and is obeyed once."""
    run = make_run(tmp_path / "r", training_steps=2, validation=[])
    run.request_stop(save_checkpoint=False)
    assert train(run.path) is TrainerExitCode.STOPPED
    assert run.read_checkpoints() == []
    assert not run.stop.exists()
    record = run.read_exit()
    assert record is not None
    assert (record.status, record.step) == ("stopped", 0)
    assert train(run.path) is TrainerExitCode.DONE


def test_a_directory_in_use_is_left_alone(make_run: MakeRun, tmp_path: Path) -> None:
    """A second process says so with its exit code and writes nothing."""
    run = make_run(tmp_path / "r")
    with hold_lock(run.lock):
        assert train(run.path) is TrainerExitCode.ALREADY_ACTIVE
    assert not run.exit.exists()
    assert run.read_events() == []


def test_a_free_slot_is_taken(make_run: MakeRun, tmp_path: Path) -> None:
    """One of two slots is enough, and it is free again afterwards."""
    slots = tmp_path / "slots"
    slots.mkdir()
    run = make_run(tmp_path / "r", slots_dir=slots, slots=2, training_steps=1)
    with hold_lock(slots / f"cpu-{host_key()}.0.lock"):
        assert train(run.path) is TrainerExitCode.DONE
    with hold_lock(slots / f"cpu-{host_key()}.1.lock", patience=0):
        pass


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("{", "spec.json is not valid"),
        ('{"run_id": "r"}', "model"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_spec_is_said(tmp_path: Path, spec: str | None, said: str) -> None:
    """Exit code 4 and a failure of kind validation."""
    run = RunDir(tmp_path)
    if spec is not None:
        run.spec.write_text(spec)
    assert train(run.path) is TrainerExitCode.BAD_INPUT
    record = run.read_exit()
    assert record is not None
    assert record.failure is not None
    assert record.failure.kind == "validation"
    assert said in record.failure.message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": ["missing.jsonl"]}, "missing.jsonl cannot be read"),
        ({"model": "./nowhere"}, "Model directory not found"),
        ({"tuning": "lora"}, "only supports full fine-tuning"),
    ],
)
def test_what_cannot_be_trained_is_said(
    make_run: MakeRun, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    """Exit code 4, and the message names what is wrong."""
    run = make_run(tmp_path / "r", **changes)
    assert train(run.path) is TrainerExitCode.BAD_INPUT
    record = run.read_exit()
    assert record is not None
    assert record.failure is not None
    assert said in record.failure.message
    assert run.read_events()[-1][0].data == {"status": "failed"}


def test_bad_rows_are_named_by_line_or_left_out(make_run: MakeRun, tmp_path: Path) -> None:
    """One bad row in three is refused, unless the spec allows for it; the rest is told."""
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    silent = {"messages": [{"role": "user", "content": "a"}]}
    long = {"text": "x" * 100}
    lines = ["\ufeff" + json.dumps(good), "", json.dumps(silent), "nonsense", json.dumps(long)]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(lines))
    changes = {"train": [path], "validation": [], "training_steps": 1, "seq_len": 50}
    strict = make_run(tmp_path / "strict", **changes)
    assert train(strict.path) is TrainerExitCode.BAD_INPUT
    record = strict.read_exit()
    assert record is not None
    assert record.failure is not None
    assert "1 invalid rows: line 4" in record.failure.message
    lenient = make_run(tmp_path / "lenient", max_invalid_fraction=0.25, **changes)
    assert train(lenient.path) is TrainerExitCode.DONE
    told = [e.data for e, _ in lenient.read_events() if e.name == "message"]
    assert told == [{"invalid": 1}, {"untrained": 1}, {"truncated": 1}]


def test_a_diverging_run_fails_with_advice(make_run: MakeRun, tmp_path: Path) -> None:
    """A loss that is no number ends the run, and no checkpoint is made of it."""
    run = make_run(
        tmp_path / "r", learning_rate=1e30, warmup_fraction=0, validation=[], training_steps=30
    )
    assert train(run.path) is TrainerExitCode.CRASHED
    record = run.read_exit()
    assert record is not None
    assert record.failure is not None
    assert record.failure.kind == "internal"
    assert "Reduce the learning rate" in record.failure.message


def test_gradients_that_are_no_numbers_end_a_run(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the last step is of before it, and the weights behind it are useless."""
    compute_loss = TokenObjective.compute_loss

    def broken(objective: TokenObjective, model: Any, batch: Any) -> Any:
        found = compute_loss(objective, model, batch)
        root = (model.get_input_embeddings().weight[0, 0] * 0).sqrt()  # 0, and its slope infinite
        return found._replace(losses=found.losses + root)

    monkeypatch.setattr(TokenObjective, "compute_loss", broken)
    run = make_run(tmp_path / "r", validation=[], training_steps=1)
    assert train(run.path) is TrainerExitCode.CRASHED
    record = run.read_exit()
    assert record is not None
    assert record.failure is not None
    assert "gradient norm is nan at step 1" in record.failure.message
    assert run.read_checkpoints() == []


def choices() -> list[str]:
    """Return rows with a word in the question that decides the answer, each of them once."""
    answers = {"cat": "p", "sun": "s", "bus": "r"}
    rows = []
    for place, word, others in product(
        range(4), answers, product(["one", "two", "red", "old", "new", "far"], repeat=3)
    ):
        text = " ".join([*others[:place], word, *others[place:]])
        roles = {"user": text, "assistant": answers[word]}
        chat = [{"role": role, "content": content} for role, content in roles.items()]
        rows.append(json.dumps({"messages": chat}))
    random.Random(1).shuffle(rows)
    return rows


def test_answers_are_learnt_for_questions_that_it_has_not_seen(
    make_run: MakeRun, tmp_path: Path
) -> None:
    """An answer is a letter, and the end token, which is right from early on."""
    rows = choices()
    seen, unseen = tmp_path / "train.jsonl", tmp_path / "valid.jsonl"
    seen.write_text("\n".join(rows[:960]))
    unseen.write_text("\n".join(rows[960:1016]))
    run = make_run(
        tmp_path / "r",
        train=[seen],
        validation=[unseen],
        training_steps=60,
        batch_size=16,
        checkpoint_every=10,
    )
    assert train(run.path) is TrainerExitCode.DONE
    told = [row.valid_mean_token_accuracy for row in metrics(run).values()]
    first, *_, last = [accuracy for accuracy in told if accuracy is not None]
    assert first < 0.75, "chance is a third of the letters"
    assert last >= 0.975


def test_micro_batches_change_memory_not_the_result(
    finished: RunDir, make_run: MakeRun, tmp_path: Path
) -> None:
    """Four rows at once or two times two: the losses are the same but for rounding."""
    changes = {"training_steps": 20, "checkpoint_every": 20, "validation": []}
    run = make_run(tmp_path / "r", micro_batch_size=2, **changes)
    assert train(run.path) is TrainerExitCode.DONE
    expected = [row.train_loss for row in metrics(finished).values()]
    assert [row.train_loss for row in metrics(run).values()] == pytest.approx(expected, rel=1e-3)


def test_an_adapter_is_trained_and_asked(
    finished: RunDir, make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LoRA on a local model: its files name no place of this machine, and it answers."""
    run = make_run(
        tmp_path / "r",
        model=str(finished.result),
        tuning={"kind": "lora", "rank": 4},
        training_steps=2,
    )
    assert train(run.path) is TrainerExitCode.DONE
    assert (run.result / "adapter_model.safetensors").is_file()
    for path in run.result.iterdir():
        assert str(tmp_path.parent).encode() not in path.read_bytes()
    record = run.read_exit()
    assert record is not None
    assert record.result is not None
    assert record.result.format == "adapter"
    capsys.readouterr()
    assert main(["sample", str(run.result), "--prompt", "3 plus 4?", "--max-tokens", "8"]) == 0
    adapted = json.loads(capsys.readouterr().out)
    assert set(adapted) == {"answer"}
    assert main(["merge", str(run.result), str(tmp_path / "merged")]) == 0
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    asked = ["sample", str(tmp_path / "merged"), "--prompt", "3 plus 4?", "--max-tokens", "8"]
    capsys.readouterr()
    assert main(asked) == 0
    assert json.loads(capsys.readouterr().out) == adapted


def test_a_model_that_does_not_load_is_not_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reason is the last line, and nothing is written."""
    assert main(["merge", str(tmp_path), str(tmp_path / "merged")]) != 0
    assert "not a model directory" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
