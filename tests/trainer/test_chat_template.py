"""A model trained with a chat template of the user's own answers, and stops, as it was trained."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from training_backends.datasets.rows import ChatRow, Message
from training_backends.rundir.directory import RunDir, TrainerExitCode
from training_backends.trainer.generate import answer
from training_backends.trainer.models import load_model
from training_backends.trainer.process import train

MakeRun = Callable[..., RunDir]

# Earlier answers are shown shortened, and an answer does not end with the tokenizer's own token.
TEMPLATE = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ '...' if m.role == 'assistant' and not loop.last else m.content }}{{ '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
ROW = [
    {"role": "user", "content": "Is it far?"},
    {"role": "assistant", "content": "Two stops."},
    {"role": "user", "content": "And back?"},
    {"role": "assistant", "content": "Three."},
]


def save_base(directory: Path) -> Path:
    """Write a small Llama with the control tokens of ChatML and without a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>", "tokenizer_class": "TokenizersBackend"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=256,
        bos_token_id=None,
        pad_token_id=256,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.mark.engine
def test_the_result_answers_and_stops_with_the_template_it_was_trained_with(
    make_run: MakeRun, tmp_path: Path
) -> None:
    """Each answer is learnt after its own prompt; any program stops at the end of an answer."""
    base = save_base(tmp_path / "base")
    data = tmp_path / "chats.jsonl"
    data.write_text((json.dumps({"messages": ROW}) + "\n") * 8)
    run = make_run(
        tmp_path / "r",
        model=str(base),
        chat_template_text=TEMPLATE,
        train=[data],
        validation=[],
        training_steps=40,
        batch_size=8,
        checkpoint_every=40,
        learning_rate=1e-2,
        sample_prompt="Is it far?",
    )
    assert train(run.path) is TrainerExitCode.DONE
    said = {event.message: event for event, _ in run.read_events()}
    assert any("8 conversations became 16 examples" in message for message in said)
    assert "after: Two stops." in said

    assert GenerationConfig.from_pretrained(run.result).eos_token_id == [256, 258]
    loaded = load_model(str(run.result), seed=0, tuning=None, device=torch.device("cpu"))
    assert answer(loaded.model, loaded.encoder, "Is it far?", 60) == "Two stops."

    tokenizer = AutoTokenizer.from_pretrained(run.result)
    assert tokenizer.chat_template == TEMPLATE
    asked = tokenizer.apply_chat_template(
        ROW[:3], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(run.result)
    out = model.generate(**asked, max_new_tokens=60, do_sample=False)
    served = tokenizer.decode(out[0, asked["input_ids"].shape[1] :])
    assert served == "Three.<|im_end|>"


@pytest.mark.engine
def test_an_adapter_is_asked_with_the_template_it_was_trained_with(
    make_run: MakeRun, tmp_path: Path
) -> None:
    """Its base model has none; what ends an answer is stored with the adapter."""
    run = make_run(
        tmp_path / "r",
        model=str(save_base(tmp_path / "base")),
        tuning={"kind": "lora", "rank": 4},
        chat_template_text=TEMPLATE,
        validation=[],
        training_steps=1,
    )
    assert train(run.path) is TrainerExitCode.DONE
    loaded = load_model(str(run.result), seed=0, tuning=None, device=torch.device("cpu"))
    asked = loaded.encoder.decode(
        loaded.encoder.prompt(ChatRow([Message("user", "a")])), keep_controls=True
    )
    assert asked == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert loaded.encoder.end_ids == (256, 258)
    assert GenerationConfig.from_pretrained(run.result).eos_token_id == [256, 258]
