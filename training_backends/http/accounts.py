"""What all clients of this process know together of one account at one server."""

import hashlib
from functools import lru_cache
from threading import Lock

from pydantic import SecretStr

from training_backends.http.breaker import Breaker
from training_backends.http.limits import Limiter

__all__ = ["Account", "account_of"]


class Account:
    """Limits and failures of one account."""

    def __init__(self) -> None:
        self.limiter = Limiter()
        self.breaker = Breaker()


def account_of(base_url: str, key: SecretStr | None) -> Account:
    """Return the account that this process has for a key at a server; one for all callers."""
    digest = "" if key is None else hashlib.sha256(key.get_secret_value().encode()).hexdigest()
    with _making:
        return _account(base_url, digest)


# State of the module, for a limit is the server's and not a client's: two clients with one key
# share it, also when one comes after the other. A client keeps its own, however many there are.
_making = Lock()


@lru_cache(maxsize=64)
def _account(base_url: str, digest: str) -> Account:
    del base_url, digest
    return Account()
