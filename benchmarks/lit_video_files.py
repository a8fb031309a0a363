"""What a run leaves, as a few files of a bounded size, and back: to go on elsewhere.

Kept are results, logs, pictures, scores and adapters of a folder of runs, or the export of a teacher without its
autoencoder, which is the embedded model's.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

from postgen.assets import embedded_model
from postgen.errors import UserError
from postgen.files import replacing

LARGEST = 15 * 2**20
"""Bytes of a part, with room for what tar adds below 16 MiB."""
MOST = 4
"""Parts."""
TAIL = 20_000
"""Bytes of the end of a log."""


def kept_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder that are kept, those that must not be lost first."""
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
    """Write `part-N.tar.gz` with what is kept of a folder; what does not fit into all parts is left out.

    Raises:
        UserError: there is nothing to keep, or a file is larger than a part.
    """
    parts: list[list[tuple[str, bytes]]] = [[]]
    room = LARGEST
    for path in kept_files(folder):
        content = path.read_bytes()
        content = content[-TAIL:] if path.suffix == ".log" else content
        if len(content) > LARGEST:
            raise UserError(f"{path} has {len(content):,} bytes, a part takes {LARGEST:,}")
        if len(content) + 1024 > room:
            if len(parts) == MOST:
                continue
            parts.append([])
            room = LARGEST
        parts[-1].append((path.relative_to(folder).as_posix(), content))
        room -= len(content) + 1024
    if not parts[0]:
        raise UserError(f"{folder} holds nothing that is kept: give a folder of jobs, or an export")
    back.mkdir(parents=True, exist_ok=True)
    written = []
    for number, files in enumerate(parts):
        target = back / f"part-{number}.tar.gz"
        with replacing(target) as part, tarfile.open(part, "w:gz") as archive:
            for name, content in files:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        written.append(target)
    return written


def unpack(back: Path, folder: Path) -> None:
    """Put the parts of a folder together; a pipeline gets the embedded model's autoencoder.

    Raises:
        UserError: there are no parts.
    """
    parts = sorted(back.glob("part-*.tar.gz"))
    if not parts:
        raise UserError(f"there is no part-*.tar.gz in {back}")
    for part in parts:
        with tarfile.open(part) as archive:
            archive.extractall(folder, filter="data")
    if (folder / "model_index.json").is_file() and not (folder / "vae").exists():
        shutil.copytree(embedded_model() / "vae", folder / "vae")
