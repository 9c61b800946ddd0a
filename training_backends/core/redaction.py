"""Takes secrets out of text that somebody will read (standard library only).

Each way finds what the others miss: the value of a secret that this process has read, in
whatever way it is written (`register_secret`); a name such as `password` before it; the shape
that many keys have.
"""

import base64
import json
import os
import re
from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import PurePath
from threading import Lock
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, unquote
from uuid import UUID

if TYPE_CHECKING:
    from pydantic import SecretStr

__all__ = [
    "REDACTED",
    "forget_secrets",
    "redact",
    "redact_value",
    "register_environment",
    "register_proxy",
    "register_secret",
    "register_url",
]

REDACTED: Final = "[redacted]"

# -- by value ----------------------------------------------------------------------------------

_SHORTEST: Final = 6
"""Characters below which a secret would also be found in ordinary words."""
_SHORTEST_BASE64: Final = 8
_MOST: Final = 64
"""So that a program which runs for months does not collect every key it ever had."""
_LONGEST: Final = 64 * 2**10
"""Characters of one text that are redacted; the rest is left out, as no line needs more."""
_MARGIN: Final = 4096
"""Characters left out before that, so that no half of a secret remains at the end."""

# State of the module, for what must not be written concerns all of a process, whichever part of
# it read the secret. In clear, as a text cannot be searched for what is known by its hash only;
# the process has them in its environment or its HTTP clients anyway.
_known: dict[str, re.Pattern[str]] = {}
_longest_first: tuple[re.Pattern[str], ...] = ()
_lock = Lock()


def register_secret(secret: "str | SecretStr") -> None:
    """Have a secret taken out wherever it appears from now on.

    It is found as it is, quoted for URLs or JSON, and inside base64. The latest few dozen are
    remembered, and none that is shorter than six characters.
    """
    value = (secret if isinstance(secret, str) else secret.get_secret_value()).strip()
    if len(value) < _SHORTEST:
        return
    with _lock:
        # The one read last goes to the end, however often it was read before.
        pattern = _known.pop(value) if value in _known else re.compile(_written(value))
        _known[value] = pattern
        while len(_known) > _MOST:
            del _known[next(iter(_known))]
        _publish()


def _publish() -> None:
    global _longest_first  # noqa: PLW0603  # replaced whole, so that nobody who reads it waits
    # One secret may be the beginning of another.
    _longest_first = tuple(_known[value] for value in sorted(_known, key=len, reverse=True))


def register_environment(environ: Mapping[str, str] = os.environ) -> None:
    """Register what the environment holds: keys by their names, passwords inside URLs."""
    for name, value in environ.items():
        if _SECRET_VARIABLE.search(name):
            register_secret(value)
        elif name.lower().endswith("_proxy"):
            register_proxy(value)
        else:
            register_url(value)


def register_url(text: str) -> None:
    """Register the passwords inside a text, if it is a URL; some hold what no URL should.

    A password that was not percent-encoded may make a URL that no parser accepts. It is
    registered all the same, and so is each part of it that an error message could quote.
    """
    for rest in text.split("://")[1:]:
        authority = _END_OF_AUTHORITY.split(rest, maxsplit=1)[0]
        if "@" in authority:
            _register_userinfo(authority)
        elif _BROKEN_PASSWORD.match(rest):
            _register_userinfo(rest)
    if "://" in text:
        for name, value in parse_qsl(text.partition("?")[2]):
            if _SECRET_NAME.search(name):
                register_secret(value)


def register_proxy(url: str) -> None:
    """Register the password of a proxy's URL, also where there is no scheme before it.

    All up to the last `@` is user and password, for a proxy has no path.
    """
    _register_userinfo(url.partition("://")[2] or url)


def _register_userinfo(text: str) -> None:
    userinfo = text.rpartition("@")[0]
    user, colon, password = userinfo.partition(":")
    secret = password if colon else user
    if colon or len(secret) >= _LONG_USER or _END_OF_AUTHORITY.search(secret):
        # The last one registered is the last one forgotten.
        for piece in (*_DELIMITERS.split(secret), unquote(secret), secret):
            register_secret(piece)


