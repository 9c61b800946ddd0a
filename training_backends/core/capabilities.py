"""The capabilities of a backend, declared as data."""

from pydantic import BaseModel

from training_backends.core.data_rules import ProviderFormat

__all__ = ["Capabilities"]


class Capabilities(BaseModel, frozen=True):
    """The capabilities of a backend; check these, never `hasattr`.

    Methods declared as False raise `UnsupportedOperation`.

    Attributes:
        methods: Supported values of `TrainingConfig.method`.
        tunings: Supported values of `Tuning.kind`.
        quotes: The provider quotes a price before the run starts.
        stops: Runs can be stopped.
        keeps_checkpoint_on_stop: Stopping a run saves a checkpoint.
        resumes: Stopped or failed runs can be resumed.
        downloads: The trained model can be downloaded.
        samples: The trained model can be prompted.
        deletes: Runs can be deleted.
        lists_remote: All jobs of the account can be listed, whoever created them.
        validation_files: Validation data is supported.
        suffix: The name of the trained model can have a suffix.
        integrations: Supported types of `TrainingConfig.integrations`.
        provider_format: Provider format of the training data.
    """

    methods: frozenset[str] = frozenset({"sft"})
    tunings: frozenset[str] = frozenset()
    quotes: bool = False
    stops: bool = True
    keeps_checkpoint_on_stop: bool = False
    resumes: bool = False
    downloads: bool = False
    samples: bool = False
    deletes: bool = False
    lists_remote: bool = False
    validation_files: bool = True
    suffix: bool = False
    integrations: frozenset[str] = frozenset()
    provider_format: ProviderFormat = ProviderFormat()
