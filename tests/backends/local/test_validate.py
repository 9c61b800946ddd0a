"""What the files of a model, or the hub, say against a run before it is launched."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from training_backends.backends.local import validate
from training_backends.backends.local.backend import LocalBackend
from training_backends.backends.local.process import Hub
from training_backends.backends.local.settings import LocalSettings
from training_backends.backends.local.validate import amd_memory
from training_backends.core.errors import Issue
from training_backends.core.run import TrainingRun

pytestmark = pytest.mark.anyio

MakeRun = Callable[..., TrainingRun]
Inspected = Callable[..., Any]

PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
STRICT = (
    "{% if messages[0].content == '7 plus 7?' %}{{ raise_exception('no sevens') }}{% endif %}"
    + PLAIN
)
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}...{% else %}"
    "{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
)
ENDLESS = "{% for a in range(99999) %}" * 9 + "{% set b = a %}" + "{% endfor %}" * 9
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 1000,
}


def write_weights(path: Path, shape: tuple[int, ...] = (4, 4), cut: int = 0) -> None:
    """Write a safetensors file of one tensor, without its last bytes if wanted."""
    size = 4
    for each in shape:
        size *= each
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {}, "w": tensor}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size - cut)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The directory of a model against which nothing can be said."""
    tokenizers = pytest.importorskip("tokenizers")
    directory = tmp_path / "model"
    directory.mkdir()
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    core.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(PLAIN)
    (directory / "config.json").write_text(json.dumps(SHAPE))
    write_weights(directory / "model.safetensors")
    return directory


@pytest.fixture
def check(backend: LocalBackend, make_run: MakeRun, inspected: Inspected) -> Callable[..., Any]:
    """Return a function that validates a run of a model; keywords change its configuration."""

    async def found(model: object, rows: str = "instruct", **changes: Any) -> tuple[Issue, ...]:
        run = make_run(model=str(model), **changes)
        report = await backend.validate(run.config, inspected(run, sample_type=rows))
        return report.issues

    return found


@pytest.mark.parametrize(
    "model_type", ["mistral3", "mistral4", "ministral3", "qwen3_vl", "gemma3", "llava"]
)
async def test_image_text_models_are_known(
    check: Callable[..., Any], model: Path, model_type: str
) -> None:
    """Their text part is trained; the size of the vocabulary may be one level down."""
    described = {"model_type": model_type, "text_config": {**SHAPE, "vocab_size": 264}}
    (model / "config.json").write_text(json.dumps(described))
    (model / "chat_template.jinja").unlink()  # not needed: the vocabulary is that of bytes
    assert await check(model) == ()


