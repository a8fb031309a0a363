"""Protection of a server from slow, silent or greedy clients: a deadline for their data, a limit on all of it."""

from __future__ import annotations

import io
import threading
import time
from socket import socket
from typing import Any

LEAST = 2**16
"""Number of bytes that a client must send in each time span."""


class Patient(io.BufferedReader):
    """Buffered reader of a socket with a minimum data rate, read by lines first and then in pieces.

    In each time span the client must send `LEAST` bytes or reach the end of its data. A single byte from time to time
    is not enough.

    Args:
        connection: the socket; every read sets its timeout.
        seconds: length of the first time span.

    Raises:
        TimeoutError: raised by reads when a time span is over.
    """

    def __init__(self, connection: socket, seconds: float) -> None:
        self._stream = _Stream(connection, seconds)
        super().__init__(self._stream, 2**16)

    def start(self, seconds: float) -> None:
        """Start a new time span of the given length."""
        self._stream.start(seconds)

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the available data, up to `size` bytes; empty at the end."""
        return self.read1(-1 if size is None else size)


class _Stream(io.RawIOBase):
    def __init__(self, connection: socket, seconds: float) -> None:
        super().__init__()
        self._connection = connection
        self.start(seconds)

    def start(self, seconds: float) -> None:
        self._seconds, self._end, self._received = seconds, time.monotonic() + seconds, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the client is too slow")
        self._connection.settimeout(left)
        count = self._connection.recv_into(buffer)
        self._received += count
        if self._received >= LEAST:
            self.start(self._seconds)
        return count


class Budget:
    """A shared budget of bytes; a request for more than is left is refused.

    >>> budget = Budget(10)
    >>> budget.take(8), budget.take(8)
    (True, False)
    >>> budget.give_back(8)
    >>> budget.take(8)
    True
    """

    def __init__(self, total: int) -> None:
        self._left = total
        self._lock = threading.Lock()

    def take(self, count: int) -> bool:
        """Take `count` bytes if as many are left; return whether they were taken."""
        with self._lock:
            taken = count <= self._left
            self._left -= count if taken else 0
            return taken

    def give_back(self, count: int) -> None:
        """Return bytes that were taken to the budget."""
        with self._lock:
            self._left += count
