"""Redacts secrets from text (standard library only).

Three methods complement each other: by value, for secrets that this process has read, in any
encoding (`register_secret`); by name, such as `password` before the value; and by shape, for
well-known key formats.
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
    "split_secret",
]

REDACTED: Final = "[redacted]"

# -- by value ----------------------------------------------------------------------------------

_SHORTEST: Final = 6
"""Minimum length of a secret; shorter ones would match ordinary words."""
_SHORTEST_BASE64: Final = 8
_MOST: Final = 64
"""Maximum number of registered secrets, so that a long-running program does not collect all."""
_LONGEST: Final = 64 * 2**10
"""Maximum characters of a text; the rest is dropped."""
_MARGIN: Final = 4096
"""Characters dropped before that limit, so that no partial secret remains at the end."""

# Module state, because redaction applies to the whole process, whichever part of it read the
# secret. In plain text, because a text cannot be searched for hashes; the process has the secrets
# in its environment or its HTTP clients anyway.
_known: dict[str, re.Pattern[str]] = {}
_longest_first: tuple[re.Pattern[str], ...] = ()
_lock = Lock()


def register_secret(secret: "str | SecretStr") -> None:
    """Register a secret to be redacted wherever it appears.

    It is found in plain text, quoted for URLs or JSON, and inside base64. Only the most recent
    64 are kept, and secrets shorter than six characters are ignored.
    """
    value = (secret if isinstance(secret, str) else secret.get_secret_value()).strip()
    if len(value) < _SHORTEST:
        return
    with _lock:
        # The most recently registered secret goes to the end, even if it was known.
        pattern = _known.pop(value) if value in _known else re.compile(_written(value))
        _known[value] = pattern
        while len(_known) > _MOST:
            del _known[next(iter(_known))]
        _publish()


def split_secret(secret: "SecretStr") -> "Mapping[str, SecretStr]":
    """Return the secrets in a stored one by name; see `CredentialSource.get_all`."""
    text = secret.get_secret_value()
    try:
        found = json.loads(text) if text.startswith("{") else None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
        return {"key": secret}
    for value in found.values():
        register_secret(value)
    from pydantic import SecretStr  # noqa: PLC0415  # slow to import

    return {name: SecretStr(value) for name, value in found.items()}


def _publish() -> None:
    global _longest_first  # noqa: PLW0603  # replaced atomically, so that readers need no lock
    # Longest first, because one secret may be a prefix of another.
    _longest_first = tuple(_known[value] for value in sorted(_known, key=len, reverse=True))


def register_environment(environ: Mapping[str, str] = os.environ) -> None:
    """Register the secrets of the environment: keys by variable name, and passwords in URLs."""
    for name, value in environ.items():
        if _SECRET_VARIABLE.search(name):
            register_secret(value)
        elif name.lower().endswith("_proxy"):
            register_proxy(value)
        else:
            register_url(value)


def register_url(text: str) -> None:
    """Register the passwords in a URL, even if it is malformed.

    A password that is not percent-encoded may make the URL invalid. It is registered anyway, and
    so is each part of it that an error message could quote.
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
    """Register the password of a proxy URL, with or without a scheme.

    Everything up to the last `@` is user and password, because a proxy has no path.
    """
    _register_userinfo(url.partition("://")[2] or url)


def _register_userinfo(text: str) -> None:
    userinfo = text.rpartition("@")[0]
    user, colon, password = userinfo.partition(":")
    secret = password if colon else user
    if colon or len(secret) >= _LONG_USER or _END_OF_AUTHORITY.search(secret):
        # The complete secret is registered last, so that it is dropped last.
        for piece in (*_DELIMITERS.split(secret), unquote(secret), secret):
            register_secret(piece)


def forget_secrets() -> None:
    """Remove all registered secrets."""
    with _lock:
        _known.clear()
        _publish()


_LONG_USER: Final = 20
"""Length from which a user name without a password is assumed to be a token."""
_END_OF_AUTHORITY: Final = re.compile(r"[/?#]")
_DELIMITERS: Final = re.compile(r"[/?#@:%]")
_BROKEN_PASSWORD: Final = re.compile(
    # Not a port before a path that contains an `@`.
    r"""[^\s/?#:@"']*:(?!\d{1,5}[/?#])[^\s@"'<>]*@"""
)
_SECRET_VARIABLE: Final = re.compile(
    r"((API|ACCESS|SECRET|PRIVATE)_?KEY|TOKEN|PASSWORD|PASSWD|PASSPHRASE|SECRET)$", re.IGNORECASE
)


def _written(secret: str) -> str:
    """Return a pattern that matches a secret in any encoding."""
    parts = re.findall(r"\\+|.", secret, re.DOTALL)
    befores = ["", *parts]
    plain = "".join(map(_in_any_quoting, parts, befores))
    return "|".join([plain, *_in_base64(secret)])