async def test_the_files_of_an_adapter_are_those_of_its_base(
    check: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    """A run may start from an adapter, with its rank; what its base lacks is found."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": str(model), "r": 8}))
    assert await check(adapter, tuning="lora") == ()
    (issue,) = await check(adapter, tuning={"kind": "lora", "rank": 16})
    assert (issue.field, issue.severity) == ("tuning.rank", "warning")
    (model / "chat_template.jinja").unlink()
    (issue,) = await check(adapter)
    assert issue.code == "no_chat_template"
    config.write_text("{}")
    (issue,) = await check(adapter)
    assert (issue.code, issue.field) == ("model_files", "model")
    assert "names no base model" in issue.message


async def test_a_good_model_has_no_issues(check: Callable[..., Any], model: Path) -> None:
    """Neither its files nor its rows."""
    assert await check(model) == ()


def test_a_good_model_is_checked_without_torch(model: Path, tmp_path: Path) -> None:
    """Nor transformers: whoever launches keeps its memory."""
    chat = {"messages": [{"role": r, "content": "a"} for r in ("user", "assistant")]}
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(chat) + "\n")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from training_backends.backends.local.validate import files_issues\n"
        "from training_backends.core.config import TrainingConfig\n"
        "from training_backends.core.dataset import DataFile, Dataset\n"
        "model, data = map(Path, sys.argv[1:])\n"
        "config = TrainingConfig.model_validate({'model': str(model), 'data': {'train': data}})\n"
        "file = DataFile(path=data, role='train', size=1, rows=1, sample_type='instruct')\n"
        "assert [*files_issues(config, Dataset(files=(file,)), model)] == []\n"
        "assert not sys.modules.keys() & {'torch', 'transformers'}\n"
    )
    subprocess.run([sys.executable, "-c", code, str(model), str(data)], check=True)


async def test_an_architecture_that_cannot_be_loaded(
    check: Callable[..., Any], model: Path
) -> None:
    """It is named, and so is a type that nobody knows; a classifier has its own list."""
    for described in (
        {"model_type": "voxtral", "architectures": ["VoxtralForConditionalGeneration"]},
        {"model_type": "clip"},
        {"model_type": "no-such-type"},
        {"model_type": "florence2", "is_encoder_decoder": True},
    ):
        (model / "config.json").write_text(json.dumps(described))
        (issue,) = await check(model)
        assert (issue.code, issue.severity) == ("unsupported_architecture", "error")
        assert described["model_type"] in issue.message


@pytest.mark.engine
def test_the_list_of_architectures_is_that_of_transformers() -> None:
    """What its tables say as text, and what they hold when they are loaded, are the same."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # noqa: PLC0415
    from transformers.models.auto.modeling_auto import (  # noqa: PLC0415
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    from training_backends.backends.local import validate  # noqa: PLC0415
    from training_backends.backends.local.interpreter import THIS_INTERPRETER  # noqa: PLC0415

    package = THIS_INTERPRETER.transformers()
    assert package is not None
    for tables, classifies in (
        ((MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES), False),
        ((MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,), True),
    ):
        names = {name for table in tables for name in table}
        classes = {CONFIG_MAPPING_NAMES[name] for name in names & CONFIG_MAPPING_NAMES.keys()}
        known = {name for name, each in CONFIG_MAPPING_NAMES.items() if each in classes}
        known.discard("EvollaModel")  # a class's name among the types
        found = validate.trainable_types(package, classifies=classifies)
        assert found is not None
        assert known <= found
        assert found & CONFIG_MAPPING_NAMES.keys() == known


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b"{", "config.json is not valid JSON"),
        ("config.json", b"[]", "config.json is not a JSON object"),
        ("model.safetensors", None, "has no weights"),
        ("model.safetensors", b"", "model.safetensors is damaged"),
        ("model.safetensors", b"version https://git-lfs", "model.safetensors is damaged"),
        ("model.safetensors", b"\x02\0\0\0\0\0\0\0[]", "model.safetensors is damaged"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"w": "model-1.safetensors"}}',
            "model-1.safetensors is missing",
        ),
        ("model.safetensors.index.json", b"{}", "model.safetensors.index.json is damaged"),
    ],
)
async def test_damaged_or_missing_files(
    check: Callable[..., Any], model: Path, name: str, content: bytes | None, said: str
) -> None:
    """The file is named."""
    (model / name).unlink(missing_ok=True)
    if content is not None:
        (model / name).write_bytes(content)
    (issue,) = await check(model)
    assert (issue.field, issue.severity) == ("model", "error")
    assert said in issue.message


async def test_weights_that_were_not_copied_to_their_end(
    check: Callable[..., Any], model: Path
) -> None:
    """The header says how long the file is."""
    write_weights(model / "model.safetensors", cut=1)
    (issue,) = await check(model)
    assert "model.safetensors is damaged" in issue.message


async def test_a_model_without_a_tokenizer(check: Callable[..., Any], model: Path) -> None:
    """Nothing can be encoded for it."""
    for path in model.glob("tokenizer*"):
        path.unlink()
    (issue,) = await check(model)
    assert "no tokenizer found" in issue.message


async def test_chats_need_a_template(check: Callable[..., Any], model: Path) -> None:
    """A base model takes texts only."""
    (model / "chat_template.jinja").unlink()
    (issue,) = await check(model)
    assert issue.code == "no_chat_template"
    assert await check(model, rows="pretrain") == ()


@pytest.mark.engine
@pytest.mark.parametrize(
    ("template", "said"),
    [(STRICT, "no sevens"), (ENDLESS, "did not finish")],
)
async def test_rows_that_the_template_rejects(
    check: Callable[..., Any],
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    said: str,
) -> None:
    """With the line, as an estimate would say it; a warning where such rows are tolerated."""
    if template == ENDLESS:
        monkeypatch.setattr("training_backends.tokens.jinja.RENDER_SECONDS", 0.1)
    (model / "chat_template.jinja").write_text(template)
    issues = await check(model)
    assert {issue.code for issue in issues} == {"unusable_row"}
    assert said in issues[0].message
    assert issues[0].line == (8 if template == STRICT else 1)
    assert issues[0].severity == "error"
    tolerant = await check(model, options={"device": "cpu", "max_invalid_fraction": 0.1})
    assert {issue.severity for issue in tolerant} == {"warning"}


