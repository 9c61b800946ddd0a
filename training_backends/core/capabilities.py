"""The capabilities of a backend, declared as data and judged by the client."""

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Final, Literal

from pydantic import BaseModel, Field

from training_backends.core.config import TrainingConfig
from training_backends.core.data_rules import ProviderFormat
from training_backends.core.errors import Issue

__all__ = ["Capabilities", "SuffixRule", "config_issues"]

_OWN_KEY: Final = "a key of your own here: it uses the one that is stored at the provider"


class SuffixRule(BaseModel, frozen=True):
    """What a suffix of the trained model's name may be.

    Attributes:
        max_length: Maximum characters.
        alphabet: The characters allowed; None: any.
    """

    max_length: int = Field(ge=1)
    alphabet: str | None = None


class Capabilities(BaseModel, frozen=True):
    """The capabilities of a backend; check these, never `hasattr`.

    The client rejects a configuration that sets an undeclared field before it asks the backend, so
    a backend only checks what this data cannot express. Methods declared as False raise
    `UnsupportedOperation`.

    Attributes:
        methods: Supported values of `TrainingConfig.method`; empty: the field is not used, and only
            its default is accepted. See `uses_method`.
        tunings: Supported values of `Tuning.kind`; empty: the field `tuning` is not supported.
        hyperparameters: Supported fields of `Hyperparameters`; None: all.
        needs_model: A configuration must have a model.
        data: Supported kinds of data: local files, URIs, and files that the provider has, by id.
        needs_data: A configuration must have training data.
        inspects: Data files have rows of `provider_format`, which are checked; False: any content.
        max_train_files: Maximum number of training files; None: no limit.
        weights: Training files can have weights.
        validation_files: Validation data is supported.
        chat_template: A chat template can be given.
        result_checkpoints: Supported values of `TrainingConfig.result.checkpoint`.
        suffix: Rule for the suffix of the trained model's name; None: not supported.
        resources: Supported fields of `TrainingConfig.resources`.
        integrations: Supported types of `TrainingConfig.integrations`.
        integration_fields: Supported fields of an integration; without `credential`, the provider
            uses a key that it has stored.
        quotes: The provider quotes a price before the run starts.
        stops: Runs can be stopped.
        keeps_checkpoint_on_stop: Stopping a run saves a checkpoint.
        pauses: Runs can be paused, and continue in place.
        resumes: Whether a stopped or failed run can be continued as a new run: `no`; `anew`, which
            trains from the start; or `checkpoint`, from any of its checkpoints.
        downloads: The trained model can be downloaded.
        downloads_checkpoints: Any checkpoint can be downloaded as a model.
        names_result: Completed runs have a `result_model`.
        samples: The trained model can be prompted.
        samples_chats: It can also be asked to continue a conversation of several messages.
        deletes: Runs can be deleted.
        lists_remote: All jobs of the account can be listed, also those created elsewhere.
        provider_format: Provider format of the training data.
    """

    methods: frozenset[str] = frozenset({"sft"})
    tunings: frozenset[str] = frozenset()
    hyperparameters: frozenset[str] | None = frozenset()
    needs_model: bool = True
    data: frozenset[Literal["file", "uri", "remote"]] = frozenset({"file"})
    needs_data: bool = True
    inspects: bool = True
    max_train_files: int | None = Field(default=None, ge=1)
    weights: bool = False
    validation_files: bool = False
    chat_template: bool = False
    result_checkpoints: frozenset[Literal["last", "best"]] = frozenset({"last"})
    suffix: SuffixRule | None = None
    resources: frozenset[str] = frozenset()
    integrations: frozenset[str] = frozenset()
    integration_fields: frozenset[str] = frozenset({"project", "name", "run_name", "credential"})
    quotes: bool = False
    stops: bool = True
    keeps_checkpoint_on_stop: bool = False
    pauses: bool = False
    resumes: Literal["no", "anew", "checkpoint"] = "no"
    downloads: bool = False
    downloads_checkpoints: bool = False
    names_result: bool = True
    samples: bool = False
    samples_chats: bool = False
    deletes: bool = False
    lists_remote: bool = False
    provider_format: ProviderFormat = ProviderFormat()

    @property
    def uses_method(self) -> bool:
        """Whether the backend distinguishes training methods."""
        return bool(self.methods)


def config_issues(
    config: TrainingConfig, capabilities: Capabilities, backend: str
) -> Iterator[Issue]:
    """Yield an error for each field that was set and that the backend does not support.

    A field that was not set, or set to its default, is no error: it has no effect.

    Args:
        backend: Name of the backend, for the messages.
    """
    if capabilities.uses_method:
        if config.method not in capabilities.methods:
            yield _unsupported("method", repr(config.method), backend, capabilities.methods)
    elif "method" in _set_fields(config):
        yield _unsupported("method", "a method", backend)
    yield from _model_issues(config, capabilities, backend)
    known = capabilities.hyperparameters
    for name in _set_fields(config.hyperparameters):
        if known is not None and name not in known:
            yield _unsupported(f"hyperparameters.{name}", name, backend)
    yield from _data_issues(config, capabilities, backend)
    yield from _result_issues(config, capabilities, backend)
    yield from _destination_issues(config, capabilities, backend)
    yield from _suffix_issues(config.suffix, capabilities.suffix, backend)
    for name in _set_fields(config.resources):
        if name not in capabilities.resources:
            yield _unsupported(f"resources.{name}", name, backend)
    yield from _integration_issues(config, capabilities, backend)


