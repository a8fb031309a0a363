"""Measure how long slow, silent or many clients keep a healthy client of `postgen serve-reward` waiting.

    python -m benchmarks.faults_server

A server runs in its own process. One kind of bad clients after the other connects to it, many at the same time. During
each attack, a healthy client requests one score after the other. The result is its longest wait; if the server answers
503, the wait lasts until a later request returns the score. The benchmark also counts the answers that are lost
because the connection is reset, and the lines that the server writes to the terminal.
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
"""Number of slow clients at the same time, number of requests of a burst, and duration of a slow attack in seconds."""
_LIMIT = 60.0
HEAD = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: {MEDIA_TYPE}\r\n"


def request() -> bytes:
    """Return the body of a healthy request, with one clip of 8 frames of 64x64 pixels."""
    return pack(["a"], [torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))])


def ask(port: int, body: bytes) -> int:
    """Send a request; return the HTTP status of the answer.

    Raises:
        OSError: if no answer arrives.
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
    """Thread that requests scores until `stop`, and records the wait in seconds for each score."""

    def __init__(self, port: int, body: bytes) -> None:
        super().__init__(daemon=True)
        self.port, self.body = port, body
        self.waits: list[float] = []
        self.resets = 0
        self._over = threading.Event()

    def run(self) -> None:
        """Request scores until `stop`, or until one wait exceeds the limit."""
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
        """Stop the thread; return the longest wait in seconds."""
        self._over.set()
        self.join(_LIMIT)
        return max(self.waits, default=_LIMIT)


def _drip(port: int, start: str, over: float) -> None:
    """Open a connection, send `start`, and then one byte per second. With an empty `start`, send nothing."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(start.encode())
        while time.monotonic() < over:
            time.sleep(1)
            if start:
                connection.sendall(b"x")


def slow(start: str, count: int = SLOW) -> Callable[[int, bytes], Counter[str]]:
    """Return an attack with `count` slow connections, which are opened again when the server closes them.

    With an empty `start` the connections are silent.
    """

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
    """Send `BURST` requests at the same time, three times; return the number of answers by status."""
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
    """Send half a request or a whole one, and close the connection without waiting for the answer."""
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
    """Start a server; yield its port, and a function that counts the lines it has written to stderr so far."""
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
    """Run each attack of `ATTACKS` and return one row per attack."""
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
