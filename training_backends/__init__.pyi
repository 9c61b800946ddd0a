# ruff: isort: skip_file
# Public names of the package; `__init__.py` loads each on first use.

from .client.client import AsyncTrainingClient as AsyncTrainingClient
from .client.config_file import ConfigFile as ConfigFile, load_config as load_config
from .client.evaluation import EvaluatedRow as EvaluatedRow, Evaluation as Evaluation
from .client.recovery import Recovery as Recovery
from .client.sync import TrainingClient as TrainingClient
from .client.watch import Watcher as Watcher
from .core.backend import (
    BackendContext as BackendContext,
    CredentialSource as CredentialSource,
    Health as Health,
    Journal as Journal,
    RemoteFilters as RemoteFilters,
    RemoteRun as RemoteRun,
    TrainingBackend as TrainingBackend,
)
from .core.capabilities import (
    Capabilities as Capabilities,
)
from .core.capabilities import (
    SuffixRule as SuffixRule,
)
from .core.config import (
    ChatTemplate as ChatTemplate,
    ClassifierTarget as ClassifierTarget,
    Data as Data,
    DataSource as DataSource,
    Hyperparameters as Hyperparameters,
    Result as Result,
    TrainingConfig as TrainingConfig,
    Tuning as Tuning,
)
from .core.integrations import (
    MLflowIntegration as MLflowIntegration,
    PluginIntegration as PluginIntegration,
    TensorBoardIntegration as TensorBoardIntegration,
    WandbIntegration as WandbIntegration,
    WebhookIntegration as WebhookIntegration,
)
from .core.dataset import DataFile as DataFile, Dataset as Dataset
from .core.errors import (
    AmbiguousLaunch as AmbiguousLaunch,
    AuthenticationFailed as AuthenticationFailed,
    BackendBroken as BackendBroken,
    BackendNotInstalled as BackendNotInstalled,
    BackendRetired as BackendRetired,
    BackendUnavailable as BackendUnavailable,
    BudgetExceeded as BudgetExceeded,
    ConfigError as ConfigError,
    CredentialNotFound as CredentialNotFound,
    DatasetError as DatasetError,
    DuplicateRun as DuplicateRun,
    Issue as Issue,
    PayloadTooLarge as PayloadTooLarge,
    PermissionDenied as PermissionDenied,
    ProtocolError as ProtocolError,
    RateLimited as RateLimited,
    RunNotFound as RunNotFound,
    StoreError as StoreError,
    TrainingBackendError as TrainingBackendError,
    UnsupportedOperation as UnsupportedOperation,
    VaultLocked as VaultLocked,
    WaitTimeout as WaitTimeout,
)
from .core.estimate import (
    Budget as Budget,
    CostItem as CostItem,
    Estimate as Estimate,
    Money as Money,
    PriceSource as PriceSource,
)
from .core.logging import configure_logs as configure_logs
from .core.plugins import installed_backends as installed_backends
from .core.registry import backend_class as backend_class
from .core.run import (
    ChatMessage as ChatMessage,
    Checkpoint as Checkpoint,
    Failure as Failure,
    LogRecord as LogRecord,
    Observation as Observation,
    Place as Place,
    Prompt as Prompt,
    Reply as Reply,
    RunFailed as RunFailed,
    RunState as RunState,
    Staleness as Staleness,
    TrainingRun as TrainingRun,
    ValidationReport as ValidationReport,
    run_id_from as run_id_from,
)
from .core.status import TrainingStatus as TrainingStatus
from .credentials.vault import CredentialVault as CredentialVault
from .store import MetricPoint as MetricPoint, Metrics as Metrics

__version__: str
