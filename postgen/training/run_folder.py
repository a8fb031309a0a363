"""The folder of a run: that one process at a time writes there, and what is said where it cannot be written."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from postgen.errors import UserError, first_line
from postgen.locks import FolderLock

from .logging import say

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""What stops every file from being written, wherever in the program that shows."""


class RunLock(FolderLock):
    """`FolderLock` of a run, whose processes tell the terminal in one voice."""

    def warn(self, message: str) -> None:
        """Say something that does not stop the run."""
        say(f"postgen: warning: {message}")


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
