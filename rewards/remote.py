"""A reward that another process computes, asked over HTTP (the form of the requests: `postgen.rewards.wire`).

`POST <url>/score` takes a request and answers `{"scores": [number or null, ...]}`, or `{"error": text}` with a code of
400 and more. `GET <url>/health` answers `{"reward": name, "max_bytes": most bytes of a request}`.
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
    """A server that could not be reached, refused, or answered something else than scores."""


class _Passing(RemoteError):
    """An error that may be gone at the next try, or after the seconds that the server has asked for."""

    after = 0.0


class RemoteReward:
    """A reward behind an `http://` or `https://` address; its calls run beside the other rewards.

    Args:
        url: address, with a path where the server has one, as `http://127.0.0.1:8765`.
        name: how it is named in tables; None takes host and port.
        timeout: seconds for one try.
        retries: tries after the first one, where the server is busy, broken or silent.
        backoff: seconds before the second try; doubled each time, 30 at most.
        exact: send float32 frames (4 times the bytes) rather than 8-bit ones.
        batch_bytes: most bytes of clips (float32) in one request.

    Raises:
        UserError: no such address, or a number out of range.
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
            raise UserError(f"{url!r} is no address of a reward: it must look like http://127.0.0.1:8765")
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
            RemoteError: no usable answer after all tries, or a request above the server's limit.
            WireError: a column that cannot be sent, or an answer that holds other things than one score a clip.
        """
        rest = {k: v for k, v in columns.items() if k not in GIVEN}
        # A clip of NaN is no picture and has no score; the others of its batch do.
        rows = [row for row, clip in enumerate(completions) if bool(clip.isfinite().all())]
        if log_reasons is not None and len(rows) < len(completions):
            why = {row: "it holds values that are no numbers" for row in range(len(completions)) if row not in rows}
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
        """Return what the server says about itself: `reward`, `max_bytes`.

        Raises:
            RemoteError: it cannot be reached, or is no server of a reward.
        """
        answer = self._request("GET", "/health", b"")
        try:
            told: dict[str, Any] = json.loads(answer)
            self._limit = int(told["max_bytes"])
        except (ValueError, KeyError, TypeError) as error:
            raise RemoteError(f"{self.name} is no server of a reward: {answer[:80]!r}") from error
        return told

    def _ask(self, body: bytes, stop: threading.Event) -> bytes:
        for attempt in range(self.retries + 1):
            try:
                if self._limit is None:
                    self.health()
                if self._limit is not None and len(body) > self._limit:
                    raise RemoteError(
                        f"a request of {len(body)} bytes is above the limit of {self.name}, {self._limit}: "
                        "use a smaller batch_bytes, or a larger --max-mb there"
                    )
                return self._request("POST", "/score", body)
            except _Passing as error:
                wait = min(max(self.backoff * 2**attempt, error.after), _LONGEST_WAIT)
                if attempt == self.retries or stop.wait(wait):
                    raise
        raise AssertionError("the loop ends by return or raise")

    def _unreached(self, error: OSError | http.client.HTTPException) -> str:
        """Say in words why there was no answer."""
        if isinstance(error, ConnectionRefusedError):
            return f"{self.name}: nobody listens there: start `postgen serve-reward NAME --port {self.port or 80}`"
        if isinstance(error, socket.gaierror):
            return f"{self.name}: there is no machine of the name {self.host}"
        if isinstance(error, TimeoutError):
            return f"{self.name}: no answer within {self.timeout:g} s"
        if isinstance(error, ConnectionError):
            return f"{self.name} closed the connection before it had answered"
        told = first_line(error)
        return f"{self.name}: {told if isinstance(error, OSError) else f'it does not speak HTTP ({told})'}"

    def _request(self, method: str, path: str, body: bytes) -> bytes:
        """One try: send, and read the answer within `timeout` seconds in all."""
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
        told = f"{self.name} answered {response.status}: {answer[:200].decode(errors='replace')}"
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
            raise http.client.HTTPException(f"an answer of more than {_LONGEST_ANSWER} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("the answer takes too long")
    return data


async def _in_thread(function: Callable[[], bytes]) -> bytes:
    """Run a function in a thread that nobody has to wait for: asyncio's own threads hold up the end of the loop."""
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
