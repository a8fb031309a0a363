"""Reading from clients that are slow, silent or greedy: a deadline for what they send, a bound for all of it."""

from __future__ import annotations

import io
import threading
import time
from socket import socket
from typing import Any

LEAST = 2**16
"""Bytes that a client must send in each span."""


class Patient(io.BufferedReader):
    """What a socket receives, to be read line by line and then in pieces.

    In each span of time `LEAST` bytes must come, or the end: one byte now and then does not do.

    Args:
        connection: the socket; its time limit is set anew by every read.
        seconds: the first span.

    Raises:
        TimeoutError: by its reads, when a span is over.
    """

    def __init__(self, connection: socket, seconds: float) -> None:
        self._stream = _Stream(connection, seconds)
        super().__init__(self._stream, 2**16)

    def start(self, seconds: float) -> None:
        """Begin a new span, of another length."""
        self._stream.start(seconds)

    def read(self, size: int | None = -1, /) -> bytes:
        """Return what there is, up to `size` bytes; nothing at the end."""
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
    """So many bytes for all; who wants more than is left gets none.

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
        """Take some, if there are so many."""
        with self._lock:
            taken = count <= self._left
            self._left -= count if taken else 0
            return taken

    def give_back(self, count: int) -> None:
        """Give back what was taken."""
        with self._lock:
            self._left += count
