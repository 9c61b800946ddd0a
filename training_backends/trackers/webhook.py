"""Webhooks: what happens to a run, as JSON to a URL."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Final, Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from training_backends.core.run import LogRecord, utc_now
from training_backends.http.webhook import signed_headers, signing_key
from training_backends.trackers.tracker import Measurement, Tracker

__all__ = ["WebhookTracker"]

_PATIENCE: Final = 30.0
"""Seconds for a response."""


class WebhookTracker(Tracker):
    """Sends one request for each event and each batch of metrics, in order.

    A request that is repeated has the same `webhook-id`. Any status below 300 is success.
    """

    def start(self) -> None:
        """Send the parameters of the run."""
        self._send("run.started", {"parameters": dict(self.run.parameters)})

    def measured(self, measurements: Sequence[Measurement]) -> None:
        """Send the metrics of some steps."""
        points = [
            {"step": each.step, "at": each.at.isoformat(), "values": dict(each.values)}
            for each in measurements
        ]
        self._send("run.metrics", {"metrics": points})

    def happened(self, record: LogRecord) -> None:
        """Send an event."""
        shown = record.model_dump(mode="json", exclude={"cursor"}, exclude_none=True)
        self._send(f"run.{record.source}", {"record": shown})

    def finish(self, status: Literal["completed", "failed", "cancelled"], message: str) -> None:
        """Send how the run ended."""
        self._send(f"run.{status}", {"message": message} if message else {})

    def _send(self, kind: str, data: dict[str, Any]) -> None:
        document = {"type": kind, "run_id": self.run.id, **data}
        body = json.dumps(document, separators=(",", ":"), sort_keys=True).encode()
        message_id = f"msg_{hashlib.sha256(body).hexdigest()[:32]}"
        headers = {"content-type": "application/json", "user-agent": "training-backends"}
        if self.key is None:
            headers["webhook-id"] = message_id
        else:
            key = signing_key(self.key.get_secret_value())
            moment = int(utc_now().timestamp())
            headers |= signed_headers(key, message_id, moment, body)
        # The configuration allows http and https only.
        request = Request(self.integration.url, body, headers, method="POST")  # noqa: S310
        try:
            with urlopen(request, timeout=_PATIENCE):  # noqa: S310
                return
        except HTTPError as error:
            error.close()
            raise ConnectionError(f"the webhook's receiver answered {error.code}") from None