@pytest.mark.parametrize(
    ("described", "tuning", "severity"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "full", "error"),
        ({"quant_method": "gptq"}, "full", "error"),
        ({"quant_method": "gptq"}, "lora", "error"),
        ({"quant_method": "of tomorrow"}, "lora", "warning"),
        ({"quant_method": "fp8"}, "qlora", "error"),
        ({"quant_method": "fp8"}, "lora", None),
        ({"quant_method": "fp8"}, "full", None),
        ({"quant_method": "mxfp4"}, "lora", None),
    ],
)
async def test_a_quantized_model(
    check: Callable[..., Any],
    model: Path,
    described: dict[str, Any],
    tuning: str,
    severity: str | None,
) -> None:
    """Some are dequantized; others need a package, and cannot be trained themselves."""
    (model / "config.json").write_text(json.dumps({**SHAPE, "quantization_config": described}))
    issues = await check(model, tuning=tuning)
    expected = [("quantized_model", severity)] if severity else []
    assert [(issue.code, issue.severity) for issue in issues] == expected


def test_the_memory_of_amd_gpus_is_what_their_driver_reports(tmp_path: Path) -> None:
    """Without torch; a processor with graphics has no memory of its own."""
    for number, size in enumerate((2**29, 192 * 2**30, "?")):
        device = tmp_path / f"card{number}" / "device"
        device.mkdir(parents=True)
        (device / "mem_info_vram_total").write_text(f"{size}\n")
    assert amd_memory(tmp_path) == (192 * 2**30,)
    assert amd_memory(tmp_path / "none") == ()


@pytest.mark.parametrize(
    ("share", "tuning", "severity"),
    [(0.5, "full", "warning"), (2, "full", "error"), (2, "lora", "error"), (0.01, "full", None)],
)
async def test_a_model_that_does_not_fit_into_memory(
    check: Callable[..., Any], model: Path, share: float, tuning: str, severity: str | None
) -> None:
    """An error if the weights alone do not fit; sparse files stand for large ones."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    write_weights(model / "model.safetensors", (int(share * memory / 4 / 1024), 1024))
    issues = await check(model, tuning=tuning)
    assert [issue.severity for issue in issues] == ([severity] if severity else [])
    assert all("GiB" in issue.message for issue in issues)


@pytest.mark.parametrize(
    ("options", "has"),
    [
        ({}, "the GPU has 1.0 GiB"),
        ({"num_processes": 2}, ""),
        ({"num_processes": 2, "sharding": "zero2"}, "the GPU has 1.0 GiB"),
        ({"num_processes": 2, "dtype": "float32"}, "2 GPUs have 2.0 GiB"),
    ],
)
async def test_several_gpus_share_a_model(
    check: Callable[..., Any],
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    has: str,
) -> None:
    """Unless each of them holds all weights."""
    monkeypatch.setattr(validate, "_gpu_memory", lambda: (2**30, 2**30))
    write_weights(model / "model.safetensors", (3 * 2**18, 1024))  # 1.5 GiB in bfloat16
    issues = await check(model, tuning="lora", options=options)
    (message,) = [issue.message for issue in issues if issue.code == "memory"] or [""]
    assert has in message
    assert bool(has) == bool(message)


async def test_a_configuration_tells_the_size_of_other_weights(
    check: Callable[..., Any], model: Path
) -> None:
    """Mistral 7B has 7.24 billion."""
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").touch()
    large = {
        **SHAPE,
        "hidden_size": 4096,
        "num_hidden_layers": 32_000,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14_336,
        "vocab_size": 32_000,
    }
    (model / "config.json").write_text(json.dumps(large))
    (issue,) = await check(model)
    # A thousand times its layers, with the same tables.
    assert "6979.6 billion weights" in issue.message


async def test_an_invalid_template_is_named(check: Callable[..., Any], model: Path) -> None:
    """It is a problem of the model, not of a row."""
    (model / "chat_template.jinja").write_text("{% if %}")
    (issue,) = await check(model)
    assert (issue.field, issue.severity) == ("model", "error")
    assert "invalid chat template" in issue.message


SYSTEM = {"role": "system", "content": "Be brief."}
DROPS_SYSTEM = PLAIN.replace("in messages", "in messages if m.role != 'system'")


@pytest.mark.parametrize(
    ("template", "system", "said"),
    [
        (FORGETFUL, False, None),
        (PLAIN, True, None),
        (DROPS_SYSTEM, True, "messages[0].content: the chat template leaves it out"),
    ],
)
async def test_rows_are_encoded_as_in_training(
    backend: LocalBackend,
    make_run: MakeRun,
    inspected: Inspected,
    model: Path,
    tmp_path: Path,
    *,
    template: str,
    system: bool,
    said: str | None,
) -> None:
    """Rewritten answers become examples of their own; what a template leaves out is an error."""
    (model / "chat_template.jinja").write_text(template)
    turn = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    data = tmp_path / "turns.jsonl"
    data.write_text(json.dumps({"messages": [SYSTEM] * system + turn * 2}) + "\n")
    run = make_run(model=str(model), data={"train": data})
    report = await backend.validate(run.config, inspected(run))
    assert [said in issue.message for issue in report.errors if said] == [True] * bool(said)
    assert report.ok is (said is None)


async def test_a_template_of_the_users_own(
    backend: LocalBackend, make_run: MakeRun, inspected: Inspected, model: Path, tmp_path: Path
) -> None:
    """It replaces the model's own, or gives one to a base model; it is checked like it."""
    (model / "chat_template.jinja").unlink()
    own = tmp_path / "own.jinja"
    own.write_text(PLAIN)
    run = make_run(model=str(model), chat_template=str(own))
    assert (await backend.validate(run.config, inspected(run))).ok
    own.write_text("{% if %}")
    report = await backend.validate(run.config, inspected(run))
    assert [issue.field for issue in report.errors] == ["chat_template"]
    tiny = make_run(chat_template=str(own))
    report = await backend.validate(tiny.config, inspected(tiny))
    assert [issue.field for issue in report.errors] == ["chat_template"]


