"""A pretrained model, trained and asked: SmolLM2-135M-Instruct, on a CPU.

Several minutes each on two cores: run with `make test-model`.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import training_backends
from tests.e2e.conftest import serving
from tests.real_model import smollm2
from training_backends.core.config import Tuning
from training_backends.rundir.directory import RunDir, RunSpec

pytestmark = [pytest.mark.model, pytest.mark.timeout(3600)]

Record = Callable[[str, object], None]
SAMPLES = Path(training_backends.__file__).parent / "samples"
HELD_OUT = {
    "What is the capital of France?": "Paris",
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of England?": "London",
    "What is the opposite of good?": "bad",
    "What is the opposite of left?": "right",
    "Which language is spoken in Spain?": "Spanish",
    "What color is a fire engine?": "red",
    "What is the chemical symbol of nitrogen?": "N",
}
"""Questions like those of the samples, none of which has them, and what the base knows."""


@pytest.fixture(scope="module")
def model() -> Path:
    """The directory of the pretrained model."""
    return smollm2()


def ask(directory: Path, questions: list[str]) -> list[str]:
    """Return what a model answers, loaded by the trainer as for `generate`."""
    torch = pytest.importorskip("torch")
    from training_backends.trainer.generate import answer  # noqa: PLC0415
    from training_backends.trainer.models import load_model  # noqa: PLC0415

    loaded = load_model(str(directory), seed=0, tuning=None, device=torch.device("cpu"))
    return [answer(loaded.model, loaded.encoder, each, 24) for each in questions]


def content(text: str) -> str | None:
    """Return what is answered in the trained form; None for any other form."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found["answer"] if isinstance(found, dict) and [*found] == ["answer"] else None


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The result of a job that the official SDK created at a gateway."""
    home = tmp_path_factory.mktemp("gateway")
    catalogue = home / "models.toml"
    catalogue.write_text(
        f'[models.smollm]\ntarget = "{model}"\noptions.result = "both"\n'
        'tuning = { kind = "lora", rank = 16 }\n'
    )
    with serving(home, TRAINING_BACKENDS_GATEWAY__CATALOGUE=str(catalogue)) as served:
        mistralai = pytest.importorskip("mistralai.client")
        client = mistralai.Mistral(api_key=served.key, server_url=served.url)
        ids = []
        for name in ("facts-train.jsonl", "facts-validation.jsonl"):
            with (SAMPLES / name).open("rb") as handle:
                file = {"file_name": name, "content": handle}
                ids.append(client.files.upload(file=file).id)
        job = client.fine_tuning.jobs.create(
            model="smollm",
            training_files=[{"file_id": ids[0], "weight": 1}],
            validation_files=[ids[1]],
            hyperparameters={"training_steps": 24, "learning_rate": 5e-4, "seq_len": 256},
            auto_start=True,
        )
        while job.status not in {"SUCCESS", "FAILED", "FAILED_VALIDATION"}:
            time.sleep(1)
            job = client.fine_tuning.jobs.get(job_id=job.id)
        assert job.status == "SUCCESS", job.events
        (result,) = home.glob("**/runs/*/result")
        yield result


def test_the_sdk_teaches_a_form_and_the_knowledge_stays(
    model: Path, trained: Path, record_property: Record
) -> None:
    """Unseen questions are answered in the trained form, with what the base model knows."""
    questions = [*HELD_OUT]
    assert all(
        question not in (SAMPLES / "facts-train.jsonl").read_text() for question in questions
    )
    before = ask(model, questions)
    assert [content(text) for text in before] == [None] * len(questions), before
    after = [content(text) for text in ask(trained, questions)]
    assert None not in after, after
    right = sum(one == other for one, other in zip(after, HELD_OUT.values(), strict=True))
    record_property("answers", f"{right} of {len(questions)} right: {after}")
    assert right >= 5, after


def test_the_merged_model_answers_as_the_adapter(trained: Path) -> None:
    """It is rounded to the base's bfloat16, which changes no answer."""
    questions = [*HELD_OUT]
    assert ask(trained, questions) == ask(trained / "adapter", questions)


