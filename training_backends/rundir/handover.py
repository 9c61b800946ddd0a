"""How a process is handed the model hub's token: on its standard input.

Not as an argument, which everybody sees in the list of processes, and not in its environment,
which the same user's other programs see for as long as it runs.
"""

from typing import Final

__all__ = ["ON_STDIN"]

ON_STDIN: Final = "HF_TOKEN_ON_STDIN"
"""Environment variable that is set if the first line of standard input is the token."""
