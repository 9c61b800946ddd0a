"""The server of Together's API, driven by Together's own client.

The requirements of `together==3.1.1` exclude current versions of rich and filelock, so it is not a
dependency: install it with `pip install --target DIR --no-deps together==3.1.1 distro
detect_agent`, and run with `PYTHONPATH=DIR`.
"""

import json
from pathlib import Path

import pytest

from training_backends.testing.faults import OtherAnswer
from training_backends.testing.together_provider import ScriptedTogetherProvider

together = pytest.importorskip("together")


def test_official_client_drives_the_server(tmp_path: Path) -> None:
    """Upload through a presigned URL, price, create, events, metrics, checkpoints, cancel."""
    path = tmp_path / "train.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path.write_text((json.dumps({"messages": messages}) + "\n") * 5)
    with (
        ScriptedTogetherProvider() as server,
        together.Together(api_key="test-key", base_url=server.base_url, max_retries=0) as client,
    ):
        model = server.models[0]
        first = client.files.upload(path, check=False)
        again = client.files.upload(path, check=False)
        assert again.id == first.id
        assert server.files[first.id].content == path.read_bytes()
        assert len(server.storage.asked("PUT")) == 1
        client.files.retrieve(first.id)
        assert client.files.retrieve(first.id).processing_status == "COMPLETED"

        job = client.fine_tuning.create(
            training_file=first.id, model=model, n_epochs=2, lora=True, suffix="mine"
        )
        made = server.jobs[job.id]
        assert (made.asked["suffix"], made.asked["training_type"]["type"]) == ("mine", "Lora")
        assert made.price == pytest.approx(2 * path.stat().st_size * server.dollars_per_byte)
        server.set_status(job.id, "running")
        server.add_metrics(job.id, 1, loss=2.5)
        server.add_checkpoint(job.id, 1)
        assert client.fine_tuning.retrieve(job.id).status == "running"
        assert [each.suffix for each in client.fine_tuning.list().data] == ["mine"]
        events = client.fine_tuning.list_events(job.id).data
        assert [event.type for event in events] == [
            "job_pending",
            "training_start",
            "checkpoint_save",
        ]
        assert client.fine_tuning.list_metrics(job.id).metrics[0]["train/loss"] == 2.5
        assert [each.step for each in client.fine_tuning.list_checkpoints(job.id).data] == [1]
        assert client.fine_tuning.cancel(job.id).status == "cancel_requested"
        server.set_status(job.id, "completed")
        assert client.fine_tuning.content(ft_id=job.id, checkpoint="adapter").read()
        client.fine_tuning.delete(job.id)
        with pytest.raises(together.NotFoundError):
            client.fine_tuning.retrieve(job.id)
        server.fail(OtherAnswer(status=429, body={"error": {"message": "slow down"}}))
        with pytest.raises(together.RateLimitError):
            client.fine_tuning.list()
        server.key = "other"
        with pytest.raises(together.AuthenticationError):
            client.fine_tuning.list()
