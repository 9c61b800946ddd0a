"""Fine-tuning that outlives the provider: one interface, any backend.

Names are loaded on first use, so that importing the package costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training_backends.client.client import AsyncTrainingClient
    from training_backends.client.sync import TrainingClient
    from training_backends.client.watch import Watcher
    from training_backends.core.backend import (
        BackendContext,
        CredentialSource,
        Health,
        Journal,
        RemoteFilters,
        RemoteRun,
        TrainingBackend,
    )
    from training_backends.core.capabilities import Capabilities
    from training_backends.core.config import (
        ClassifierTarget,
        Data,
        DataSource,
        Hyperparameters,
        TrainingConfig,
        Tuning,
        WandbIntegration,
    )
    from training_backends.core.dataset import DataFile, Dataset
    from training_backends.core.errors import (
        AmbiguousLaunch,
        AuthenticationFailed,
        BackendBroken,
        BackendNotInstalled,
        BackendRetired,
        BackendUnavailable,
        BudgetExceeded,
        ConfigError,
        CredentialNotFound,
        DatasetError,
        DuplicateRun,
        Issue,
        PayloadTooLarge,
        PermissionDenied,
        ProtocolError,
        RateLimited,
        RunNotFound,
        StoreError,
        TrainingBackendError,
        UnsupportedOperation,
        VaultLocked,
        WaitTimeout,
    )
    from training_backends.core.estimate import Budget, CostItem, Estimate, Money, PriceSource
    from training_backends.core.plugins import installed_backends
    from training_backends.core.registry import backend_class
    from training_backends.core.run import (
        Checkpoint,
        Failure,
        LogRecord,
        Observation,
        Place,
        Reply,
        RunState,
        Staleness,
        TrainingRun,
        ValidationReport,
    )
    from training_backends.core.status import TrainingStatus
    from training_backends.credentials.vault import CredentialVault

_HOMES = {
    "client.client": ("AsyncTrainingClient",),
    "client.sync": ("TrainingClient",),
    "client.watch": ("Watcher",),
    "core.backend": (
        "BackendContext",
        "CredentialSource",
        "Health",
        "Journal",
        "RemoteFilters",
        "RemoteRun",
        "TrainingBackend",
    ),
    "core.capabilities": ("Capabilities",),
    "core.config": (
        "ClassifierTarget",
        "Data",
        "DataSource",
        "Hyperparameters",
        "TrainingConfig",
        "Tuning",
        "WandbIntegration",
    ),
    "core.dataset": ("DataFile", "Dataset"),
    "core.errors": (
        "AmbiguousLaunch",
        "AuthenticationFailed",
        "BackendBroken",
        "BackendNotInstalled",
        "BackendRetired",
        "BackendUnavailable",
        "BudgetExceeded",
        "ConfigError",
        "CredentialNotFound",
        "DatasetError",
        "DuplicateRun",
        "Issue",
        "PayloadTooLarge",
        "PermissionDenied",
        "ProtocolError",
        "RateLimited",
        "RunNotFound",
        "StoreError",
        "TrainingBackendError",
        "UnsupportedOperation",
        "VaultLocked",
        "WaitTimeout",
    ),
    "core.estimate": ("Budget", "CostItem", "Estimate", "Money", "PriceSource"),
    "core.plugins": ("installed_backends",),
    "core.registry": ("backend_class",),
    "core.run": (
        "Checkpoint",
        "Failure",
        "LogRecord",
        "Observation",
        "Place",
        "Reply",
        "RunState",
        "Staleness",
        "TrainingRun",
        "ValidationReport",
    ),
    "core.status": ("TrainingStatus",),
    "credentials.vault": ("CredentialVault",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__version__ = "0.1.0"

__all__ = [
    "AmbiguousLaunch",
    "AsyncTrainingClient",
    "AuthenticationFailed",
    "BackendBroken",
    "BackendContext",
    "BackendNotInstalled",
    "BackendRetired",
    "BackendUnavailable",
    "Budget",
    "BudgetExceeded",
    "Capabilities",
    "Checkpoint",
    "ClassifierTarget",
    "ConfigError",
    "CostItem",
    "CredentialNotFound",
    "CredentialSource",
    "CredentialVault",
    "Data",
    "DataFile",
    "DataSource",
    "Dataset",
    "DatasetError",
    "DuplicateRun",
    "Estimate",
    "Failure",
    "Health",
    "Hyperparameters",
    "Issue",
    "Journal",
    "LogRecord",
    "Money",
    "Observation",
    "PayloadTooLarge",
    "PermissionDenied",
    "Place",
    "PriceSource",
    "ProtocolError",
    "RateLimited",
    "RemoteFilters",
    "RemoteRun",
    "Reply",
    "RunNotFound",
    "RunState",
    "Staleness",
    "StoreError",
    "TrainingBackend",
    "TrainingBackendError",
    "TrainingClient",
    "TrainingConfig",
    "TrainingRun",
    "TrainingStatus",
    "Tuning",
    "UnsupportedOperation",
    "ValidationReport",
    "VaultLocked",
    "WaitTimeout",
    "WandbIntegration",
    "Watcher",
    "__version__",
    "backend_class",
    "installed_backends",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module the first time that it is asked for."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List public names, loaded or not."""
    return sorted(__all__)
