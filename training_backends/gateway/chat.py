"""Chat with base models and fine-tuned models: a reverse proxy to an inference server."""

import shutil
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Final
from uuid import uuid4

import anyio
import sqlalchemy as sa
from anyio import to_thread
from anyio.abc import TaskGroup
from pydantic import BaseModel, Field, SecretStr

from training_backends.backends.local.backend import LocalBackend
from training_backends.backends.local.interpreter import THIS_INTERPRETER, Interpreter
from training_backends.backends.local.validate import find_directory
from training_backends.core.backend import TrainingBackend
from training_backends.core.config import TINY_MODEL
from training_backends.core.errors import (
    BackendUnavailable,
    ConfigError,
    ProtocolError,
    RateLimited,
    RunNotFound,
    TrainingBackendError,
)
from training_backends.core.files import make_private_directory
from training_backends.core.logging import get_logger
from training_backends.gateway.catalogue import Catalogue, Offer
from training_backends.gateway.checkpoint_models import (
    CheckpointModel,
    CheckpointModels,
    job_of_key,
    jobs_in,
)
from training_backends.gateway.external import ExternalServer, Find, Merge, Seen
from training_backends.gateway.inference import InferenceServers, can_serve, inference_policy
from training_backends.gateway.jobstore import OWNER, begins_with
from training_backends.gateway.keys import Principal
from training_backends.gateway.model_use import ModelUse
from training_backends.gateway.settings import GatewaySettings
from training_backends.gateway.store import GatewayStore
from training_backends.gateway.weights import WeightService
from training_backends.http.client import HttpClient
from training_backends.http.urls import normalize_base_url
from training_backends.rundir.handover import safe_environment
from training_backends.store.gateway_schema import jobs, models
from training_backends.store.runs import among

__all__ = [
    "Abilities",
    "ChatProblem",
    "ChatRequest",
    "ChatService",
    "InferenceModel",
    "find_interpreter",
]

log = get_logger()

_RETRY_AFTER: Final = 2
"""Seconds after which a chat may be answered that could not be now."""
_JOB_DIGITS: Final = 8
"""Characters of the job id at the end of a model name, see `jobstore`."""

_ANSWERED: Final = frozenset(
    {
        *("model", "messages", "stream", "tools", "temperature", "top_p", "stop", "seed"),
        *("max_tokens", "max_completion_tokens", "frequency_penalty", "logit_bias"),
    }
)
"""Fields that `transformers serve` 5.23 applies (its chat_completion.py, 2026-11-30). Others it
ignores, or reads as file names, templates or generation options of any kind.
"""
_WITHOUT_EFFECT: Final = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "stream_options", "safe_prompt"),
        *("prompt_cache_key", "safety_identifier", "parallel_tool_calls", "verbosity"),
    }
)
"""Fields that do not change what a model answers, or only what it may."""
_DEFAULTS: Final[Mapping[str, Any]] = {
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "presence_penalty": 0,
    "tool_choice": "auto",
    "response_format": {"type": "text"},
}


