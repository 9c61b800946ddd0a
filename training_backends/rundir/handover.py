"""How a training process receives a secret (standard library only: a queued one loads no more)."""

from typing import Final

__all__ = ["ON_STDIN"]

ON_STDIN: Final = "HF_TOKEN_ON_STDIN"
"""Environment variable; if set, the first line of standard input is the Hub token."""
