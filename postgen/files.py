"""Write files and folders so that nobody ever sees half of one."""

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
"""Temporary names that are in use."""


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
    with replacing_all([target]) as (part,):
        yield part


@contextmanager
def replacing_all(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Give a temporary name for each of several files and folders: all of them take their places, or none does.

    As `replacing`, which says more. A link stays: what it names is replaced. Signals wait while names change.

    Raises:
        OSError: a place cannot be written.
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
                with suppress(OSError):  # somebody else has put something there
                    folder.rmdir()


def discard_unfinished() -> None:
    """Remove all temporary files that are in use: for the end of a command that was stopped, wherever it was."""
    _clear(list(_unfinished))


def _part(target: Path) -> Path:
    # A name may be as long as the file system allows, and that of its temporary file must fit as well.
    return target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}.part")


def _real(path: Path) -> Path:
    """Return where a link leads, also where nothing is yet; any other path as it is."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _make_parents(target: Path) -> list[Path]:
    """Make the folder of a file; return the folders that are new, from the outermost."""
    missing = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _place(pairs: list[tuple[Path, Path]]) -> None:
    """Rename all, or undo what was renamed and raise."""
    old: list[tuple[Path, Path]] = []
    new: list[Path] = []
    try:
        for part, target in pairs:
            folders = part.is_dir() and target.is_dir()
            if target.is_dir() and not part.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
            # One file replaces another in a single step. No system call does so with a folder that is not empty, nor
            # with several files: there the old one steps aside first.
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
        with suppress(NotADirectoryError):  # it was never made: a file stands where its folder should
            _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def named(text: str, *, folder: bool = False) -> Path:
    """Return the path that a text names, for something to be written; `~` is the home of a user.

    Args:
        text: what the user gave.
        folder: whether a folder is meant, which a slash at the end says.

    Raises:
        UserError: it is empty, or a folder where a file is meant.
    """
    if not text.strip():
        raise UserError("the name of the output is empty: say what to write")
    if text[-1] in (os.sep, os.altsep) and not folder:
        raise UserError(f"cannot write {text}: the slash at its end makes it a folder, name a file")
    with suppress(RuntimeError):  # nobody of that name has a home
        return Path(text).expanduser()
    return Path(text)


def check_place(output: Path, *, folder: bool | None = None) -> None:
    """Find out whether something can be written, before work goes into it.

    A file is written and vanishes at once: permissions alone do not tell (full disks, read-only and special mounts).

    Args:
        output: what is going to be written; its folder need not exist yet.
        folder: whether it will be a folder; None for either.

    Raises:
        UserError: nothing can be written there; it is `.`, `..` or no name at all; a folder stands where a file is
            meant, or a file where a folder; it is a device, a pipe or a socket.
    """
    if not output.name.strip(". "):
        raise UserError(f"cannot write {str(output) or '(nothing)'}: it is no name of its own, give one")
    if "\0" in str(output):
        raise UserError(f"cannot write {str(output)!r}: no name holds a zero byte")
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
    """Return the mode of what stands there; 0 for nothing."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _check_kind(output: Path, mode: int, folder: bool | None) -> None:
    if stat.S_ISDIR(mode) and folder is False:
        raise UserError(f"cannot write {output}: it is a folder")
    if stat.S_ISREG(mode) and folder:
        raise UserError(f"cannot write {output}: it is a file, give the name of a folder")
    if mode and not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise UserError(f"cannot write {output}: it is a device, a pipe or a socket, and no file")


def check_apart(outputs: Iterable[Path], inputs: Iterable[Path] = ()) -> None:
    """See that the outputs of a call overwrite neither each other nor what it reads; links are followed.

    Args:
        outputs: what is going to be written.
        inputs: files that are read, also those in an output folder; `files_of` lists those of an input folder.

    Raises:
        UserError: two of them are the same file, or an output folder holds an input.
    """
    seen: dict[object, Path] = {}
    for output in outputs:
        for key in _identities(output):
            if seen.setdefault(key, output) is not output:
                what = "two files of this call" if str(output) == str(seen[key]) else f"the same file as {seen[key]}"
                raise UserError(f"{output} would be {what}: give another name, or another format")
    for given in inputs:
        for key in _identities(given):
            if key in seen:
                raise UserError(f"{seen[key]} would overwrite {given}, which this call reads: give another place")
        if inside := next((seen[key] for parent in given.parents for key in _identities(parent) if key in seen), None):
            raise UserError(f"{inside} would replace {given}, which this call reads: give another place")


def files_of(path: Path) -> list[Path]:
    """Return the files of a folder and of its folders, as a model has them; a file itself; nothing for neither."""
    with suppress(OSError, ValueError):  # an odd name is told where it is read
        if path.is_dir():
            return sorted(file for pattern in ("*", "*/*") for file in path.glob(pattern) if file.is_file())
        if path.exists():
            return [path]
    return []


def _identities(path: Path) -> list[object]:
    """Return what is equal for two names of one file: its place without links, and its inode where it is there."""
    place: list[object] = [os.path.realpath(path)]
    with suppress(OSError, ValueError):
        found = os.stat(path)
        place.append((found.st_dev, found.st_ino))
    return place