class ChatProblem(Exception):
    """A chat that is not answered.

    Attributes:
        status: HTTP status.
        sentence: What is wrong.
        field: Field of the request that it is about.
        code: Machine-readable reason, as OpenAI names it.
    """

    def __init__(
        self, status: int, sentence: str, *, field: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
        self.field = field
        self.code = code

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response: when to retry, if that can help."""
        return {"retry-after": str(_RETRY_AFTER)} if self.status in {429, 503} else {}


class ChatRequest(BaseModel, extra="allow"):
    """The fields of a chat that the gateway reads; others are passed on."""

    model: Annotated[str, Field(min_length=1, max_length=300)]
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    stream: bool | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    stop: str | list[str] | None = None
    tools: list[dict[str, Any]] | None = None

    def fields(self) -> dict[str, Any]:
        """Return the fields that are set."""
        given = self.model_dump(exclude_unset=True)
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceModel:
    """A model on an inference server.

    Attributes:
        name: Its name there.
        is_embedded: Whether the server is `transformers serve`.
    """

    client: HttpClient
    name: str
    is_embedded: bool

    def body(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the request for this server.

        Raises:
            ChatProblem: The server cannot do what a field asks for.
        """
        body = dict(fields) | {"model": self.name}
        return _for_transformers(body) if self.is_embedded else body


def _for_transformers(body: dict[str, Any]) -> dict[str, Any]:
    if body.get("tool_choice") == "none":
        del body["tool_choice"]
        body.pop("tools", None)
    for name, value in list(body.items()):
        if name in _WITHOUT_EFFECT or (name in _DEFAULTS and value == _DEFAULTS[name]):
            del body[name]
        elif name not in _ANSWERED:
            raise ChatProblem(
                400,
                f"The inference server of this gateway does not support {name}"
                + (f" other than {_DEFAULTS[name]!r}." if name in _DEFAULTS else "."),
                field=name,
                code="unsupported_parameter",
            )
    for message in body["messages"]:
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        # Parts of other kinds name URLs and files that the server would open.
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
            raise ChatProblem(400, "Messages can only contain text.", field="messages")
    return body


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """Which models could answer at some moment.

    Attributes:
        runs: Directory of the runs whose models can be loaded, if there is a server for them.
        seen: What the server in the settings has, if there is one.
    """

    runs: Path | None = None
    seen: Seen | None = None

    def has(self, offer: Offer) -> bool:
        """Return whether a base model can answer. Blocking."""
        if self.seen is not None:
            return self._is_there(offer.target)
        if self.runs is None:
            return False
        return offer.target == TINY_MODEL or find_directory(offer.target) is not None

    def has_result(self, job_id: str, name: str) -> bool:
        """Return whether a fine-tuned model can answer. Blocking."""
        weights = self.runs / job_id / "result" if self.runs else None
        if self.seen is None:
            return weights is not None and weights.is_dir()
        adapter = weights / "adapter_config.json" if weights and self.seen.loads else None
        return self._is_there(name) or (adapter is not None and adapter.exists())

    def has_checkpoint(self, name: str) -> bool:
        """Return whether a checkpoint can answer; it is written when it is first asked."""
        return self._is_there(name) if self.seen is not None else self.runs is not None

    def _is_there(self, name: str) -> bool:
        if self.seen is None or self.seen.failure is not None:
            return False
        return self.seen.names is None or name in self.seen.names


class ChatService:
    """Finds the inference server of a model.

    Args:
        root: The gateway's home.
        tasks: Runs the servers.
    """

    def __init__(
        self,
        store: GatewayStore,
        tasks: TaskGroup,
        checkpoints: CheckpointModels,
        *,
        interpreter: Interpreter | None,
        catalogue: Catalogue,
        weights: WeightService,
        use: ModelUse,
        settings: GatewaySettings,
        root: Path,
    ) -> None:
        self._store = store
        self._use = use
        self._checkpoints = checkpoints
        self._catalogue = catalogue
        self._weights = weights
        self._timeout = settings.inference_timeout
        self._limit = settings.inference_requests
        self._open = 0
        self._merges = root / "inference" / "models"
        self._preparing: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)
        policy = inference_policy(self._timeout, self._limit)
        self._external: ExternalServer | None = None
        self._servers: InferenceServers | None = None
        self._runs = root / "runs"
        self._interpreter = interpreter or THIS_INTERPRETER
        if settings.inference_url is not None:
            key = settings.inference_api_key
            self._external = ExternalServer(
                HttpClient(
                    normalize_base_url(settings.inference_url),
                    key=_source(key) if key else None,
                    policy=policy,
                )
            )
        elif interpreter is not None:
            self._servers = InferenceServers(
                tasks,
                interpreter=interpreter,
                logs=root / "inference" / "logs",
                limit=settings.inference_models,
                idle=settings.inference_idle,
                policy=policy,
                options=settings.inference_options,
            )

    @property
    def is_available(self) -> bool:
        """Whether models of this gateway can answer."""
        return self._external is not None or self._servers is not None

    async def aclose(self) -> None:
        """Close the connections to the server in the settings."""
        if self._external is not None:
            await self._external.aclose()

    async def abilities(self) -> "Abilities":
        """Return which models can answer now."""
        if self._external is not None:
            return Abilities(runs=self._runs, seen=await self._external.look())
        return Abilities(runs=self._runs if self._servers is not None else None)

    @asynccontextmanager
    async def asking(self, name: str, caller: Principal) -> AsyncIterator[InferenceModel]:
        """Yield a model on its inference server, for one chat.

        Raises:
            ChatProblem: There is no such model, it cannot answer, or the chat fails.
        """
        if self._open >= self._limit:
            raise ChatProblem(
                429,
                f"Too many chats at a time; the limit is {self._limit}. Retry later.",
                code="rate_limit_exceeded",
            )
        self._open += 1
        try:
            with anyio.fail_after(self._timeout):
                async with self._found(name, caller) as found:
                    yield found
        except TimeoutError:
            raise ChatProblem(
                503, f"The model did not answer within {self._timeout:g} s."
            ) from None
        except TrainingBackendError as error:
            if self._external is not None:
                self._external.doubt()
            raise _problem(error) from error
        finally:
            self._open -= 1

    @asynccontextmanager
    async def _found(self, name: str, caller: Principal) -> AsyncIterator[InferenceModel]:
        offer = self._catalogue.get(name)
        checkpoint = None if offer else await self._checkpoints.find(name, caller)
        job_id = None
        if checkpoint is not None:
            _require_completion(name, checkpoint.job.job_type)
        elif offer is None:
            job_id = await self._store.aread(lambda c: _job_of(c, name, caller))
        if not self.is_available:
            raise ChatProblem(
                404,
                f"The model {name!r} exists, but this gateway has no inference server. Install "
                "training-backends[serving], or set TRAINING_BACKENDS_GATEWAY__INFERENCE_URL.",
                code="model_not_found",
            )
        if checkpoint is not None:
            find: Find = partial(self._checkpoints.path, checkpoint)
            complete: Merge = partial(self._checkpoint, checkpoint)
        else:
            find = partial(self._weights.directory, str(job_id))
            complete = partial(self._result, str(job_id), name)
        if checkpoint is not None:
            await self._use.mark(checkpoint.job.id, checkpoint.point.step)
        elif job_id is not None:
            await self._use.mark(job_id)
        if self._external is not None:
            there = self._external
            target = offer.target if offer else await there.name_of(name, find, complete)
            yield InferenceModel(client=there.client, name=target, is_embedded=False)
            return
        assert self._servers is not None  # noqa: S101  # it is available
        directory = await (self._base(offer) if offer else complete())
        async with self._servers.using(directory) as client:
            yield InferenceModel(client=client, name=".", is_embedded=True)

    async def _checkpoint(self, checkpoint: CheckpointModel) -> Path:
        return await self._plain(await self._checkpoints.path(checkpoint), checkpoint.key)

    async def _base(self, offer: Offer) -> Path:
        if offer.target == TINY_MODEL:
            return await self._merged(TINY_MODEL, TINY_MODEL)
        directory = await to_thread.run_sync(find_directory, offer.target)
        if directory is None:
            raise ChatProblem(
                404,
                f"The weights of {offer.name!r} are not on the machine of this gateway. Train it "
                f"once, or download them: hf download {offer.target}",
                code="model_not_found",
            )
        # Not by its name, which may be another model's after a restart; see `sweep`.
        return await self._plain(directory, f"base-{sha256(bytes(directory)).hexdigest()[:16]}")

    async def _result(self, job_id: str, name: str) -> Path:
        path = await self._weights.directory(job_id)
        if path is None:
            raise ChatProblem(
                404,
                f"The weights of {name!r} are not on the machine of this gateway.",
                code="model_not_found",
            )
        return await self._plain(path, job_id)

    async def _plain(self, directory: Path, key: str) -> Path:
        """Return a directory with a complete model: this one, or where its adapter is merged."""
        if not await anyio.Path(directory / "adapter_config.json").exists():
            return directory
        return await self._merged(str(directory), key)

    async def _merged(self, model: str, key: str) -> Path:
        """Return the directory into which a model is merged, once."""
        target = self._merges / key
        async with self._preparing[key]:
            if await anyio.Path(target).is_dir():
                return target
            await to_thread.run_sync(make_private_directory, self._merges)
            partly = self._merges / f".{uuid4()}"
            try:
                await _merge(model, partly, self._interpreter)
                await anyio.Path(partly).rename(target)
            finally:
                with anyio.CancelScope(shield=True):
                    await to_thread.run_sync(_remove, partly)
        return target

    async def forget(self, job_id: str, name: str) -> None:
        """Stop the server of a fine-tuned model that is deleted, and remove its weights."""
        paths = await self.paths(job_id)
        if self._external is not None:
            await self._external.forget(name)
        if self._servers is not None:
            weights = await self._weights.directory(job_id)
            written = await self._checkpoints.paths(job_id)
            for directory in (*paths, *written, *([weights] if weights else [])):
                await self._servers.stop(directory)
        for merged in paths:
            await to_thread.run_sync(_remove, merged)

    async def forget_checkpoint(self, key: str, name: str, written: Path) -> None:
        """Stop the server of a checkpoint that is deleted, and remove its merged weights.

        Args:
            key: See `CheckpointModel.key`.
            name: Name of its model.
            written: Directory of its model, which may not exist.
        """
        if self._external is not None:
            await self._external.forget(name, exactly=True)
        merged = self._merges / key
        if self._servers is not None:
            for directory in (merged, written):
                await self._servers.stop(directory)
        await to_thread.run_sync(_remove, merged)

    async def paths(self, job_id: str) -> list[Path]:
        """Return the directories in which models of a job are merged."""
        return await to_thread.run_sync(lambda: [*self._merges.glob(f"{job_id}*")])

    async def sweep(self) -> None:
        """Remove incomplete merges, those of deleted models, and those of base models."""
        found = await to_thread.run_sync(jobs_in, self._merges)
        query = sa.select(models.c.job_id).where(models.c.deleted_at.is_(None))
        kept = await self._store.aread(
            lambda connection: {
                row.job_id for row in among(connection, query, models.c.job_id, found)
            }
        )
        await to_thread.run_sync(_sweep, self._merges, {TINY_MODEL, *kept})


