"""A folder that one process at a time works in. Light to import."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from postgen.errors import UserError

NAME = ".run.lock"
"""The file that is locked; it says who holds the lock."""

_EVERY = 0.5
"""Seconds between two looks of a process that waits."""

_TAKEN = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK}


class FolderLock:
    """Keeps a second process out of a folder, from `acquire` or `wait` to `release` or to the end of its process.

    The lock is the system's own (`flock`): it needs no cleaning up, after a kill either. Its file stays in the folder.

    Args:
        folder: that is locked.
        name: of the file that is locked; locks of other names know nothing of each other.
        setting: what names the folder, for the error.
    """

    def __init__(self, folder: Path, name: str = NAME, setting: str = "output_dir") -> None:
        self.folder, self._name, self._setting, self._file = folder, name, setting, -1

    def acquire(self) -> None:
        """Lock the folder; on a file system without locks, say that nothing is locked.

        Raises:
            UserError: another process has it; the message names it and its host.
            OSError: the file of the lock cannot be made.
        """
        if holder := self._try():
            raise UserError(
                f"{self._setting} {self.folder} is in use by {holder}: wait for its end, stop it, or name another"
                f" {self._setting}"
            )

    def wait(self, say: Callable[[str], None], what: str) -> None:
        """Lock the folder once it is free; Ctrl-C ends the wait.

        Args:
            say: is told once, where another process has it.
            what: that process does, for this message.

        Raises:
            OSError: as for `acquire`.
        """
        told = False
        while holder := self._try():
            if not told:
                say(f"{self._setting} {self.folder}: {holder} {what}, waiting for it")
                told = True
            time.sleep(_EVERY)

    def _try(self) -> str:
        """Lock the folder, or say who has it."""
        try:
            import fcntl
        except ImportError:  # Windows
            return ""
        file = os.open(self.folder / self._name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            told = os.read(file, 1000)
            os.close(file)
            if error.errno in _TAKEN:
                return _holder(told)
            self.warn(
                f"the file system of {self.folder} has no locks ({error.strerror}): start no second run with this"
                f" {self._setting}, nothing would stop it"
            )
            return ""
        self._file = file
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        os.ftruncate(file, 0)
        os.write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode())
        return ""

    def warn(self, message: str) -> None:
        """Say something that does not stop the work."""
        warnings.warn(message, stacklevel=3)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *failure: object) -> None:
        self.release()

    def release(self) -> None:
        """Let the next process in."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _holder(told: bytes) -> str:
    try:
        said = json.loads(told)
        return f"process {said['pid']} on {said['host']} since {said['since']}"
    except (ValueError, KeyError, TypeError):  # it has just been locked
        return "another process"
