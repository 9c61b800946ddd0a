"""What is offered, and what a user's own file changes in it."""

from pathlib import Path

import pytest

from training_backends.backends.local.backend import LocalBackend
from training_backends.core.config import Tuning
from training_backends.core.errors import ConfigError
from training_backends.gateway.catalogue import Catalogue


def test_the_built_in_names_stand_for_open_weights() -> None:
    """The model made on the spot is among them."""
    catalogue = Catalogue.load()
    tiny, seven = catalogue.get("tiny-mistral"), catalogue.get("open-mistral-7b")
    assert tiny is not None
    assert seven is not None
    assert (tiny.target, seven.target) == ("tiny-mistral", "mistralai/Mistral-7B-v0.3")
    assert catalogue.get("mistral-medium-latest") is None
    assert "open-mistral-nemo" in catalogue.names("completion")
    assert {"tiny-mistral", "open-mistral-7b"} < set(catalogue.names("classifier"))
    assert catalogue.get("pixtral-12b-latest") is None, "nothing here trains what reads images"


def test_a_file_adds_and_replaces(tmp_path: Path) -> None:
    """The rest of the built-in names stays."""
    path = tmp_path / "catalogue.toml"
    path.write_text(
        '[models.mine]\ntarget = "org/mine"\njob_types = ["classifier"]\n'
        '[models.open-mistral-7b]\ntarget = "/models/seven"\ncontext_length = 4096\n'
    )
    catalogue = Catalogue.load(path)
    seven = catalogue.get("open-mistral-7b")
    assert seven is not None
    assert (seven.target, seven.context_length) == ("/models/seven", 4096)
    assert catalogue.names("classifier")[-1] == "mine"
    assert "open-mistral-7b" not in catalogue.names("classifier")
    assert catalogue.get("tiny-mistral") is not None


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[models.a]\ntraget = "x"\n', "models.a.target"),
        ('[models.a]\ntarget = "x"\njob_types = ["chat"]\n', "models.a.job_types.0"),
        ('[models.a]\ntarget = "x"\ncontext_length = "8k"\n', "models.a.context_length"),
        ('[models."a/b"]\ntarget = "x"\n', "models.a/b"),
        ('[models.a]\ntarget = "x"\ntuning = "loro"\n', "models.a.tuning.kind"),
        ('[models.a]\ntarget = "x"\noptions = 4\n', "models.a.options"),
        ("[models]\na = 1\n", "models.a"),
        ("models = 1\n", "models"),
        ("[model.a]\n", "model"),
        ("[models.a\n", None),
    ],
)
def test_a_mistake_is_named_with_file_and_key(tmp_path: Path, text: str, key: str | None) -> None:
    """Each issue says where to look."""
    path = tmp_path / "catalogue.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        Catalogue.load(path)
    assert raised.value.issues[0].path == str(path)
    assert key in [issue.field for issue in raised.value.issues]


def test_a_file_says_how_a_model_is_trained(tmp_path: Path) -> None:
    """With the backend's own options, which are checked before the first job."""
    path = tmp_path / "catalogue.toml"
    path.write_text(
        '[models.a]\ntarget = "x"\ntuning = "qlora"\noptions.num_processes = 4\n'
        '[models.b]\ntarget = "x"\ntuning = { kind = "lora", target_modules = ["q_proj"] }\n'
    )
    catalogue = Catalogue.load(path)
    a, b = catalogue.get("a"), catalogue.get("b")
    assert a is not None
    assert b is not None
    assert a.tuning == Tuning(kind="qlora")
    assert b.tuning == Tuning(kind="lora", target_modules=("q_proj",))
    catalogue.check_options(LocalBackend.options_model)
    path.write_text(
        '[models.a]\ntarget = "x"\noptions.num_processes = 0\n'
        '[models.b]\ntarget = "x"\noptions.gpus = 2\n'
    )
    with pytest.raises(ConfigError) as raised:
        Catalogue.load(path).check_options(LocalBackend.options_model)
    assert [issue.path for issue in raised.value.issues] == [str(path)] * 2
    fields = [issue.field for issue in raised.value.issues]
    assert fields == ["models.a.options.num_processes", "models.b.options.gpus"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """With what is wrong with it."""
    with pytest.raises(ConfigError) as raised:
        Catalogue.load(tmp_path / "none.toml")
    assert "No such file" in raised.value.issues[0].message
