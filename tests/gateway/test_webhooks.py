"""Events of finished jobs, received by a server and verified by the official client."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sa
from openai import OpenAI
from pydantic import SecretStr, TypeAdapter
from pydantic.networks import AnyHttpUrl

from tests.gateway.conftest import Site, own_id, site
from tests.waiting import until
from training_backends.core.errors import ConfigError, CredentialNotFound
from training_backends.core.status import TrainingStatus
from training_backends.credentials.vault import CredentialVault
from training_backends.gateway import webhooks
from training_backends.store.gateway_schema import webhooks as waiting
from training_backends.testing.server import LoopbackServer, Received, StubReply

pytestmark = pytest.mark.anyio

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
PATH = "/hook?team=a"


class Endpoint(LoopbackServer):
    """Answers with `status`."""

    def __init__(self) -> None:
        self.status = 200
        super().__init__(self._answered)

    def _answered(self, request: Received) -> StubReply:
        del request
        return StubReply(status=self.status, content=b"{}")

    def settings(self) -> dict[str, Any]:
        """Return the settings of a gateway that reports to it."""
        url = TypeAdapter(AnyHttpUrl).validate_python(f"{self.base_url}{PATH}")
        return {"webhook_url": url, "webhook_secret": SecretStr(SECRET)}

    def deliveries(self) -> list[Received]:
        return self.asked("POST", "/hook")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once."""
    monkeypatch.setattr(webhooks, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(webhooks, "LONGEST_PAUSE", 0.05)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as server:
        yield server


def unwrapped(request: Received, secret: str = SECRET) -> Any:
    """Verify and read a delivery as an application does."""
    client = OpenAI(api_key="none", webhook_secret=secret)
    return client.webhooks.unwrap(request.body, request.headers)


async def left(here: Site) -> int:
    """Return how many events are not delivered yet."""
    count = sa.select(sa.func.count()).select_from(waiting)
    return await here.served.gateway.store.aread(lambda c: c.execute(count).scalar_one())


async def test_each_end_of_a_job_is_reported(tmp_path: Path, endpoint: Endpoint) -> None:
    """Once, signed, with the id that the OpenAI API has for the job."""
    async with site(tmp_path, **endpoint.settings()) as here:
        ended = {"succeeded": (await here.finished())["id"]}
        failed, remote = await here.started(suffix="fails")
        here.backend.fail(remote)
        cancelled, remote = await here.started(suffix="stops")
        await here.http.post(f"/v1/fine_tuning/jobs/{cancelled}/cancel")
        stopping = TrainingStatus.STOPPING
        await until(lambda: here.backend._jobs[remote].status is stopping)
        here.backend.say(remote, TrainingStatus.CANCELLED)
        ended |= {"failed": failed, "cancelled": cancelled}
        await until(lambda: len(endpoint.deliveries()) == 3)
        await until(lambda: left(here), lambda count: count == 0)
    events = [unwrapped(request) for request in endpoint.deliveries()]
    assert {event.type.rpartition(".")[2]: own_id(event.data.id) for event in events} == ended
    assert {event.object for event in events} == {"event"}
    assert {event.id[:4] for event in events} == {"evt_"}
    (one, *_) = endpoint.deliveries()
    assert one.target == PATH
    assert one.headers["content-type"] == "application/json"
    assert one.headers["webhook-id"] == events[0].id
    with pytest.raises(openai.InvalidWebhookSignatureError):
        unwrapped(one, "whsec_" + base64.b64encode(b"another").decode())


async def test_an_event_is_repeated_until_it_is_received(
    tmp_path: Path, endpoint: Endpoint
) -> None:
    """With the same id, also after a restart; the job has succeeded meanwhile."""
    endpoint.status = 500
    async with site(tmp_path, **endpoint.settings()) as here:
        job_id = (await here.finished())["id"]
        await until(lambda: len(endpoint.deliveries()) >= 2)
    before = len(endpoint.deliveries())
    async with site(tmp_path, **endpoint.settings()) as here:
        assert (await here.get(job_id))["status"] == "SUCCESS"
        await until(lambda: len(endpoint.deliveries()) > before)
        endpoint.status = 204
        await until(lambda: left(here), lambda count: count == 0)
    events = [unwrapped(request) for request in endpoint.deliveries()]
    assert {(event.id, event.type) for event in events} == {
        (events[0].id, "fine_tuning.job.succeeded")
    }


@pytest.mark.parametrize("reason", ["gone", "late"])
async def test_an_event_is_given_up(
    reason: str,
    tmp_path: Path,
    endpoint: Endpoint,
    logs: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a 410, or after three days without success; the log says so."""
    endpoint.status = 410 if reason == "gone" else 503
    if reason == "late":
        monkeypatch.setattr(webhooks, "GIVEN_UP_AFTER", -1.0)
    async with site(tmp_path, **endpoint.settings()) as here:
        await here.finished()
        await until(lambda: len(endpoint.deliveries()) == 1)
        await until(lambda: left(here), lambda count: count == 0)
    assert [entry["reason"] for entry in logs if entry["event"] == "webhook event given up"] == [
        f"status {endpoint.status}"
    ]
    assert SECRET not in str(logs)


async def test_an_endpoint_that_cannot_be_reached_harms_no_job(tmp_path: Path) -> None:
    """The event waits."""
    with Endpoint() as closed:
        given = closed.settings()
    async with site(tmp_path, **given) as here:
        await here.finished()
        await until(lambda: left(here), lambda count: count == 1)


async def test_the_secret_may_be_a_credential(tmp_path: Path, endpoint: Endpoint) -> None:
    """Of the provider `webhook`; without any, or with one that is no secret, nothing starts."""
    given = {"webhook_url": endpoint.settings()["webhook_url"]}
    plain = "a-secret-that-is-no-base64"
    vault = CredentialVault(explicit={"webhook": plain})
    async with site(tmp_path, vault=vault, **given) as here:
        await here.finished()
        await until(lambda: len(endpoint.deliveries()) == 1)
    assert unwrapped(endpoint.deliveries()[0], plain).type == "fine_tuning.job.succeeded"
    with pytest.raises(CredentialNotFound, match="webhook"):
        async with site(tmp_path, vault=CredentialVault(environ={}), **given):
            pass
    for wrong in ("whsec_%", "short"):
        with pytest.raises(ConfigError, match="Invalid webhook secret") as error:
            async with site(tmp_path, **given, webhook_secret=SecretStr(wrong)):
                pass
        assert wrong not in str(error.value)
