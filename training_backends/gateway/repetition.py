"""Recognize a request of the OpenAI API that repeats an earlier one."""

import time
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from training_backends.gateway.errors import problem
from training_backends.protocols.openai.errors import ErrorAnswer

__all__ = ["Repetition"]

_RETRIED_WITHIN: Final = 600.0
"""Seconds within which a client's retry refers to the object of its first request."""
_KEY_LASTS: Final = 86400.0
"""Seconds for which an idempotency key is known."""


@dataclass(frozen=True, slots=True)
class Repetition:
    """How a client marks a request that it may have sent before.

    Attributes:
        is_retry: One of the official clients repeats it by itself.
        key: Value of `Idempotency-Key`.
    """

    is_retry: bool = False
    key: str | None = None

    def first(
        self,
        connection: sa.Connection,
        table: sa.Table,
        *,
        mine: sa.ColumnElement[bool],
        same: sa.ColumnElement[bool],
        key: sa.ColumnElement[Any],
    ) -> Any:
        """Return the row that the first request created, or None if there was none.

        Args:
            mine: The rows of this client.
            same: Those that an equal request created.
            key: Where a row has its idempotency key.

        Raises:
            HTTPProblem: The key was sent with another request.
        """
        now, at = time.time(), table.c.created_at
        found = sa.select(table, same.label("is_same")).where(mine).order_by(at.desc())
        if self.key is not None:
            keyed = found.where(key == self.key, at > now - _KEY_LASTS)
            if (row := connection.execute(keyed).first()) is not None:
                if not row.is_same:
                    message = "This Idempotency-Key was used for another request."
                    raise problem(
                        ErrorAnswer(status=400, message=message, code="idempotency_error")
                    )
                return row
        if self.is_retry:
            return connection.execute(found.where(same, at > now - _RETRIED_WITHIN)).first()
        return None
