"""Types of columns that mean the same in every database; the revisions use them too."""

import sqlalchemy as sa

__all__ = ["BigInteger", "short_text"]

# In SQLite only INTEGER numbers rows by itself, and it is as wide.
BigInteger = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
"""An integer of 64 bits."""


def short_text(length: int) -> sa.String:
    """Return the type of a short text, which is in order of its code points.

    Args:
        length: As expected. SQLite holds nobody to it, so PostgreSQL is not told of it.
    """
    return sa.String(length).with_variant(sa.Text(collation="C"), "postgresql")
