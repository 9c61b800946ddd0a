"""Options and settings of the Ray backend."""

from pathlib import Path
from typing import Any, ClassVar, Final, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from training_backends.backends.local.settings import TrainingOptions
from training_backends.core.errors import ConfigError
from training_backends.http.settings import ServerSettings
from training_backends.http.urls import normalize_base_url
from training_backends.objects.store import scheme_of

__all__ = ["RayOptions", "RaySettings"]


_STORES: Final = ("s3", "gs", "az")


class RayOptions(TrainingOptions, frozen=True):
    """How to train on the cluster; `resources` chooses the workers."""

    max_failures: int = Field(
        default=3,
        ge=0,
        le=1000,
        description="Restarts from the newest checkpoint after a worker or its node was lost.",
    )


class RaySettings(ServerSettings):
    """Section `ray`: `TRAINING_BACKENDS_RAY__BASE_URL` and so on. Times in seconds."""

    section: ClassVar[str | None] = "ray"

    base_url: str = Field(
        default="http://127.0.0.1:8265", description="URL of the cluster's dashboard."
    )
    storage: str | None = Field(
        default=None,
        description="Directory that this machine and all nodes share under the same path, or URL "
        "in an object store, such as `s3://bucket/training`; default: "
        "TRAINING_BACKENDS_HOME/ray, for a cluster on this machine.",
    )
    scratch: Path | None = Field(
        default=None,
        description="With an object store: directory of each node for runs in progress; default: "
        "in its directory for temporary files.",
    )
    package: Literal["send", "installed"] = Field(
        default="send",
        description="Send this package to the cluster, or use the version installed there.",
    )
    python: str = Field(default="python", description="Python program of the nodes.")
    autoscaling: bool = Field(
        default=False,
        description="Whether the cluster adds nodes, so that a run may exceed its present size.",
    )

    @field_validator("base_url")
    @classmethod
    def _normalized(cls, value: str) -> str:
        try:
            return normalize_base_url(value)
        except ConfigError as error:
            raise ValueError(error.message) from None

    @field_validator("storage", mode="before")
    @classmethod
    def _located(cls, value: Any) -> Any:
        if value is None:
            return None
        text = str(value).removeprefix("file://")
        if "://" not in text:
            if not Path(text).is_absolute():
                raise ValueError("must be an absolute path or a URL such as s3://bucket/training")
            return text
        if scheme_of(text) not in _STORES:
            known = ", ".join(f"{scheme}://" for scheme in _STORES)
            raise ValueError(f"unknown scheme {text.partition(':')[0]!r}; use a path or {known}")
        if not urlsplit(text).netloc:
            raise ValueError("the name of the bucket is missing")
        # Microsoft's own form has the account there: abfs://container@account.
        if "?" in text or ("@" in text and not text.startswith("abfs")):
            raise ValueError("the URL must not contain credentials or a query")
        return text.rstrip("/")

    @field_validator("scratch")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_absolute():
            raise ValueError("must be an absolute path")
        return value
