"""Write files and folders atomically, so that no reader ever sees an incomplete one."""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from postgen.errors import UserError
from postgen.interrupts import held

_unfinished: set[Path] = set()
"""Temporary paths that are in use."""


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Context manager that yields a temporary path, and renames it to `target` when the block ends without an error.

    It works for a file and for a folder. On any exception, including Ctrl-C, it removes the temporary file or folder
    and leaves `target` unchanged. It creates the parent folder of `target` if that is missing.

    Raises:
        OSError: `target` cannot be written.

    >>> from tempfile import mkdtemp
    >>> note = Path(mkdtemp()) / "note.txt"
    >>> with replacing(note) as part:
    ...     _ = part.write_text("hello")
    >>> note.read_text()
    'hello'
    """
    with replacing_all([target]) as (part,):
        yield part


@contextmanager
def replacing_all(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Context manager that works like `replacing` for several files and folders: it replaces all of them or none.

    A symbolic link remains, and the file that it points to is replaced. Signals are delayed during the renaming.

    Args:
        targets: final paths.

    Yields:
        The temporary paths, in the order of `targets`.

    Raises:
        OSError: a target cannot be written.
    """
    targets = [_real(target) for target in targets]
    parts = [_part(target) for target in targets]
    made: list[Path] = []
    _unfinished.update(parts)
    try:
        for target in targets:
            made += _make_parents(target)
        yield parts
        with held():
            _place(list(zip(parts, targets, strict=True)))
            made = []
    finally:
        with held():
            _clear(parts)
            for folder in reversed(made):
                with suppress(OSError):  # another process has written a file there
                    folder.rmdir()


def discard_unfinished() -> None:
    """Remove the temporary files and folders of all unfinished `replacing` blocks, after an interrupt."""
    _clear(list(_unfinished))


def _part(target: Path) -> Path:
    # The name of the target may have the largest allowed length, and the name of the temporary file must fit too.
    return target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}.part")


