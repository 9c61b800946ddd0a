"""A configuration converted to another backend, and the report of what changes."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from pydantic import BaseModel

from training_backends import AsyncTrainingClient, ConfigError, TrainingConfig
from training_backends.client.config_file import load_config
from training_backends.client.port import Ported, backends_for, port, to_yaml
from training_backends.core.capabilities import Capabilities, SuffixRule
from training_backends.datasets.provider_formats import LOCAL, OPENAI
from training_backends.testing.backend import ScriptedBackend

pytestmark = pytest.mark.anyio


class SourceOptions(BaseModel, extra="forbid"):
    """Options that the target has under the same name, another name, or not."""

    packing: bool = False
    dpo_beta: float = 0.1
    device: str = "auto"
    max_invalid_fraction: float = 0.0


class Source(ScriptedBackend):
    """Supports every field."""

    name: ClassVar[str] = "source"
    options_model: ClassVar[type[BaseModel]] = SourceOptions

    def tolerated_bad_rows(self, config: TrainingConfig) -> float:
        return float(config.options.get("max_invalid_fraction", 0.0))

    def options_tolerating(self, fraction: float) -> dict[str, Any]:
        return {"max_invalid_fraction": fraction}


class TargetOptions(BaseModel, extra="forbid"):
    """Options of the target."""

    packing: bool = False
    beta: float = 0.1
    learning_rate_multiplier: float | None = None
    skip: float = 0.0


class Target(ScriptedBackend):
    """Supports what its test declares."""

    name: ClassVar[str] = "target"
    options_model: ClassVar[type[BaseModel]] = TargetOptions

    def options_tolerating(self, fraction: float) -> dict[str, Any]:
        return {"skip": fraction}


SOURCE = Source(
    capabilities=Capabilities(
        methods=frozenset({"sft", "dpo", "classifier"}),
        tunings=frozenset({"full", "lora", "qlora"}),
        hyperparameters=None,
        data=frozenset({"file", "remote", "uri"}),
        weights=True,
        validation_files=True,
        suffix=SuffixRule(max_length=100),
        chat_template=True,
        result_checkpoints=frozenset({"last", "best"}),
        resources=frozenset({"gpus", "accelerator"}),
        integrations=frozenset({"wandb"}),
        provider_format=LOCAL,
    )
)
HOSTED = Capabilities(
    methods=frozenset({"sft", "dpo"}),
    tunings=frozenset({"lora"}),
    hyperparameters=frozenset({"epochs", "batch_size"}),
    max_train_files=1,
    validation_files=True,
    suffix=SuffixRule(max_length=8, alphabet="abcdefghijklmnopqrstuvwxyz-"),
    provider_format=OPENAI,
)


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[AsyncTrainingClient]:
    backends = {"source": SOURCE, "target": Target(capabilities=HOSTED)}
    async with AsyncTrainingClient(home=tmp_path / "home", backends=backends) as client:
        yield client


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write a file of forty conversations."""
    return write(tmp_path / "data.jsonl", *(chat("user", f"Say {n}.") for n in range(40)))


def chat(first: str, text: str) -> dict[str, Any]:
    answer = {"role": "assistant", "content": "No."}
    return {"messages": [{"role": first, "content": text}, answer]}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


async def moved(
    client: AsyncTrainingClient, file: Path, *, to: str = "target", **fields: Any
) -> Ported:
    """Port a configuration of the source."""
    model = fields.pop("chosen", None)
    config = {"model": "m", "data": {"train": str(file)}, **fields}
    directory = file.parent / "out"
    return await port(client, config, to=to, source="source", model=model, directory=directory)


def changes(ported: Ported) -> dict[str, str]:
    """Return the approximated fields with their messages."""
    return dict(ported.approximated)


async def test_what_the_target_supports_is_mapped(client: AsyncTrainingClient, data: Path) -> None:
    """Values stay as they are, and the result can be launched."""
    fields: dict[str, Any] = {
        "tuning": "lora",
        "hyperparameters": {"epochs": 2, "batch_size": 4},
        "suffix": "mine",
        "tags": {"team": "a"},
        "budget": {"max_duration": "2h"},
    }
    ported = await moved(client, data, chosen="m", **fields)
    given = TrainingConfig.model_validate({"model": "m", "data": {"train": str(data)}, **fields})
    assert ported.config == given
    assert (ported.approximated, ported.lost, ported.files, ported.issues) == ((), (), (), ())
    assert {"tuning", "hyperparameters.epochs", "data.train.0", "tags"} <= {*ported.mapped}