def forget_secrets() -> None:
    """Forget everything that was registered."""
    with _lock:
        _known.clear()
        _publish()


_LONG_USER: Final = 20
"""Characters from which on a name without a password is rather a token."""
_END_OF_AUTHORITY: Final = re.compile(r"[/?#]")
_DELIMITERS: Final = re.compile(r"[/?#@:%]")
_BROKEN_PASSWORD: Final = re.compile(
    # Not a port before a path that has an `@` in it.
    r"""[^\s/?#:@"']*:(?!\d{1,5}[/?#])[^\s@"'<>]*@"""
)
_SECRET_VARIABLE: Final = re.compile(
    r"((API|ACCESS|SECRET|PRIVATE)_?KEY|TOKEN|PASSWORD|PASSWD|PASSPHRASE|SECRET)$", re.IGNORECASE
)


def _written(secret: str) -> str:
    """Return a pattern for every way in which a secret may be written."""
    parts = re.findall(r"\\+|.", secret, re.DOTALL)
    befores = ["", *parts]
    plain = "".join(map(_in_any_quoting, parts, befores))
    return "|".join([plain, *_in_base64(secret)])


def _in_any_quoting(char: str, before: str) -> str:
    if char.isascii() and (char.isalnum() or char in "-_.~"):
        return re.escape(char)
    quoted = "".join(f"%(?:25)*(?i:{byte:02x})" for byte in char.encode("utf-8", "surrogatepass"))
    # Backslashes are doubled each time that an escaped text is escaped again. A run of them is
    # matched at once and from its beginning, for tried at each of them a long one takes hours.
    run = r"(?<!\\)\\++"
    if char.startswith("\\"):
        return rf"(?:{run}|{quoted})"
    escaped = [re.escape(json.dumps(char)[1:-1]).replace(r"\\", run), run + re.escape(char)]
    if before.startswith("\\"):
        escaped = [each.removeprefix(run) for each in escaped]  # matched with the one before
    ways = dict.fromkeys((re.escape(char), quoted, *escaped))
    if char == " ":
        ways[r"\+"] = None
    return f"(?:{'|'.join(ways)})"


def _in_base64(secret: str) -> list[str]:
    """Return what base64 makes of a secret whatever stands around it, as in `user:secret`."""
    found = []
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + secret.encode("utf-8", "surrogatepass"))
        whole = encoded.rstrip(b"=").decode()
        # The characters at both ends have bits of the neighbours in them.
        core = whole[(0, 2, 3)[before] : -1 if encoded.endswith(b"=") else None]
        if len(core) >= _SHORTEST_BASE64:
            either = re.sub(r"[+/]", lambda char: "[+-]" if char[0] == "+" else "[/_]", core)
            found.append(rf"{either}[\w+/-]*=*")
    return found


# -- by name -----------------------------------------------------------------------------------

_NAME: Final = (
    r"(?:(?:api|access|private)[_-]?key|authorization|passw(?:or)?d|passphrase|secret|token|cookie)"
    r"(?:[_-](?:access[_-])?(?:key|value))?"
)
_SECRET_NAME: Final = re.compile(
    r"(api|access|private)[_-]?key|authorization|passw(or)?d|passphrase|secret|cookie"
    r"|token([_-]?value)?$",
    re.IGNORECASE,
)
_QUOTED: Final = re.compile(
    # The quote that ends the value has as many backslashes as the one before it. Where the text
    # was cut off before that, all the rest is the value.
    rf"""({_NAME}\\*["']?\s*(?:=>?|:)\s*[bru]?(\\*)(["']))(.*?)((?<!\\)\2\3|\Z)""",
    re.IGNORECASE | re.DOTALL,
)
_PAIR: Final = re.compile(
    rf"""(\([bru]?["'][\w-]*{_NAME}["'],\s*[bru]?(["']))(.*?)((?<!\\)\2|\Z)""",
    re.IGNORECASE | re.DOTALL,
)
_PLAIN: Final = re.compile(
    rf"""
    ({_NAME})
    (["']?[ \t]*(?:=(?!=)|:)[ \t]*)
    (?:(?:bearer|basic|digest|token|negotiate)[ \t]+)?
    (?![bru]?\\*["'])                           # quoted: done before
    (?![{{[(]+(?:[\s"'\\]|\Z))                  # what it holds has names of its own
    # Up to white space, the next parameter, or the end of the text in JSON that it stands in.
    ([^\s&]+?)(?=[)"'}},;.]{{0,4}}(?:[\s&]|\Z) | (?<!\\)\\++["'] | ["']\s*[,:}}\]])
    """,
    re.IGNORECASE | re.VERBOSE,
)
_QUERY: Final = re.compile(
    r"""([?&](?:key|sig|signature|x-(?:amz|goog)-[a-z-]+)=)[^\s&"'<>\\]+""", re.IGNORECASE
)
_NOTHING: Final = re.compile(r"null|none|true|false", re.IGNORECASE)
_NUMBER: Final = re.compile(r"[-+]?[\d.,_]+(e[-+]?\d+)?%?", re.IGNORECASE)
_WORD: Final = re.compile(r"[A-Za-z]?[a-z]{0,14}")
_MORE_WORDS: Final = re.compile(r"[,;]?\s+[a-z(]")


