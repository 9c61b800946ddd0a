"""One launch: upload, check, quote, create; each step exactly once.

A job starts as soon as it is created, and create requests have no idempotency key. So a job's
suffix ends with a random token of its run, by which a job whose create response was lost is found
in the list. Nobody else has the token: a second job with it is ours too, and is cancelled.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import SecretStr

from training_backends.backends.together.api import TogetherAPI, require_usable
from training_backends.backends.together.job_log import state_of
from training_backends.backends.together.job_request import make_body, make_suffix
from training_backends.backends.together.settings import TogetherSettings
from training_backends.backends.together.status import to_status
from training_backends.backends.together.wire import FineTune, JobPrice
from training_backends.core.backend import CredentialSource, Journal, JSONValue
from training_backends.core.backoff import Backoff
from training_backends.core.config import DataSource, TrainingConfig
from training_backends.core.errors import BudgetExceeded, RunNotFound
from training_backends.core.estimate import CostItem, Estimate, Money, PriceSource
from training_backends.core.logging import get_logger
from training_backends.core.persist import TRIES, persist, poll, settle
from training_backends.core.run import RunState, TrainingRun, utc_now
from training_backends.core.status import TrainingStatus
from training_backends.http.upload import hash_file

__all__ = ["TogetherLaunch", "file_name", "price_estimate", "require_allowed", "wandb_fields"]

_CREATES: Final = 3
"""Maximum create requests per launch."""

_T = TypeVar("_T")

log = get_logger()


@dataclass(slots=True, kw_only=True)
class TogetherLaunch:
    """One launch.

    Attributes:
        from_checkpoint: Where to continue from: `JOB_ID:STEP`; None: the base model.
    """

    api: TogetherAPI
    settings: TogetherSettings
    credentials: CredentialSource
    run: TrainingRun
    journal: Journal
    from_checkpoint: str | None = None
    _suffix: str = ""
    _body: dict[str, Any] = field(default_factory=dict)
    _hidden: tuple[SecretStr, ...] = ()
    _lost: bool = False
    """Whether an earlier create request may have created a job, too."""

    async def launch(self) -> RunState:
        """Launch, or continue an interrupted launch."""
        job_id = self.run.remote_id
        if job_id is None:
            job_id = await self._create_job()
            await self.journal.record(RunState(status=TrainingStatus.PENDING, remote_id=job_id))
        return state_of(await self._persist(partial(self.api.job, job_id)))

    async def _create_job(self) -> str:
        config = self.run.config
        self._suffix = make_suffix(config.suffix, await self.journal.token("suffix"))
        train = await self._file_id(config.data.train[0])
        validation = config.data.validation
        self._body = make_body(
            config,
            training_file=train,
            validation_file=await self._file_id(validation[0]) if validation else None,
            suffix=self._suffix,
            from_checkpoint=self.from_checkpoint,
        )
        # A step, so that a launch that continues does not ask for consent again.
        await self.journal.step("quote", self._quote, repeatable=True)
        tracking = await wandb_fields(config, self.credentials)
        self._hidden = tuple(SecretStr(tracking[name]) for name in tracking if name == "wandb_key")
        self._body |= tracking
        create = partial(self.journal.step, "create", self._create, self._find)
        created: Any = await self._persist(create, tries=_CREATES)
        await self._cancel_twins(created["job"], resent=created["resent"])
        return str(created["job"])

    async def _persist(self, act: Callable[[], Awaitable[_T]], *, tries: int = TRIES) -> _T:
        within = self.settings.call_timeout
        return await persist(act, tries=tries, within=within, pauses=self._pauses())

    def _pauses(self) -> Backoff:
        return Backoff(self.settings.poll_min, self.settings.longest_poll, factor=1.4)

    # -- files -------------------------------------------------------------------------

    async def _file_id(self, source: DataSource) -> str:
        """Return the id of a file that Together has checked.

        Raises:
            DatasetError: Together rejected it.
            WaitTimeout: It was not checked in time; repeat the launch to continue.
        """
        file_id = source.remote_id or await self._upload(source.local_path)
        await poll(
            partial(self.api.file, file_id),
            require_usable,
            within=self.settings.file_timeout,
            what=f"the check of file {source}",
            pauses=self._pauses(),
        )
        return file_id

    async def _upload(self, path: Path) -> str:
        hashed = await hash_file(path)

        def progress(done: int, total: int) -> None:
            self.journal.progress(f"upload {path.name}", done, total)

        async def has(file_id: str) -> bool:
            try:
                return (await self.api.file(file_id)).bytes in {None, hashed.size}
            except RunNotFound:
                return False

        async def find() -> None:
            return None  # uploading again finds it by its checksum

        name = file_name(path, hashed.sha256)
        upload = partial(self.api.upload, path, name, hashed, progress)
        return await self._persist(
            partial(self.journal.upload, self.settings.scope, hashed.sha256, upload, find, has)
        )

    # -- price -------------------------------------------------------------------------

    async def _quote(self) -> JSONValue:
        price = await self._persist(partial(self.api.price, self._body))
        require_allowed(price)
        await self.journal.quote(price_estimate(price))
        return {"price": price.estimated_total_price}

    # -- job ---------------------------------------------------------------------------

    async def _create(self) -> JSONValue:
        job = await self.api.create(self._body, self._hidden)
        return {"job": job.id, "resent": self._lost}

    async def _find(self) -> JSONValue:
        """Look for our job until a late create request would have created it."""
        self._lost = True

        async def look() -> JSONValue:
            ours = await self._persist(self._ours)
            return {"job": ours[0].id, "resent": False} if ours else None

        return await settle(look, within=self.settings.settling, pauses=self._pauses())

    async def _ours(self) -> list[FineTune]:
        """Return the jobs of this run, oldest first."""
        ours = [job for job in await self.api.jobs() if job.has_suffix(self._suffix)]
        return sorted(ours, key=lambda job: (job.created_at is None, job.created_at, job.id))

    async def _cancel_twins(self, job_id: str, *, resent: bool) -> None:
        """Cancel further jobs of this run, which a proxy may have created late or twice.

        Args:
            resent: An earlier create request may still take effect.
        """
        act = partial(self._persist, partial(self._cancel_all_but, job_id))
        await act()
        if resent:
            await settle(act, within=self.settings.settling, pauses=self._pauses())

    async def _cancel_all_but(self, job_id: str) -> None:
        for job in await self._ours():
            status = to_status(job.status)
            ending = status.is_terminal or status is TrainingStatus.STOPPING
            if job.id != job_id and not ending:
                log.warning("cancelling a second job of the run", job=job.id, run_id=self.run.id)
                await self.api.cancel(job.id)


async def wandb_fields(config: TrainingConfig, credentials: CredentialSource) -> dict[str, str]:
    """Return the fields of a create request for Weights & Biases, with the key.

    Raises:
        CredentialNotFound: The key that the configuration names does not exist.
    """
    for entry in config.wandb:
        provider, _, profile = entry.credential.partition("/")
        key = (await credentials.get(provider, profile or None)).get_secret_value()
        name = entry.run_name or entry.name
        named = {"wandb_name": name, "wandb_entity": entry.entity}
        given = {field: value for field, value in named.items() if value is not None}
        return {"wandb_key": key, "wandb_project_name": entry.project, **given}
    return {}


def file_name(path: Path, sha256: str) -> str:
    """Return a file's name at Together, which tells its content."""
    return f"{path.stem[:80]}-{sha256[:16]}.jsonl"


