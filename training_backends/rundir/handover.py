"""What a child process receives (standard library only: a queued one loads no more)."""

import os
import re
from typing import Final

__all__ = ["KEYS_ON_STDIN", "ON_STDIN", "is_secret_name", "safe_environment"]

ON_STDIN: Final = "HF_TOKEN_ON_STDIN"
"""Environment variable; if set, the first line of standard input is the Hub token."""

KEYS_ON_STDIN: Final = "TRACKER_KEYS_ON_STDIN"
"""Likewise; the next line is a JSON object with the keys of the run's integrations, by number."""

# Allowlist, so that no API key reaches the child: it may run for days, and any process of the
# same user can read its environment.
_PASSED_ON: Final = re.compile(
    r"PATH|HOME|USER|LANG|LC_\w+|TZ|TMPDIR|VIRTUAL_ENV|PYTHON(PATH|HOME|UTF8)|LD_LIBRARY_PATH"
    r"|XDG_CACHE_HOME|HF_(HOME|ENDPOINT|HUB_OFFLINE|HUB_CACHE|HUB_DOWNLOAD_TIMEOUT)"
    r"|CUDA_\w+|NVIDIA_\w+|(OMP|MKL|OPENBLAS)_NUM_THREADS|PYTORCH_\w+"
    r"|(NCCL|GLOO|TORCH|TORCHINDUCTOR|TRITON|HSA|HIP|ROCR|CUBLAS|BNB|UCX|FI|HF_XET)_\w+"
    r"|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE"
    # Without headers of exporters, which may hold a key.
    r"|OTEL_(SERVICE_NAME|TRACES_EXPORTER|EXPORTER_OTLP_(TRACES_)?(ENDPOINT|PROTOCOL))",
    re.IGNORECASE,
)
# Excluded even if allowed above.
_SECRET: Final = re.compile(
    r"(?:\w+_)?(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)", re.IGNORECASE
)


def is_secret_name(name: str) -> bool:
    """Return whether an environment variable has the name of a secret."""
    return _SECRET.fullmatch(name) is not None


def safe_environment() -> dict[str, str]:
    """Return the variables of this process that a child process may have; no secrets."""
    return {
        name: value
        for name, value in os.environ.items()
        if _PASSED_ON.fullmatch(name) and not is_secret_name(name)
    }
