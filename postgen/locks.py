"""Locks for folders and files that several processes use. Light to import."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Self

from postgen.errors import UserError

NAME = ".run.lock"
"""Default name of the lock file. The file contains the process that holds the lock."""

_EVERY = 0.5
"""Seconds between two attempts of a waiting process."""

_TAKEN = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK}
"""Errors of `flock` if another process holds the lock."""


@contextmanager
def alone(file: IO[bytes]) -> Iterator[None]:
    """Context manager that waits until no other process is in such a block with the same file.

    The operating system ends the lock of a killed process. Without locks (Windows, some network file systems) the
    block runs at once.

    Args:
        file: the open file; its content and position do not change.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file that several processes may write. Its folder is created if it is missing.

    A line that a killed process has left incomplete stays a line of its own, so a kill loses at most one line.

    Args:
        path: the file.
        line: text of the line, without its end.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file, alone(file):
        # The system lets a file grow page by page, so without the lock this could be the middle of a line that another
        # process is writing.
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
        whole = not end or file.read(1) == b"\n"
        data = f"{line}\n".encode() if whole else f"\n{line}\n".encode()
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


class FolderLock:
    """Lock that keeps other processes out of a folder.

    A process holds the lock from `acquire` or `wait` until `release` or until the process ends. The lock is a lock of
    the operating system (`flock`), which releases it even after a kill. The lock file remains in the folder.

    Args:
        folder: folder to lock.
        name: name of the lock file. Locks with different names are independent.
        setting: name of the setting that contains the folder, for error messages.
    """

    def __init__(self, folder: Path, name: str = NAME, setting: str = "output_dir") -> None:
        self.folder, self._name, self._setting, self._file = folder, name, setting, -1

    def acquire(self) -> None:
        """Lock the folder. On a file system without locks, only warn.

        Raises:
            UserError: another process holds the lock; the message names the process and its host.
            OSError: the lock file cannot be created.
        """
        if holder := self._try():
            raise UserError(
                f"{self._setting} {self.folder} is in use by {holder}: wait for its end, stop it, or give another"
                f" {self._setting}"
            )

    def wait(self, say: Callable[[str], None], what: str) -> None:
        """Wait until the folder is free, and lock it. Ctrl-C ends the wait.

        Args:
            say: function that shows a message; called once if another process holds the lock.
            what: verb phrase for this message: what the other process does.

        Raises:
            OSError: the lock file cannot be created.
        """
        told = False
        while holder := self._try():
            if not told:
                say(f"{self._setting} {self.folder}: {holder} {what}, waiting for it")
                told = True
            time.sleep(_EVERY)

    def _try(self) -> str:
        """Lock the folder and return an empty text, or return a description of the process that holds the lock."""
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
                f"the file system of {self.folder} does not support locks ({error.strerror}), so a second run is not"
                f" detected: start no second run with this {self._setting}"
            )
            return ""
        self._file = file
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        os.ftruncate(file, 0)
        os.write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode())
        return ""

    def warn(self, message: str) -> None:
        """Issue a warning."""
        warnings.warn(message, stacklevel=3)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *failure: object) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _holder(told: bytes) -> str:
    try:
        said = json.loads(told)
        return f"process {said['pid']} on {said['host']} since {said['since']}"
    except (ValueError, KeyError, TypeError):  # the holder has not written its description yet
        return "another process"
