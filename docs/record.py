"""Record `terminal.svg`, the picture of a terminal in the README.

Runs the commands in an empty directory, with a home of its own.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

import training_backends

COLUMNS = 92
COMMANDS = (
    "validate run.yaml",
    "launch run.yaml --id experiment-7 --follow",
    "metrics experiment-7 --plot",
    "list",
)
CONFIG = """\
backend: local
model: tiny-mistral
data:
  train: train.jsonl
hyperparameters:
  training_steps: 40
"""
TEMPLATE = """\
<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" viewBox="0 0 {width} {height}">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, Menlo, Consolas, monospace;
  font-size: {char_height}px;
  line-height: {line_height}px;
}}
{styles}
</style>
<defs>{lines}</defs>
<rect fill="#1b1f24" width="{width}" height="{height}" rx="8"/>
<g transform="translate(12, 10)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def recorded(command: str, directory: Path) -> str:
    """Return the results that a command prints, in colour and for a terminal of this width."""
    environment = {
        **os.environ,
        "COLUMNS": str(COLUMNS),
        "FORCE_COLOR": "1",
        "TRAINING_BACKENDS_HOME": str(directory / "home"),
    }
    program = [sys.executable, "-m", "training_backends", *command.split()]
    return subprocess.run(
        program, cwd=directory, env=environment, check=True, capture_output=True, text=True
    ).stdout


def shortened(output: str) -> str:
    """Leave out the middle of a long log."""
    lines = output.splitlines()
    return "\n".join([*lines[:6], "…", *lines[-4:]] if len(lines) > 16 else lines)


def main() -> None:
    """Write the picture."""
    package = Path(training_backends.__file__).parent
    with tempfile.TemporaryDirectory() as name, Path(os.devnull).open("w") as nowhere:
        directory = Path(name)
        shutil.copy(package / "samples" / "train.jsonl", directory)
        (directory / "run.yaml").write_text(CONFIG)
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        for command in COMMANDS:
            console.print(f"[bold]$ training-backends {command}[/]", highlight=False)
            output = recorded(command, directory)
            console.print(Text.from_ansi(output if "--plot" in command else shortened(output)))
    picture = console.export_svg(code_format=TEMPLATE, unique_id="terminal")
    (Path(__file__).parent / "terminal.svg").write_text(picture)


if __name__ == "__main__":
    main()