def find_interpreter(backend: TrainingBackend) -> Interpreter | None:
    """Return the Python environment that can serve the models of a backend. Blocking."""
    if isinstance(backend, LocalBackend) and can_serve(backend.interpreter):
        return backend.interpreter
    return None


def _sweep(directory: Path, kept: set[str]) -> None:
    for path in directory.glob("*") if directory.is_dir() else ():
        if path.name not in kept and job_of_key(path.name) not in kept:
            _remove(path)


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)


async def _merge(model: str, target: Path, interpreter: Interpreter) -> None:
    done = await anyio.run_process(
        interpreter.command("merge", model, str(target)),
        check=False,
        env=interpreter.variables(safe_environment()) | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        log.error("model not merged", model=model, reason=said)
        raise ChatProblem(503, "The model could not be loaded; see the log of the gateway.")


def _source(key: SecretStr) -> Any:
    async def source() -> SecretStr:
        return key

    return source


def _job_of(connection: sa.Connection, name: str, caller: Principal) -> str:
    """Return the id of the job of a fine-tuned model that can answer.

    Raises:
        ChatProblem: It does not exist, with the state of its job if there is one.
    """
    visible = [models.c.deleted_at.is_(None), caller.sees(models.c.project)]
    row = connection.execute(models.select().where(models.c.id == name, *visible)).first()
    if row is None:
        raise _unknown(connection, name, caller)
    _require_completion(name, row.model_type)
    return str(row.job_id)


def _require_completion(name: str, kind: str) -> None:
    if kind == "classifier":
        raise ChatProblem(
            400, f"The model {name!r} is a classifier; it does not chat.", field="model"
        )


def _unknown(connection: sa.Connection, name: str, caller: Principal) -> ChatProblem:
    sentence = f"The model {name!r} does not exist."
    digits = name.rpartition(":")[2][:36]
    if len(digits) >= _JOB_DIGITS:
        found = sa.select(jobs.c.id, jobs.c.status, jobs.c.fine_tuned_model).where(
            begins_with(digits), caller.sees(OWNER)
        )
        job = connection.execute(found).first()
        if job is not None and job.fine_tuned_model is None:
            sentence = f"{sentence[:-1]}: its job {job.id} is {job.status}."
        elif job is not None and job.fine_tuned_model != name:
            sentence += f" The model of job {job.id} is {job.fine_tuned_model!r}."
        elif job is not None:
            sentence = f"The model {name!r} has been deleted."
    return ChatProblem(404, sentence, code="model_not_found")


def _problem(error: TrainingBackendError) -> ChatProblem:
    """Return what a client learns of a failure between the gateway and its inference server."""
    if isinstance(error, ConfigError):
        return ChatProblem(400, error.message)
    if isinstance(error, RateLimited):
        return ChatProblem(429, "The inference server is busy.", code="rate_limit_exceeded")
    log.error("chat failed", reason=error.message)
    if isinstance(error, BackendUnavailable):
        return ChatProblem(503, "The inference server is unavailable; retry the request.")
    if isinstance(error, RunNotFound):
        return ChatProblem(
            404, "The inference server does not have this model.", code="model_not_found"
        )
    what = "sent no valid response" if isinstance(error, ProtocolError) else "rejected the request"
    return ChatProblem(502, f"The inference server {what}.")