def _hide_named(match: re.Match[str]) -> str:
    name, gap, value = match.groups()
    is_number = name.lower().endswith("token") and _NUMBER.fullmatch(value)
    is_sentence = (
        ":" in gap
        and _WORD.fullmatch(value)
        and _MORE_WORDS.match(match.string, match.end())  # "password: must not be empty"
    )
    if is_number or is_sentence or _NOTHING.fullmatch(value):
        return match[0]
    return f"{name}{gap}{REDACTED}"


# -- by shape ----------------------------------------------------------------------------------

_USERINFO: Final = re.compile(
    r"""(?<=://)(?:
        [^\s/?\#:@"']*:                         # user
        (?!\d{1,5}(?:[/?\#"'<>,;)\s]|\Z))       # no port
        (?:[^\s/?\#"'<>]{0,300}|[^\s@"'<>]{0,300}+)       # password; some have a slash in it
        | [^\s/?\#:@"']{20,}                    # a token alone
    )(?=@)""",
    re.VERBOSE,
)
_SCHEME: Final = re.compile(
    r"""
    (\b(?i:bearer)\s+)
        (?![A-Z]?[a-z]{1,15}[.,;:)]?\s | [a-z_]+=)          # a sentence; a challenge
        [^\s"'\\]{6,}
    | (\b(?i:basic)\s+)
        (?![A-Z]?[a-z]{1,15}(?:[^\w+/=-]|\Z))              # a word is no base64
        [\w+/-]{6,}=*
    """,
    re.VERBOSE,
)
# Each takes a word at once, also where it is no secret, which the functions below decide: else a
# text such as `hf_hf_hf_…` would be read again from each `hf_` on.
_HUB: Final = re.compile(r"(?<![A-Za-z0-9])hf_\w{12,}", re.ASCII)
_HUB_MARK: Final = re.compile(r"[A-Z0-9]")
_HUB_LETTERS: Final = re.compile(r"(?<![A-Za-z0-9])hf_[a-z]{20}\w*", re.ASCII)
_JWT: Final = re.compile(  # JSON Web Token
    r"(?<![A-Za-z0-9])eyJ(?:([\w-]{8,}+\.[\w-]{8,}+\.[\w-]*+)|[\w-]*+)", re.ASCII
)
_PREFIXED: Final = re.compile(
    r"""(?<![A-Za-z0-9])(?:
        (?:sk|tb)-[\w-]{8,}                     # OpenAI and many others; our gateway
        | (?:wandb_v\d+|gh[opusr]|github_pat)_\w{16,}
    )""",
    re.VERBOSE | re.ASCII,
)
_BARE: Final = re.compile(
    r"""(?<![A-Za-z0-9])(?:
        (?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{40}       # Weights & Biases
        | (?=[A-Z0-9]*[a-z])(?=[a-z0-9]*[A-Z])(?=[A-Za-z]*\d)[A-Za-z0-9]{32}     # Mistral
    )(?![A-Za-z0-9])""",
    re.VERBOSE | re.ASCII,
)
_SHA1: Final = re.compile(r"[0-9a-f]{40}")
_HASH_NAME: Final = re.compile(r"commit|revision|sha-?1?\b|hash|digest|etag|oid", re.IGNORECASE)
_HASH_BEFORE: Final = re.compile(
    r"(@|(commit|revision|\brev|sha-?1?|hash|digest|etag|oid|snapshot|blob|tree|object)"
    r"[\w-]*[^A-Za-z0-9]{1,4})\Z",
    re.IGNORECASE,
)


