"""Settings of the gateway."""

import hashlib
import re
from pathlib import Path
from typing import ClassVar

from pydantic import AnyHttpUrl, Field, SecretStr

from training_backends.core.settings import SectionSettings
from training_backends.mistral.wire import MAX_FILE_BYTES

__all__ = ["GatewaySettings"]


class GatewaySettings(SectionSettings):
    """Where the gateway listens, what it accepts and what it calls itself."""

    section: ClassVar[str | None] = "gateway"

    api_key: SecretStr | None = Field(
        default=None, description="One static key, beside those of `keys create`."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8321, ge=0, le=65535, description="0: any free port.")
    public_url: AnyHttpUrl | None = Field(
        default=None,
        description="How clients reach the gateway, for signed URLs; default: the address asked.",
    )
    max_upload_bytes: int = Field(default=MAX_FILE_BYTES, ge=1, description="Largest file.")
    organization: str = Field(
        default="local", min_length=1, description="Stands, as 8 hex digits, in model names."
    )
    catalogue: Path | None = Field(
        default=None, description="TOML file with models to offer beside the built-in ones."
    )
    default_epochs: float = Field(
        default=3.0,
        gt=0,
        description="Taken when a job gives neither epochs nor training_steps.",
    )

    @property
    def organization_id(self) -> str:
        """The organization as the 8 hex digits of a model name."""
        if re.fullmatch("[0-9a-f]{8}", self.organization):
            return self.organization
        return hashlib.sha256(self.organization.encode()).hexdigest()[:8]
