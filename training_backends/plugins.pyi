# ruff: isort: skip_file
# Public names of the toolkit; `plugins.py` loads each on first use.

from .core.backend import (
    BackendContext as BackendContext,
    CredentialSource as CredentialSource,
    Health as Health,
    JSONValue as JSONValue,
    Journal as Journal,
    NoOptions as NoOptions,
    RemoteFilters as RemoteFilters,
    RemoteRun as RemoteRun,
    TrainingBackend as TrainingBackend,
)
from .core.backoff import Backoff as Backoff
from .core.capabilities import Capabilities as Capabilities, SuffixRule as SuffixRule
from .core.concurrency import run_all as run_all
from .core.config import (
    ChatTemplate as ChatTemplate,
    ClassifierTarget as ClassifierTarget,
    ConfigPath as ConfigPath,
    Data as Data,
    DataSource as DataSource,
    Hyperparameters as Hyperparameters,
    Result as Result,
    TrainingConfig as TrainingConfig,
    Tuning as Tuning,
    option_issues as option_issues,
)
from .core.data_rules import ProviderFormat as ProviderFormat
from .core.dataset import Counting as Counting, DataFile as DataFile, Dataset as Dataset
from .core.errors import (
    AmbiguousLaunch as AmbiguousLaunch,
    AuthenticationFailed as AuthenticationFailed,
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
    TrainingBackendError as TrainingBackendError,
    UnsupportedOperation as UnsupportedOperation,
    WaitTimeout as WaitTimeout,
    may_have_happened as may_have_happened,
)
from .core.estimate import (
    Budget as Budget,
    CostItem as CostItem,
    Estimate as Estimate,
    Money as Money,
    PriceSource as PriceSource,
)
from .core.integrations import WandbIntegration as WandbIntegration
from .core.logging import (
    get_logger as get_logger,
    redact as redact,
    register_secret as register_secret,
)
from .core.persist import (
    ensure as ensure,
    may_pass as may_pass,
    persist as persist,
    poll as poll,
    settle as settle,
)
from .core.run import (
    ChatMessage as ChatMessage,
    Checkpoint as Checkpoint,
    CleanText as CleanText,
    Failure as Failure,
    FailureKind as FailureKind,
    LogRecord as LogRecord,
    LogSource as LogSource,
    Observation as Observation,
    Prompt as Prompt,
    Reply as Reply,
    RunState as RunState,
    TrainingRun as TrainingRun,
    UtcDatetime as UtcDatetime,
    ValidationReport as ValidationReport,
    provider_name as provider_name,
    to_source as to_source,
    utc_now as utc_now,
)
from .core.settings import SectionSettings as SectionSettings, load_settings as load_settings
from .core.status import TrainingStatus as TrainingStatus
from .core.uploads import upload_once as upload_once
from .datasets.inspect import (
    inspect as inspect,
    inspect_files as inspect_files,
    raise_for_errors as raise_for_errors,
)
from .datasets.provider_formats import PROVIDER_FORMATS as PROVIDER_FORMATS
from .http.answer import Answer as Answer, Model as Model, ServerEvent as ServerEvent
from .http.auth import (
    KeyHeader as KeyHeader,
    KeySource as KeySource,
    Signer as Signer,
    UnsignedRequest as UnsignedRequest,
)
from .http.backend import ServerBackend as ServerBackend, server_health as server_health
from .http.client import HttpClient as HttpClient
from .http.error_table import (
    ErrorDecoder as ErrorDecoder,
    ErrorKind as ErrorKind,
    ErrorTable as ErrorTable,
)
from .http.exchange import Query as Query
from .http.paging import (
    NextPage as NextPage,
    Page as Page,
    after_last as after_last,
    first_match as first_match,
    next_cursor as next_cursor,
    next_link as next_link,
    next_number as next_number,
    paged as paged,
)
from .http.policy import HttpPolicy as HttpPolicy
from .http.settings import ServerSettings as ServerSettings
from .http.upload import (
    FileBody as FileBody,
    FileUpload as FileUpload,
    HashedFile as HashedFile,
    Progress as Progress,
    hash_file as hash_file,
    hash_parts as hash_parts,
)
from .http.urls import (
    is_loopback as is_loopback,
    normalize_base_url as normalize_base_url,
    path_segment as path_segment,
    require_private_transport as require_private_transport,
)
from .tokens import (
    TokenCount as TokenCount,
    count_tokens as count_tokens,
    row_counter as row_counter,
    tokenizer_of as tokenizer_of,
)
