"""Base models and fine-tuned models of the gateway."""

import time
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from anyio import to_thread

from training_backends.client.client import AsyncTrainingClient
from training_backends.core.config import TINY_MODEL, Tuning
from training_backends.core.errors import RunNotFound, TrainingBackendError
from training_backends.core.logging import get_logger
from training_backends.gateway.catalogue import Catalogue, Offer
from training_backends.gateway.chat import Abilities, ChatService
from training_backends.gateway.checkpoint_models import CheckpointModel, CheckpointModels
from training_backends.gateway.errors import not_found, plain
from training_backends.gateway.jobstore import (
    base_model,
    checkpoint_name,
    keep_history,
    model_name,
)
from training_backends.gateway.keys import Principal
from training_backends.gateway.model_use import ModelUse
from training_backends.gateway.store import GatewayStore
from training_backends.gateway.weights import WeightService
from training_backends.protocols.mistral.status import METHODS
from training_backends.protocols.mistral.wire import (
    ArchiveFTModelOut,
    BaseModelCard,
    ClassifierFTModelOut,
    CompletionFTModelOut,
    DeleteModelOut,
    FTModelCapabilitiesOut,
    FTModelCard,
    ModelCapabilities,
    UnarchiveFTModelOut,
    UpdateFTModelIn,
)
from training_backends.store.gateway_schema import models

__all__ = ["ModelService"]

log = get_logger()

_PAGE: Final = 500
"""Models per transaction, and per part of a response."""

FTModelOut = CompletionFTModelOut | ClassifierFTModelOut


