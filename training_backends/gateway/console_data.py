"""What the console shows of a data file: its inspection, and the tokens that are trained on."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import msgspec
from anyio import to_thread

from training_backends.core.config import Data, DataSource, Hyperparameters, TrainingConfig
from training_backends.core.data_rules import ProviderFormat
from training_backends.core.errors import ConfigError, DatasetError, Issue, TrainingBackendError
from training_backends.datasets.inspect import inspect_files
from training_backends.gateway.catalogue import Offer
from training_backends.gateway.errors import plain
from training_backends.gateway.files import StoredFile
from training_backends.gateway.uploads import BlobStore
from training_backends.tokens.preview import PreviewExample, preview

__all__ = ["DataLook"]

MOST_ISSUES: Final = 200
MOST_TOKENS: Final = 2048
"""Tokens of an example to show."""


class DataLook:
    """Reads data files for people, a few at a time.

    Args:
        cache: Directory of kept inspections, shared with the client.
        blobs: Where the files are.
    """

    def __init__(self, cache: Any, blobs: BlobStore) -> None:
        self._cache = cache
        self._blobs = blobs
        self._limiter = anyio.CapacityLimiter(2)

    async def inspection(self, file: StoredFile, provider_format: ProviderFormat) -> dict[str, Any]:
        """Return statistics and issues of a file by the rules of the gateway's backend."""
        path = await to_thread.run_sync(self._blobs.local, file.sha256, limiter=self._limiter)
        read = partial(
            inspect_files,
            [DataSource(path=path)],
            provider_format=provider_format,
            cache=self._cache,
        )
        found = await to_thread.run_sync(read, limiter=self._limiter)
        issues = sorted(found.issues, key=lambda issue: issue.severity)
        shown: dict[str, Any] = {
            "issues": [_issue(issue, path, file) for issue in issues[:MOST_ISSUES]],
            "more_issues": max(0, len(issues) - MOST_ISSUES),
            "errors": len(found.errors),
        }
        for inspected in found.files:
            summary = msgspec.to_builtins(inspected.summary.model_dump())
            shown |= {
                "rows": inspected.rows,
                "bad_rows": inspected.bad_rows,
                "turns": inspected.turns,
                "sample_type": inspected.sample_type,
                "summary": summary,
            }
        return shown

    async def preview(
        self, file: StoredFile, offer: Offer, *, method: str, rows: int, seq_len: int | None
    ) -> list[dict[str, Any]]:
        """Return the first rows of a file as the trainer encodes them.

        Raises:
            HTTPProblem: The model's tokenizer is not here, or the file cannot be read.
        """
        path = await to_thread.run_sync(self._blobs.local, file.sha256, limiter=self._limiter)
        config = TrainingConfig(
            model=offer.target,
            method=method,
            data=Data(train=(DataSource(path=path),)),
            hyperparameters=Hyperparameters(**({"seq_len": seq_len} if seq_len else {})),
        )
        # More than fits on a page is encoded no further than it is shown.
        limit = min(seq_len or MOST_TOKENS, MOST_TOKENS)
        try:
            found = await to_thread.run_sync(
                lambda: list(preview(config, rows=rows, seq_len=limit)), limiter=self._limiter
            )
        except (ConfigError, DatasetError) as error:
            raise plain(422, _sentence(error, path, file)) from error
        except TrainingBackendError as error:
            raise plain(503, _sentence(error, path, file)) from error
        return [_example(example, limit) for example in found]


def _issue(issue: Issue, path: Path, file: StoredFile) -> Mapping[str, Any]:
    return {
        "severity": issue.severity,
        "code": issue.code,
        "line": issue.line,
        "field": issue.field,
        "message": issue.message.replace(str(path), file.filename),
        "fix": issue.fix and issue.fix.replace(str(path), file.filename),
    }


def _sentence(error: TrainingBackendError, path: Path, file: StoredFile) -> str:
    issues = error.issues if isinstance(error, ConfigError | DatasetError) else ()
    reasons = [f"{issue.message} ({issue.fix})" if issue.fix else issue.message for issue in issues]
    text = ": ".join([error.message.rstrip("."), *reasons[:1]])
    return text.replace(str(path), file.filename)


def _example(example: PreviewExample, limit: int) -> dict[str, Any]:
    return {
        "line": example.line,
        "example": example.example,
        "examples": example.examples,
        "part": example.part,
        "segments": [
            {"text": part.text, "trained": part.trained, "tokens": part.tokens}
            for part in example.segments
        ],
        "tokens": example.tokens,
        "trained_tokens": example.trained_tokens,
        "truncated": example.truncated,
        "limit": limit,
        "reason": example.reason,
    }
