"""Make text from outside safe to show on a terminal and in a log."""

import re
from typing import Final

__all__ = ["escape_controls", "escape_json"]

_CONTROLS: Final = re.compile(
    "["
    "\\x00-\\x1f\\x7f-\\x9f"  # C0, DEL and C1: terminals take commands from them
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional controls reorder what is read
    "\u2028\u2029"  # line and paragraph separator
    "\ud800-\udfff"  # bytes of a file name that are not UTF-8; they cannot be encoded
    "]"
)


def escape_controls(text: str, *, keep: str = "") -> str:
    r"""Replace control characters by their Python escapes, such as `\x1b`.

    Args:
        keep: Control characters to leave as they are, such as the newlines of a traceback.
    """

    def escaped(match: re.Match[str]) -> str:
        found = match[0]
        return found if found in keep else found.encode("unicode_escape").decode("ascii")

    return _CONTROLS.sub(escaped, text)


def escape_json(document: str) -> str:
    """Escape in a JSON document what JSON lets stand as it is, such as DEL and C1."""

    def escaped(match: re.Match[str]) -> str:
        found = match[0]
        return found if found == "\n" else f"\\u{ord(found):04x}"

    return _CONTROLS.sub(escaped, document)
