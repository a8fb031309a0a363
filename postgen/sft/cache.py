"""Tensors in a folder of safetensors files by digest: resumable, shared by processes and runs, checked when read."""

from __future__ import annotations

import json
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from postgen.errors import UserError, first_line
from postgen.files import replacing
from postgen.tensor_files import opened
from postgen.training.logging import Progress, say
from postgen.training.run_folder import RunLock

_NOTE = "postgen"
"""Metadata of a file: its checksum, and the rows of each encoding before zeros were removed."""
_MEMORY = 2**30
"""Bytes of the last used entries that stay in memory."""
_STALE = 600.0
"""Age in seconds from which the unfinished file of a killed process is removed."""


class _EntryLock(RunLock):
    """Lock for writing entries. It warns once about a file system without locks, not for each entry."""

    warned = False

    def warn(self, message: str) -> None:
        """Print a warning, if it is the first."""
        if not _EntryLock.warned:
            _EntryLock.warned = True
            super().warn(message)


Make = Callable[[], Mapping[str, Tensor]]
"""Makes the tensors of an entry."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """Tensors as they are stored."""

    tensors: dict[str, Tensor]
    rows: dict[str, int]
    """Rows of an encoding before zeros were removed, by name."""

    @property
    def size(self) -> int:
        """Number of bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Cache:
    """Named tensors by digest.

    A file holds one entry with a checksum. It is written under a temporary name and renamed, so that a killed process
    leaves no half of one. Zeros at the end of a text encoding, (1, L, C), are not stored.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._warned = False
        self._kept: OrderedDict[str, _Entry] = OrderedDict()
        self._space = _MEMORY

    def place(self, key: str) -> Path:
        """Return the file of an entry."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def fill(self, entries: Sequence[tuple[str, Make]], *, part: int = 0, parts: int = 1, bar: str = "") -> int:
        """Make the missing entries, and return how many were missing.

        A process makes its share, then entries that no other process is making, and waits for the rest.

        Args:
            entries: digest of each entry, and the function that makes it.
            part: number of this process.
            parts: number of processes that call this function with the same entries.
            bar: label of the progress bar; empty for none.

        Raises:
            UserError: the folder cannot be written, or an entry cannot be made.
        """
        missing = [entry for entry in dict(entries).items() if not self._whole(entry[0])]
        others: list[tuple[str, Make]] = []
        turns = [entry for turn in range(parts) for entry in missing[(part + turn) % parts :: parts]]
        bars = Progress(step=0, max_steps=len(missing), shown=bool(bar and missing), name=bar)
        with closing(bars) as progress:
            for entries_now, wait in ((turns, False), (others, True)):
                for key, make in entries_now:
                    if self._make(key, make, wait=wait):
                        progress.step()
                    else:
                        others.append((key, make))
        return len(missing)

    def get(self, key: str, make: Make) -> dict[str, Tensor]:
        """Return the tensors of an entry, on the CPU. A missing or damaged entry is made again, with a warning.

        The last used entries stay in memory. Do not change the tensors.

        Raises:
            UserError: the folder cannot be written or read, or the entry cannot be made.
        """
        if key not in self._kept:
            self._keep(key, self._remade(key, make))
        self._kept.move_to_end(key)
        found = self._kept[key]
        return {name: _with_zeros(value, found.rows.get(name, 0)) for name, value in found.tensors.items()}

    def _keep(self, key: str, entry: _Entry) -> None:
        self._kept[key] = entry
        self._space -= entry.size
        while self._space < 0 and len(self._kept) > 1:
            self._space += self._kept.popitem(last=False)[1].size

    def _remade(self, key: str, make: Make) -> _Entry:
        found = self._read(key)
        if found is None:
            self._warn(key)
            self.place(key).unlink(missing_ok=True)
            self._make(key, make, wait=True)
            found = self._read(key)
        if found is None:
            raise UserError(f"cache_dir: {self.place(key)} cannot be read right after it was written: check the disk")
        return found

    def _make(self, key: str, make: Make, *, wait: bool) -> bool:
        """Make an entry, if it is missing; return False if another process is making one and `wait` is off."""
        place = self.place(key)
        if self._whole(key):
            return True
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            lock = _EntryLock(place.parent, ".lock", "cache_dir")
            if wait:
                lock.wait(say, "encodes clips")
            else:
                try:
                    lock.acquire()
                except UserError:
                    return False
            try:
                if not self._whole(key):
                    _remove_stale(place.parent)
                    self._write(place, make())
            finally:
                lock.release()
        except (OSError, SafetensorError) as error:
            raise UserError(f"cache_dir {self.folder} cannot be written: {first_line(error)}") from error
        return True

    def _write(self, place: Path, tensors: Mapping[str, Tensor]) -> None:
        kept = {name: _without_zeros(tensor.detach().cpu()) for name, tensor in tensors.items()}
        rows = {name: len(tensor[0]) for name, tensor in tensors.items() if tensor.dim() == 3}
        with replacing(place) as part:
            # One entry: safetensors writes several in any order, and equal content should give equal files.
            save_file(kept, part, {_NOTE: json.dumps({"crc32": _checksum(kept, rows), "rows": rows})})

    def _whole(self, key: str) -> bool:
        """Return whether the file of an entry exists and has its full length."""
        if not self.place(key).is_file():
            return False
        try:
            with opened(self.place(key)) as content:
                return _NOTE in (content.metadata() or {})
        except UserError:
            self._warn(key)
            self.place(key).unlink(missing_ok=True)
            return False

    def _read(self, key: str) -> _Entry | None:
        """Return an entry; None if the file is missing or damaged."""
        try:
            with opened(self.place(key)) as content:
                told = dict(json.loads((content.metadata() or {}).get(_NOTE, "{}")))
                found = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        except (UserError, ValueError, TypeError):  # TypeError: the note is no object
            return None
        if told.get("crc32") != _checksum(found, told.get("rows")):
            return None
        return _Entry(found, told["rows"])

    def _warn(self, key: str) -> None:
        if not self._warned:
            self._warned = True
            say(
                f"postgen: warning: the cache file {self.place(key)} is missing or damaged: such files are made again;"
                " if this repeats, check the disk"
            )


def _checksum(tensors: Mapping[str, Tensor], rows: Any) -> int:
    """Return a checksum of tensors with names, shapes and dtypes, and of their rows before zeros were removed."""
    kinds = {name: (str(value.dtype), list(value.shape)) for name, value in tensors.items()}
    found = zlib.crc32(json.dumps([kinds, rows], sort_keys=True).encode())
    for name in sorted(tensors):
        values = tensors[name].contiguous().reshape(-1).view(torch.uint8)
        found = zlib.crc32(values.numpy().data, found)
    return found


def _without_zeros(tensor: Tensor) -> Tensor:
    if tensor.dim() != 3:
        return tensor.contiguous()
    used = (tensor != 0).any(2).any(0).nonzero()
    return tensor[:, : int(used[-1]) + 1 if len(used) else 0].contiguous()


def _with_zeros(tensor: Tensor, rows: int) -> Tensor:
    if tensor.dim() != 3 or tensor.shape[1] == rows:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], rows - tensor.shape[1], tensor.shape[2])], 1)


def _remove_stale(folder: Path) -> None:
    """Remove the temporary files of killed processes. The caller holds the lock of the folder."""
    for part in folder.glob(".*.part"):
        if time.time() - part.stat().st_mtime > _STALE:
            part.unlink(missing_ok=True)
