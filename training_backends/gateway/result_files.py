"""The result file of a job that succeeded: a CSV of its metrics, as the OpenAI API has it."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, Final, Literal
from uuid import NAMESPACE_OID, uuid5

import sqlalchemy as sa

from training_backends.gateway.files import RESULTS_PURPOSE, FileService
from training_backends.gateway.store import GatewayStore
from training_backends.protocols.openai.results import RESULT_COLUMNS, write_results
from training_backends.protocols.openai.wire import StepMetrics
from training_backends.store.schema import metrics

__all__ = ["ResultFiles"]

_NAME: Final = "step_metrics.csv"
_MEASURED: Final = tuple(name for name in RESULT_COLUMNS["openai"].values() if name != "step")


class ResultFiles:
    """Writes result files.

    Args:
        coding: How the content is stored and served.
    """

    def __init__(
        self, store: GatewayStore, files: FileService, coding: Literal["base64", "plain"]
    ) -> None:
        self._store = store
        self._files = files
        self._coding: Literal["base64", "plain"] = coding

    async def write(self, job: Any) -> list[str]:
        """Write the metrics of a job's run and return the ids of the files; safe to repeat.

        Raises:
            OSError: The disk is full.
        """

        def content(connection: sa.Connection) -> bytes:
            return write_results(_rows(connection, job.id), coding=self._coding)

        file_id = str(uuid5(NAMESPACE_OID, f"results of {job.id}"))
        await self._files.add(
            await self._store.aread(content),
            file_id=file_id,
            filename=_NAME,
            purpose=RESULTS_PURPOSE,
            mimetype="text/csv",
            owner=job,
        )
        return [file_id]


def _rows(connection: sa.Connection, run_id: str) -> Iterator[StepMetrics]:
    query = sa.select(metrics.c.step, metrics.c.name, metrics.c.value).where(
        metrics.c.run_id == run_id, metrics.c.name.in_(_MEASURED)
    )
    found = connection.execute(query.order_by(metrics.c.step))
    for step, values in groupby(found, key=lambda row: row.step):
        yield StepMetrics.model_validate({"step": step, **{row.name: row.value for row in values}})
