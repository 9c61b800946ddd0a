"""The model card of a result, and what it may not say."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.trainer.continuing import before_its_end, train_to_continue
from tests.trainer.plain import save_tiny
from training_backends.core.files import digest_of
from training_backends.rundir.directory import (
    Event,
    MetricsRow,
    ResultRecord,
    RunDir,
    TrainerExitCode,
)
from training_backends.trainer.model_card import DataFacts, Licence, read_licence, write_card
from training_backends.trainer.process import train

pytestmark = pytest.mark.engine

MakeRun = Callable[..., RunDir]


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# M\n", {}, Licence("apache-2.0")),
        (
            "---\nlicense: other\nlicense_name: mrl\nlicense_link: https://example.org/mrl\n---\n",
            {"license": "mit"},
            Licence("other", "mrl", "https://example.org/mrl"),
        ),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", {}, Licence("mit, apache-2.0")),
        ("# no head\n", {"license": "mit"}, Licence("mit")),
        ("---\nlicense: [\n---\n", {}, None),
        (None, {"license": 3}, None),
        (None, None, None),
    ],
)
def test_a_licence_is_what_the_base_says(
    tmp_path: Path, card: str | None, config: dict[str, Any] | None, expected: Licence | None
) -> None:
    """Its card first, its config else; what cannot be read is no licence."""
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_licence(str(tmp_path)) == expected


def test_a_model_that_is_not_here_has_none() -> None:
    """Nothing is fetched for it; the built-in model has no weights to license."""
    assert read_licence("nobody/nothing") is None
    assert read_licence("tiny-mistral") is None


class Card(NamedTuple):
    """A card as the hub reads it."""

    data: dict[str, Any]
    text: str

    @classmethod
    def of(cls, result: Path) -> "Card":
        """Read README.md."""
        _, head, text = (result / "README.md").read_text().split("---\n", 2)
        return cls(yaml.safe_load(head), text)


def card_of(make_run: MakeRun, path: Path, record: ResultRecord, **changes: Any) -> Card:
    """Write the card of a run of two steps."""
    run = make_run(path, **changes)
    for step in (1, 2):
        values = {"train_loss": 3.0 / step, "learning_rate": 0.1, "tokens": 50 * step}
        run.add_metrics(MetricsRow(step=step, total_steps=2, epoch=step / 2, **values))
        measured = {"metrics": {"valid_loss": 2.0 * step}}
        run.add_event(Event(name="checkpoint", step=step, data=measured))
    spec = run.read_spec()
    result = path / "result"
    result.mkdir()
    file = spec.train[0].local_path
    digest = digest_of(file)
    data = [DataFacts(file.name, "training", 60, digest.size, digest.sha256)]
    write_card(result, run=run, spec=spec, record=record, data=data)
    return Card.of(result)


def test_a_card_says_what_the_model_is_made_of(
    make_run: MakeRun, data: Path, tmp_path: Path
) -> None:
    """Base, data by content, measures, configuration, and how to serve it."""
    lora = {"kind": "lora", "rank": 24}
    record = ResultRecord(path="result", format="adapter", base_model="org/base")
    card = card_of(make_run, tmp_path / "r", record, model="org/base", tuning=lora)
    assert card.data["base_model"] == "org/base"
    assert card.data["library_name"] == "peft"
    text = card.text
    digest = hashlib.sha256((data / "train.jsonl").read_bytes()).hexdigest()
    assert f"| train.jsonl | training | 60 | {(data / 'train.jsonl').stat().st_size:,} |" in text
    assert digest in text
    assert "2 steps, 100 tokens" in text
    assert "| | step 1 | step 2 |" in text
    assert "| train_loss | 3 | 1.5 |" in text
    assert "Lowest validation loss: 2 at step 1" in text
    serve = "vllm serve org/base --enable-lora --max-lora-rank 32 --lora-modules tuned=DIR"
    assert serve in text
    assert "do not name a license" in text
    said = json.loads(text.partition("```json\n")[2].partition("```")[0])
    assert said["tuning"]["rank"] == 24
    assert said["train"] == [{"file": "train.jsonl", "weight": 1.0}]
    assert "slots_dir" not in said


def test_a_whole_model_is_served_as_it_is(make_run: MakeRun, tmp_path: Path) -> None:
    """With Mistral's tokenizer where it has that; a classifier is not served."""
    record = ResultRecord(path="result", format="full", base_model="tiny-mistral")
    card = card_of(make_run, tmp_path / "a", record)
    assert "vllm serve DIR\n" in card.text
    assert card.data["library_name"] == "transformers"
    assert "random weights and no license" in card.text


def test_the_card_of_a_real_result_names_no_place_of_this_machine(
    make_run: MakeRun, data: Path, tmp_path: Path
) -> None:
    """Nor does any other file; it is licensed as its base, and says what it was trained on."""
    base = save_tiny(tmp_path / "seven")
    (base / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    run = make_run(
        tmp_path / "r",
        model=str(base),
        tuning={"kind": "lora", "rank": 2},
        training_steps=2,
        result="both",
    )
    assert train(run.path) is TrainerExitCode.DONE
    card = Card.of(run.result)
    assert card.data["license"] == "cc-by-4.0"
    assert "base_model" not in card.data, "only a name of the hub means something elsewhere"
    for name in ("train.jsonl", "valid.jsonl"):
        assert hashlib.sha256((data / name).read_bytes()).hexdigest() in card.text
    files = [path for path in run.result.rglob("*") if path.is_file()]
    assert {"README.md", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in files
    }
    for path in files:
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content, path
        assert str(data).encode() not in content, path


def test_data_that_changed_behind_a_checkpoint_is_said(
    make_run: MakeRun, data: Path, tmp_path: Path
) -> None:
    """The run goes on, and its log says that it is not the one that it would have been."""
    copy = tmp_path / "train.jsonl"
    copy.write_bytes((data / "train.jsonl").read_bytes())
    changes = {"training_steps": 4, "checkpoint_every": 2, "validation": [], "train": [copy]}
    finished = make_run(tmp_path / "r", **changes)
    assert train_to_continue(finished) is TrainerExitCode.DONE
    run = before_its_end(finished, tmp_path / "again")
    (run.checkpoints / "step-4" / "state.json").unlink()
    copy.write_bytes(b"".join(reversed(copy.read_bytes().splitlines(keepends=True))))
    assert train(run.path) is TrainerExitCode.DONE
    said = [event.message for event, _ in run.read_events() if event.level == "warning"]
    assert said[-1] == "The data has changed since the checkpoint was saved"
