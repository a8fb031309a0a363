"""Pack the results of a run into a few files of limited size, and unpack them to continue on another machine.

From a folder of jobs the results, logs, pictures, scores and adapters are packed. From the export of a teacher
everything is packed except its autoencoder, which is that of the embedded model.
"""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from postgen.assets import embedded_model
from postgen.errors import UserError
from postgen.files import replacing

LARGEST = 15 * 2**20
"""Largest content of a part in bytes; with the overhead of tar a part stays below 16 MiB."""
MOST = 4
"""Largest number of parts."""
TAIL = 20_000
"""Bytes that are kept from the end of a log."""


def kept_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder to pack, the most important ones first."""
    if (folder / "model_index.json").is_file():
        yield from sorted(
            path for path in folder.rglob("*") if path.is_file() and "vae" not in path.relative_to(folder).parts
        )
        return
    for pattern in ("prompts.jsonl", "jobs/*.json", "jobs/*.log", "work/s1.*/scores.json", "jobs/*.png"):
        yield from sorted(folder.glob(pattern))
    yield from sorted(
        folder.glob("work/*/adapter.safetensors"), key=lambda path: not path.parent.name.startswith("s1")
    )


def pack(folder: Path, back: Path) -> list[Path]:
    """Write the files of a folder of jobs, or of the export of a teacher, to `part-N.tar.gz` in `back`.

    Returns:
        The written parts.

    Raises:
        UserError: there is nothing to pack, or a file of an export does not fit.
    """
    return pack_files(kept_files(folder), folder, back, complete=(folder / "model_index.json").is_file())


def pack_files(
    files: Iterable[Path | Sequence[Path]], folder: Path, back: Path, *, complete: bool = False
) -> list[Path]:
    """Write files to `part-N.tar.gz`, in place of all parts that are there.

    Args:
        files: the files, the most important ones first. Files in a sequence are written together or not at all; if a
            running job has removed one of them since, the others are left out without a word.
        folder: the folder that holds them; their names in the parts are relative to it.
        back: the folder for the parts.
        complete: whether a file that does not fit is an error. Otherwise it is left out, and its name is printed, so
            that all other files are kept.

    Returns:
        The written parts.

    Raises:
        UserError: there is nothing to pack, or with `complete` a file does not fit.
    """
    parts, left_out = _Parts(), []
    for each in files:
        paths = [each] if isinstance(each, Path) else each
        try:
            contents = [(path.relative_to(folder).as_posix(), _content(path)) for path in paths]
        except FileNotFoundError:
            if isinstance(each, Path):
                raise
            continue
        if not parts.add(contents):
            size = sum(len(content) for _, content in contents)
            more = f" and {len(contents) - 1} more" if len(contents) > 1 else ""
            left_out.append(f"{contents[0][0]}{more} ({size:,} bytes)")
    if left_out:
        told = f"{', '.join(left_out)} does not fit into {MOST} files of {LARGEST:,} bytes"
        if complete:
            raise UserError(told)
        print(f"not saved: {told}", flush=True)
    if not parts.contents[0]:
        raise UserError(f"{folder} has no files to pack: give a folder of jobs, or the export of a teacher")
    back.mkdir(parents=True, exist_ok=True)
    written = []
    for number, contents in enumerate(parts.contents):
        target = back / f"part-{number}.tar.gz"
        with replacing(target) as part, tarfile.open(part, "w:gz") as archive:
            for name, content in contents:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        written.append(target)
    for stale in {*back.glob("part-*.tar.gz")} - {*written}:  # it would replace newer files when it is unpacked
        stale.unlink()
    return written


class _Parts:
    """The contents of the parts, each a list of names and contents of files."""

    def __init__(self) -> None:
        self.contents: list[list[tuple[str, bytes]]] = [[]]
        self._room = LARGEST

    def add(self, files: Sequence[tuple[str, bytes]]) -> bool:
        """Add files if all of them fit; return whether they do."""
        new: list[list[tuple[str, bytes]]] = [[]]
        room = self._room
        for name, content in files:
            size = len(content) + 1024
            if size > room:
                new.append([])
                room = LARGEST
            if size > room or len(self.contents) + len(new) - 1 > MOST:
                return False
            new[-1].append((name, content))
            room -= size
        self.contents[-1] += new[0]
        self.contents += new[1:]
        self._room = room
        return True


def _content(path: Path) -> bytes:
    """Return the bytes of a file to pack: of a log only the end."""
    content = path.read_bytes()
    return content[-TAIL:] if path.suffix == ".log" else content


def unpack(back: Path, folder: Path) -> None:
    """Extract the parts in `back` to `folder`; add the autoencoder of the embedded model to a pipeline.

    Raises:
        UserError: `back` has no parts, or one is damaged.
    """
    parts = sorted(back.glob("part-*.tar.gz"))
    if not parts:
        raise UserError(f"there is no part-*.tar.gz in {back}: give a folder that --back wrote")
    for part in parts:
        try:
            with tarfile.open(part) as archive:
                archive.extractall(folder, filter="data")
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{part} is damaged ({error}): copy it again, or remove it to do without it") from error
    if (folder / "model_index.json").is_file() and not (folder / "vae").exists():
        shutil.copytree(embedded_model() / "vae", folder / "vae")
