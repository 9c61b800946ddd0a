"""What a backend can do, as data."""

from pydantic import BaseModel, ConfigDict

from training_backends.core.data_rules import Dialect

__all__ = ["Capabilities"]


class Capabilities(BaseModel):
    """What a backend can do; callers ask this first, never `hasattr`.

    A verb declared False raises `UnsupportedOperation`.

    Attributes:
        methods: Values of `TrainingConfig.method` that it trains.
        tunings: Values of `Tuning.kind` that it trains.
        quotes: The provider names a price before the run starts.
        stops: A run can be stopped.
        keeps_checkpoint_on_stop: What was learnt before a stop is kept.
        resumes: A stopped or failed run can be continued.
        downloads: The result can be fetched as files.
        samples: The result can be asked.
        deletes: Runs can be deleted.
        lists_remote: Runs that others made can be listed.
        validation_files: Validation data is used.
        suffix: The result's name takes a suffix.
        integrations: Types of `TrainingConfig.integrations` that it reports to.
        dialect: What it takes as training data.
    """

    model_config = ConfigDict(frozen=True)

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
    dialect: Dialect = Dialect()
