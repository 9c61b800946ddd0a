"""The examples that ship with the project are valid and can be inspected."""

import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from training_backends.backends.local.settings import LocalSettings
from training_backends.backends.mistral.settings import MistralSettings
from training_backends.backends.openai.settings import OpenAISettings
from training_backends.client.config_file import load_config
from training_backends.client.observe import WatchSettings
from training_backends.core.plugins import installed_backends
from training_backends.core.registry import backend_class
from training_backends.core.settings import SectionSettings, Settings
from training_backends.credentials.choice import CredentialSettings
from training_backends.datasets.inspect import inspect
from training_backends.datasets.provider_formats import LOCAL, MISTRAL
from training_backends.gateway.catalogue import Catalogue
from training_backends.gateway.settings import GatewaySettings
from training_backends.objects.settings import ObjectSettings

CONFIGS = Path(__file__).parents[2] / "configs"
EXAMPLES = sorted(CONFIGS.glob("*.yaml"))
SECTIONS: dict[str | None, type[SectionSettings]] = {
    None: Settings,
    "local": LocalSettings,
    "mistral": MistralSettings,
    "openai": OpenAISettings,
    "credentials": CredentialSettings,
    "watch": WatchSettings,
    "objects": ObjectSettings,
    "gateway": GatewaySettings,
}


def by_name(path: Path) -> str:
    return path.name


def test_there_are_examples() -> None:
    """The examples that the documentation names are there."""
    assert {path.stem for path in EXAMPLES} >= {
        "classifier",
        "local-classifier",
        "local-dpo",
        "local-lora",
        "local-tiny",
        "minimal",
        "mistral-sft",
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=by_name)
def test_an_example_is_valid_and_its_data_is_clean(path: Path) -> None:
    """It loads as the command line loads it, and its files pass inspection."""
    loaded = load_config(path)
    assert loaded.backend is None or loaded.backend in installed_backends()
    provider_format = {"local": LOCAL}.get(loaded.backend or "", MISTRAL)
    dataset = inspect(loaded.config, provider_format=provider_format)
    assert dataset.issues == ()
    assert dataset.train


@pytest.mark.parametrize("path", EXAMPLES, ids=by_name)
def test_an_examples_options_fit_its_backend(path: Path) -> None:
    """Options are checked by the model of the backend that the example names."""
    loaded = load_config(path)
    if loaded.backend:
        backend_class(loaded.backend).options_model.model_validate(loaded.config.options)


def test_the_integration_that_is_commented_out_is_valid(tmp_path: Path) -> None:
    """Taking the comment signs away gives a working configuration."""
    head, _, block = (CONFIGS / "mistral-sft.yaml").read_text().partition("# integrations:")
    assert block
    target = tmp_path / "config.yaml"
    target.write_text(head + "integrations:" + block.replace("\n# ", "\n"))
    assert load_config(target).config.wandb[0].credential == "wandb"


def test_every_setting_of_the_example_is_real() -> None:
    """Each key of settings.toml, commented out or not, is a field of its section."""
    text = (CONFIGS / "settings.toml").read_text()
    values = tomllib.loads(re.sub(r"^# (\w+ = .*)$", r"\1", text, flags=re.MULTILINE))
    sections = {name: table for name, table in values.items() if isinstance(table, dict)}
    top = {name: value for name, value in values.items() if name not in sections}
    assert set(sections) <= {name for name in SECTIONS if name}
    for name, table in [(None, top), *sections.items()]:
        assert set(table) <= set(SECTIONS[name].model_fields)
        SECTIONS[name].model_validate(table)


def test_the_example_catalogue_maps_names_to_open_weights() -> None:
    """The gateway takes it, and each name stands for a model of the hub."""
    text = (CONFIGS / "models.toml").read_text()
    catalogue = Catalogue.load(CONFIGS / "models.toml")
    for name in tomllib.loads(text)["models"]:
        offer = catalogue.get(name)
        assert offer is not None
        assert re.fullmatch(r"mistralai/[\w.-]+", offer.target)
        assert offer.licence
    assert "ministral-3b-latest" in catalogue.names("classifier")


def test_the_samples_ship_with_the_package_and_fit_its_limits() -> None:
    """The validation set has no row of the training set and keeps to 5 % of its size."""
    samples = files("training_backends") / "samples"
    train, validation = (
        (samples / name).read_text(encoding="utf-8").splitlines()
        for name in ("train.jsonl", "validation.jsonl")
    )
    assert 150 <= len(train) <= 250
    assert len(set(train)) == len(train)
    assert not set(train) & set(validation)
    assert 20 * sum(map(len, validation)) <= sum(map(len, train))