class HubServer(BaseHTTPRequestHandler):
    """A hub that has one small model, one of an unknown type, a gated one, and one too large."""

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/api/models/org/")
        sizes = {"large": 10**15, "small": 1000, "odd": 1000, "gated": 1000}
        code, error = 200, ""
        body: dict[str, Any] = {}
        if name.endswith("/auth-check"):
            code, error = 403, "GatedRepo"
        elif name in sizes:
            described = {"model_type": "voxtral" if name == "odd" else "llama"}
            tensors = {"parameters": {"F32": sizes[name]}, "total": sizes[name]}
            body = {"id": f"org/{name}", "modelId": f"org/{name}", "config": described}
            body |= {"safetensors": tensors, "gated": "manual" if name == "gated" else False}
        else:
            code, error = 404, "RepoNotFound"
        content = json.dumps(body).encode()
        self.send_response(code)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_request(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    """Where that hub is."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubServer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("small", []),
        ("none", ["unknown_model"]),
        ("gated", ["gated_model"]),
        ("odd", ["unsupported_architecture"]),
        ("large", ["memory"]),
    ],
)
async def test_the_hub_is_asked_for_a_model_that_is_not_here(
    hub: str, home: Path, make_run: MakeRun, inspected: Inspected, *, name: str, codes: list[str]
) -> None:
    """Whether it has it, gives it, and what it is; nothing is fetched."""
    pytest.importorskip("huggingface_hub")
    run = make_run(model=f"org/{name}")
    backend = LocalBackend(home, hub=Hub(LocalSettings(hub_url=hub)))
    report = await backend.validate(run.config, inspected(run))
    assert [issue.code for issue in report.errors] == codes


async def test_a_hub_out_of_reach_is_a_warning_and_one_that_must_not_be_asked_an_error(
    home: Path, make_run: MakeRun, inspected: Inspected
) -> None:
    """It could not be looked up; the run cannot work."""
    run = make_run(model="org/any")
    away = LocalBackend(home, hub=Hub(LocalSettings(hub_url="http://127.0.0.1:1")))
    (issue,) = (await away.validate(run.config, inspected(run))).issues
    assert (issue.code, issue.severity) == ("hub_not_asked", "warning")
    assert "could not be looked up" in issue.message
    offline = LocalBackend(home, hub=Hub(LocalSettings(offline=True)))
    (issue,) = (await offline.validate(run.config, inspected(run))).issues
    assert (issue.code, issue.severity) == ("model_not_here", "error")


@pytest.mark.engine
async def test_a_row_that_the_template_rejects_far_down_is_found_when_rows_are_counted(
    backend: LocalBackend,
    make_run: MakeRun,
    inspected: Inspected,
    model: Path,
    tmp_path: Path,
) -> None:
    """Long rows are counted in any case, and the count meets it."""
    (model / "chat_template.jinja").write_text(STRICT)
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]}
        for text in ["a"] * 150 + ["7 plus 7?"]
    ]
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    run = make_run(model=str(model), data={"train": data})
    files = inspected(run, sample_type="instruct", summary={"longest_row": 10_000})
    (issue,) = (await backend.validate(run.config, files)).issues
    assert (issue.code, issue.severity) == ("unusable_row", "error")
    assert ":151: " in issue.message
    assert "no sevens" in issue.message


async def test_a_proxy_s_password_is_in_no_issue(
    home: Path, make_run: MakeRun, inspected: Inspected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries quote the URL that they cannot read."""
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://user:s3cret/pass#word@127.0.0.1:1")
    backend = LocalBackend(home, hub=Hub(LocalSettings(hub_url="https://hub.example.org")))
    run = make_run(model="org/any")
    (issue,) = (await backend.validate(run.config, inspected(run))).issues
    assert issue.code == "hub_not_asked"
    assert "s3cret" not in str(issue)
    assert "#word" not in str(issue)
