"""The folder of a run: a lock, so that one run at a time writes to it, and errors about files in it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from postgen.errors import UserError, first_line
from postgen.locks import FolderLock

from .checkpoint import to_resume
from .config import TrainingConfig
from .logging import say

_FOLDERS = ("export", "samples", "evaluation")
"""Folders that trainers write long after the start of a run."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Errors that affect all files (full or read-only disk), so they are reported even for files outside the folder."""


class RunLock(FolderLock):
    """A `FolderLock` of a run that prints its warnings without breaking the progress bar."""

    def warn(self, message: str) -> None:
        """Print a warning; the run continues."""
        say(f"postgen: warning: {message}")


@contextmanager
def written(folder: Path, what: str = "the run") -> Iterator[None]:
    """Turn errors about files of a run that cannot be written into a `UserError`.

    Args:
        folder: folder of the run.
        what: description of what is written, for the message.

    Raises:
        UserError: the disk is full or read-only, or a file in `folder` cannot be written. Other errors pass through
            unchanged.
    """
    usual = threading.excepthook
    # TensorBoard's writer thread would print a traceback; its next call raises the same error again.
    threading.excepthook = lambda failed: None if _is_full(failed.exc_value) else usual(failed)
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and not _is_full(error) and not _inside(error, folder):
            raise
        raise UserError(
            f"{what} in {folder} cannot be written: {first_line(error)}. Make room, or remove what is in the way, then"
            " continue from the last checkpoint with --resume."
        ) from error
    finally:
        threading.excepthook = usual


@contextmanager
def own_folder(args: TrainingConfig, first_error: Callable[[str], str], *, main: bool) -> Iterator[None]:
    """Context manager that creates and locks the folder of a run, so that no other run writes to it.

    Args:
        args: the configuration of the run.
        first_error: returns the first non-empty text of all processes; every process calls it.
        main: whether this process creates the folder.

    Raises:
        UserError: the folder cannot be created, another run uses it, `check_places` refuses it, or there is nothing to
            resume.
    """
    lock, problem = RunLock(args.folder), ""
    try:
        if main:
            if not args.folder.exists():  # check first: an impossible resume must not create a folder
                to_resume(args.folder, args.resume_from_checkpoint)
            args.folder.mkdir(parents=True, exist_ok=True)
            check_places(args)
            lock.acquire()
    except OSError as error:
        problem = f"output_dir {args.folder} cannot be created: {no_folder(args.folder, error)}."
    except UserError as error:
        problem = str(error)
    try:
        if problem := first_error(problem):
            raise UserError(problem)
        yield
    finally:
        lock.release()


def check_places(args: TrainingConfig) -> None:
    """Check, before a run begins, that nothing is in the way of the folders that it writes later.

    Args:
        args: the configuration of the run. With `evaluate_only` it writes no export.

    Raises:
        UserError: a file has the name of one of them, or `export` holds files that no run wrote, which a run would
            replace.
    """
    folder = args.folder
    for place in (folder / name for name in _FOLDERS):
        if place.exists() and not place.is_dir():
            raise UserError(
                f"{place} is a file, but the run writes a folder there: move it, or give another output_dir"
            )
    export = folder / "export"
    ours = any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl"))  # a run writes both at its start
    if not (ours or args.evaluate_only) and export.is_dir() and any(export.iterdir()):
        raise UserError(
            f"{export} holds files that the run would replace, but {folder} is not the folder of a run: move them, or"
            " give another output_dir"
        )


def no_folder(folder: Path, error: OSError) -> str:
    """Return why a folder cannot be created: the file that is in its place, or the message of the error."""
    file = next((place for place in (folder, *folder.parents) if place.is_file()), None)
    return first_line(error) if file is None else f"{file} is a file, not a folder"


def _is_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in _FULL


def _inside(error: OSError, folder: Path) -> bool:
    home = os.path.abspath(folder)
    names = [name for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike)]
    return error.errno is not None and any(os.path.abspath(name).startswith(home) for name in names)
