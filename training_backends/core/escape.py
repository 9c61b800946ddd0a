"""Format text for people, and escape untrusted text for terminals and logs."""

import re
from typing import Final

__all__ = ["escape_controls", "escape_json", "plural"]

_CONTROLS: Final = re.compile(
    "["
    "\\x00-\\x1f\\x7f-\\x9f"  # C0, DEL and C1: terminal control sequences
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional controls reorder displayed text
    "\u2028\u2029"  # line and paragraph separator
    "\ud800-\udfff"  # surrogates: non-UTF-8 bytes of file names, which cannot be encoded
    "]"
)


def escape_controls(text: str, *, keep: str = "") -> str:
    r"""Replace control characters with Python escapes, such as `\x1b`.

    Args:
        keep: Control characters to keep, such as the newlines of a traceback.
    """

    def escaped(match: re.Match[str]) -> str:
        found = match[0]
        return found if found in keep else found.encode("unicode_escape").decode("ascii")

    return _CONTROLS.sub(escaped, text)


def escape_json(document: str) -> str:
    """Escape control characters that JSON allows unescaped, such as DEL and C1."""

    def escaped(match: re.Match[str]) -> str:
        found = match[0]
        return found if found == "\n" else f"\\u{ord(found):04x}"

    return _CONTROLS.sub(escaped, document)


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, such as `1 row` and `1,200 rows`."""
    return f"{count:,} {noun}" + "s" * (count != 1)
