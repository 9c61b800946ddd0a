"""The page of the documentation about data: its examples and tables are true."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import Run
from tests.pages import DOCS, code_blocks
from training_backends.core.data_rules import ProviderFormat
from training_backends.datasets.check_fast import RowRules
from training_backends.datasets.provider_formats import PROVIDER_FORMATS
from training_backends.datasets.repair import REPAIRS

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
PAGE = (DOCS / "data.md").read_text()


def blocks(language: str) -> list[str]:
    return [block.text for block in code_blocks("data.md", language)]


def sessions() -> Iterator[tuple[str, str]]:
    """Yield each command of the page, with what it shows."""
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            end = part.find("\nEND\n") + 5 if "<<'END'" in part else part.find("\n") + 1
            yield part[:end], part[end:]


@pytest.fixture(autouse=True)
def sample_data(tmp_path: Path) -> None:
    """Lay down what `quickstart` writes."""
    data = tmp_path / "quickstart" / "data"
    data.mkdir(parents=True)
    shutil.copy(ROOT / "training_backends" / "samples" / "train.jsonl", data)


SIMPLE = re.compile(r"training-backends ([\w./ -]+)\n")
"""A command that needs no shell."""


def output_of(directory: Path, *command: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )
    return done.stdout


def test_every_example_does_what_it_shows(run: Run, tmp_path: Path) -> None:
    """The commands are run one after the other, in one directory."""
    for command, shown in sessions():
        if simple := SIMPLE.fullmatch(command):
            done = run(*simple[1].split())
            assert shown in {done.out + done.err, done.err + done.out}, command
        else:
            assert output_of(tmp_path, "bash", "-c", command) == shown, command


def test_the_example_in_python_prints_what_it_shows(tmp_path: Path) -> None:
    """It is a whole program."""
    (program,) = blocks("python")
    (shown,) = blocks("text")
    assert output_of(tmp_path, sys.executable, "-c", program) == shown


@pytest.mark.parametrize("row", [line for block in blocks("json") for line in block.splitlines()])
def test_every_example_row_is_right(row: str) -> None:
    """At least one provider format has nothing to say about it."""
    assert json.loads(row)
    assert any(
        not RowRules(provider_format).judge(row.encode())[1]
        for provider_format in PROVIDER_FORMATS.values()
    )


def test_every_repair_is_listed() -> None:
    """By its code, as `--json` has it."""
    listed = re.findall(r"^\| `([a-z_]+)` \|", PAGE, re.MULTILINE)
    assert set(REPAIRS) <= set(listed)


def provider_format_table() -> str:
    """Write the provider formats down as the page has them."""
    rows = [
        ["", *(f"`{name}`" for name in PROVIDER_FORMATS)],
        ["---"] * (len(PROVIDER_FORMATS) + 1),
        ["formats", *(_codes(each.formats) for each in PROVIDER_FORMATS.values())],
        ["roles", *(", ".join(each.roles) for each in PROVIDER_FORMATS.values())],
        ["ids of tool calls", *(each.call_id_words for each in PROVIDER_FORMATS.values())],
        ["arguments", *(" or ".join(each.arguments) for each in PROVIDER_FORMATS.values())],
        ["images", *map(_images, PROVIDER_FORMATS.values())],
        [
            "weighted messages of",
            *(", ".join(each.weighted_roles) for each in PROVIDER_FORMATS.values()),
        ],
        [
            "rows of a training file",
            *(f"{each.min_rows:,} or more" for each in PROVIDER_FORMATS.values()),
        ],
        ["bytes of a file", *(_most(each.max_file_bytes) for each in PROVIDER_FORMATS.values())],
        ["validation set", *map(_validation, PROVIDER_FORMATS.values())],
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _codes(words: tuple[str, ...]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _images(provider_format: ProviderFormat) -> str:
    if not any("image_url" in parts for parts in provider_format.parts.values()):
        return "none"
    most = f", at most {provider_format.max_images} a row" if provider_format.max_images else ""
    types, schemes = provider_format.image_types, provider_format.image_schemes
    return f"{', '.join(types)} by {', '.join(schemes)}{most}"


def _most(limit: int | None) -> str:
    return f"at most {limit:,}" if limit else "any"


def _validation(provider_format: ProviderFormat) -> str:
    share, most = provider_format.validation_max_share, provider_format.validation_max_bytes
    parts = [f"{most:,} bytes"] if most else []
    parts += [f"{share:.0%} of the training set"] if share else []
    return f"at most {' and '.join(parts)}" if parts else "any"


def test_the_table_of_provider_formats_is_that_of_the_package() -> None:
    """Nothing in it was written from memory."""
    assert provider_format_table() in PAGE
