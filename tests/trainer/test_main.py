"""The commands of the engine, as a shell starts them."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import BytesIO, TextIOWrapper
from pathlib import Path

import huggingface_hub
import pytest

from tests.trainer.conftest import Engine
from tests.waiting import wait_until
from training_backends.core.files import hold_lock
from training_backends.rundir.directory import RunDir, TrainerExitCode
from training_backends.rundir.handover import ON_STDIN
from training_backends.trainer.__main__ import main
from training_backends.trainer.queue import host_key

pytestmark = pytest.mark.engine

PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy")


ASKED = ("sample", "tiny-mistral", "--seed", "5", "--max-tokens", "6")


def test_the_untrained_model_says_the_same_thing_every_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One JSON line, from the seed alone, even for a prompt that is no UTF-8."""
    asked = [*ASKED, "--prompt", "hi \udcff"]
    assert main(asked) == main(asked) == 0
    said, again = capsys.readouterr().out.splitlines()
    assert set(json.loads(said)) == {"answer"}
    assert again == said


def test_a_conversation_is_continued(capsys: pytest.CaptureFixture[str]) -> None:
    """What was said before counts; a single message is a prompt."""
    asked = {"role": "user", "content": "hi"}
    before = [{"role": "system", "content": "Sing."}, asked, {"role": "assistant", "content": "la"}]
    for prompt in (["hi"], [json.dumps([asked]), "--messages"]):
        assert main([*ASKED, "--prompt", *prompt]) == 0
    assert main([*ASKED, "--messages", "--prompt", json.dumps([*before, asked])]) == 0
    one, same, other = capsys.readouterr().out.splitlines()
    assert one == same != other


def test_a_prompt_may_stand_on_standard_input_behind_the_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is taken as it is, the end of its last line too, and need be no text."""
    with monkeypatch.context() as patched:
        patched.setenv("HF_TOKEN", "set by the program, and taken back here")
        patched.setenv(ON_STDIN, "1")
        patched.setattr("sys.stdin", TextIOWrapper(BytesIO(b"secret\nhi\0\xff\nyou\n")))
        assert main([*ASKED]) == 0
    assert main([*ASKED, "--prompt", "hi\0\ufffd\nyou\n"]) == 0
    one, other = capsys.readouterr().out.splitlines()
    assert one == other


UNREACHED = ("sample", "nobody/nothing", "--prompt", "x")


def test_a_hub_out_of_reach_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one clear line, without the password of a proxy."""
    for name in PROXIES:
        monkeypatch.setenv(name, "http://u:s3cret/pass#word@127.0.0.1:1")
    huggingface_hub.close_session()  # one of another test would not read the variables
    assert main([*UNREACHED]) == 1
    said = capsys.readouterr().err
    assert "cannot be reached" in said
    assert "s3cret" not in said
    assert len(said.splitlines()) == 1


def test_a_hub_that_is_not_to_be_asked_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line names what forbids it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main([*UNREACHED]) == 4
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err


def test_a_queued_process_has_loaded_the_standard_library_only(
    make_run: Callable[..., RunDir], engine: Engine, tmp_path: Path
) -> None:
    """Compiled modules would show in its maps; it waits for any of the slots, and hears a stop."""
    slots = tmp_path / "slots"
    slots.mkdir()
    run = make_run(tmp_path / "run", slots_dir=slots, slots=2)
    first, second = (slots / f"cpu-{host_key()}.{number}.lock" for number in range(2))
    with hold_lock(first), hold_lock(second):
        child = engine.start("train", run.path)
        ((event, _),) = wait_until(run.read_events)
        assert event.data == {"status": "queued", "position": 1}
        if (maps := Path(f"/proc/{child.pid}/maps")).exists():
            assert "site-packages" not in maps.read_text()
        run.request_stop()
        assert child.wait(60) == TrainerExitCode.STOPPED
    record = run.read_exit()
    assert record is not None
    assert (record.status, record.step) == ("stopped", 0)


UNNEEDED = {
    *("peft", "bitsandbytes", "trl", "datasets", "pandas", "sklearn", "scipy", "mistral_common"),
    *("sqlalchemy", "httpx"),
}


def test_full_fine_tuning_loads_no_library_that_it_does_not_need(
    make_run: Callable[..., RunDir],
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each would take up to a second of every run; Python reports what it imports."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    run = make_run(tmp_path / "run", training_steps=1, validation=[])
    child = engine.start("train", run.path)
    _, imports = child.communicate()
    assert child.returncode == TrainerExitCode.DONE
    loaded = {line.rpartition("|")[2].strip() for line in imports.splitlines()}
    assert {"torch", "transformers"} < loaded
    assert not loaded & UNNEEDED


def test_a_queued_run_trains_once_there_is_a_slot(
    make_run: Callable[..., RunDir], tmp_path: Path
) -> None:
    """The same process that waited goes on to train."""
    slots = tmp_path / "slots"
    slots.mkdir()
    run = make_run(tmp_path / "run", slots_dir=slots, training_steps=1, validation=[])
    with ThreadPoolExecutor() as threads, ExitStack() as taken:
        taken.enter_context(hold_lock(slots / f"cpu-{host_key()}.0.lock"))

        def leave() -> None:
            wait_until(run.read_events)
            taken.close()

        threads.submit(leave)
        assert main(["train", str(run.path)]) == TrainerExitCode.DONE
    statuses = [event.data.get("status") for event, _ in run.read_events()]
    assert [*filter(None, statuses)] == ["queued", "initializing", "running", "completed"]


def test_a_spec_that_cannot_be_read_fails_the_run(
    make_run: Callable[..., RunDir], tmp_path: Path
) -> None:
    """Whatever is wrong with it, exit.json says what."""
    for number, text in enumerate(["", "[]", '{"num_processes": "many"}', '{"slots_dir": 3}']):
        run = make_run(tmp_path / str(number))
        run.spec.write_text(text)
        assert main(["train", str(run.path)]) == TrainerExitCode.BAD_INPUT
        record = run.read_exit()
        assert record is not None
        assert record.failure is not None
        assert "spec.json is not valid" in record.failure.message