def price_estimate(price: JobPrice) -> Estimate:
    """Return Together's price as a quote."""
    tokens = price.estimated_train_token_count
    notes: tuple[str, ...] = ()
    costs: tuple[CostItem, ...] = ()
    if price.estimation_available and price.estimated_total_price is not None:
        amount = Money(amount=Decimal(str(price.estimated_total_price)), currency="USD")
        source = PriceSource(name="Together, estimate-price", as_of=utc_now().date())
        costs = (CostItem(name="training", amount=amount, source=source),)
    else:
        reason = price.unavailable_reason or "no reason given"
        notes = (f"Cost unknown: Together has no price for this job ({reason}).",)
    return Estimate(
        train_tokens=None if tokens is None else round(tokens),
        costs=costs,
        basis="quote",
        notes=notes,
    )


def require_allowed(price: JobPrice) -> None:
    """Check that the account may start the job.

    Raises:
        BudgetExceeded: The price exceeds its limit.
    """
    if price.is_allowed:
        return
    found = _dollars(price.estimated_total_price)
    limit = _dollars(price.user_limit)
    raise BudgetExceeded(
        f"Together does not allow this run: it would cost {found}, and the account's limit is "
        f"{limit}.",
        hint="Add credits at Together, or train on fewer tokens.",
        limit=limit,
        found=found,
        backend="together",
    )


def _dollars(amount: float | None) -> str:
    return "an unknown amount" if amount is None else f"{amount:.2f} USD"
