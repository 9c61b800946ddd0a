"""Settings of object stores."""

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from pydantic import Field, field_validator

from training_backends.core.redaction import register_secret
from training_backends.core.settings import SectionSettings

__all__ = ["ObjectSettings", "StoreOptions", "hide_secrets"]

StoreOptions = Mapping[str, Any]
"""Arguments of a file system of fsspec."""
_SECRETS: Final = ("secret", "token", "password", "key", "sas", "connection_string", "credential")


def hide_secrets(options: StoreOptions) -> None:
    """Register the secrets among options, so that no message or log shows them."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            hide_secrets(value)
        elif isinstance(value, str) and any(part in name.lower() for part in _SECRETS):
            register_secret(value)


class ObjectSettings(SectionSettings):
    """Section `objects`: how objects such as `s3://bucket/train.jsonl` are read and written."""

    section: ClassVar[str | None] = "objects"

    options: dict[str, dict[str, Any]] = Field(
        default={},
        description="Options of each kind of store, by scheme (`s3`, `gs`, `az`, `hf`), for "
        "example `endpoint_url` of an S3-compatible server.",
    )
    max_object_bytes: int = Field(
        default=200 * 10**9, ge=1, description="Maximum size of a data file that is fetched."
    )
    cache_bytes: int = Field(
        default=500 * 10**9,
        ge=0,
        description="Size up to which fetched data is kept; the least recently used is removed, "
        "except what a run in progress reads.",
    )

    @field_validator("options")
    @classmethod
    def _hidden(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        hide_secrets(value)
        return value