def _model_issues(
    config: TrainingConfig, capabilities: Capabilities, backend: str
) -> Iterator[Issue]:
    if config.model is None and capabilities.needs_model:
        yield _missing("model", backend)
    if config.tuning is not None:
        kind, kinds = config.tuning.kind, capabilities.tunings
        if not kinds:
            yield _unsupported("tuning", "tuning", backend)
        elif kind not in kinds:
            yield _unsupported("tuning.kind", repr(kind), backend, kinds)
    if config.chat_template is not None and not capabilities.chat_template:
        yield _unsupported("chat_template", "a chat template", backend)


def _integration_issues(
    config: TrainingConfig, capabilities: Capabilities, backend: str
) -> Iterator[Issue]:
    for index, entry in enumerate(config.integrations):
        if entry.type not in capabilities.integrations:
            yield _unsupported(f"integrations.{index}", entry.type, backend)
            continue
        for name in _set_fields(entry):
            if name not in {"type", *capabilities.integration_fields}:
                what = _OWN_KEY if name == "credential" else f"{name} of {entry.type}"
                yield _unsupported(f"integrations.{index}.{name}", what, backend)


def _data_issues(
    config: TrainingConfig, capabilities: Capabilities, backend: str
) -> Iterator[Issue]:
    if capabilities.needs_data and not config.data.train:
        yield _missing("data.train", backend)
    limit = capabilities.max_train_files
    if limit is not None and len(config.data.train) > limit:
        files = "one training file" if limit == 1 else f"at most {limit} training files"
        yield Issue(
            code="too_many_files",
            message=f"{backend} takes {files}, not {len(config.data.train)}",
            field="data.train",
            fix="join the files, or use another backend",
        )
    if not capabilities.validation_files and config.data.validation:
        yield _unsupported("data.validation", "validation data", backend)
    for part, sources in (("train", config.data.train), ("validation", config.data.validation)):
        for index, source in enumerate(sources):
            if source.kind not in capabilities.data:
                field = f"data.{part}.{index}"
                yield _unsupported(field, _KINDS[source.kind], backend)
            if "weight" in _set_fields(source) and not (capabilities.weights and part == "train"):
                field = f"data.{part}.{index}.weight"
                yield _unsupported(field, f"a weight of a {part} file", backend)


def _result_issues(
    config: TrainingConfig, capabilities: Capabilities, backend: str
) -> Iterator[Issue]:
    chosen, known = config.result.checkpoint, capabilities.result_checkpoints
    if chosen not in known and "checkpoint" in _set_fields(config.result):
        yield _unsupported("result.checkpoint", repr(chosen), backend, known)
    elif chosen == "best" and capabilities.validation_files and not config.data.validation:
        yield Issue(
            code="missing_field",
            message="`result.checkpoint: best` is chosen by the validation loss",
            field="data.validation",
            fix="set it, or use `result.checkpoint: last`",
        )


def _destination_issues(
    config: TrainingConfig, capabilities: Capabilities, backend: str
) -> Iterator[Issue]:
    if config.result.destination is not None and not capabilities.downloads:
        yield _unsupported("result.destination", "downloads of the trained model", backend)


def _suffix_issues(suffix: str | None, rule: SuffixRule | None, backend: str) -> Iterator[Issue]:
    if suffix is None:
        return
    if rule is None:
        yield _unsupported("suffix", "a suffix", backend)
        return
    if len(suffix) > rule.max_length:
        yield Issue(
            code="suffix_too_long",
            message=f"{backend} takes at most {rule.max_length} characters, not {len(suffix)}",
            field="suffix",
            fix="shorten it",
        )
    wrong = "".join(dict.fromkeys(c for c in suffix if c not in (rule.alphabet or suffix)))
    if wrong:
        yield Issue(
            code="suffix_characters",
            message=f"{backend} does not take the characters {wrong!r}",
            field="suffix",
            fix="remove them",
        )


def _set_fields(model: BaseModel) -> list[str]:
    """Return the fields that were set to something other than their default, in order."""
    return [
        name
        for name, field in type(model).model_fields.items()
        if name in model.model_fields_set and getattr(model, name) != field.default
    ]


_KINDS: Final[Mapping[str, str]] = MappingProxyType(
    {"file": "local files", "uri": "data by URI", "remote": "data by the provider's file id"}
)


def _missing(field: str, backend: str) -> Issue:
    return Issue(code="missing_field", message=f"{backend} needs it", field=field, fix="set it")


def _unsupported(
    field: str, what: str, backend: str, supported: Collection[str] | None = None
) -> Issue:
    fix = "remove it, or use another backend"
    if supported:
        fix = f"supported: {', '.join(sorted(supported))}"
    return Issue(
        code="unsupported_field",
        message=f"{backend} does not support {what}",
        field=field,
        fix=fix,
    )
