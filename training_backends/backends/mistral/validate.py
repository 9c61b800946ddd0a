"""Validate configurations before anything is uploaded."""

from collections.abc import Iterator, Sequence

from training_backends.backends.mistral.api import MistralAPI
from training_backends.backends.mistral.job_request import (
    check_wandb_key,
    find_credential,
    read_options,
)
from training_backends.backends.mistral.settings import MistralOptions
from training_backends.core.backend import CredentialSource
from training_backends.core.config import TrainingConfig
from training_backends.core.errors import (
    BackendRetired,
    ConfigError,
    CredentialNotFound,
    Issue,
    TrainingBackendError,
    VaultLocked,
    suggest,
)
from training_backends.protocols.mistral.errors import retired
from training_backends.protocols.mistral.wire import FTModelCard, ModelCard

__all__ = ["check_config", "check_secrets", "check_server"]


def check_config(config: TrainingConfig) -> list[Issue]:
    """Return issues that need no server and that the capabilities cannot express."""
    issues = [*_config_issues(config)]
    try:
        read_options(config)
    except ConfigError as error:
        issues += error.issues
    return issues


def _config_issues(config: TrainingConfig) -> Iterator[Issue]:
    if config.method == "classifier":
        if config.hyperparameters.fim_ratio is not None:
            yield Issue(
                code="unsupported_field",
                message="the Mistral protocol has no `fim_ratio` for classifiers",
                field="hyperparameters.fim_ratio",
                fix="remove it",
            )
        if not config.classifier_targets:
            yield Issue(
                code="missing_field",
                message="a classifier needs at least one target",
                field="classifier_targets",
                fix="list each target with its name and labels",
            )


async def check_secrets(config: TrainingConfig, credentials: CredentialSource) -> list[Issue]:
    """Return issues with the credentials that the configuration names."""
    wanted = [
        (f"integrations.{index}.credential", entry.credential, True)
        for index, entry in enumerate(config.wandb)
    ]
    wanted += [
        (f"options.repositories.{index}.credential", entry.credential, False)
        for index, entry in enumerate(_options(config).repositories)
    ]
    issues: list[Issue] = []
    for field, reference, is_wandb in wanted:
        try:
            secret = await find_credential(credentials, reference)
            if is_wandb:
                check_wandb_key(secret)
        except ConfigError as error:
            issues += error.issues
        except (CredentialNotFound, VaultLocked) as error:
            provider, _, profile = reference.partition("/")
            command = f"training-backends credentials set {provider}"
            fix = f"run `{command}{f' --profile {profile}' if profile else ''}`"
            issues.append(Issue(code="no_credential", message=error.message, field=field, fix=fix))
    return issues


def _options(config: TrainingConfig) -> MistralOptions:
    try:
        return read_options(config)
    except ConfigError:
        return MistralOptions()  # reported by check_config


async def check_server(
    config: TrainingConfig, api: MistralAPI, *, hosted: bool = False
) -> list[Issue]:
    """Ask the server whether it supports fine-tuning and the model.

    A server that cannot be reached (no key, no network) is a warning; the launch would fail.

    Args:
        hosted: Whether it is the provider's own service, which is known to be retired.

    Raises:
        BackendRetired: The server has ended fine-tuning.
    """
    try:
        await api.probe()
        cards = (await api.list_models()).data
    except BackendRetired:
        raise
    except TrainingBackendError as error:
        if hosted:
            raise retired(f"not verified: {error.message}", "mistral") from error
        message = f"could not check with the server: {error.message}"
        return [Issue(code="server_not_asked", message=message, fix=error.hint, severity="warning")]
    return [*_model_issues(config, cards), *await _integration_issues(config, api)]


async def _integration_issues(config: TrainingConfig, api: MistralAPI) -> list[Issue]:
    """Return issues with integrations that the server would reject after the upload."""
    if not config.integrations:
        return []
    try:
        known = await api.integrations()
    except TrainingBackendError:
        return []  # only our gateway reports them
    return [
        Issue(
            code="unsupported_integration",
            message=f"the server does not support {entry.type}",
            field=f"integrations.{index}",
            fix="remove it",
        )
        for index, entry in enumerate(config.integrations)
        if known is not None and entry.type not in known
    ]


def _model_issues(config: TrainingConfig, cards: Sequence[ModelCard]) -> list[Issue]:
    names = {name for card in cards for name in (card.id, *card.aliases)}
    if not names or config.base_model in names:
        return []
    offered = sorted(card.id for card in cards if not isinstance(card, FTModelCard))
    return [
        Issue(
            code="unknown_model",
            message=f"the server has no model {config.base_model!r}",
            field="model",
            fix=suggest(config.base_model, names, f"available: {', '.join(offered[:12])}"),
        )
    ]
