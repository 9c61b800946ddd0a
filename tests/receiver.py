"""A real receiver of webhooks, on loopback."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

__all__ = ["Receiver"]


class Receiver:
    """A server that notes what it is sent.

    Attributes:
        refusing: Statuses of the next answers; after them, 204.
    """

    def __init__(self) -> None:
        self.received: list[tuple[dict[str, str], bytes]] = []
        self.refusing: list[int] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.received.append(({k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(receiver.refusing.pop(0) if receiver.refusing else 204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        self._thread = Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def documents(self) -> list[dict[str, Any]]:
        """The bodies, in order."""
        return [json.loads(body) for _, body in self.received]

    @property
    def steps(self) -> list[int]:
        """The steps whose metrics were received, in order."""
        return [it["step"] for one in self.documents for it in one.get("metrics", ())]

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
