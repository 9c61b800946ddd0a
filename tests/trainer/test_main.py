"""The commands of the engine, as a shell starts them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from tests.trainer.conftest import Engine
from tests.waiting import wait_until
from training_backends.core.files import hold_lock
from training_backends.rundir.directory import RunDir, TrainerExitCode
from training_backends.rundir.handover import ON_STDIN
from training_backends.trainer.__main__ import main

pytestmark = pytest.mark.engine

PROGRAM = (sys.executable, "-m", "training_backends.trainer")
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy")


def test_the_untrained_model_says_the_same_thing_every_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One JSON line, from the seed alone, even for a prompt that is no UTF-8.

    A prompt on standard input stands behind the token; it is taken as it is, the end of its
    last line too.
    """
    asked = ["sample", "tiny-mistral", "--seed", "5", "--max-tokens", "6"]
    prompt = b"hi \xff\nyou\n"
    argument = ["--prompt", os.fsdecode(prompt)]
    with monkeypatch.context() as patched:
        patched.setenv(ON_STDIN, "1")
        patched.setattr("sys.stdin", TextIOWrapper(BytesIO(b"secret\n" + prompt)))
        assert main(asked) == 0
    assert main([*asked, *argument]) == 0
    done = subprocess.run([*PROGRAM, *asked, *argument], capture_output=True, text=True, check=True)
    first, *others = capsys.readouterr().out.splitlines()
    assert set(json.loads(first)) == {"answer"}
    assert [*others, *done.stdout.splitlines()] == [first, first]


@pytest.mark.parametrize(
    ("env", "code", "said"),
    [
        ({"HF_HUB_OFFLINE": "1"}, 4, "HF_HUB_OFFLINE"),
        (dict.fromkeys(PROXIES, "http://u:s3cret/pass#word@127.0.0.1:1"), 1, "cannot be reached"),
    ],
)
def test_a_model_out_of_reach_is_said_at_once(env: dict[str, str], code: int, said: str) -> None:
    """An unreachable hub, or one that is not to be asked, gives one clear line."""
    done = subprocess.run(
        [*PROGRAM, "sample", "nobody/nothing", "--prompt", "x"],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
    )
    assert done.returncode == code
    assert said in done.stderr
    assert "s3cret" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_queued_process_has_loaded_the_standard_library_only(
    make_run: Callable[..., RunDir], engine: Engine, tmp_path: Path
) -> None:
    """What holds memory is loaded once there is a slot: compiled modules show in its maps."""
    slots = tmp_path / "slots"
    slots.mkdir()
    run = make_run(tmp_path / "run", slots_dir=slots, training_steps=1, validation=[])
    with hold_lock(slots / "0.lock"):
        child = engine.start("train", run.path)
        wait_until(run.read_events)
        maps = Path(f"/proc/{child.pid}/maps").read_text()
        assert "site-packages" not in maps
    assert child.wait(120) == TrainerExitCode.DONE, child.communicate()
    positions = [event.data.get("position") for event, _ in run.read_events()]
    assert positions[0] == 1


def test_a_spec_that_cannot_be_read_fails_the_run(
    engine: Engine, make_run: Callable[..., RunDir], tmp_path: Path
) -> None:
    """Whatever is wrong with it, exit.json says what."""
    for number, text in enumerate(["", "[]", '{"num_processes": "many"}', '{"slots_dir": 3}']):
        run = make_run(tmp_path / str(number))
        run.spec.write_text(text)
        assert engine.start("train", run.path).wait(60) == TrainerExitCode.BAD_INPUT
        record = run.read_exit()
        assert record is not None
        assert record.failure is not None
        assert "spec.json is not valid" in record.failure.message
