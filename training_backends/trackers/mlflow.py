"""Runs of an MLflow tracking server or database."""

import os
from collections.abc import Sequence
from typing import Any, ClassVar, Final, Literal

from training_backends.trackers.tracker import Measurement, Tracker

__all__ = ["MLflowTracker"]

_RUN_TAG: Final = "training_backends.run_id"
_MOST_METRICS: Final = 1000
"""In one request; a limit of MLflow's REST API (2026-11)."""
_LONGEST_VALUE: Final = 6000
"""Characters of a parameter's value; likewise."""
_STATUSES: Final = {"completed": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}


class MLflowTracker(Tracker):
    """Finds its MLflow run by a tag, so that a restarted run is continued.

    Values that are reported twice are stored once: MLflow identifies them by step, time and value.
    """

    requires: ClassVar[Sequence[str]] = ("mlflow",)
    install: ClassVar[str] = "pip install 'training-backends[mlflow]'"
    _client: Any = None
    _id: str = ""

    def start(self) -> None:
        """Find or create the experiment and the run, and log the parameters."""
        from mlflow import MlflowClient  # noqa: PLC0415
        from mlflow.entities import Param  # noqa: PLC0415

        if self.key is not None:  # MLflow takes it from the environment only
            os.environ["MLFLOW_TRACKING_TOKEN"] = self.key.get_secret_value()
        self._client = client = MlflowClient(tracking_uri=self.integration.tracking_uri)
        name = self.integration.experiment
        experiment = client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment else client.create_experiment(name)
        known = client.search_runs([where], f"tags.`{_RUN_TAG}` = '{self.run.id}'", max_results=1)
        if known:
            self._id = known[0].info.run_id
            client.update_run(self._id, status="RUNNING")
        else:
            title = self.integration.run_name or self.run.id
            made = client.create_run(where, run_name=title, tags={_RUN_TAG: self.run.id})
            self._id = made.info.run_id
        parameters = [
            Param(key, str(value)[:_LONGEST_VALUE]) for key, value in self.run.parameters.items()
        ]
        client.log_batch(self._id, params=parameters)

    def measured(self, measurements: Sequence[Measurement]) -> None:
        """Log metrics with the steps' own times."""
        from mlflow.entities import Metric  # noqa: PLC0415

        found = [
            Metric(_lawful(name), value, int(each.at.timestamp() * 1000), each.step)
            for each in measurements
            for name, value in each.values.items()
        ]
        for at in range(0, len(found), _MOST_METRICS):
            self._client.log_batch(self._id, metrics=found[at : at + _MOST_METRICS])

    def finish(self, status: Literal["completed", "failed", "cancelled"], message: str) -> None:
        """Set the final status, and the reason of a failure as a tag."""
        if message:
            self._client.set_tag(self._id, "training_backends.failure", message[:5000])
        self._client.set_terminated(self._id, status=_STATUSES[status])


def _lawful(name: str) -> str:
    """Replace characters that MLflow does not allow in names."""
    return "".join(char if char.isalnum() or char in "_-./ :" else "_" for char in name)
