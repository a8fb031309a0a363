"""The reference server of a reward, for `RemoteReward`: it accepts local connections and scores one batch at a time.

The server opens no file that a request names, reads at most `max_bytes` per request, and accepts only safetensors,
which a web page in a browser cannot send without permission. Every connection has its own thread, a deadline for its
request head and a minimum rate for its body, so slow and silent clients do not block others. The number of requests
that wait to be scored and their total size are limited.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import MSG_PEEK, SHUT_WR, socket
from typing import Any

from postgen.errors import UserError, check_number
from postgen.rewards.patience import Budget, Patient
from postgen.rewards.registry import get_reward
from postgen.rewards.runner import RewardRunner
from postgen.rewards.wire import MEDIA_TYPE, WireError, unpack

HOST = "127.0.0.1"
_WAITING = 32
"""Largest number of requests that wait to be scored; the server asks further clients to retry."""
_CONNECTIONS = 512
"""Largest number of open connections; further ones wait in the system's queue until a connection is free."""
_QUEUE = 1024
_AGAIN = 1
"""Seconds after which a refused client may retry (`Retry-After`)."""
_HEAD = 3.0
"""Seconds within which the head of a request must arrive."""
_CHUNK = 2**18
_EMPTY_LINES, _LINE = 8, 2**16
_TAKEN = "there is GET /health and POST /score"
_DIGITS = 15
_UNKNOWN = 2**63
_log = logging.getLogger(__name__)


class RewardServer(ThreadingHTTPServer):
    """Serves one reward on 127.0.0.1. `serve_forever()` runs it; `shutdown()` from another thread ends it.

    Args:
        reward: an input of `get_reward`.
        port: port to listen on; 0 lets the system choose one, see `server_port`.
        max_bytes: largest request body. All requests that wait to be scored take at most four times that together.
        idle: seconds that a client may take for each 64 KiB of its body; for the head, at most 3.
        runner_options: keyword arguments of `RewardRunner`, for example `device` or `timeout`.

    Raises:
        UserError: an unknown reward, a port in use, or a number out of range.
    """

    daemon_threads = True
    request_queue_size = _QUEUE

    def __init__(
        self, reward: Any, *, port: int = 8765, max_bytes: int = 2**28, idle: float = 20.0, **runner_options: Any
    ) -> None:
        check_number("port", port, 0, 65535, whole=True)
        check_number("max_bytes", max_bytes, 1, 2**50, whole=True)
        if not 0 < idle < math.inf:
            raise UserError(f"idle must be above 0 seconds, got {idle}")
        self.reward = get_reward(reward)
        self.runner = RewardRunner([self.reward], **runner_options)
        self.max_bytes, self.idle = max_bytes, idle
        self.busy = threading.Lock()
        self.scored = 0
        """Number of requests that were scored."""
        self.seats = threading.BoundedSemaphore(_WAITING)
        self.bodies = Budget(4 * max_bytes)
        self._places = threading.BoundedSemaphore(_CONNECTIONS)
        self._ended = threading.Event()
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise UserError(f"cannot listen on {HOST}:{port}: {error.strerror}; choose another --port") from error

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, as soon as fewer than the largest number are open."""
        while not self._places.acquire(timeout=0.2):
            if self._ended.is_set():
                self.shutdown_request(request)
                return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handle a connection in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def shutdown(self) -> None:
        """End `serve_forever`, also while it waits for a free connection."""
        self._ended.set()
        super().shutdown()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what broke a connection at debug level; a client that disconnects is not worth a message."""
        _log.debug("a request from %s ended early", client_address, exc_info=True)

    @property
    def url(self) -> str:
        """Address for `get_reward`."""
        return f"http://{HOST}:{self.server_port}"

    def score(self, data: bytes, gone: Callable[[], bool] = lambda: False) -> Sequence[float | None]:
        """Score one request, after all earlier requests.

        Args:
            data: body of the request.
            gone: returns whether the client has disconnected.

        Raises:
            WireError: the body is not a valid request.
            ConnectionError: the client has disconnected before its turn.
            RuntimeError: the reward failed.
        """
        with self.busy:
            if gone():
                raise ConnectionAbortedError("the client left before its turn")
            result = self.runner(**unpack(data), must_score=False)
            self.scored += 1
        if result.errors:
            raise RuntimeError("; ".join(result.errors.values()))
        return [None if value != value else value for value in result.values[:, 0].tolist()]


