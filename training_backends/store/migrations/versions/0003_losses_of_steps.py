"""Restore step metrics that checkpoint records had overwritten."""

import json
import math
from typing import Any, Final

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_RECORDS: Final = sa.table(
    "records",
    sa.column("run_id"),
    sa.column("seq"),
    sa.column("step"),
    sa.column("source"),
    sa.column("at"),
    sa.column("fields"),
)
_METRICS: Final = sa.table(
    "metrics",
    sa.column("run_id"),
    sa.column("step"),
    sa.column("name"),
    sa.column("at"),
    sa.column("value"),
)


def upgrade() -> None:
    """Restore the values measured at the steps of checkpoints."""
    connection = op.get_bind()
    own, point = _RECORDS.alias("own"), _RECORDS.alias("point")
    reached = sa.exists().where(
        point.c.run_id == own.c.run_id, point.c.step == own.c.step, point.c.source == "checkpoint"
    )
    query = sa.select(own).where(own.c.source == "metrics", own.c.fields.is_not(None), reached)
    for row in connection.execute(query.order_by(own.c.run_id, own.c.seq)).all():
        for name, value in json.loads(row.fields).items():
            if _is_number(value):
                connection.execute(
                    _METRICS.update()
                    .where(
                        _METRICS.c.run_id == row.run_id,
                        _METRICS.c.step == row.step,
                        _METRICS.c.name == name,
                    )
                    .values(value=float(value), at=row.at)
                )


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