def test_what_openais_sdk_has_tuned_answers_through_it(
    model: Path, tmp_path: Path, record_property: Record
) -> None:
    """Held-out questions in the trained form, streamed and not."""
    openai = pytest.importorskip("openai")
    catalogue = tmp_path / "models.toml"
    catalogue.write_text(
        f'[models."gpt-4o-mini"]\ntarget = "{model}"\ntuning = {{ kind = "lora", rank = 16 }}\n'
    )
    settings = {"TRAINING_BACKENDS_GATEWAY__CATALOGUE": str(catalogue)}
    with serving(tmp_path / "home", **settings) as served:
        client = openai.OpenAI(
            api_key=served.key, base_url=f"{served.url}/openai/v1", timeout=600, max_retries=0
        )
        with (SAMPLES / "facts-train.jsonl").open("rb") as file:
            uploaded = client.files.create(file=file, purpose="fine-tune")
        # Five times the default learning rate.
        rates = {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 5}
        job = client.fine_tuning.jobs.create(
            model="gpt-4o-mini",
            training_file=uploaded.id,
            method={"type": "supervised", "supervised": {"hyperparameters": rates}},
        )
        while job.status not in {"succeeded", "failed", "cancelled"}:
            time.sleep(1)
            job = client.fine_tuning.jobs.retrieve(job.id)
        assert job.status == "succeeded", job.error

        def ask_tuned(question: str, *, stream: bool = False) -> str:
            messages = [{"role": "user", "content": question}]
            said = client.chat.completions.create(
                model=job.fine_tuned_model, messages=messages, max_tokens=24, stream=stream
            )
            if not stream:
                return str(said.choices[0].message.content)
            return "".join(part.choices[0].delta.content or "" for part in said if part.choices)

        texts = [ask_tuned(question) for question in HELD_OUT]
        assert ask_tuned(next(iter(HELD_OUT)), stream=True) == texts[0]
    after = [content(text) for text in texts]
    right = sum(one == other for one, other in zip(after, HELD_OUT.values(), strict=True))
    record_property("answers", f"{right} of {len(texts)} right: {texts}")
    assert None not in after, texts
    assert right >= 4, after


def test_dpo_flips_a_preference(trained: Path, tmp_path: Path, record_property: Record) -> None:
    """Of an adapter that SFT has trained: a question that is not in the data included."""
    torch = pytest.importorskip("torch")
    from training_backends.datasets.rows import ChatRow, Message  # noqa: PLC0415
    from training_backends.trainer.models import load_model  # noqa: PLC0415
    from training_backends.trainer.process import train  # noqa: PLC0415

    answers = ("I prefer tea.", "I prefer coffee.")

    def margin(directory: Path) -> float:
        """Return by how much the first answer is the likelier."""
        loaded = load_model(str(directory), seed=0, tuning=None, device=torch.device("cpu"))
        found = []
        for text in answers:
            row = ChatRow(
                [Message("user", "What would you like to drink?"), Message("assistant", text)]
            )
            ids, counts = loaded.encoder.encode(row)
            with torch.no_grad():
                said = loaded.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            chosen = said[range(len(ids) - 1), ids[1:]]
            found.append(float(chosen[torch.tensor(counts[1:])].sum()))
        return found[0] - found[1]

    before = margin(trained / "adapter")
    chosen, rejected = answers if before < 0 else answers[::-1]
    questions = (
        "Tea or coffee?",
        "Which drink do you prefer?",
        "What do you drink in the morning?",
        "Do you like tea or coffee more?",
    )
    rows = [{"prompt": each, "chosen": chosen, "rejected": rejected} for each in questions]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = RunDir(tmp_path / "dpo")
    values: dict[str, Any] = {
        "run_id": "dpo",
        "model": str(trained / "adapter"),
        "method": "dpo",
        "train": [data],
        "tuning": Tuning(kind="lora"),
        "training_steps": 8,
        "batch_size": 4,
        "seq_len": 128,
        "learning_rate": 2e-4,
        "warmup_fraction": 0,
        "device": "cpu",
    }
    run.write_spec(RunSpec.model_validate(values))
    assert train(run.path) == 0
    after = margin(run.result)
    record_property("margin", f"{before:.3f} before, {after:.3f} after")
    assert before * after < 0, (before, after)


def test_the_quickstart_does_the_same_for_a_user(model: Path, tmp_path: Path) -> None:
    """With one command; what it answers before and after is printed."""
    done = subprocess.run(
        [sys.executable, "-m", "training_backends", "quickstart", "--model", model, "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["question"] == "What is the capital of France?"
    assert content(found["answer_before"]) is None
    assert content(found["answer_after"]) == "Paris"
    assert (Path(found["model"]) / "adapter_config.json").is_file()
