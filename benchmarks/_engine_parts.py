"""The parts of `engine.py` that run in their own processes.

    python benchmarks/_engine_parts.py prepare|ours|transformers|trl|matmul|profile DIR

DIR contains `task.json` (see `Task`). Each part prints one JSON document.
"""

# ruff: noqa: PLC0415  # each part imports only what it needs, because its memory is measured
import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import torch

IGNORED: Final = -100
_WARM_UP: Final = 3
_KINDS: Final = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "optimizer": ("adam", "multi_tensor", "foreach", "clip_grad"),
    "matrices": ("gemm", "nvjet", "cutlass", "cublas", "aten::mm", "aten::addmm", "aten::bmm"),
    "copies": ("memcpy", "memset", "copy_", "_to_copy"),
}
"""Kinds of kernels and operations, by substrings of their names."""
_WORDS: Final = (
    *("the", "model", "answers", "a", "question", "about", "parcels", "invoices", "rivers"),
    *("because", "somebody", "asked", "for", "short", "and", "clear", "summary", "of", "places"),
)


@dataclass(frozen=True)
class Task:
    """What all trainers train.

    Attributes:
        micro: Rows in memory at a time.
        chats: Train on answers only; otherwise on every token of texts.
    """

    device: str
    hidden: int
    head: int
    layers: int
    seq_len: int
    batch: int
    micro: int
    steps: int
    chats: bool
    checkpointing: bool
    method: str = "sft"

    @property
    def dtype(self) -> str:
        """Compute dtype; weights are float32."""
        return "bfloat16" if self.device == "cuda" else "float32"


def read_task(directory: Path) -> Task:
    """Read the task stored in a directory."""
    return Task(**json.loads((directory / "task.json").read_text()))


def prepare(directory: Path) -> dict[str, Any]:
    """Write the model and the rows: as text for ours, tokenized in its order for the peers."""
    from transformers import MistralConfig, MistralForCausalLM

    from training_backends.tokens.byte_tokenizer import save_tiny_tokenizer
    from training_backends.tokens.encoders import encoder_for
    from training_backends.tokens.examples import ExampleReader
    from training_backends.trainer.data import Order

    task = read_task(directory)
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=32768,
            hidden_size=task.hidden,
            intermediate_size=4 * task.hidden,
            num_hidden_layers=task.layers,
            num_attention_heads=task.hidden // task.head,
            num_key_value_heads=task.hidden // task.head // 2,
            head_dim=task.head,
            max_position_embeddings=max(4096, task.seq_len),
            sliding_window=None,
        )
    )
    base = directory / "base"
    model.save_pretrained(base)
    tokenizer = files("mistral_common") / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    shutil.copyfile(str(tokenizer), base / "tokenizer.model.v3")
    save_tiny_tokenizer(directory / "tokenizer")
    chance = random.Random(1)
    lines = [
        json.dumps(_make_row(chance, task), ensure_ascii=False)
        for _ in range(task.batch * task.steps)
    ]
    (directory / "rows.jsonl").write_text("\n".join(lines))
    encoder = encoder_for("base", base)
    reader = ExampleReader(encoder, task.seq_len, method="dpo" if task.method == "dpo" else "sft")
    examples = [each for line in lines for each in reader.read(line.encode(), "").examples]
    order = Order((len(examples),), (1.0,), 0)
    rows = [_for_peers(examples[order.row(position)]) for position in range(len(examples))]
    (directory / "rows.json").write_text(json.dumps(rows))
    sequences = [sequence for example in examples for sequence in example.sequences]
    tokens = sum(len(sequence.ids) for sequence in sequences)
    embedded = model.get_input_embeddings().weight.numel()
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "parameters": parameters,
        "multiplied": parameters - embedded,
        "tokens": tokens,
        "in_loss": sum(sum(sequence.trained) for sequence in sequences) / tokens,
        "width": tokens / len(sequences),
    }


