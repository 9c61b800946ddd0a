"""Compare exact token counts with mistral-common: speed and equality.

    python benchmarks/tokens.py [--size MB] [--rounds N] [--file FILE]
    python benchmarks/tokens.py --equality [N]

The first command compares complete counts, from file to number, with mistral-common's
`encode_chat_completion` on rows of the same file. The two alternate within one run, each in its
own process, so that both include importing and loading. The rows are prose and code from the
standard library, and the French and tool-call rows of `_chats.py`.

The second command counts N rows of every format both ways with every tokenizer in the wheel and
exits with 1 if any row differs.
"""

import argparse
import ast
import json
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest.mock import patch

import msgspec

from benchmarks._chats import chat_rows
from benchmarks._conversations import FORMATS, make_row
from training_backends.datasets.rows import ChatRow

_SHARE: Final = 0.1
"""Fraction of the file that mistral-common counts; its rate does not depend on the length."""

_Row = dict[str, Any]


def docs_and_code() -> Iterator[tuple[str, str]]:
    """Yield docstrings and source code of functions in the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = ast.get_docstring(node) or ""
                code = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                if len(code) < 4000:
                    yield text, code


def rows(seed: int = 0) -> Iterator[bytes]:
    """Yield rows indefinitely."""
    chance = random.Random(seed)
    pieces = list(docs_and_code())
    texts = [text for text, _ in pieces if len(text) > 60]
    codes = [code for _, code in pieces if len(code) > 100]
    others = chat_rows(seed)
    while True:
        for text, code in zip(
            chance.sample(texts, len(texts)), chance.choices(codes, k=len(texts)), strict=True
        ):
            yield next(others)
            messages = [
                {"role": "user", "content": text[:400]},
                {"role": "assistant", "content": f"{chance.choice(texts)}\n\n```\n{code}\n```"},
            ]
            yield msgspec.json.encode({"messages": messages}) + b"\n"


def write_rows(path: Path, size: int, *, tools: bool = True) -> None:
    """Write at least `size` bytes of rows."""
    written = 0
    with path.open("wb") as file:
        for row in rows():
            if tools or b'"tools"' not in row:
                written += file.write(row)
            if written >= size:
                return


# Run in their own processes; each prints a `Took`.


class Took(NamedTuple):
    """Wall and CPU seconds of a count, and how much of each was loading."""

    size: int
    seconds: float
    cpu: float
    loading: float = 0.0
    loading_cpu: float = 0.0

    def rate(self, size: int) -> float:
        """Return bytes per second, extrapolated to a file of `size` bytes; loading happens once."""
        return size / (self.loading + (self.seconds - self.loading) * size / self.size)

    def cpu_rate(self, size: int) -> float:
        """Return bytes per CPU second, which is more meaningful on a busy machine."""
        return size / (self.loading_cpu + (self.cpu - self.loading_cpu) * size / self.size)


def count_ours(path: str, tokenizer: str, processes: str) -> None:
    """Count a file as `count_tokens` does."""
    start = time.perf_counter()
    from training_backends.core.dataset import DataFile, Dataset  # noqa: PLC0415
    from training_backends.tokens import count_tokens  # noqa: PLC0415

    size = Path(path).stat().st_size
    file = DataFile(path=Path(path), role="train", size=size, rows=1)
    count = count_tokens(Dataset(files=(file,)), _MODELS[tokenizer], processes=int(processes))
    if count.data_tokens is None or count.notes:
        raise SystemExit(f"{count.reason} {count.notes}")
    print(json.dumps(Took(size, time.perf_counter() - start, time.process_time())))


def count_theirs(path: str, tokenizer: str, share: str) -> None:
    """Count the first rows of a file with mistral-common and a tokenizer file."""
    start = time.perf_counter()
    reference = Theirs(Path(tokenizer))
    loading, loading_cpu = time.perf_counter() - start, time.process_time()
    size = 0
    wanted = Path(path).stat().st_size * float(share)
    with Path(path).open("rb") as file:
        for line in file:
            if reference.count(line) is None:
                raise SystemExit(f"rejected: {line!r}")
            size += len(line)
            if size >= wanted:
                break
    seconds = time.perf_counter() - start
    print(json.dumps(Took(size, seconds, time.process_time(), loading, loading_cpu)))


_MODELS: Final = {
    "v1": "mistral-medium-2312",
    "v2": "mistral-large-2402",
    "v3": "mistral-large-2407",
    "v7": "mistral-large-2411",
    "v7m1": "pixtral-large-2411",
    "v3-tekken": "open-mistral-nemo",
    "v3-tekken-m1": "pixtral-12b-2409",
}


class Theirs:
    """Counts a JSON row with mistral-common alone."""

    def __init__(self, path: Path) -> None:
        from mistral_common.protocol.instruct.request import (  # noqa: PLC0415
            ChatCompletionRequest,
        )
        from mistral_common.protocol.instruct.validator import ValidationMode  # noqa: PLC0415
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer  # noqa: PLC0415

        self._tokenizer = MistralTokenizer.from_file(str(path), ValidationMode.finetuning)
        self._request = ChatCompletionRequest

    @staticmethod
    @contextmanager
    def without_pixels() -> Iterator[None]:
        """Skip resizing images, which needs opencv and does not change the tokens."""
        import numpy as np  # noqa: PLC0415  # a dependency of mistral-common
        from mistral_common.tokens.tokenizers import image  # noqa: PLC0415

        with patch.object(image, "transform_image", lambda *_: np.zeros((3, 1, 1))):
            yield

    def count(self, line: bytes) -> int | None:
        """Count the tokens of a row; None if mistral-common rejects it."""
        row = json.loads(line)
        if "text" in row:
            tokenizer = self._tokenizer.instruct_tokenizer.tokenizer
            return len(tokenizer.encode(row["text"], bos=True, eos=True))
        try:
            return sum(self._conversation(*each) for each in _conversations(row))
        except Exception:  # any kind of rejection
            return None

    def _conversation(self, messages: list[_Row], tools: list[_Row] | None) -> int:
        plain = [
            {key: value for key, value in message.items() if key != "weight"}
            | ({"role": "system"} if message["role"] == "developer" else {})
            for message in messages
        ]
        request = self._request.model_validate({"messages": plain, "tools": tools})
        return len(self._tokenizer.encode_chat_completion(request).tokens)


def _conversations(row: _Row) -> list[tuple[list[_Row], list[_Row] | None]]:
    if "messages" in row:
        return [(row["messages"], row.get("tools"))]
    if "input" in row:
        asked, tools = row["input"]["messages"], row["input"].get("tools")
        return [(asked + row[key], tools) for key in ("preferred_output", "non_preferred_output")]
    asked = row.get("prompt", [])
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
        chosen = [[{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")]
        return [(asked + answer, None) for answer in chosen]
    return [(asked + row[key], row.get("tools")) for key in ("chosen", "rejected")]


# Equality

_CONTROLS: Final = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
    "[/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] "
    "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT] [CALL_ID] [ARGS] [THINK] [/THINK]"
)


def later_tokenizers(folder: Path) -> Iterator[tuple[str, Path]]:
    """Write tekken files of versions that the wheel lacks, with the first words of one it has."""
    from training_backends.tokens.text_counters import shipped  # noqa: PLC0415

    data = json.loads(shipped("tekken_240911.json").read_text(encoding="utf-8"))
    # The layout differs, not the vocabulary, and loading a complete one takes a second.
    del data["vocab"][2000:]
    data["config"] |= {"num_vocab_tokens": 2000, "default_vocab_size": 3000}
    data["special_tokens"] = [
        {"rank": rank, "token_str": text, "is_control": True}
        for rank, text in enumerate(_CONTROLS.split())
    ]
    for version in ("v11", "v13"):
        data["config"]["version"] = version
        path = folder / f"tekken_made_{version}.json"
        path.write_text(json.dumps(data), encoding="utf-8")
        yield f"{version} from v3-tekken-m1", path


@dataclass(slots=True)
class Compared:
    """Rows of one format, counted both ways.

    Attributes:
        refused: Number of rows that mistral-common rejects.
        asked: Number of rows that our counter passed to mistral-common.
        differences: One message per row that differs.
    """

    form: str
    rows: int
    refused: int = 0
    asked: int = 0
    differences: list[str] = field(default_factory=list)


def compared(path: Path, number: int) -> Iterator[Compared]:
    """Count rows of each format both ways with the tokenizer in a file."""
    from training_backends.tokens.counters import count_row, counter_of  # noqa: PLC0415
    from training_backends.tokens.counts import Uncountable, read_row  # noqa: PLC0415
    from training_backends.tokens.tokenizers import mistral_file  # noqa: PLC0415

    theirs = Theirs(path)
    ours = counter_of(mistral_file(path))
    asked = Counter[str]()
    with _noting_asked(asked), theirs.without_pixels():
        for form in FORMATS:
            asked.clear()
            result = Compared(form, number)
            for line in (make_row(form, each) for each in range(number)):
                expected = theirs.count(line)
                try:
                    found = sum(count_row(ours, read_row(line)))
                except Uncountable:
                    found = None
                result.refused += expected is None
                if found != expected:
                    result.differences.append(f"{found}, not {expected}: {line!r}")
            result.asked = asked["asked"]
            yield result


def equality(number: int) -> int:
    """Compare counts of rows of each format with each tokenizer."""
    from training_backends.tokens.text_counters import shipped  # noqa: PLC0415
    from training_backends.tokens.tokenizers import SHIPPED  # noqa: PLC0415

    print(
        f"{'tokenizer':<26} {'format':<18} {'rows':>7} {'rejected':>8} {'passed':>7} {'differ':>7}"
    )
    differences = 0
    with tempfile.TemporaryDirectory() as folder:
        files = [(name, shipped(file)) for name, file in SHIPPED.items()]
        for name, path in (*files, *later_tokenizers(Path(folder))):
            for each in compared(path, number):
                for difference in each.differences:
                    print(difference[:2000])
                differences += len(each.differences)
                print(
                    f"{name:<26} {each.form:<18} {each.rows:>7} {each.refused:>8} "
                    f"{each.asked:>7} {len(each.differences):>7}",
                    flush=True,
                )
    print(f"{differences} differences")
    return 1 if differences else 0


@contextmanager
def _noting_asked(asked: Counter[str]) -> Iterator[None]:
    """Count how often our counter passes a row to mistral-common."""
    from training_backends.tokens.mistral_layout import Layout  # noqa: PLC0415

    chat = Layout.chat

    def noted(layout: Layout, row: ChatRow) -> int | None:
        found = chat(layout, row)
        asked["asked"] += found is None
        return found

    with patch.object(Layout, "chat", noted):
        yield


# Speed


def measured(*arguments: object) -> Took:
    """Run one of the counts above in its own process."""
    command = [sys.executable, "-m", "benchmarks.tokens", "--run", *map(str, arguments)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root)
    return Took(*json.loads(done.stdout))


def speed(paths: Mapping[str, Path], rounds: int) -> None:
    """Print rates and ratios; every round measures each variant once."""
    from training_backends.tokens.text_counters import shipped  # noqa: PLC0415
    from training_backends.tokens.tokenizers import SHIPPED  # noqa: PLC0415

    print("MB/s and ratio to mistral-common in the same round; medians")
    print(
        f"{'':<14} {'mistral-common':>15} {'1 process':>16} {'in CPU time':>12} {'2 processes':>16}"
    )
    for name, path in paths.items():
        size = path.stat().st_size
        taken = [
            (
                measured("theirs", path, shipped(SHIPPED[name]), _SHARE),
                measured("ours", path, name, 1),
                measured("ours", path, name, 2),
            )
            for _ in range(rounds)
        ]
        rates = [[each.rate(size) for each in turn] for turn in taken]
        theirs, one, two = (statistics.median(turn[n] for turn in rates) / 1e6 for n in range(3))
        ratios = [statistics.median(turn[n] / turn[0] for turn in rates) for n in (1, 2)]
        cpu = statistics.median(ours.cpu_rate(size) / t.cpu_rate(size) for t, ours, _ in taken)
        print(
            f"{name:<14} {theirs:>15.2f} {one:>8.1f} {ratios[0]:>5.1f} x {cpu:>10.1f} x "
            f"{two:>8.1f} {ratios[1]:>5.1f} x",
            flush=True,
        )


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=200, help="MB of rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--file", type=Path, help="use this file of rows instead")
    parser.add_argument("--tokenizers", nargs="*", default=["v3-tekken", "v1", "v3", "v7"])
    parser.add_argument("--equality", type=int, nargs="?", const=5000, metavar="N")
    parser.add_argument("--run", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        {"ours": count_ours, "theirs": count_theirs}[given.run[0]](*given.run[1:])
        return 0
    if given.equality:
        return equality(given.equality)
    with tempfile.TemporaryDirectory() as folder:
        path, without = Path(folder) / "rows.jsonl", Path(folder) / "without-tools.jsonl"
        if not given.file:
            write_rows(path, given.size * 1_000_000)
            # The v1 tokenizer has no tools.
            write_rows(without, given.size * 1_000_000, tools=False)
        paths = {name: without if name == "v1" else path for name in given.tokenizers}
        speed({name: given.file or path for name, path in paths.items()}, given.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
