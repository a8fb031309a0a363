"""The reference server of a reward, for `RemoteReward`: on this machine only, one batch at a time.

It opens no file that a request names, reads no more than `max_bytes`, and takes only safetensors (which a page in a
browser cannot send unasked).
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from postgen.errors import UserError
from postgen.rewards.registry import get_reward
from postgen.rewards.runner import RewardRunner
from postgen.rewards.wire import MEDIA_TYPE, WireError, unpack

HOST = "127.0.0.1"
_WAITING = 8
_CHUNK = 2**20
_log = logging.getLogger(__name__)


class RewardServer(ThreadingHTTPServer):
    """Serves one reward on 127.0.0.1; `serve_forever()` runs it, `shutdown()` from another thread ends it.

    Args:
        reward: what `get_reward` takes.
        port: 0 lets the system choose one; `server_port` tells it.
        max_bytes: longest request that is read.
        idle: seconds after which a silent client is dropped.
        runner_options: keywords of `RewardRunner`, as `device` or `timeout`.

    Raises:
        UserError: an unknown reward, a port that is taken, or a number out of range.
    """

    daemon_threads = True

    def __init__(
        self, reward: Any, *, port: int = 8765, max_bytes: int = 2**28, idle: float = 60.0, **runner_options: Any
    ) -> None:
        if not 0 <= port < 65536 or max_bytes < 1 or not idle > 0:
            raise UserError(f"port must be 0 to 65535, max_bytes and idle above 0, got {port}, {max_bytes}, {idle}")
        self.reward = get_reward(reward)
        self.runner = RewardRunner([self.reward], **runner_options)
        self.max_bytes, self.idle = max_bytes, idle
        self.busy = threading.Lock()
        self.seats = threading.BoundedSemaphore(_WAITING)
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise UserError(f"cannot listen on {HOST}:{port}: {error.strerror}; choose another --port") from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note a client that went away, or what broke its request, in the log rather than on the terminal."""
        _log.warning("a request from %s ended early", client_address, exc_info=True)

    @property
    def url(self) -> str:
        """Address for `get_reward`."""
        return f"http://{HOST}:{self.server_port}"

    def score(self, data: bytes) -> Sequence[float | None]:
        """Score one request.

        Raises:
            WireError: it is none.
            RuntimeError: the reward failed on all of it.
        """
        arguments = unpack(data)
        with self.busy:
            result = self.runner(**arguments, must_score=False)
        if result.errors:
            raise RuntimeError("; ".join(result.errors.values()))
        return [None if value != value else value for value in result.values[:, 0].tolist()]


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.idle)

    def do_GET(self) -> None:
        if self.path.rstrip("/") != "/health":
            self._answer(HTTPStatus.NOT_FOUND, {"error": "there is GET /health and POST /score"})
            return
        self._answer(HTTPStatus.OK, {"reward": self.server.reward.name, "max_bytes": self.server.max_bytes})

    def do_POST(self) -> None:
        refusal = self._refusal()
        if refusal is not None:
            self._answer(refusal[0], {"error": refusal[1]})
            self._drain()
            return
        if not self.server.seats.acquire(blocking=False):
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "too many requests are waiting"})
            self._drain()
            return
        try:
            self._answer(HTTPStatus.OK, {"scores": self.server.score(self.rfile.read(self._length()))})
        except (WireError, UserError) as error:
            self._answer(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        except RuntimeError as error:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)})
        finally:
            self.server.seats.release()

    def _length(self) -> int:
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdigit() else -1

    def _refusal(self) -> tuple[HTTPStatus, str] | None:
        """What is wrong with a request before its body is read."""
        if self.path.rstrip("/") != "/score":
            return HTTPStatus.NOT_FOUND, "there is GET /health and POST /score"
        if self.headers.get_content_type() != MEDIA_TYPE:
            return HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"the content type must be {MEDIA_TYPE}"
        if self._length() < 0:
            return HTTPStatus.LENGTH_REQUIRED, "a Content-Length is needed"
        if self._length() > self.server.max_bytes:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {self.server.max_bytes} bytes are taken"
        return None

    def _drain(self) -> None:
        """Throw some of a refused body away: a connection closed at once would take the answer with it."""
        self.close_connection = True
        left = min(self._length(), 4 * self.server.max_bytes)
        while left > 0 and (chunk := self.rfile.read(min(left, _CHUNK))):
            left -= len(chunk)

    def _answer(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        _log.info(format, *args)
