"""Can clients that are slow, silent or many keep others away from `postgen serve-reward`?

    python -m benchmarks.faults_server

A server in a process of its own, and against it one kind of bad client after the other, so many at once. All the
while a healthy client asks for a score, waits for it, and asks again; the longest that it waited counts (of one that
is sent away with 503, until a later try has its score). Counted are also answers that did not arrive because the
connection was reset, and the lines that the server wrote on the terminal.
"""

from __future__ import annotations

import http.client
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from postgen.rewards.wire import MEDIA_TYPE, pack

SLOW, BURST, SECONDS = 64, 200, 15.0
"""Slow clients at once, requests of a burst, and how long slow clients go on."""
_LIMIT = 60.0
HEAD = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: {MEDIA_TYPE}\r\n"


def request() -> bytes:
    """Return the body of a healthy request: a clip of 8 frames, 64x64."""
    return pack(["a"], [torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))])


def ask(port: int, body: bytes) -> int:
    """Send a request; return the status of the answer.

    Raises:
        OSError: none came.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_LIMIT)
    try:
        connection.request("POST", "/score", body, {"Content-Type": MEDIA_TYPE})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except http.client.HTTPException as error:
        raise ConnectionResetError(str(error)) from error
    finally:
        connection.close()


class Healthy(threading.Thread):
    """Asks for scores until it is told to stop, and notes how long it waited for each."""

    def __init__(self, port: int, body: bytes) -> None:
        super().__init__(daemon=True)
        self.port, self.body = port, body
        self.waits: list[float] = []
        self.resets = 0
        self._over = threading.Event()

    def run(self) -> None:
        """Ask."""
        start = time.monotonic()
        while not self._over.wait(0.05):
            try:
                if ask(self.port, self.body) == 200:
                    self.waits.append(time.monotonic() - start)
                    start = time.monotonic()
                    continue
            except OSError:
                self.resets += 1
            if time.monotonic() - start > _LIMIT:
                break
        else:
            return
        self.waits.append(time.monotonic() - start)

    def stop(self) -> float:
        """End it; return the longest wait."""
        self._over.set()
        self.join(_LIMIT)
        return max(self.waits, default=_LIMIT)


def _drip(port: int, start: str, over: float) -> None:
    """Open a connection, send something, then a byte a second."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(start.encode())
        while time.monotonic() < over:
            time.sleep(1)
            if start:
                connection.sendall(b"x")


def slow(start: str, count: int = SLOW) -> Callable[[int, bytes], Counter[str]]:
    """Return what opens so many connections, again when they are closed; without a start they are silent."""

    def attack(port: int, body: bytes) -> Counter[str]:
        over = time.monotonic() + SECONDS

        def again() -> None:
            while time.monotonic() < over:
                _drip(port, start, over)
                time.sleep(0.2)

        _together(again, count)
        return Counter()

    return attack


def burst(port: int, body: bytes) -> Counter[str]:
    """Send requests at once, three times; return how each was answered."""
    outcomes: Counter[str] = Counter()

    def one() -> None:
        try:
            outcomes[str(ask(port, body))] += 1
        except OSError:
            outcomes["reset"] += 1

    for _ in range(3):
        _together(one, BURST)
    return outcomes


def leave(port: int, body: bytes) -> Counter[str]:
    """Send half a request, or a whole one, and leave without waiting."""
    for number in range(8 * SLOW):
        time.sleep(0.005)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            text = f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body
            connection.sendall(text[: len(text) // (1 + number % 2)])
    return Counter()


def _together(work: Callable[[], None], count: int) -> None:
    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * _LIMIT)


ATTACKS: dict[str, Callable[[int, bytes], Counter[str]]] = {
    "none": lambda port, body: time.sleep(2) or Counter(),
    "silent": slow(""),
    "head byte by byte": slow("POST /score HTTP/1.1\r\nX: "),
    "body byte by byte": slow(f"{HEAD}Content-Length: 1000000\r\n\r\n"),
    "body in chunks without end": slow(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n"),
    "600 silent": slow("", 600),
    "burst": burst,
    "leaving": leave,
}


@contextmanager
def serving() -> Iterator[tuple[int, Callable[[], int]]]:
    """Start a server; give its port, and what counts the lines that it has written so far."""
    command = [sys.executable, "-u", "-m", "postgen", "serve-reward", "motion_floor", "--port", "0"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            told = re.search(r"http://127\.0\.0\.1:(\d+)", server.stdout.readline())
            assert told is not None, "the server did not start"

            def lines() -> int:
                errors.seek(0)
                return len(errors.read().splitlines())

            yield int(told[1]), lines
        finally:
            server.kill()


def by_attack() -> list[dict[str, Any]]:
    """Return a row for each of `ATTACKS`."""
    rows, body = [], request()
    with serving() as (port, lines):
        for name, attack in ATTACKS.items():
            before = lines()
            healthy = Healthy(port, body)
            healthy.start()
            outcomes = attack(port, body)
            longest = healthy.stop()
            rows.append(
                {
                    "clients": name,
                    "longest_wait_s": round(longest, 3),
                    "healthy_scores": len(healthy.waits),
                    "resets": healthy.resets + outcomes.pop("reset", 0),
                    "answers": dict(outcomes),
                    "lines": lines() - before,
                }
            )
            print(rows[-1])
    return rows


if __name__ == "__main__":
    by_attack()
