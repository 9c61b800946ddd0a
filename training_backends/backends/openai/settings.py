"""Settings and options of the OpenAI backend."""

from collections.abc import Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import ClassVar, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    field_validator,
    model_validator,
)

from training_backends.core.errors import ConfigError
from training_backends.core.estimate import Money
from training_backends.http.auth import KeyHeader
from training_backends.http.settings import ServerSettings
from training_backends.http.urls import normalize_base_url
from training_backends.protocols.openai.wire import (
    MAX_FILE_BYTES,
    MAX_PART_BYTES,
    MAX_UPLOAD_BYTES,
)

__all__ = ["CLOCK_SLACK", "HOSTED_URL", "OpenAIOptions", "OpenAISettings", "Variant"]

HOSTED_URL: Final = "https://api.openai.com/v1"
CLOCK_SLACK: Final = timedelta(days=1)
"""Tolerated difference between the local and the server's clock when listing jobs by time."""

Variant = Literal["openai", "azure", "nebius"]
"""Variant of the protocol that a server speaks."""

_HOSTS: Mapping[str, Variant] = MappingProxyType(
    {
        ".openai.azure.com": "azure",
        ".services.ai.azure.com": "azure",
        ".cognitiveservices.azure.com": "azure",
        ".nebius.com": "nebius",
        ".nebius.ai": "nebius",
    }
)
"""Variants by the end of the host's name (documentation of 2025-12 and 2026)."""


_LARGEST: Mapping[Variant, int] = MappingProxyType(
    {"openai": MAX_UPLOAD_BYTES, "azure": 9 * 10**9, "nebius": 5 * 10**9}
)
"""Largest file in bytes (Azure: specification 2024-10-21; Nebius: reference 20260506)."""
_LARGEST_REQUEST: Mapping[Variant, int] = MappingProxyType(
    {"openai": MAX_FILE_BYTES, "azure": MAX_FILE_BYTES, "nebius": _LARGEST["nebius"]}
)
"""Largest file in one request, in bytes; Nebius documents no uploads in parts."""


class OpenAIOptions(BaseModel):
    """`options` of a configuration for the OpenAI protocol."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate_multiplier: float | None = Field(
        default=None, gt=0, description="Relative to the provider's own rate; not at Nebius."
    )
    beta: float | None = Field(
        default=None, gt=0, le=2, description="KL penalty towards the reference model (dpo)."
    )
    training_type: str | None = Field(
        default=None, description="Azure: Standard, GlobalStandard or a Developer type."
    )


class OpenAISettings(ServerSettings):
    """Section `openai`: `TRAINING_BACKENDS_OPENAI__BASE_URL` and so on. Times in seconds."""

    section: ClassVar[str | None] = "openai"

    base_url: str = Field(default=HOSTED_URL, description="Base URL; without a path, /v1 is added.")
    variant: Variant | None = Field(
        default=None, description="Variant of the protocol; default: known from the host's name."
    )
    key_header: Literal["bearer", "api-key"] | None = Field(
        default=None, description="Header of the API key; default: api-key at Azure, else bearer."
    )
    query: dict[str, str] = Field(
        default_factory=dict,
        description="Query parameters of every request, such as Azure's api-version.",
    )
    keeps_metadata: bool | None = Field(
        default=None,
        description="Whether the server stores a job's metadata; default: not at Azure and Nebius.",
    )
    prices: dict[str, Money] = Field(
        default_factory=dict, description="Price of 1 M trained tokens by model, as `3 USD`."
    )
    max_file_bytes: PositiveInt | None = Field(
        default=None,
        description="Maximum file size of the server; default: 8 GB, Azure 9 GB, Nebius 5 GB.",
    )
    max_request_bytes: PositiveInt | None = Field(
        default=None,
        description="Larger files are uploaded in parts; default: 512 MB, Nebius never.",
    )
    part_bytes: PositiveInt = Field(default=MAX_PART_BYTES, description="Size of a part.")

    @field_validator("base_url")
    @classmethod
    def _normalized(cls, value: str) -> str:
        try:
            return normalize_base_url(value)
        except ConfigError as error:
            raise ValueError(error.message) from None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        """Choose variant and limits from the host, and add the path that people often omit."""
        parts = urlsplit(self.base_url)
        host = parts.hostname or ""
        known = [variant for end, variant in _HOSTS.items() if host.endswith(end)]
        variant: Variant = self.variant or (known[0] if known else "openai")
        values: dict[str, object] = {
            "variant": variant,
            "max_file_bytes": self.max_file_bytes or _LARGEST[variant],
            "max_request_bytes": self.max_request_bytes or _LARGEST_REQUEST[variant],
        }
        if not parts.path:
            path = "/v1"
            if variant == "azure":
                version = self.query.get("api-version", "v1")
                path = "/openai/v1" if version in {"v1", "preview"} else "/openai"
            values["base_url"] = self.base_url + path
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the model is frozen
        return self

    @property
    def header(self) -> KeyHeader:
        """The header that carries the key."""
        chosen = self.key_header or ("api-key" if self.variant == "azure" else "bearer")
        return KeyHeader.named("api-key") if chosen == "api-key" else KeyHeader()

    @property
    def sends_metadata(self) -> bool:
        """Whether a job can carry the id of its run."""
        # Neither documents it; Azure's specification of 2024-10-21 has no such field.
        known = self.keeps_metadata
        return self.variant == "openai" if known is None else known and self.variant != "nebius"

    def cost(self, model: str, tokens: int | None) -> Money | None:
        """Return the price of trained tokens; None if either is unknown."""
        price = self.prices.get(model)
        if price is None or tokens is None:
            return None
        return Money(amount=price.amount * tokens / 10**6, currency=price.currency)

    @property
    def is_hosted(self) -> bool:
        """Whether the server is OpenAI's own."""
        return self.base_url == HOSTED_URL
