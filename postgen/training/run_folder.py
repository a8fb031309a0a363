"""The folder of a run: that one process at a time writes there, and what is said where it cannot be written."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from safetensors import SafetensorError

from postgen.errors import UserError, first_line

from .logging import say

NAME = ".run.lock"
"""The file that is locked; it says who holds the lock."""

_TAKEN = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""What stops every file from being written, wherever in the program that shows."""


class RunLock:
    """Keeps a second run out of a folder, from `acquire` to `release` or to the end of the process, a kill included.

    The lock is the system's own (`flock`): it needs no cleaning up. Its file stays in the folder.

    Args:
        folder: of the run.
        name: of the file that is locked; locks of other names know nothing of each other.
        setting: what names the folder, for the error.
    """

    def __init__(self, folder: Path, name: str = NAME, setting: str = "output_dir") -> None:
        self.folder, self._name, self._setting, self._file = folder, name, setting, -1

    def acquire(self) -> None:
        """Lock the folder; on a file system without locks, say that nothing is locked.

        Raises:
            UserError: another run has it; the message names its process and host.
            OSError: the file of the lock cannot be made.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            return
        file = os.open(self.folder / self._name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            told = os.read(file, 1000)
            os.close(file)
            if error.errno in _TAKEN:
                raise UserError(
                    f"{self._setting} {self.folder} is in use by {_holder(told)}: wait for its end, stop it, or name"
                    f" another {self._setting}"
                ) from None
            say(
                f"postgen: warning: the file system of {self.folder} has no locks ({error.strerror}): start no second"
                f" run with this {self._setting}, nothing would stop it"
            )
            return
        self._file = file
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        os.ftruncate(file, 0)
        os.write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode())

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *failure: object) -> None:
        self.release()

    def release(self) -> None:
        """Let the next run in."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _holder(told: bytes) -> str:
    try:
        said = json.loads(told)
        return f"process {said['pid']} on {said['host']} since {said['since']}"
    except (ValueError, KeyError, TypeError):  # it has just been locked
        return "another process"


@contextmanager
def written(folder: Path, what: str = "the run") -> Iterator[None]:
    """Turn what keeps files of a run from being written (a full disk, a folder in a file's place) into one line.

    Args:
        folder: of the run.
        what: what was to be written.

    Raises:
        UserError: instead of an error of the file system that says the disk is full or read-only, or that is about a
            file in `folder`. Any other goes on as it is.
    """
    usual = threading.excepthook
    # TensorBoard writes in a thread, and raises once more where it is called next.
    threading.excepthook = lambda failed: None if _is_full(failed.exc_value) else usual(failed)
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and not _is_full(error) and not _inside(error, folder):
            raise
        raise UserError(
            f"{what} in {folder} cannot be written: {first_line(error)}. Make room or clear the place, then go on from"
            " the last checkpoint with --resume."
        ) from error
    finally:
        threading.excepthook = usual


def _is_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in _FULL


def _inside(error: OSError, folder: Path) -> bool:
    home = os.path.abspath(folder)
    names = [name for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike)]
    return error.errno is not None and any(os.path.abspath(name).startswith(home) for name in names)