def _for_peers(example: Any) -> dict[str, list[int]]:
    if len(example.sequences) == 1:
        ids, trained = example.sequences[0]
        labels = [n if counts else IGNORED for n, counts in zip(ids, trained, strict=True)]
        return {"input_ids": ids, "labels": labels}
    (prompt, chosen), (_, rejected) = (
        (ids[: len(ids) - sum(trained)], ids[len(ids) - sum(trained) :])
        for ids, trained in example.sequences
    )
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def _make_row(chance: random.Random, task: Task) -> dict[str, Any]:
    # On a GPU texts fill the sequence; on a CPU row lengths vary as those of chats do.
    least = 1.0 if task.device == "cuda" else 0.25
    count = round(task.seq_len * chance.uniform(least, 1.0) * (1.2 if least == 1.0 else 0.7))
    words = chance.choices(_WORDS, k=count)
    if not task.chats:
        return {"text": " ".join(words)}
    asked, answered = words[: count // 2], words[count // 2 :]
    if task.method == "dpo":
        rejected = chance.sample(answered, k=len(answered) // 2 + 1)
        return {
            "prompt": " ".join(asked),
            "chosen": " ".join(answered),
            "rejected": " ".join(rejected),
        }
    return {
        "messages": [
            {"role": "user", "content": " ".join(asked)},
            {"role": "assistant", "content": " ".join(answered)},
        ]
    }


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad rows on the right to the length of the longest."""
    width = max(len(row["input_ids"]) for row in rows)

    def pad(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

    masks = [[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows]
    return {
        "input_ids": pad("input_ids", 0),
        "labels": pad("labels", IGNORED),
        "attention_mask": torch.tensor(masks),
    }


def peer(directory: Path, *, trl: bool) -> dict[str, Any]:
    """Train with transformers' Trainer or TRL's, as their users would, and measure it."""
    from transformers import MistralForCausalLM

    task = read_task(directory)
    rows = json.loads((directory / "rows.json").read_text())
    times: list[float] = []
    common: dict[str, Any] = {
        # The same precision as ours: float32 weights with autocast.
        "model": MistralForCausalLM.from_pretrained(directory / "base", dtype=torch.float32),
        "callbacks": [_make_clock(task, times)],
    }
    make = _make_transformers
    if trl:
        make = _make_trl_pairs if task.method == "dpo" else _make_trl
    version, trainer = make(directory, rows, _peer_arguments(directory, task), common)
    finished = trainer.train()
    tokens = sum(_length(row) for row in rows[_WARM_UP * task.batch :])
    return {
        "version": version,
        "tokens_per_second": tokens / (times[1] - times[0]),
        "memory": peak_memory(task),
        "loss": finished.training_loss,
    }


def _length(row: dict[str, list[int]]) -> int:
    """Return the tokens of a row; in a pair the prompt counts with each answer."""
    return sum(
        len(ids) * (1 + (name == "prompt_ids")) for name, ids in row.items() if "ids" in name
    )


def _peer_arguments(directory: Path, task: Task) -> dict[str, Any]:
    return {
        "output_dir": str(directory / "peer"),
        "max_steps": task.steps,
        "per_device_train_batch_size": task.micro,
        "gradient_accumulation_steps": task.batch // task.micro,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": task.checkpointing,
        "bf16": task.dtype == "bfloat16",
        "use_cpu": task.device == "cpu",
        "dataloader_pin_memory": task.device == "cuda",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "logging_steps": 10,
    }


def _make_clock(task: Task, times: list[float]) -> Any:
    """Return a callback that records when the warm-up and the last step end."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]  # untyped library
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            del args, control, others
            if state.global_step in {_WARM_UP, task.steps}:
                if task.device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter())

    return Clock()


def _make_transformers(
    directory: Path, rows: list[Any], arguments: dict[str, Any], common: dict[str, Any]
) -> tuple[str, Any]:
    import transformers

    del directory
    trainer = transformers.Trainer(
        args=transformers.TrainingArguments(**arguments),
        train_dataset=_Rows(rows),
        data_collator=collate,
        **common,
    )
    return f"transformers {transformers.__version__}", trainer


def _make_trl(
    directory: Path, rows: list[Any], arguments: dict[str, Any], common: dict[str, Any]
) -> tuple[str, Any]:
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    # The rows are already tokenized.
    prepared = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = trl.SFTTrainer(
        args=trl.SFTConfig(**arguments, **prepared),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(directory / "tokenizer"),
        data_collator=collate,
        **common,
    )
    return f"trl {trl.__version__}", trainer


def _make_trl_pairs(
    directory: Path, rows: list[Any], arguments: dict[str, Any], common: dict[str, Any]
) -> tuple[str, Any]:
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    class Trainer(trl.DPOTrainer):  # type: ignore[misc]  # untyped library
        def _prepare_dataset(self, dataset: Any, *others: Any) -> Any:
            del others  # the rows are already tokenized
            return dataset

    trainer = Trainer(
        # As ours: reference log probabilities are computed once, without a second model in memory.
        args=trl.DPOConfig(**arguments, beta=0.1, max_length=None, precompute_ref_log_probs=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(directory / "tokenizer"),
        **common,
    )
    return f"trl {trl.__version__}", trainer


class _Rows(torch.utils.data.Dataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows[index]


def peak_memory(task: Task) -> int:
    """Return peak memory in bytes, measured as the trainer does."""
    if task.device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Written out: a Python that has TRL need not have us.
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) * 1024


def write_run(directory: Path, task: Task) -> Any:
    """Create a run directory for the task."""
    from training_backends.core.config import DataSource, Tuning
    from training_backends.rundir.directory import RunDir, RunSpec

    shutil.rmtree(directory / "run", ignore_errors=True)
    run = RunDir(directory / "run")
    run.write_spec(
        RunSpec(
            run_id="run",
            model=str(directory / "base"),
            method=task.method,
            tuning=Tuning(kind="full"),
            train=(DataSource(path=directory / "rows.jsonl"),),
            learning_rate=1e-3,
            weight_decay=0.1,
            warmup_fraction=0,
            training_steps=task.steps,
            batch_size=task.batch,
            micro_batch_size=task.micro,
            seq_len=task.seq_len,
            checkpoint_every=task.steps,
            gradient_checkpointing=task.checkpointing,
            device="cuda" if task.device == "cuda" else "cpu",
        )
    )
    return run


def ours(directory: Path) -> dict[str, Any]:
    """Train with our trainer, as the local backend does, and measure it."""
    from training_backends.trainer.process import train

    task = read_task(directory)
    run = write_run(directory, task)
    code = train(run.path)
    if code:
        raise SystemExit(f"the trainer exited with {code!r}: {run.read_exit()}")
    rows = [row for row, _ in run.read_metrics()]
    first, last = rows[_WARM_UP - 1], rows[-1]
    return {
        "version": "training-backends",
        "tokens_per_second": (last.tokens - first.tokens) / (last.at - first.at).total_seconds(),
        "memory": last.memory_bytes,
        "loss": sum(row.train_loss for row in rows) / len(rows),
    }


def matmul(directory: Path) -> dict[str, Any]:
    """Measure the device's matrix throughput in FLOP/s."""
    task = read_task(directory)
    size = 8192 if task.device == "cuda" else 1024
    one, other = (
        torch.randn(size, size, device=task.device, dtype=getattr(torch, task.dtype))
        for _ in range(2)
    )
    times = []
    for _ in range(30):
        start = time.perf_counter()
        one @ other
        if task.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {"flops": 2 * size**3 / statistics.median(times)}


def profile(directory: Path) -> dict[str, Any]:
    """Profile a few steps of our trainer; return the share of time of each kind of kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from training_backends.trainer.loop import Reporter
    from training_backends.trainer.process import train

    task = read_task(directory)
    on_gpu = task.device == "cuda"
    watching = profiler(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])
    first, last = _WARM_UP, _WARM_UP + 4
    moments: list[float] = []
    start_step = Reporter.start_step

    def watched(reporter: Any, step: int) -> None:
        if step - 1 in {first, last} and len(moments) < 2:
            if on_gpu:
                torch.cuda.synchronize()
            if moments:
                watching.stop()
            moments.append(time.perf_counter())
            if len(moments) == 1:
                watching.start()
        start_step(reporter, step)

    setattr(Reporter, "start_step", watched)  # noqa: B010  # a method, for the profile only
    train(write_run(directory, task).path)
    wall = moments[1] - moments[0]
    shares = dict.fromkeys((*_KINDS, "other kernels"), 0.0)
    for event in watching.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        name = event.key.lower()
        kind = next((k for k, words in _KINDS.items() if any(w in name for w in words)), None)
        shares[kind or "other kernels"] += spent / 1e6 / wall
    return {**shares, "outside kernels": 1 - sum(shares.values())}


def main() -> None:
    """Run one part."""
    part, directory = sys.argv[1], Path(sys.argv[2])
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "prepare": prepare,
        "ours": ours,
        "transformers": partial(peer, trl=False),
        "trl": partial(peer, trl=True),
        "matmul": matmul,
        "profile": profile,
    }
    print(json.dumps(parts[part](directory)))


if __name__ == "__main__":
    main()