class ModelService:
    """Base models of the catalogue and fine-tuned models of this gateway.

    `fine_tuning` and `classification` say what a model can be trained for, or was trained for;
    `completion_chat` whether it answers chats now.
    """

    def __init__(
        self,
        store: GatewayStore,
        client: AsyncTrainingClient,
        *,
        backend: str,
        catalogue: Catalogue,
        organization_id: str,
        opened_at: float,
        weights: WeightService,
        chat: ChatService,
        checkpoints: CheckpointModels,
        use: ModelUse,
    ) -> None:
        self._store = store
        self._client = client
        self._backend = backend
        self._catalogue = catalogue
        self._organization_id = organization_id
        self._opened_at = int(opened_at)
        self._weights = weights
        self._chat = chat
        self._checkpoints = checkpoints
        self._use = use

    async def pages(
        self, caller: Principal, *, provider: str | None = None, model: str | None = None
    ) -> AsyncGenerator[Sequence[BaseModelCard | FTModelCard], None]:
        """Yield base models first, then pages of fine-tuned ones, newest first.

        Args:
            provider: Filter by owner.
            model: Filter by id.
        """
        can = await self._chat.abilities()
        cards = await to_thread.run_sync(
            lambda: [self._base_card(offer, can) for offer in self._offers()]
        )
        yield [
            card for card in cards if provider in {None, card.owned_by} and model in {None, card.id}
        ]
        if provider not in {None, self._organization_id}:
            return
        mine = _visible(caller) if model is None else [*_visible(caller), models.c.id == model]
        query = sa.select(models).where(*mine)
        query = query.order_by(models.c.created_at.desc(), models.c.id.desc()).limit(_PAGE)
        place = sa.tuple_(models.c.created_at, models.c.id)
        rows: Sequence[Any] = []
        while not rows or len(rows) == _PAGE:
            after = query.where(place < (rows[-1].created_at, rows[-1].id)) if rows else query
            rows = await self._store.aread(partial(_rows, after))
            if not rows:
                return
            yield await to_thread.run_sync(partial(self._cards, rows, can))

    def _cards(self, rows: Sequence[Any], can: Any) -> Sequence[FTModelCard]:
        return [self._card(row, can) for row in rows]

    async def retrieve(self, model_id: str, caller: Principal) -> BaseModelCard | FTModelCard:
        """Return one model.

        Raises:
            HTTPProblem: There is no such model.
        """
        for offer in self._offers():
            if offer.name == model_id:
                can = await self._chat.abilities()
                return await to_thread.run_sync(self._base_card, offer, can)
        if checkpoint := await self._checkpoints.find(model_id, caller):
            can = await self._chat.abilities()
            return self._checkpoint_card(model_id, checkpoint, can)
        row = await self._store.aread(lambda c: self._row(c, model_id, caller))
        return await to_thread.run_sync(self._card, row, await self._chat.abilities())

    async def offer(self, name: str, caller: Principal) -> Offer | None:
        """Return a fine-tuned model or a checkpoint as what a job can start from, or None.

        It counts as used now, so that retention keeps it until the job is stored.
        """
        query = models.select().where(models.c.id == name, *_visible(caller))
        row = await self._store.aread(lambda connection: connection.execute(query).first())
        if row is not None:
            await self._use.mark(row.job_id)
            kind, length, target = row.model_type, row.context_length, None
            with suppress(RunNotFound):
                target = (await self._client.get(row.job_id)).result_model
        elif checkpoint := await self._checkpoints.find(name, caller):
            await self._use.mark(checkpoint.job.id, checkpoint.point.step)
            kind, length = checkpoint.job.job_type, checkpoint.job.context_length
            target = str(await self._checkpoints.path(checkpoint))
        else:
            return None
        if target is None:
            return None
        base = self._catalogue.get(base_model(name))
        tuning = base.tuning if base else None
        if tuning is None and base is not None and base.target == TINY_MODEL:
            tuning = Tuning(kind="full")  # as its own default is; that of a directory is not
        return Offer(
            name=name,
            target=target,
            job_types=frozenset({kind}),
            context_length=length,
            tuning=tuning,
            options=base.options if base else {},
        )

    async def update(self, model_id: str, change: UpdateFTModelIn, caller: Principal) -> FTModelOut:
        """Update the given fields of a fine-tuned model."""
        values = change.model_dump(exclude_unset=True)
        row = await self._store.awrite(
            lambda c: self._change(c, model_id, values, caller, "model.update")
        )
        return await to_thread.run_sync(self._updated, row, await self._chat.abilities())

    async def archive(self, model_id: str, caller: Principal) -> ArchiveFTModelOut:
        """Archive a fine-tuned model; safe to repeat."""
        change = {"archived": True}
        await self._store.awrite(
            lambda c: self._change(c, model_id, change, caller, "model.archive")
        )
        return ArchiveFTModelOut(id=model_id)

    async def unarchive(self, model_id: str, caller: Principal) -> UnarchiveFTModelOut:
        """Unarchive a fine-tuned model; safe to repeat."""
        change = {"archived": False}
        await self._store.awrite(
            lambda c: self._change(c, model_id, change, caller, "model.unarchive")
        )
        return UnarchiveFTModelOut(id=model_id)

    async def delete(self, model_id: str, caller: Principal) -> DeleteModelOut:
        """Delete a fine-tuned model, and its weights if the backend can."""

        def work(connection: sa.Connection) -> Any:
            change = {"deleted_at": time.time()}
            row = self._change(connection, model_id, change, caller, "model.delete")
            keep_history(connection, row.job_id)
            return row

        row = await self._store.awrite(work)
        await self._remove(row.job_id, row.id)
        return DeleteModelOut(id=model_id)

    async def remove(self, job: Any) -> None:
        """Remove what a finished job has left; its history must be stored."""
        await self._remove(job.id, self._name(job))

    async def remove_checkpoints(self, job: Any, steps: Collection[int]) -> None:
        """Remove some checkpoints of a finished job, but not its model.

        Raises:
            TrainingBackendError: The backend cannot remove them.
        """
        for step in steps:
            written = self._checkpoints.written(job.id, step)
            name = checkpoint_name(self._name(job), step)
            await self._chat.forget_checkpoint(written.name, name, written)
            await self._checkpoints.remove(job.id, step)
        await self._client.remove_checkpoints(job.id, steps)

    async def places(self, job: Any) -> list[Path]:
        """Return the directories of a job on this machine; some may not exist."""
        run = self._client.home / "runs" / job.id
        written = await self._checkpoints.paths(job.id)
        return [run, self._weights.copy(job.id), *written, *await self._chat.paths(job.id)]

    def offers_any(self, places: Collection[Path]) -> bool:
        """Return whether a model of the catalogue is in one of these directories. Blocking."""
        targets = [Path(offer.target).absolute() for offer in self._catalogue.all()]
        return any(target.is_relative_to(place) for target in targets for place in places)

    async def checkpoint_places(self, job: Any, steps: Collection[int]) -> list[Path]:
        """Return the directories of the models of checkpoints; some may not exist."""
        written = [self._checkpoints.written(job.id, step) for step in steps]
        merged = await self._chat.paths(job.id)
        names = {path.name for path in written}
        return [*written, *(path for path in merged if path.name in names)]

    def _name(self, job: Any) -> str:
        at: float = job.modified_at
        return job.fine_tuned_model or model_name(job, self._organization_id, at)

    async def _remove(self, job_id: str, name: str) -> None:
        await self._chat.forget(job_id, name)
        await self._weights.forget(job_id)
        await self._checkpoints.forget(job_id)
        try:
            await self._client.delete(job_id)
        except RunNotFound:
            log.info("run already deleted", model=name)
        except TrainingBackendError as error:
            # The model is deleted for clients; the operator must remove the files.
            log.error("run not deleted", model=name, reason=error.message)  # noqa: TRY400

    def _offers(self) -> Sequence[Offer]:
        methods = self._client.backend(self._backend).capabilities.methods
        return [
            offer
            for offer in self._catalogue.all()
            if any(METHODS[kind] in methods for kind in offer.job_types)
        ]

    def _row(self, connection: sa.Connection, model_id: str, caller: Principal) -> Any:
        found = models.select().where(models.c.id == model_id, *_visible(caller))
        row = connection.execute(found).first()
        if row is None:
            raise not_found("model")
        return row

    def _change(
        self,
        connection: sa.Connection,
        model_id: str,
        values: dict[str, Any],
        caller: Principal,
        action: str,
    ) -> Any:
        if any(offer.name == model_id for offer in self._catalogue.all()):
            raise plain(403, f"{model_id} is a base model; only fine-tuned models can be changed.")
        self._row(connection, model_id, caller)
        mine = models.c.id == model_id
        if values:
            connection.execute(models.update().where(mine).values(values))
            caller.record(connection, action, model_id)
        return connection.execute(models.select().where(mine)).first()

    def _base_card(self, offer: Offer, can: Abilities) -> BaseModelCard:
        licence = f" License: {offer.licence}." if offer.licence else ""
        return BaseModelCard(
            id=offer.name,
            created=self._opened_at,
            capabilities=ModelCapabilities(
                completion_chat=can.has(offer),
                fine_tuning=True,
                classification="classifier" in offer.job_types,
            ),
            name=offer.name,
            description=f"Fine-tunes {offer.target}.{licence}",
            max_context_length=offer.context_length,
        )

    def _card(self, row: Any, can: Abilities) -> FTModelCard:
        classifies = row.model_type == "classifier"
        return FTModelCard(
            id=row.id,
            created=int(row.created_at),
            owned_by=self._organization_id,
            capabilities=ModelCapabilities(
                completion_chat=not classifies and can.has_result(row.job_id, row.id),
                classification=classifies,
            ),
            name=row.name,
            description=row.description,
            max_context_length=row.context_length,
            job=row.job_id,
            root=row.root,
            archived=row.archived,
        )

    def _checkpoint_card(
        self, name: str, checkpoint: CheckpointModel, can: Abilities
    ) -> FTModelCard:
        job = checkpoint.job
        classifies = job.job_type == "classifier"
        return FTModelCard(
            id=name,
            created=int(checkpoint.point.at),
            owned_by=self._organization_id,
            capabilities=ModelCapabilities(
                completion_chat=not classifies and can.has_checkpoint(name),
                classification=classifies,
            ),
            max_context_length=job.context_length,
            job=job.id,
            root=base_model(job.model),
            archived=False,
        )

    def _updated(self, row: Any, can: Abilities) -> FTModelOut:
        classifies = row.model_type == "classifier"
        fields: dict[str, Any] = {
            "id": row.id,
            "created": int(row.created_at),
            "owned_by": self._organization_id,
            "workspace_id": row.project,
            "root": row.root,
            "root_version": "",
            "archived": row.archived,
            "name": row.name,
            "description": row.description,
            "capabilities": FTModelCapabilitiesOut(
                completion_chat=not classifies and can.has_result(row.job_id, row.id),
                classification=classifies,
            ),
            "max_context_length": row.context_length,
            "job": row.job_id,
        }
        if classifies:
            return ClassifierFTModelOut(**fields, classifier_targets=row.classifier_targets)
        return CompletionFTModelOut(**fields)


def _rows(query: "sa.Select[Any]", connection: sa.Connection) -> Sequence[Any]:
    return connection.execute(query).all()


def _visible(caller: Principal) -> list[sa.ColumnElement[bool]]:
    """Return the conditions for the models that a caller may see."""
    return [models.c.deleted_at.is_(None), caller.sees(models.c.project)]
