"""A reward that another process computes, requested over HTTP (request format: `postgen.rewards.wire`).

`POST <url>/score` takes a request and returns `{"scores": [number or null, ...]}`, or `{"error": text}` with a status
of 400 or above. `GET <url>/health` returns `{"reward": name, "max_bytes": largest request in bytes}`.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from postgen.errors import UserError, first_line, is_number, is_whole, shown
from postgen.rewards.base import GIVEN
from postgen.rewards.wire import MEDIA_TYPE, pack, read_scores

_LONGEST_ANSWER = 2**22
_LONGEST_WAIT = 30.0


class RemoteError(RuntimeError):
    """The server could not be reached, refused the request, or returned something other than scores."""


class _Passing(RemoteError):
    """A temporary error: the next try may succeed, after the number of seconds that the server requests."""

    after = 0.0


class RemoteReward:
    """A reward at an `http://` or `https://` address; requests run in parallel with the other rewards.

    Args:
        url: address, with a path if the server has one, for example `http://127.0.0.1:8765`.
        name: the name in tables; None uses host and port.
        timeout: seconds for one try.
        retries: further tries after the first one if the server is busy, fails or does not respond.
        backoff: seconds before the second try; doubled for each further try, at most 30.
        exact: send float32 frames (4 times the bytes) instead of 8-bit frames.
        batch_bytes: largest size of the clips (float32) of one request in bytes.

    Raises:
        UserError: the address is malformed, or a number is out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        exact: bool = False,
        batch_bytes: int = 2**27,
    ) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise UserError(f"{url!r} is not the address of a reward: it must have the form http://127.0.0.1:8765")
        numbers = is_number(timeout) and 0 < timeout <= 1e7 and is_number(backoff) and 0 <= backoff <= 1e5
        if not (numbers and is_whole(retries, 0, 10_000) and is_whole(batch_bytes, 1, 2**36)):
            raise UserError(
                "timeout (up to 10**7 s) and batch_bytes (up to 2**36) must be above 0, retries (up to 10,000) and"
                f" backoff (up to 10**5 s) at least 0, got timeout={shown(timeout)}, batch_bytes={shown(batch_bytes)},"
                f" retries={shown(retries)}, backoff={shown(backoff)}"
            )
        self.host, self.port, self._path = parts.hostname, port, parts.path.rstrip("/")
        self._secure = parts.scheme == "https"
        self.name = name or f"{self.host}:{port or (443 if self._secure else 80)}"
        self.timeout, self.retries, self.backoff, self.exact = timeout, retries, backoff, exact
        self.batch_bytes = batch_bytes
        self._limit: int | None = None

    async def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[Tensor],
        *,
        fps: float | None = None,
        log_reasons: Any = None,
        **columns: Any,
    ) -> list[float | None]:
        """Score a batch.

        Raises:
            RemoteError: no valid response after all tries, or a request above the server's limit.
            WireError: a column cannot be sent, or the response does not have one score per clip.
        """
        rest = {k: v for k, v in columns.items() if k not in GIVEN}
        # A clip with NaN has no score, but the other clips of its batch do.
        rows = [row for row, clip in enumerate(completions) if bool(clip.isfinite().all())]
        if log_reasons is not None and len(rows) < len(completions):
            why = {row: "it has values that are not finite" for row in range(len(completions)) if row not in rows}
            log_reasons([why.get(row) for row in range(len(completions))])
        scores: list[float | None] = [None] * len(completions)
        if not rows:
            return scores
        texts, clips = [prompts[row] for row in rows], [completions[row] for row in rows]
        rest = {k: [values[row] for row in rows] for k, values in rest.items() if values is not None}
        body = pack(texts, clips, fps=fps, columns=rest, exact=self.exact)
        stop = threading.Event()
        try:
            found = read_scores(await _in_thread(lambda: self._ask(body, stop)), len(rows))
        finally:
            stop.set()
        for row, score in zip(rows, found, strict=True):
            scores[row] = score
        return scores

    def health(self) -> dict[str, Any]:
        """Return what the server reports about itself: `reward`, `max_bytes`.

        Raises:
            RemoteError: the server cannot be reached, or does not serve a reward.
        """
        answer = self._request("GET", "/health", b"")
        try:
            told: dict[str, Any] = json.loads(answer)
            self._limit = int(told["max_bytes"])
        except (ValueError, KeyError, TypeError) as error:
            raise RemoteError(f"{self.name} does not serve a reward, it returned {answer[:80]!r}") from error
        return told

    def _ask(self, body: bytes, stop: threading.Event) -> bytes:
        for attempt in range(self.retries + 1):
            try:
                if self._limit is None:
                    self.health()
                if self._limit is not None and len(body) > self._limit:
                    raise RemoteError(
                        f"a request of {len(body)} bytes is above the limit of {self.name}, {self._limit}: "
                        "use a smaller batch_bytes, or start the server with a larger --max-mb"
                    )
                return self._request("POST", "/score", body)
            except _Passing as error:
                wait = min(max(self.backoff * 2**attempt, error.after), _LONGEST_WAIT)
                if attempt == self.retries or stop.wait(wait):
                    raise
        raise AssertionError("the loop ends by return or raise")

    def _unreached(self, error: OSError | http.client.HTTPException) -> str:
        """Describe why there was no response."""
        if isinstance(error, ConnectionRefusedError):
            return f"{self.name}: no server listens there: start `postgen serve-reward NAME --port {self.port or 80}`"
        if isinstance(error, socket.gaierror):
            return f"{self.name}: the host {self.host} is unknown: check the address"
        if isinstance(error, TimeoutError):
            return f"{self.name}: no response within {self.timeout:g} s"
        if isinstance(error, ConnectionError):
            return f"{self.name} closed the connection before it responded"
        told = first_line(error)
        return f"{self.name}: {told if isinstance(error, OSError) else f'it does not speak HTTP ({told})'}"

    def _request(self, method: str, path: str, body: bytes) -> bytes:
        """Try once: send the request, and read the response within `timeout` seconds in total."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=self.timeout)
        deadline = time.monotonic() + self.timeout
        try:
            connection.request(method, self._path + path, body, {"Content-Type": MEDIA_TYPE} if body else {})
            response = connection.getresponse()
            answer = _read(response, deadline)
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(self._unreached(error)) from error
        finally:
            connection.close()
        if response.status == 200:
            return answer
        told = f"{self.name} returned status {response.status}: {answer[:200].decode(errors='replace')}"
        if response.status < 500 and response.status != 429:
            raise RemoteError(told)
        passing, asked = _Passing(told), response.headers.get("Retry-After", "")
        passing.after = float(asked) if asked.isascii() and asked.isdigit() and len(asked) < 6 else 0.0
        raise passing


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    data = b""
    while chunk := response.read1(65536):
        data += chunk
        if len(data) > _LONGEST_ANSWER:
            raise http.client.HTTPException(f"the response has more than {_LONGEST_ANSWER} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("the response takes too long")
    return data


async def _in_thread(function: Callable[[], bytes]) -> bytes:
    """Run a function in a daemon thread; asyncio's own threads would delay the end of the event loop."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[bytes] = loop.create_future()

    def settle(value: bytes | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value or b"")

    def work() -> None:
        value, error = None, None
        try:
            value = function()
        except Exception as caught:
            error = caught
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=work, daemon=True).start()
    return await future
