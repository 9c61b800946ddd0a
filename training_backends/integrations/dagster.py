"""A Dagster resource that trains within an asset or op."""

import time
from collections.abc import Mapping
from typing import Any, Final

from training_backends.client.config_file import ConfigLike
from training_backends.client.sync import TrainingClient
from training_backends.core.run import LogRecord, RunFailed, TrainingRun, run_id_from
from training_backends.integrations import requires

with requires("dagster", "dagster"):
    import dagster as dg

__all__ = ["TrainingResource"]

_MEASURED: Final = {"metrics", "checkpoint"}


class TrainingResource(dg.ConfigurableResource):  # type: ignore[misc]  # an optional package
    """Runs trainings, with their logs, metrics and results in Dagster's event log.

    Attributes:
        backend: Name of the backend.
        attempts: Most runs for one step in all; see `TrainingClient.run`.
        observe_every: Least seconds between two observations of an asset's metrics.
    """

    backend: str = "local"
    attempts: int = 3
    observe_every: float = 30.0

    def run(self, context: Any, config: ConfigLike, *, run_id: str | None = None) -> TrainingRun:
        """Launch a run, follow it to its end and return it; stop it if the step is terminated.

        The log goes to `context.log`. In an asset, metrics are recorded as observations while the
        run trains, and the metadata of its materialization has the run and its last metrics; in an
        op, the metadata of its output. A step that is retried continues with the same run.

        Args:
            context: The context of an asset or op.
            run_id: Your own id, needed if a step trains more than once; default: made of the step
                and the Dagster run.

        Raises:
            dagster.Failure: The run has failed; a retry policy applies if a retry may help.
            TrainingBackendError: As by `TrainingClient.run`.
        """
        asset = _asset(context)
        observed = -self.observe_every

        def tell(record: LogRecord) -> None:
            nonlocal observed
            _log(context, record)
            values = _values(record)
            now = time.monotonic()
            if asset and values and now - observed >= self.observe_every:
                observed = now
                context.log_event(
                    dg.AssetObservation(asset, metadata={**values, "step": record.step or 0})
                )

        if run_id is None:
            step = context.get_step_execution_context().step.key
            run_id = run_id_from(f"{step} {context.run_id}")
        with TrainingClient() as client:
            try:
                found = client.run(
                    config,
                    backend=self.backend,
                    run_id=run_id,
                    attempts=self.attempts,
                    on_record=tell,
                )
            except RunFailed as error:
                raise dg.Failure(
                    error.message,
                    metadata=_metadata(error.run),
                    allow_retries=error.retryable,
                ) from error
        if asset:
            context.add_asset_metadata(_metadata(found), asset_key=asset)
        elif len(context.op_def.output_defs) == 1:
            context.add_output_metadata(_metadata(found))
        return found


def _asset(context: Any) -> Any:
    """Return the key of the only asset that a step makes; None in an op or a multi-asset."""
    keys = getattr(context, "selected_asset_keys", ()) if context.has_assets_def else ()
    return next(iter(keys)) if len(keys) == 1 else None


def _log(context: Any, record: LogRecord) -> None:
    context.log.log(record.level.upper(), record.message)


def _values(record: LogRecord) -> Mapping[str, float]:
    if record.source not in _MEASURED:
        return {}
    return {name: value for name, value in record.fields.items() if isinstance(value, float)}


def _metadata(run: TrainingRun | None) -> Mapping[str, Any]:
    if run is None:
        return {}
    found: dict[str, Any] = {**run.metrics, "run": run.id}
    if run.result_model:
        found["model"] = run.result_model
    if run.step is not None:
        found["steps"] = run.step
    return found