def _hide_hub(match: re.Match[str]) -> str:
    """Leave names such as hf_checkpoints."""
    word = match[0]
    return REDACTED if _HUB_MARK.search(word) else _HUB_LETTERS.sub(REDACTED, word)


def _hide_jwt(match: re.Match[str]) -> str:
    return REDACTED if match[1] else match[0]


def _hide_bare(match: re.Match[str]) -> str:
    """Leave the hash of a commit, which looks like a key, where it is called one."""
    before = match.string[max(0, match.start() - 24) : match.start()]
    is_hash = _SHA1.fullmatch(match[0]) and _HASH_BEFORE.search(before)
    return match[0] if is_hash else REDACTED


# -- all together ------------------------------------------------------------------------------

_DEEPEST: Final = 12


def redact(text: str) -> str:
    """Replace everything in `text` that is known to be a secret or looks like one.

    Takes time in proportion to the length. Of more than 64 Ki characters only the first are
    returned, with a note of how many are left out.
    """
    if len(text) <= _LONGEST:
        return _redacted(text)
    margin = max(_MARGIN, 12 * max(map(len, _known), default=0))  # as `%2525xx` for a character
    kept = _redacted(text[:_LONGEST])[:-margin]
    return f"{kept} … [cut: {len(text)} characters]"


def _redacted(text: str) -> str:
    for known in _longest_first:
        text = known.sub(REDACTED, text)
    text = _USERINFO.sub(REDACTED, text)
    text = _PAIR.sub(rf"\1{REDACTED}\4", text)
    text = _QUOTED.sub(rf"\1{REDACTED}\5", text)
    text = _PLAIN.sub(_hide_named, text)
    text = _QUERY.sub(rf"\1{REDACTED}", text)
    text = _SCHEME.sub(rf"\1\2{REDACTED}", text)
    text = _JWT.sub(_hide_jwt, text)
    text = _HUB.sub(_hide_hub, text)
    text = _PREFIXED.sub(REDACTED, text)
    return _BARE.sub(_hide_bare, text)


def redact_value(value: Any) -> Any:
    """Return a value made of plain data only, without secrets, whatever it was made of."""
    return _cleaned(value, 0)


def _cleaned(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, date | timedelta | UUID | PurePath):
        return redact(str(value))
    if depth < _DEEPEST:
        if isinstance(value, Mapping):
            return {
                redact(_text(key)): _named(_text(key), inner, depth) for key, inner in value.items()
            }
        if _is_header(value):
            return [_text(value[0]), REDACTED]
        if isinstance(value, list | tuple | set | frozenset):
            return [_cleaned(inner, depth + 1) for inner in value]
    return redact(_shown(value))


def _named(name: str, value: Any, depth: int) -> Any:
    """Clean what stands under a name in a mapping."""
    if _SECRET_NAME.search(name):
        is_count = isinstance(value, int | float) and name.lower().endswith("token")
        return value if value is None or isinstance(value, bool) or is_count else REDACTED
    if isinstance(value, str) and _HASH_NAME.search(name) and _SHA1.fullmatch(value):
        return value
    return _cleaned(value, depth + 1)


def _is_header(value: Any) -> bool:
    """Tell whether this is a name with its secret value, as lists of HTTP headers have it."""
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(part, str | bytes) for part in value)
        # A list of two texts is rather one of names.
        and (isinstance(value, tuple) or isinstance(value[0], bytes))
        and _SECRET_NAME.search(_text(value[0])) is not None
    )


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except Exception as error:  # a line must be written whatever is to be shown in it
        return f"<{type(value).__name__}: {type(error).__name__}>"
