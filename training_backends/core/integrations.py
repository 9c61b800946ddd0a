"""Where a run is reported while it trains: `TrainingConfig.integrations`."""

from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, Discriminator, Field, Tag, field_validator

__all__ = [
    "INTEGRATION_FIELDS",
    "Integration",
    "MLflowIntegration",
    "PluginIntegration",
    "TensorBoardIntegration",
    "WandbIntegration",
    "WebhookIntegration",
]

_LONGEST_NAME: Final = 30
"""Maximum characters of a provider's name; keys are longer."""
_SQLITE: Final = "sqlite:///"
CredentialName = Annotated[
    str, Field(description="Name of the key in the vault: PROVIDER or PROVIDER/PROFILE.")
]


class _Integration(BaseModel, frozen=True, extra="forbid"):
    @field_validator("credential", check_fields=False)
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        provider = (value or "").partition("/")[0]
        if not provider.isascii() or len(provider) > _LONGEST_NAME:
            # Probably a key, so the value is not repeated.
            raise ValueError("give the name of a stored key, such as wandb, not the key itself")
        return value

    def resolved(self, base: Path) -> Self:
        """Return the integration with paths made absolute, relative to `base`."""
        del base
        return self


class WandbIntegration(_Integration):
    """Report the run to Weights & Biases.

    The key is taken from the credential vault, unless the provider has its own (OpenAI).
    """

    type: Literal["wandb"] = "wandb"
    project: str
    name: str | None = None
    run_name: str | None = None
    entity: str | None = Field(default=None, description="Team or user that owns the project.")
    tags: tuple[str, ...] = Field(default=(), description="Tags of the run at W&B.")
    mode: Literal["online", "offline"] = Field(
        default="online", description="`offline` writes files for `wandb sync`."
    )
    credential: CredentialName = "wandb"


class MLflowIntegration(_Integration):
    """Report the run to an MLflow tracking server or database."""

    type: Literal["mlflow"]
    tracking_uri: str = Field(description="For example `https://mlflow.example.com`.")
    experiment: str = "Default"
    run_name: str | None = None
    credential: CredentialName | None = None

    @field_validator("tracking_uri")
    @classmethod
    def _has_no_password(cls, value: str) -> str:
        return _without_password(value)

    def resolved(self, base: Path) -> Self:
        """Make the path of a SQLite database absolute."""
        path = self.tracking_uri.removeprefix(_SQLITE)
        if path == self.tracking_uri or path.startswith("/"):
            return self
        return self.model_copy(update={"tracking_uri": f"{_SQLITE}{(base / path).absolute()}"})


class TensorBoardIntegration(_Integration):
    """Write the run's metrics as event files for TensorBoard."""

    type: Literal["tensorboard"]
    directory: Path | None = Field(
        default=None,
        description="Gets a subdirectory for the run; None: `tensorboard` in the run's directory.",
    )

    def resolved(self, base: Path) -> Self:
        """Make the directory absolute."""
        if self.directory is None:
            return self
        directory = (base / self.directory.expanduser()).absolute()
        return self.model_copy(update={"directory": directory})


class WebhookIntegration(_Integration):
    """Send changes of status, checkpoints and metrics to a URL as JSON."""

    type: Literal["webhook"]
    url: str = Field(pattern="^https?://")
    credential: CredentialName | None = Field(
        default=None, description="Name of the signing secret in the vault; None: not signed."
    )

    @field_validator("url")
    @classmethod
    def _has_no_password(cls, value: str) -> str:
        return _without_password(value)


class PluginIntegration(_Integration):
    """Report the run by a tracker of another package; see the entry-point group."""

    type: str = Field(pattern="^[a-z][a-z0-9_-]*$", max_length=64)
    options: dict[str, Any] = Field(
        default_factory=dict, description="Checked by the tracker of another package."
    )
    credential: CredentialName | None = None


def _without_password(url: str) -> str:
    """Return a URL that has no password."""
    if "@" in urlsplit(url).netloc:
        # The URL is stored with the run and shown, so the value is not repeated.
        raise ValueError("remove the user name and password, and name a stored key in `credential`")
    return url


_MODELS: Final[tuple[type[_Integration], ...]] = (
    WandbIntegration,
    MLflowIntegration,
    TensorBoardIntegration,
    WebhookIntegration,
    PluginIntegration,
)
_TYPES: Final = frozenset({"wandb", "mlflow", "tensorboard", "webhook"})
INTEGRATION_FIELDS: Final = frozenset(name for model in _MODELS for name in model.model_fields)
"""Fields of all integrations."""


def _kind(value: Any) -> str:
    kind = value.get("type", "wandb") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if kind in _TYPES else "plugin"


Integration = Annotated[
    Annotated[WandbIntegration, Tag("wandb")]
    | Annotated[MLflowIntegration, Tag("mlflow")]
    | Annotated[TensorBoardIntegration, Tag("tensorboard")]
    | Annotated[WebhookIntegration, Tag("webhook")]
    | Annotated[PluginIntegration, Tag("plugin")],
    Discriminator(_kind),
]
