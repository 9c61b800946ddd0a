"""A model that learns something, trained through a gateway by the official Python SDK."""

import time
from pathlib import Path
from typing import Any

from mistralai.client import Mistral

DEADLINE = 120.0
HYPERPARAMETERS = {"training_steps": 60, "learning_rate": 0.003, "seq_len": 128}
TARGETS = [
    # Without weights this SDK (2.5.1) leaves all targets out of the request.
    {"name": "topic", "labels": ["pets", "sky", "roads"], "weight": 1},
    {
        "name": "words",
        "labels": ["cat", "sun", "bus"],
        "weight": 1,
        "loss_function": "multi_class",
    },
]


def train(client: Any, paths: tuple[Path, ...], **more: Any) -> Any:
    """Upload training and validation data, and see a job to its good end."""
    ids = []
    for path in paths:
        with path.open("rb") as handle:
            file = client.files.upload(file={"file_name": path.name, "content": handle})
        ids.append(file.id)
    job = client.fine_tuning.jobs.create(
        model="tiny-mistral",
        training_files=[{"file_id": ids[0], "weight": 1}],
        validation_files=[ids[1]],
        hyperparameters=HYPERPARAMETERS,
        auto_start=True,
        **more,
    )
    deadline = time.monotonic() + DEADLINE
    while job.status not in {"SUCCESS", "FAILED", "FAILED_VALIDATION"}:
        assert time.monotonic() < deadline, f"still {job.status}"
        time.sleep(0.2)
        job = client.fine_tuning.jobs.get(job_id=job.id)
    assert job.status == "SUCCESS", job.events
    return job


def accuracies(job: Any) -> list[float]:
    """Return the share that was right of what the model has not seen, as it learnt."""
    points = sorted(job.checkpoints, key=lambda point: point.step_number)
    assert [point.step_number for point in points] == [10, 20, 30, 40, 50, 60], points
    return [point.metrics.valid_mean_token_accuracy for point in points]


def classifier(client: Any, *paths: Path) -> float:
    """Learn two targets at once."""
    job = train(client, paths, job_type="classifier", classifier_targets=TARGETS)
    assert [target.name for target in job.classifier_targets] == ["topic", "words"]
    losses = [target.loss_function for target in job.classifier_targets]
    assert losses == ["single_class", "multi_class"], losses
    assert job.fine_tuned_model.startswith("ft:classifier:tiny-mistral:")
    card = client.models.retrieve(model_id=job.fine_tuned_model)
    assert (card.capabilities.classification, card.capabilities.completion_chat) == (True, False)
    return accuracies(job)[-1]


def main(url: str, key: str, *paths: Path) -> None:
    """Train, and look at what is known in the end."""
    right = classifier(Mistral(api_key=key, server_url=url), *paths)
    assert right >= 0.95, "of what it has not seen"
