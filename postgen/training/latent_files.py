"""Latents of numbered items, made once and kept in a folder; processes and later runs share them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from postgen.errors import UserError
from postgen.files import replacing
from postgen.reading import read_json
from postgen.tensor_files import opened

_SAID = "drawn.json"
_KEY = "states"


class LatentFiles:
    """Latents of the items 0 to count - 1, in files of `batch` items each.

    Each file always holds the same items. If the latents of a file are made together, its content depends neither on
    the number of processes nor on where a run was interrupted.

    Args:
        folder: the folder of the files.
        count: number of items.
        batch: number of items in a file.
        said: JSON values that identify everything that determines the latents.
    """

    def __init__(self, folder: Path, count: int, batch: int, said: dict[str, Any]) -> None:
        self.folder, self.count, self.batch = folder, count, batch
        self._said = json.loads(json.dumps(said))

    @property
    def chunks(self) -> range:
        """Numbers of the files."""
        return range(-(-self.count // self.batch))

    def items(self, chunk: int) -> range:
        """Return the items of a file."""
        return range(chunk * self.batch, min((chunk + 1) * self.batch, self.count))

    def missing(self) -> list[int]:
        """Return the numbers of the files that do not exist yet."""
        return [chunk for chunk in self.chunks if not self._file(chunk).is_file()]

    def check(self) -> None:
        """Note in the folder what determines the latents, or compare with an existing note.

        Raises:
            UserError: the folder holds latents of another run.
        """
        path = self.folder / _SAID
        if path.is_file():
            before = read_json(path, f"{path} cannot be read")
            before = before if isinstance(before, dict) else {}
            if different := [name for name in self._said if before.get(name) != self._said[name]]:
                raise UserError(
                    f"{self.folder} holds latents of a run with other settings ({', '.join(different)}): choose"
                    " another output_dir, or remove that folder"
                )
            return
        with replacing(path) as part:
            part.write_text(json.dumps(self._said, indent=1), encoding="utf-8")

    def write(self, chunk: int, latents: Tensor) -> None:
        """Write the latents of a file, (items, ...)."""
        with replacing(self._file(chunk)) as part:
            save_file({_KEY: latents.float().cpu().contiguous()}, part)

    def at(self, item: int, *index: int) -> Tensor:
        """Return the latents of an item, or an entry of their first axes, in float32 on the CPU.

        Raises:
            UserError: the file is missing or damaged.
        """
        chunk, row = divmod(item, self.batch)
        with opened(self._file(chunk)) as content:
            state: Tensor = content.get_slice(_KEY)[(row, *index)]
        return state

    def read(self) -> Tensor:
        """Return the latents of all items, (count, ...), in float32 on the CPU.

        Raises:
            UserError: a file is missing or damaged.
        """
        parts = []
        for chunk in self.chunks:
            with opened(self._file(chunk)) as content:
                parts.append(content.get_tensor(_KEY))
        return torch.cat(parts)

    def _file(self, chunk: int) -> Path:
        return self.folder / f"{chunk:05}.safetensors"


def wait_until(done: Callable[[], bool]) -> None:
    """Poll until the files of other processes exist. A barrier of the launcher would time out after some minutes."""
    while not done():
        time.sleep(0.5)
