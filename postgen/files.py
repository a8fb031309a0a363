"""Write files and folders so that nobody ever sees half of one."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

from postgen.errors import UserError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a temporary name beside `target`; what stands there takes its place when the block ends well.

    Works for a file and for a folder. On any exception, Ctrl-C included, the temporary is removed and `target` is as
    before. The folder that holds `target` is created when it is missing.

    Raises:
        OSError: the place cannot be written.

    >>> from tempfile import mkdtemp
    >>> note = Path(mkdtemp()) / "note.txt"
    >>> with replacing(note) as part:
    ...     _ = part.write_text("hello")
    >>> note.read_text()
    'hello'
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        if part.is_dir() and target.is_dir():
            _swap_folder(part, target)
        else:
            os.replace(part, target)
    finally:
        _remove(part)


def _swap_folder(part: Path, target: Path) -> None:
    # No system call replaces a folder that is not empty, so the old one steps aside first and returns if that fails.
    aside = part.with_suffix(".old")
    os.replace(target, aside)
    try:
        os.replace(part, target)
    except BaseException:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_place(output: Path) -> None:
    """Write a file that vanishes at once: permissions alone do not tell (full disks, read-only and special mounts).

    Args:
        output: what is going to be written; its folder need not exist yet.

    Raises:
        UserError: nothing can be written there.
    """
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    try:
        with NamedTemporaryFile(dir=folder, prefix=".postgen-"):
            pass
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error
