"""Creating, comparing and updating the records of runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from pydantic import ValidationError

from training_backends.core.backend import TrainingBackend
from training_backends.core.capabilities import config_issues
from training_backends.core.config import DataSource, TrainingConfig, option_issues
from training_backends.core.errors import (
    AuthenticationFailed,
    BackendBroken,
    ConfigError,
    CredentialNotFound,
    DatasetError,
    DuplicateRun,
    Issue,
    PayloadTooLarge,
    PermissionDenied,
    TrainingBackendError,
)
from training_backends.core.logging import bound
from training_backends.core.run import Failure, FailureKind, RunState, TrainingRun, utc_now
from training_backends.core.status import TrainingStatus
from training_backends.core.tracing import span

__all__ = [
    "LAUNCHED",
    "about",
    "ended_state",
    "failure_kind",
    "identity",
    "launch_lease",
    "new_run_record",
    "require_same",
    "unfit_fields",
    "with_known_data",
    "with_state",
]

LAUNCHED: Final = "launched"
"""Journal step that is finished once the provider has accepted the launch."""


def launch_lease(run_id: str) -> str:
    """Return the name of the lease held while a run is launched."""
    return f"launch:{run_id}"


def identity(run: TrainingRun) -> dict[str, Any]:
    """Return what identifies a run in logs and spans."""
    return {"run_id": run.id, "backend": run.backend, "remote_id": run.remote_id}


@contextmanager
def about(verb: str, run: TrainingRun) -> Iterator[None]:
    """Bind the run to all log lines inside, and record an OpenTelemetry span."""
    with (
        bound(**identity(run)),
        span(f"training_backends.{verb}", **identity(run)),
    ):
        yield


def new_run_record(run_id: str, backend: str, config: TrainingConfig) -> TrainingRun:
    """Create the record of a run that has not been launched.

    Raises:
        ConfigError: The id is invalid.
    """
    try:
        run = TrainingRun(id=run_id, backend=backend, config=config, created_at=utc_now())
        # The round trip through JSON makes it equal to what the store returns.
        return TrainingRun.model_validate_json(run.model_dump_json())
    except ValidationError:
        raise ConfigError(
            f"Invalid run id {run_id!r}.",
            hint="Use up to 128 letters, digits, dots, dashes and underscores.",
        ) from None


def with_known_data(known: TrainingRun, asked: TrainingRun) -> tuple[TrainingRun, list[str]]:
    """Return a repeated launch with the content that remote data had at the first.

    Returns:
        The run, and the URLs of data that has changed since.
    """
    changed: list[str] = []
    parts: dict[str, tuple[DataSource, ...]] = {}
    for part in ("train", "validation"):
        first: tuple[DataSource, ...] = getattr(known.config.data, part)
        digests = {source.uri: source.sha256 for source in first if source.uri}
        sources: list[DataSource] = []
        for source in getattr(asked.config.data, part):
            digest = digests.get(source.uri, source.sha256)
            if digest != source.sha256:
                changed.append(str(source))
            sources.append(source.model_copy(update={"sha256": digest}) if digest else source)
        parts[part] = tuple(sources)
    data = asked.config.data.model_copy(update=parts)
    config = asked.config.model_copy(update={"data": data})
    return asked.model_copy(update={"config": config}), changed


def require_same(known: TrainingRun, asked: TrainingRun) -> None:
    """Require that a repeated launch has the configuration of the existing run.

    Raises:
        DuplicateRun: It differs; the message names the fields.
    """
    fields = {"backend", "config", "resumed_from"}
    one, other = (run.model_dump(mode="json", include=fields) for run in (known, asked))
    differing = [field.removeprefix("config.") for field in _differing(one, other)]
    if differing:
        raise DuplicateRun(
            f"Run {known.id!r} already exists with different values for: {', '.join(differing)}.",
            hint="Choose another --id, or launch with the original configuration.",
            other=known.id,
            run_id=known.id,
        )


def _differing(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Yield the dotted paths of the values that differ between two JSON documents."""
    inside = f"{place}." if place else ""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys((*one, *other)):
            yield from _differing(one.get(key), other.get(key), f"{inside}{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            yield from _differing(mine, theirs, f"{inside}{number}")
    elif one != other:
        yield place


def with_state(run: TrainingRun, state: RunState) -> TrainingRun:
    """Return a run updated with a provider's state; a quote keeps our earlier estimate."""
    changed = run.updated(state)
    if changed.estimate is None or changed.estimate is run.estimate:
        return changed
    return changed.model_copy(update={"estimate": changed.estimate.replacing(run.estimate)})


def ended_state(status: TrainingStatus, failure: Failure | None = None) -> RunState:
    """Return the state of a run that finishes now."""
    return RunState(status=status, failure=failure, finished_at=utc_now())


def failure_kind(error: TrainingBackendError) -> FailureKind:
    """Return the failure kind of an error that prevented a launch."""
    match error:
        case AuthenticationFailed() | CredentialNotFound() | PermissionDenied():
            return "auth"
        case ConfigError() | DatasetError() | PayloadTooLarge():
            return "validation"
        case BackendBroken():
            return "internal"
        case _:
            return "provider"


def unfit_fields(backend: TrainingBackend, config: TrainingConfig) -> list[Issue]:
    """Return the options that are invalid and the fields that the backend does not support."""
    issues = [*config_issues(config, backend.capabilities, backend.name)]
    issues += option_issues(backend.options_model, config.options)
    return issues
