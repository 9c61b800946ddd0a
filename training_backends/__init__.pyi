# Public names of the package; `__init__.py` loads each on first use.

from .client.client import AsyncTrainingClient as AsyncTrainingClient
from .client.config_file import ConfigFile as ConfigFile
from .client.config_file import load_config as load_config
from .client.recovery import Recovery as Recovery
from .client.sync import TrainingClient as TrainingClient
from .client.watch import Watcher as Watcher
from .core.backend import (
    BackendContext as BackendContext,
)
from .core.backend import (
    CredentialSource as CredentialSource,
)
from .core.backend import (
    Health as Health,
)
from .core.backend import (
    Journal as Journal,
)
from .core.backend import (
    RemoteFilters as RemoteFilters,
)
from .core.backend import (
    RemoteRun as RemoteRun,
)
from .core.backend import (
    TrainingBackend as TrainingBackend,
)
from .core.capabilities import (
    Capabilities as Capabilities,
)
from .core.capabilities import (
    SuffixRule as SuffixRule,
)
from .core.config import (
    ClassifierTarget as ClassifierTarget,
)
from .core.config import (
    Data as Data,
)
from .core.config import (
    DataSource as DataSource,
)
from .core.config import (
    Hyperparameters as Hyperparameters,
)
from .core.config import (
    TrainingConfig as TrainingConfig,
)
from .core.config import (
    Tuning as Tuning,
)
from .core.config import (
    WandbIntegration as WandbIntegration,
)
from .core.dataset import DataFile as DataFile
from .core.dataset import Dataset as Dataset
from .core.errors import (
    AmbiguousLaunch as AmbiguousLaunch,
)
from .core.errors import (
    AuthenticationFailed as AuthenticationFailed,
)
from .core.errors import (
    BackendBroken as BackendBroken,
)
from .core.errors import (
    BackendNotInstalled as BackendNotInstalled,
)
from .core.errors import (
    BackendRetired as BackendRetired,
)
from .core.errors import (
    BackendUnavailable as BackendUnavailable,
)
from .core.errors import (
    BudgetExceeded as BudgetExceeded,
)
from .core.errors import (
    ConfigError as ConfigError,
)
from .core.errors import (
    CredentialNotFound as CredentialNotFound,
)
from .core.errors import (
    DatasetError as DatasetError,
)
from .core.errors import (
    DuplicateRun as DuplicateRun,
)
from .core.errors import (
    Issue as Issue,
)
from .core.errors import (
    PayloadTooLarge as PayloadTooLarge,
)
from .core.errors import (
    PermissionDenied as PermissionDenied,
)
from .core.errors import (
    ProtocolError as ProtocolError,
)
from .core.errors import (
    RateLimited as RateLimited,
)
from .core.errors import (
    RunNotFound as RunNotFound,
)
from .core.errors import (
    StoreError as StoreError,
)
from .core.errors import (
    TrainingBackendError as TrainingBackendError,
)
from .core.errors import (
    UnsupportedOperation as UnsupportedOperation,
)
from .core.errors import (
    VaultLocked as VaultLocked,
)
from .core.errors import (
    WaitTimeout as WaitTimeout,
)
from .core.estimate import (
    Budget as Budget,
)
from .core.estimate import (
    CostItem as CostItem,
)
from .core.estimate import (
    Estimate as Estimate,
)
from .core.estimate import (
    Money as Money,
)
from .core.estimate import (
    PriceSource as PriceSource,
)
from .core.logging import configure_logs as configure_logs
from .core.plugins import installed_backends as installed_backends
from .core.registry import backend_class as backend_class
from .core.run import (
    Checkpoint as Checkpoint,
)
from .core.run import (
    Failure as Failure,
)
from .core.run import (
    LogRecord as LogRecord,
)
from .core.run import (
    Observation as Observation,
)
from .core.run import (
    Place as Place,
)
from .core.run import (
    Reply as Reply,
)
from .core.run import (
    RunState as RunState,
)
from .core.run import (
    Staleness as Staleness,
)
from .core.run import (
    TrainingRun as TrainingRun,
)
from .core.run import (
    ValidationReport as ValidationReport,
)
from .core.status import TrainingStatus as TrainingStatus
from .credentials.vault import CredentialVault as CredentialVault
from .store import MetricPoint as MetricPoint

__version__: str
