"""Upload a model to the Hugging Face Hub."""

import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any, Final

from anyio import to_thread
from pydantic import SecretStr

from training_backends.core.errors import (
    AuthenticationFailed,
    BackendNotInstalled,
    BackendUnavailable,
    ConfigError,
    PermissionDenied,
    TrainingBackendError,
)
from training_backends.core.logging import redact, register_secret
from training_backends.http.urls import require_private_transport

__all__ = ["push_to_hub", "read_hub_target"]

_TARGET: Final = re.compile(r"hf://([\w.-]{1,96}/[\w.-]{1,96})")
_ENDPOINT: Final = "https://huggingface.co"


def read_hub_target(target: str) -> str:
    """Return the repository that a target names.

    Raises:
        ConfigError: It is not `hf://ORG/NAME`.
    """
    found = _TARGET.fullmatch(target)
    if found is None:
        raise ConfigError(
            f"Invalid target {target!r}.",
            hint="Use hf://ORG/NAME: an organization or user, and the name of a repository.",
        )
    return found[1]


async def push_to_hub(
    directory: Path, repository: str, token: SecretStr, *, private: bool, message: str
) -> str:
    """Upload a directory as one commit, into a repository that is created if necessary.

    Args:
        private: Create a private repository, and reject one that exists and is public.

    Returns:
        The URL of the repository.

    Raises:
        BackendNotInstalled: huggingface_hub is not installed.
        ConfigError: The token would travel unencrypted, or the repository is public.
        AuthenticationFailed: The Hub rejects the token.
        PermissionDenied: The token may not write to the repository.
        BackendUnavailable: The Hub cannot be reached.
    """
    endpoint = os.environ.get("HF_ENDPOINT") or _ENDPOINT
    require_private_transport(endpoint, what="the Hub token")
    register_secret(token)
    # Abandoned if cancelled: without its commit, an upload changes nothing.
    work = partial(_push, directory, repository, endpoint.rstrip("/"), token, message)
    return await to_thread.run_sync(partial(work, private=private), abandon_on_cancel=True)


def _push(
    directory: Path,
    repository: str,
    endpoint: str,
    token: SecretStr,
    message: str,
    *,
    private: bool,
) -> str:
    try:
        from huggingface_hub import HfApi  # noqa: PLC0415  # slow import
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError  # noqa: PLC0415
        from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415
    except ImportError as error:
        raise BackendNotInstalled(
            "push requires huggingface_hub; install training-backends[hf].",
            install="pip install 'training-backends[hf]'",
        ) from error
    if not sys.stderr.isatty():
        disable_progress_bars()
    hub = HfApi(endpoint=endpoint, token=token.get_secret_value())
    try:
        created = hub.create_repo(repository, private=private, exist_ok=True)
        if private:
            _require_private(hub, repository)
        hub.upload_folder(repo_id=repository, folder_path=directory, commit_message=message)
    except HfHubHTTPError as error:
        raise _failure(repository, error.response.status_code, error.server_message) from None
    except HFValidationError as error:
        raise ConfigError(f"Invalid repository {repository!r}: {redact(str(error))}") from None
    except TrainingBackendError:
        raise
    except Exception as error:
        # Of whichever HTTP library; the text may name signed URLs.
        said = redact(f"{type(error).__name__}: {error}").splitlines()[0]
        raise BackendUnavailable(f"Pushing to {repository} failed: {said}") from None
    return str(created)


def _require_private(hub: Any, repository: str) -> None:
    if hub.model_info(repository).private is False:
        raise ConfigError(
            f"The repository {repository} exists and is public.",
            hint="Use --public to push to it, or another name.",
        )


def _failure(repository: str, status: int, message: str | None) -> TrainingBackendError:
    what = f"The Hub rejects the push to {repository} ({status}): {redact(message or 'no reason')}"
    if status == 401:
        return AuthenticationFailed(
            what, hint="Store a valid token: training-backends credentials set huggingface"
        )
    if status in {403, 404}:
        return PermissionDenied(what, hint="The token needs the write permission there.")
    if status < 500 and status not in {408, 429}:
        return ConfigError(what)
    return BackendUnavailable(what)