async def test_a_model_must_be_chosen(client: AsyncTrainingClient, data: Path) -> None:
    """No hosted model has another provider's name; the old one stays as a comment."""
    ported = await moved(client, data)
    assert ported.config.model is None
    assert [issue.field for issue in ported.issues] == ["model"]
    assert '# model: "m"' in to_yaml(ported)
    chosen = await moved(client, data, chosen="other")
    assert (chosen.config.model, chosen.issues) == ("other", ())
    assert changes(chosen)["model"] == "other instead of m, as chosen"
    assert (await moved(client, data, to="source")).config.model == "m"


@pytest.mark.parametrize(
    ("steps", "epochs", "said"),
    [
        (20, 2, "20 steps became 2 epochs (40 rows, 4 per step)"),
        (3, 1, "3 steps became 1 epoch, rounded from 0.3 (40 rows, 4 per step)"),
        (
            30_001,
            3000,
            "30,001 steps became 3,000 epochs, rounded from 3000.1 (40 rows, 4 per step)",
        ),
    ],
)
async def test_steps_become_epochs(
    client: AsyncTrainingClient, data: Path, steps: int, epochs: int, said: str
) -> None:
    """By the rows of the data and the batch size."""
    ported = await moved(client, data, hyperparameters={"training_steps": steps, "batch_size": 4})
    assert ported.config.hyperparameters.epochs == epochs
    assert changes(ported)["hyperparameters.training_steps"] == said


async def test_epochs_become_steps(client: AsyncTrainingClient, data: Path, tmp_path: Path) -> None:
    """Without a batch size by the estimate of the source; without either they are lost."""
    only_steps = HOSTED.model_copy(update={"hyperparameters": frozenset({"training_steps"})})
    backends = {"source": SOURCE, "target": Target(capabilities=only_steps)}
    async with AsyncTrainingClient(home=tmp_path / "other", backends=backends) as other:
        ported = await moved(other, data, hyperparameters={"epochs": 2, "batch_size": 16})
        assert ported.config.hyperparameters.training_steps == 5
        estimated = await moved(other, data, hyperparameters={"epochs": 2})
        assert estimated.config.hyperparameters.training_steps == 10
        assert "the estimate of source" in changes(estimated)["hyperparameters.epochs"]
    lost = await moved(client, data, hyperparameters={"training_steps": 7})
    assert "hyperparameters.training_steps" in dict(lost.lost)
    assert lost.config.hyperparameters.training_steps is None


async def test_field_of_an_integration_that_the_target_lacks_is_lost(data: Path) -> None:
    """OpenAI takes the key from its dashboard; project and tags stay."""
    entry = {"project": "p", "tags": ["a"], "credential": "wandb/mine"}
    async with AsyncTrainingClient(home=data.parent / "home") as client:
        ported = await port(
            client,
            {"model": "m", "data": {"train": str(data)}, "integrations": [entry]},
            to="openai",
            source="source",
            directory=data.parent / "out",
        )
    assert "integrations.0.credential" in dict(ported.lost)
    (kept,) = ported.config.wandb
    assert (kept.project, kept.tags, kept.credential) == ("p", ("a",), "wandb")


async def test_unsupported_fields_are_lost_by_name(client: AsyncTrainingClient, data: Path) -> None:
    """Nothing is dropped silently."""
    ported = await moved(
        client,
        data,
        tuning="full",
        hyperparameters={"learning_rate": 0.001, "seed": 3},
        resources={"gpus": 1},
        integrations=[{"project": "p"}],
        data={
            "train": {"path": str(data), "weight": 2},
            "validation": {"remote_id": "file-1"},
        },
        options={"device": "cpu"},
    )
    lost = dict(ported.lost)
    assert set(lost) == {
        "model",
        "tuning",
        "hyperparameters.learning_rate",
        "hyperparameters.seed",
        "resources.gpus",
        "integrations.0",
        "data.train.0.weight",
        "data.validation.0",
        "options.device",
    }
    assert "options.learning_rate_multiplier" in lost["hyperparameters.learning_rate"]
    assert [issue.field for issue in ported.issues] == ["model"]


async def test_a_template_and_the_best_checkpoint_are_kept_where_supported(
    client: AsyncTrainingClient, data: Path, tmp_path: Path
) -> None:
    """The template's path is written relative to the new file."""
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    fields: dict[str, Any] = {
        "chat_template": str(tmp_path / "chat.jinja"),
        "result": {"checkpoint": "best"},
        "data": {"train": str(data), "validation": str(data)},
    }
    kept = await moved(client, data, to="source", **fields)
    assert {"chat_template", "result.checkpoint"} <= {*kept.mapped}
    assert yaml.safe_load(to_yaml(kept, tmp_path))["chat_template"] == "chat.jinja"
    lost = await moved(client, data, chosen="m", **fields)
    assert {"chat_template", "result.checkpoint"} == dict(lost.lost).keys()
    assert lost.issues == ()


