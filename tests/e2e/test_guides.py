"""The migration guides, followed word for word against a gateway that trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from openai import NotFoundError, OpenAI

from tests.e2e.conftest import serving
from tests.forking import Program, Trainer
from tests.pages import code_blocks
from tests.trainer.plain import save_tiny

pytestmark = [pytest.mark.e2e, pytest.mark.engine, pytest.mark.timeout(400)]


def titled(page: str, title: str) -> str:
    """Return the text of a file that a page shows."""
    (block,) = [each for each in code_blocks(page) if each.title == title]
    return block.text


def run(
    page: str, directory: Path, samples: tuple[Path, Path], **variables: str
) -> tuple[str, str]:
    """Run the script of a page on the sample chats; return both answers that it prints."""
    (directory / "chats.jsonl").write_bytes(samples[0].read_bytes())
    script = directory / "finetune.py"
    script.write_text(titled(page, "finetune.py"))
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=directory,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # An answer may have several lines.
    answer, _, streamed = done.stdout.removesuffix("\n").partition("\nstreamed: ")
    return answer.removeprefix("answer: "), streamed


def test_both_guides_lead_to_an_answer(
    tmp_path: Path, samples: tuple[Path, Path], program: Program, trainer: Trainer
) -> None:
    """Right after the end of the job, streamed and not, with the same words.

    OpenAI's script knows of its variables only.
    """
    catalogue = tmp_path / "models.toml"
    target = "HuggingFaceTB/SmolLM2-135M-Instruct"
    text = titled("migrate-openai.md", "models.toml")
    assert target in text
    catalogue.write_text(text.replace(target, str(save_tiny(tmp_path / "base"))))
    home = tmp_path / "home"
    settings = {
        "TRAINING_BACKENDS_GATEWAY__CATALOGUE": str(catalogue),
        "TRAINING_BACKENDS_LOCAL__PYTHON": str(trainer.python),
    }
    with serving(home, program.python, **settings) as served:
        url, key = served.url, served.key
        said = [
            run(
                "migrate-openai.md",
                tmp_path,
                samples,
                OPENAI_BASE_URL=f"{url}/openai/v1",
                OPENAI_API_KEY=key,
            ),
            run(
                "migrate-mistral.md",
                tmp_path,
                samples,
                MISTRAL_SERVER_URL=url,
                MISTRAL_API_KEY=key,
            ),
        ]
        for answer, streamed in said:
            # A stream ends before a character that is incomplete.
            text = streamed.rstrip("\N{REPLACEMENT CHARACTER}")
            assert text
            assert answer.startswith(text)
        forgets_a_deleted_model(url, key, home)


def forgets_a_deleted_model(url: str, key: str, home: Path) -> None:
    """Of the adapter there is a merged copy, until the model is deleted."""
    (merged,) = (home / "gateway" / "inference").glob("models/*")
    assert not (merged / "adapter_config.json").exists()
    with OpenAI(api_key=key, base_url=f"{url}/openai/v1", max_retries=0) as openai:
        (model,) = [each.id for each in openai.models.list() if each.id.startswith("ft:gpt-4o")]
        openai.models.delete(model)
        assert not merged.exists()
        with pytest.raises(NotFoundError, match="has been deleted"):
            openai.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "Hello?"}]
            )
