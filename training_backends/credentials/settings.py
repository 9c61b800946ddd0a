"""Which keyring is used, and where the encrypted file gets its password from."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from training_backends.core.settings import SectionSettings

__all__ = ["CredentialSettings"]


class CredentialSettings(SectionSettings):
    """Section `credentials`; no setting holds a password, only where it is read."""

    section: ClassVar[str | None] = "credentials"

    keyring: Literal["system", "file"] = Field(
        default="system", description="The system's keyring, or an encrypted file in home."
    )
    password_file: Path | None = Field(
        default=None, description="Its first line opens the encrypted file; for its owner only."
    )
    password_fd: int | None = Field(
        default=None, ge=3, description="An open descriptor whose first line opens the file."
    )