async def test_values_are_fitted_to_the_target(client: AsyncTrainingClient, data: Path) -> None:
    """The suffix follows its rule, and an option gets the target's name."""
    options = {"packing": True, "dpo_beta": 0.2, "max_invalid_fraction": 0.1}
    ported = await moved(client, data, tuning="qlora", suffix="my.model.v2", options=options)
    assert ported.config.suffix == "my-model"
    assert ported.config.tuning is not None
    assert ported.config.tuning.kind == "lora"
    assert ported.config.options == {"packing": True, "beta": 0.2, "skip": 0.1}
    assert {"suffix", "tuning.kind", "options.dpo_beta"} <= set(changes(ported))


async def test_an_unsupported_method_is_an_error(client: AsyncTrainingClient, data: Path) -> None:
    """No other method trains the same."""
    with pytest.raises(ConfigError, match="target cannot run") as caught:
        await moved(client, data, method="classifier")
    assert [issue.field for issue in caught.value.issues] == ["method"]


async def test_rows_are_converted_to_the_targets_format(
    client: AsyncTrainingClient, tmp_path: Path
) -> None:
    """The new file is written beside the output; the original stays."""
    row = {"prompt": "Is it far?", "chosen": "Two stops.", "rejected": "Yes."}
    pairs = write(tmp_path / "pairs.jsonl", *[row | {"prompt": f"Is it {n}?"} for n in range(12)])
    before = pairs.read_bytes()
    ported = await moved(client, pairs, method="dpo", chosen="m")
    (file,) = ported.files
    assert file == tmp_path / "out" / "pairs.target.jsonl"
    assert json.loads(file.read_text().splitlines()[0]) == {
        "input": {"messages": [{"role": "user", "content": "Is it 0?"}]},
        "preferred_output": [{"role": "assistant", "content": "Two stops."}],
        "non_preferred_output": [{"role": "assistant", "content": "Yes."}],
    }
    assert ported.config.data.train[0].path == file
    assert "12 rows from prompt, chosen, rejected" in changes(ported)["data.train.0"]
    assert "data.train.0" not in ported.mapped
    assert (ported.issues, pairs.read_bytes()) == ((), before)
    with pytest.raises(ConfigError, match="already exists"):
        await moved(client, pairs, method="dpo", chosen="m")


async def test_rows_without_an_equivalent_are_reported(
    client: AsyncTrainingClient, tmp_path: Path
) -> None:
    """Plain text is no conversation: the file stays and must be corrected."""
    texts = write(tmp_path / "texts.jsonl", *({"text": f"row {n}"} for n in range(12)))
    ported = await moved(client, texts, chosen="m")
    assert "12 rows cannot be converted for target" in dict(ported.lost)["data.train.0"]
    assert ported.config.data.train[0].path == texts
    assert [issue.code for issue in ported.issues] == ["unconverted_rows"]
    assert ported.files == ()


async def test_several_files_are_joined(
    client: AsyncTrainingClient, data: Path, tmp_path: Path
) -> None:
    """For a backend that takes one file; the weights are lost."""
    more = write(tmp_path / "more.jsonl", chat("user", "Last?"))
    train = [{"path": str(data), "weight": 3}, str(more)]
    ported = await moved(client, data, chosen="m", data={"train": train})
    (file,) = ported.files
    assert file.read_bytes() == data.read_bytes() + more.read_bytes()
    assert [source.path for source in ported.config.data.train] == [file]
    assert "2 files joined" in changes(ported)["data.train"]
    assert "data.train.0.weight" in dict(ported.lost)


async def test_the_yaml_is_the_configuration(
    client: AsyncTrainingClient, data: Path, tmp_path: Path
) -> None:
    """Relative to its directory, and short where a short form exists."""
    ported = await moved(client, data, chosen="m", budget={"max_cost": "25 USD"}, suffix="mine")
    text = to_yaml(ported, tmp_path)
    assert yaml.safe_load(text)["data"] == {"train": "data.jsonl"}
    (tmp_path / "new.yaml").write_text(text)
    file = load_config(tmp_path / "new.yaml")
    assert (file.backend, file.config) == ("target", ported.config)


async def test_backends_that_can_run_a_configuration(
    client: AsyncTrainingClient, data: Path
) -> None:
    """Judged by their capabilities, without the one it was written for."""
    config = TrainingConfig.model_validate({"model": "m", "data": {"train": str(data)}})
    assert {"local", "openai", "together"} <= {
        *await backends_for(client, config, source="mistral")
    }
    classifier = config.model_copy(update={"method": "classifier"})
    assert await backends_for(client, classifier, source="mistral") == ["local", "ray"]
