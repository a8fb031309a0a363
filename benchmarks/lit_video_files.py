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
from collections.abc import Iterable, Iterator
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


def pack_files(files: Iterable[Path], folder: Path, back: Path, *, complete: bool = False) -> list[Path]:
    """Write files to `part-N.tar.gz`, in place of all parts that are there.

    Args:
        files: the files, the most important ones first.
        folder: the folder that holds them; their names in the parts are relative to it.
        back: the folder for the parts.
        complete: whether a file that does not fit is an error. Otherwise it is left out, and its name is printed, so
            that all other files are kept.

    Returns:
        The written parts.

    Raises:
        UserError: there is nothing to pack, or with `complete` a file does not fit.
    """
    parts: list[list[tuple[str, bytes]]] = [[]]
    room, left_out = LARGEST, []
    for path in files:
        content = path.read_bytes()
        content = content[-TAIL:] if path.suffix == ".log" else content
        size = len(content) + 1024
        if size > LARGEST or (size > room and len(parts) == MOST):
            left_out.append(f"{path.relative_to(folder)} ({len(content):,} bytes)")
            continue
        if size > room:
            parts.append([])
            room = LARGEST
        parts[-1].append((path.relative_to(folder).as_posix(), content))
        room -= size
    if left_out:
        told = f"{', '.join(left_out)} does not fit into {MOST} files of {LARGEST:,} bytes"
        if complete:
            raise UserError(told)
        print(f"not saved: {told}", flush=True)
    if not parts[0]:
        raise UserError(f"{folder} has no files to pack: give a folder of jobs, or the export of a teacher")
    back.mkdir(parents=True, exist_ok=True)
    written = []
    for number, contents in enumerate(parts):
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