class _Refused(Exception):
    """A request that the server answers with a status and a reason instead of scores."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    connection: socket

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = self.patient = Patient(self.connection, min(_HEAD, self.server.idle))
        self.left = 0
        """Number of bytes of the body that have not been read."""

    def parse_request(self) -> bool:
        """Read the request head, skipping empty lines before it (RFC 9112, 2.2)."""
        self.raw_requestline: bytes
        for _ in range(_EMPTY_LINES):
            if self.raw_requestline.strip():
                break
            self.raw_requestline = self.rfile.readline(_LINE + 1)
            if not self.raw_requestline:  # the client has left
                self.close_connection = True
                return False
        self.requestline, self.command = "", ""
        if len(self.raw_requestline) > _LINE:
            self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)
            return False
        if not self.raw_requestline.strip():
            self.send_error(HTTPStatus.BAD_REQUEST, "there is no request, only empty lines")
            return False
        return super().parse_request()

    def do_GET(self) -> None:
        if self.path.rstrip("/") != "/health":
            self._answer(HTTPStatus.NOT_FOUND, {"error": _TAKEN})
            return
        self._answer(HTTPStatus.OK, {"reward": self.server.reward.name, "max_bytes": self.server.max_bytes})

    def do_POST(self) -> None:
        status, held, content = HTTPStatus.OK, 0, dict[str, Any]()
        try:
            self._check_head()
            held, body = self._body()
            content = {"scores": self._scores(body)}
        except _Refused as error:
            status, content = error.status, {"error": str(error)}
        except (WireError, UserError) as error:
            status, content = HTTPStatus.BAD_REQUEST, {"error": str(error)}
        except ConnectionAbortedError as error:
            # A client that has closed only its sending side can still read the response.
            status = HTTPStatus.BAD_REQUEST
            content = {"error": f"{error}: keep the connection open until the answer"}
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            if not isinstance(error, RuntimeError):
                _log.exception("the reward could not be computed")
            status, content = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"{error}" or type(error).__name__}
        finally:
            self.server.bodies.give_back(held)
        self._answer(status, content)

    def _check_head(self) -> None:
        """Refuse an invalid request before its body is read."""
        lengths = self.headers.get_all("Content-Length", [])
        text = lengths[0].strip() if lengths else ""
        plain = text.isascii() and text.isdigit() and len(set(lengths)) == 1
        self.left = int(text) if plain and len(text) <= _DIGITS else _UNKNOWN
        if self.path.rstrip("/") != "/score":
            raise _Refused(HTTPStatus.NOT_FOUND, _TAKEN)
        if self.headers.get("Transfer-Encoding") is not None:
            raise _Refused(HTTPStatus.BAD_REQUEST, "a body in chunks is not taken: send it with its Content-Length")
        if not lengths:
            self.left = 0
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "a Content-Length is needed")
        if not plain or len(text) > _DIGITS:
            raise _Refused(HTTPStatus.BAD_REQUEST, f"the Content-Length is no number of bytes: {text[:40]!r}")
        if self.headers.get_content_type() != MEDIA_TYPE:
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"the content type must be {MEDIA_TYPE}")
        if self.left > self.server.max_bytes:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {self.server.max_bytes} bytes are taken")

    def _body(self) -> tuple[int, bytes]:
        """Read the body; return the bytes taken from the shared budget, and the body."""
        data, held = bytearray(), 0
        self.patient.start(self.server.idle)
        try:
            while self.left:
                chunk = self._chunk()
                if not self.server.bodies.take(len(chunk)):
                    raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too much is waiting to be scored")
                held += len(chunk)
                data += chunk
        except BaseException:
            self.server.bodies.give_back(held)
            raise
        return held, bytes(data)

    def _chunk(self) -> bytes:
        chunk = self.patient.read(min(self.left, _CHUNK))
        if not chunk:
            raise ConnectionAbortedError("the client left before it had sent all")
        self.left -= len(chunk)
        return chunk

    def _scores(self, body: bytes) -> Sequence[float | None]:
        if not self.server.seats.acquire(blocking=False):
            raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests are waiting")
        try:
            return self.server.score(body, self._gone)
        finally:
            self.server.seats.release()

    def _gone(self) -> bool:
        self.connection.settimeout(0)
        try:
            return not self.connection.recv(1, MSG_PEEK)
        except BlockingIOError:
            return False

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Respond to a request that is malformed or has an unknown method."""
        self.left, self.request_version = _UNKNOWN, self.protocol_version
        if code == HTTPStatus.NOT_IMPLEMENTED:  # sent by the base class if a method has no `do_`
            code, message = HTTPStatus.METHOD_NOT_ALLOWED, f"{self.command[:40]} is not taken: {_TAKEN}"
        self._answer(HTTPStatus(code), {"error": message or HTTPStatus(code).phrase})

    def _answer(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.close_connection = True
        self.connection.settimeout(self.server.idle)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, POST")
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", str(_AGAIN))
        self.end_headers()
        if self.command != "HEAD":  # a response to HEAD has no content (RFC 9110, 9.3.2)
            self.wfile.write(body)
        self._drain()

    def _drain(self) -> None:
        """Discard what the client still sends; closing at once would reset the connection and lose the response."""
        left = min(self.left, 4 * self.server.max_bytes)
        with suppress(OSError):
            self.connection.shutdown(SHUT_WR)
            self.patient.start(min(_HEAD, self.server.idle))
            while left > 0 and (chunk := self.patient.read(min(left, _CHUNK))):
                left -= len(chunk)

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)
