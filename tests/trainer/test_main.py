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
from training_backends.trainer.queue import host_key

pytestmark = pytest.mark.engine

PROGRAM = (sys.executable, "-m", "training_backends.trainer")
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy")


ASKED = ("sample", "tiny-mistral", "--seed", "5", "--max-tokens", "6")


def test_the_untrained_model_says_the_same_thing_every_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One JSON line, from the seed alone, even for a prompt that is no UTF-8."""
    asked = [*ASKED, "--prompt", "hi \udcff"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert set(json.loads(said)) == {"answer"}
    done = subprocess.run([*PROGRAM, *asked], capture_output=True, text=True, check=True)
    assert done.stdout == said


def test_a_prompt_may_stand_on_standard_input_behind_the_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is taken as it is, the end of its last line too."""
    with monkeypatch.context() as patched:
        patched.setenv("HF_TOKEN", "set by the program, and taken back here")
        patched.setenv(ON_STDIN, "1")
        patched.setattr("sys.stdin", TextIOWrapper(BytesIO(b"secret\nhi\nyou\n")))
        assert main([*ASKED]) == 0
    assert main([*ASKED, "--prompt", "hi\nyou\n"]) == 0
    one, other = capsys.readouterr().out.splitlines()
    assert one == other


UNREACHED = ("sample", "nobody/nothing", "--prompt", "x")


def test_a_hub_out_of_reach_is_said_at_once() -> None:
    """In one clear line, without the password of a proxy."""
    proxies = dict.fromkeys(PROXIES, "http://u:s3cret/pass#word@127.0.0.1:1")
    done = subprocess.run(
        [*PROGRAM, *UNREACHED],
        capture_output=True,
        text=True,
        env={**os.environ, **proxies},
        check=False,
    )
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr
    assert "s3cret" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hub_that_is_not_to_be_asked_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line names what forbids it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main([*UNREACHED]) == 4
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_queued_process_has_loaded_the_standard_library_only(
    make_run: Callable[..., RunDir], engine: Engine, tmp_path: Path
) -> None:
    """What holds memory is loaded once there is a slot: compiled modules show in its maps."""
    slots = tmp_path / "slots"
    slots.mkdir()
    run = make_run(tmp_path / "run", slots_dir=slots, training_steps=1, validation=[])
    with hold_lock(slots / f"cpu-{host_key()}.0.lock"):
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
