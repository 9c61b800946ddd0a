# Public names of the toolkit; `plugins.py` loads each on first use.

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
    JSONValue as JSONValue,
)
from .core.backend import (
    NoOptions as NoOptions,
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
from .core.backoff import (
    Backoff as Backoff,
)
from .core.capabilities import (
    Capabilities as Capabilities,
)
from .core.concurrency import (
    run_all as run_all,
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
from .core.config import (
    option_issues as option_issues,
)
from .core.data_rules import (
    ProviderFormat as ProviderFormat,
)
from .core.dataset import (
    DataFile as DataFile,
)
from .core.dataset import (
    Dataset as Dataset,
)
from .core.errors import (
    AmbiguousLaunch as AmbiguousLaunch,
)
from .core.errors import (
    AuthenticationFailed as AuthenticationFailed,
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
    TrainingBackendError as TrainingBackendError,
)
from .core.errors import (
    UnsupportedOperation as UnsupportedOperation,
)
from .core.errors import (
    WaitTimeout as WaitTimeout,
)
from .core.errors import (
    may_have_happened as may_have_happened,
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
from .core.logging import (
    get_logger as get_logger,
)
from .core.logging import (
    redact as redact,
)
from .core.logging import (
    register_secret as register_secret,
)
from .core.persist import (
    may_pass as may_pass,
)
from .core.persist import (
    persist as persist,
)
from .core.persist import (
    poll as poll,
)
from .core.run import (
    Checkpoint as Checkpoint,
)
from .core.run import (
    CleanText as CleanText,
)
from .core.run import (
    Failure as Failure,
)
from .core.run import (
    FailureKind as FailureKind,
)
from .core.run import (
    LogRecord as LogRecord,
)
from .core.run import (
    Observation as Observation,
)
from .core.run import (
    Reply as Reply,
)
from .core.run import (
    RunState as RunState,
)
from .core.run import (
    TrainingRun as TrainingRun,
)
from .core.run import (
    UtcDatetime as UtcDatetime,
)
from .core.run import (
    ValidationReport as ValidationReport,
)
from .core.run import (
    utc_now as utc_now,
)
from .core.settings import (
    SectionSettings as SectionSettings,
)
from .core.settings import (
    load_settings as load_settings,
)
from .core.status import (
    TrainingStatus as TrainingStatus,
)
from .core.uploads import (
    upload_once as upload_once,
)
from .datasets.inspect import (
    inspect as inspect,
)
from .datasets.inspect import (
    raise_for_errors as raise_for_errors,
)
from .datasets.provider_formats import (
    PROVIDER_FORMATS as PROVIDER_FORMATS,
)
from .http.answer import (
    Answer as Answer,
)
from .http.answer import (
    ServerEvent as ServerEvent,
)
from .http.auth import (
    KeyHeader as KeyHeader,
)
from .http.auth import (
    KeySource as KeySource,
)
from .http.auth import (
    Signer as Signer,
)
from .http.auth import (
    UnsignedRequest as UnsignedRequest,
)
from .http.client import (
    HttpClient as HttpClient,
)
from .http.error_table import (
    ErrorDecoder as ErrorDecoder,
)
from .http.error_table import (
    ErrorKind as ErrorKind,
)
from .http.error_table import (
    ErrorTable as ErrorTable,
)
from .http.exchange import (
    Query as Query,
)
from .http.paging import (
    NextPage as NextPage,
)
from .http.paging import (
    Page as Page,
)
from .http.paging import (
    after_last as after_last,
)
from .http.paging import (
    next_cursor as next_cursor,
)
from .http.paging import (
    next_link as next_link,
)
from .http.paging import (
    next_number as next_number,
)
from .http.paging import (
    paged as paged,
)
from .http.policy import (
    HttpPolicy as HttpPolicy,
)
from .http.upload import (
    FileBody as FileBody,
)
from .http.upload import (
    FileUpload as FileUpload,
)
from .http.upload import (
    HashedFile as HashedFile,
)
from .http.upload import (
    Progress as Progress,
)
from .http.upload import (
    hash_file as hash_file,
)
from .http.urls import (
    is_loopback as is_loopback,
)
from .http.urls import (
    normalize_base_url as normalize_base_url,
)
from .http.urls import (
    path_segment as path_segment,
)
from .http.urls import (
    require_private_transport as require_private_transport,
)
from .tokens import (
    TokenCount as TokenCount,
)
from .tokens import (
    count_tokens as count_tokens,
)
from .tokens import (
    row_counter as row_counter,
)
from .tokens import (
    tokenizer_of as tokenizer_of,
)