def _real(path: Path) -> Path:
    """Return the target of a symbolic link, even if the target does not exist; return any other path unchanged."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _make_parents(target: Path) -> list[Path]:
    """Create the parent folders of a file, and return the new ones, beginning with the outermost."""
    missing = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _place(pairs: list[tuple[Path, Path]]) -> None:
    """Rename all temporary paths to their targets. On an error, undo the renaming and raise the error."""
    old: list[tuple[Path, Path]] = []
    new: list[Path] = []
    try:
        for part, target in pairs:
            folders = part.is_dir() and target.is_dir()
            if target.is_dir() and not part.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
            # The system can replace one file by another in a single step, but not several files, nor a folder that is
            # not empty. In these cases the old one is renamed first, so that it can be restored.
            if (folders or len(pairs) > 1) and os.path.lexists(target):
                aside = part.with_suffix(".old")
                os.replace(target, aside)
                old.append((aside, target))
            os.replace(part, target)
            new.append(target)
    except BaseException:
        if old or len(pairs) > 1:
            for target in new:
                _remove(target)
            for aside, target in old:
                os.replace(aside, target)
        raise
    for aside, _ in old:
        _remove(aside)


def _clear(parts: Iterable[Path]) -> None:
    for part in parts:
        _unfinished.discard(part)
        with suppress(NotADirectoryError):  # the part was never written: a file has the name of its folder
            _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def named(text: str, *, folder: bool | None = False) -> Path:
    """Return the path of an output that a user names; `~` is replaced by the home folder.

    Args:
        text: the name that the user gave.
        folder: whether the output is a folder, so that the name may end with a slash; None: not known yet.

    Raises:
        UserError: the name is empty; or it ends with a slash or is an existing folder, although the output is a file.
    """
    if not text.strip():
        raise UserError("the name of the output is empty: name the file or folder to write")
    if text[-1] in (os.sep, os.altsep) and not folder:
        raise UserError(f"cannot write {text}: a slash at the end means a folder, give the name of a file")
    path = Path(text)
    with suppress(RuntimeError):  # there is no user of that name
        path = path.expanduser()
    # Checked here, because a suffix may be added to the name later.
    if folder is False and path.name.strip(". ") and os.path.isdir(path):
        raise UserError(f"cannot write {text}: it is a folder, give the name of a file")
    return path


def check_place(output: Path, *, folder: bool | None = None) -> None:
    """Check that an output can be written, before any time is spent on computing it.

    The check writes a file and removes it at once, because permissions alone do not show a full disk, a read-only
    mount or a special mount.

    Args:
        output: path of the output; its folder need not exist yet.
        folder: whether the output is a folder; None: either.

    Raises:
        UserError: the path cannot be written; it is `.`, `..` or empty; a folder exists where a file is to be written,
            or a file where a folder is to be written; or the path is a device, a pipe or a socket.
    """
    if not output.name.strip(". "):
        raise UserError(f"cannot write {str(output) or '(nothing)'}: it is not the name of an output, give a name")
    if "\0" in str(output):
        raise UserError(f"cannot write {str(output)!r}: a name cannot contain a zero byte")
    try:
        mode = _mode(output)
        home = next(parent for parent in _real(output).absolute().parents if _mode(parent))
        if not stat.S_ISDIR(_mode(home)):
            raise UserError(f"cannot write {output}: {home} is not a folder")
        _check_kind(output, mode, folder)
        with held(), NamedTemporaryFile(dir=home, prefix=".postgen-"):
            pass
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error


def _mode(path: Path) -> int:
    """Return the mode of the file or folder at a path; 0 if there is none."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _check_kind(output: Path, mode: int, folder: bool | None) -> None:
    if stat.S_ISDIR(mode) and folder is False:
        raise UserError(f"cannot write {output}: it is a folder, give the name of a file")
    if stat.S_ISREG(mode) and folder:
        raise UserError(f"cannot write {output}: it is a file, give the name of a folder")
    if mode and not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise UserError(f"cannot write {output}: it is a device, a pipe or a socket, give the name of a file")


def check_apart(outputs: Iterable[Path], inputs: Iterable[Path] = ()) -> None:
    """Check that no output of a call overwrites another output or an input. Symbolic links are followed.

    Args:
        outputs: files and folders that the call writes.
        inputs: files that the call reads; `files_of` lists the files of an input folder.

    Raises:
        UserError: two of the paths are the same file, or an output folder contains an input.
    """
    seen: dict[object, Path] = {}
    for output in outputs:
        for key in _identities(output):
            if seen.setdefault(key, output) is not output:
                what = "two files of this call" if str(output) == str(seen[key]) else f"the same file as {seen[key]}"
                raise UserError(f"{output} would be {what}: give another name or another format")
    for given in inputs:
        for key in _identities(given):
            if key in seen:
                raise UserError(f"{seen[key]} would overwrite {given}, which this call reads: give another output")
        if inside := next((seen[key] for parent in given.parents for key in _identities(parent) if key in seen), None):
            raise UserError(f"{inside} would replace {given}, which this call reads: give another output")


def files_of(path: Path) -> list[Path]:
    """Return the files of a folder and of its direct subfolders, as a model has them.

    The result for a file is this file; for a path that does not exist it is empty.
    """
    with suppress(OSError, ValueError):  # the code that reads the path reports an invalid name
        if path.is_dir():
            return sorted(file for pattern in ("*", "*/*") for file in path.glob(pattern) if file.is_file())
        if path.exists():
            return [path]
    return []


def _identities(path: Path) -> list[object]:
    """Return values that are equal for two names of one file: its path without links and, if it exists, its inode."""
    place: list[object] = [os.path.realpath(path)]
    with suppress(OSError, ValueError):
        found = os.stat(path)
        place.append((found.st_dev, found.st_ino))
    return place