def _in_any_quoting(char: str, before: str) -> str:
    if char.isascii() and (char.isalnum() or char in "-_.~"):
        return re.escape(char)
    quoted = "".join(f"%(?:25)*(?i:{byte:02x})" for byte in char.encode("utf-8", "surrogatepass"))
    # Backslashes double each time that escaped text is escaped again. A run of them is matched
    # possessively from its start; backtracking at each of them would take hours on a long run.
    run = r"(?<!\\)\\++"
    if char.startswith("\\"):
        return rf"(?:{run}|{quoted})"
    escaped = [re.escape(json.dumps(char)[1:-1]).replace(r"\\", run), run + re.escape(char)]
    if before.startswith("\\"):
        escaped = [each.removeprefix(run) for each in escaped]  # matched by the preceding run
    ways = dict.fromkeys((re.escape(char), quoted, *escaped))
    if char == " ":
        ways[r"\+"] = None
    return f"(?:{'|'.join(ways)})"


def _in_base64(secret: str) -> list[str]:
    """Return the base64 encodings of a secret at each offset, as inside `user:secret`."""
    found = []
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + secret.encode("utf-8", "surrogatepass"))
        unpadded = encoded.rstrip(b"=").decode()
        # The characters at both ends also encode bits of the neighboring text.
        core = unpadded[(0, 2, 3)[before] : -1 if encoded.endswith(b"=") else None]
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
_SCHEME_WORD: Final = r"(?:(?:bearer|basic|digest|token|negotiate)[ \t]+)?"
_QUOTED: Final = re.compile(
    # The closing quote has as many backslashes as the opening one. If the text is truncated
    # before it, the rest is the value.
    rf"""({_NAME}\\*["']?\s*(?:=>?|:)\s*{_SCHEME_WORD}[bru]?(\\*)(["']))(.*?)((?<!\\)\2\3|\Z)""",
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
    {_SCHEME_WORD}
    (?![bru]?\\*["'])                           # quoted: handled above
    (?![{{[(]+(?:[\s"'\\]|\Z))                  # nested: its items have their own names
    # Up to white space, the next parameter, or the end of the enclosing JSON string.
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
        (?!\d{1,5}(?:[/?\#"'<>,;)\s]|\Z))       # not a port
        (?:[^\s/?\#"'<>]{0,300}|[^\s@"'<>]{0,300}+)       # password; may contain a slash
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
        (?![A-Z]?[a-z]{1,15}(?:[^\w+/=-]|\Z))              # a word is not base64
        [\w+/-]{6,}=*
    """,
    re.VERBOSE,
)
# Each pattern consumes a complete word, secret or not, which the functions below decide:
# otherwise text such as `hf_hf_hf_…` would be scanned again from each `hf_`.
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
    """Redact a Hugging Face token, but not names such as hf_checkpoints."""
    word = match[0]
    return REDACTED if _HUB_MARK.search(word) else _HUB_LETTERS.sub(REDACTED, word)


def _hide_jwt(match: re.Match[str]) -> str:
    return REDACTED if match[1] else match[0]


def _hide_bare(match: re.Match[str]) -> str:
    """Redact a bare key, but not a commit hash that is labeled as one."""
    before = match.string[max(0, match.start() - 24) : match.start()]
    is_hash = _SHA1.fullmatch(match[0]) and _HASH_BEFORE.search(before)
    return match[0] if is_hash else REDACTED


# -- all together ------------------------------------------------------------------------------

_DEEPEST: Final = 12


def redact(text: str) -> str:
    """Replace everything in `text` that is known to be a secret or looks like one.

    Runs in linear time. Text longer than 64 Ki characters is truncated, with a note.
    """
    if len(text) <= _LONGEST:
        return _redacted(text)
    margin = max(
        _MARGIN, 12 * max(map(len, _known), default=0)
    )  # a character may be quoted as `%2525xx`
    kept = _redacted(text[:_LONGEST])[:-margin]
    return f"{kept} … [truncated: {len(text)} characters]"


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
    """Convert a value of any type to plain data with secrets redacted."""
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
    """Redact the value of a mapping's key."""
    if _SECRET_NAME.search(name):
        is_count = isinstance(value, int | float) and name.lower().endswith("token")
        return value if value is None or isinstance(value, bool) or is_count else REDACTED
    if isinstance(value, str) and _HASH_NAME.search(name) and _SHA1.fullmatch(value):
        return value
    return _cleaned(value, depth + 1)


def _is_header(value: Any) -> bool:
    """Return whether this is a name and its secret value, as in a list of HTTP headers."""
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(part, str | bytes) for part in value)
        # A list of two strings is more likely a list of names.
        and (isinstance(value, tuple) or isinstance(value[0], bytes))
        and _SECRET_NAME.search(_text(value[0])) is not None
    )


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except Exception as error:  # logging must not fail because of a broken repr
        return f"<{type(value).__name__}: {type(error).__name__}>"
