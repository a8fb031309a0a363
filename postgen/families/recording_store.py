"""Stores of recorded tensors: in memory or in a folder. The structures that contain the tensors are plain JSON."""

from __future__ import annotations

import json
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.tensor_files import opened

INDEX = "recording.json"
"""Name of the file that a recording's folder must have; it is written last."""

FORMAT = 1


class Store(ABC):
    """Splits nested structures into JSON and tensors, and assembles them again."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, dict[str, Any]]] = {}

    @abstractmethod
    def put(self, data: Tensor) -> str:
        """Store a contiguous CPU tensor and return its key."""

    @abstractmethod
    def get(self, key: str) -> Tensor:
        """Return the tensor of a key."""

    @abstractmethod
    def flush(self) -> None:
        """Release the memory of a complete call, where the store allows this."""

    def keep(self, value: Any, what: str) -> Any:
        """Store the tensors of a structure, and return the structure as JSON with keys in place of tensors.

        Args:
            value: tensors, numbers, texts, None, and tuples, lists and dictionaries of these.
            what: description of the structure, for the error message.

        Raises:
            UserError: the structure contains another type.
        """
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided:
                raise UserError(
                    f"{what}: a {type(value).__name__} ({value.layout}) cannot be recorded, only plain strided tensors"
                )
            return self._tensor(value)
        if value is None or type(value) in (bool, int, float, str):
            return {"value": value}
        if type(value) in (tuple, torch.Size, list):
            return {"list" if type(value) is list else "tuple": [self.keep(each, what) for each in value]}
        if type(value) is dict and all(type(key) in (str, int) for key in value):
            return {"dict": [[key, self.keep(each, what)] for key, each in value.items()]}
        raise UserError(
            f"{what}: a {type(value).__name__} cannot be recorded, only tensors, numbers, texts and collections"
        )

    def forget(self) -> None:
        """Drop the table of stored tensors at the end of a recording. Its weak references would prevent copies."""
        self._seen.clear()

    def load(self, spec: Any, device: torch.device | str) -> Any:
        """Assemble a structure from the result of `keep`, with new tensors on a device.

        A tensor that occurs twice in the structure is one object.
        """
        return self._load(spec, torch.device(device), {})

    def _load(self, spec: Any, device: torch.device, made: dict[str, Tensor]) -> Any:
        (kind, value), *_ = spec.items()
        if kind == "tensor":
            # The same data with other strides belongs to another tensor.
            name = f"{value} {spec['size']} {spec['stride']}"
            if name not in made:
                data = self.get(value)
                data = torch.view_as_complex(data) if spec["complex"] else data
                made[name] = _laid_out(data, spec["size"], spec["stride"], device)
            return made[name]
        if kind == "value":
            return value
        if kind == "dict":
            return {key: self._load(each, device, made) for key, each in value}
        return (list if kind == "list" else tuple)(self._load(each, device, made) for each in value)

    def _tensor(self, tensor: Tensor) -> dict[str, Any]:
        # Inference tensors have no version counter, so changes in place would be missed.
        if tensor.is_inference():
            return self._put(tensor)
        found = self._seen.get(id(tensor))
        if found is not None and found[0]() is tensor and found[1] == tensor._version:
            return found[2]
        spec = self._put(tensor)
        self._seen[id(tensor)] = (weakref.ref(tensor), tensor._version, spec)
        return spec

    def _put(self, tensor: Tensor) -> dict[str, Any]:
        size, stride = list(tensor.shape), list(tensor.stride())
        data = tensor.detach()
        for axis, step in enumerate(stride):
            # `expand` repeats one element along this axis: store it once.
            if step == 0 and size[axis] > 1:
                data = data.narrow(axis, 0, 1)
        if _overlaps(data):
            stride = list(torch.empty(size, device="meta").stride())
            data = tensor.detach()
        # A copy made in inference mode could not be used for training.
        with torch.inference_mode(False), torch.no_grad():
            copy = torch.empty(data.shape, dtype=data.dtype, device="cpu")
            copy.copy_(data)
            # safetensors does not have all complex dtypes.
            copy = torch.view_as_real(copy).contiguous() if copy.is_complex() else copy
        return {"tensor": self.put(copy), "size": size, "stride": stride, "complex": tensor.is_complex()}


class MemoryStore(Store):
    """Store that keeps all tensors in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, Tensor] = {}

    def put(self, data: Tensor) -> str:
        """Store a tensor and return its key."""
        key = str(len(self._kept))
        self._kept[key] = data
        return key

    def get(self, key: str) -> Tensor:
        """Return the tensor of a key."""
        return self._kept[key]

    def flush(self) -> None:
        """Do nothing: all tensors stay in memory."""


class CountingStore(Store):
    """Store that counts the bytes that the other stores would keep, and keeps nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        """Bytes of all tensors so far; a tensor that occurs twice counts once."""

    def put(self, data: Tensor) -> str:
        """Count the bytes of a tensor and return an empty key."""
        self.bytes += data.nbytes
        return ""

    def get(self, key: str) -> Tensor:
        """Refuse: this store keeps no tensor.

        Raises:
            KeyError: always.
        """
        raise KeyError(key)

    def flush(self) -> None:
        """Do nothing: there is nothing to write."""


class FolderStore(Store):
    """Store that writes one safetensors file per call of a block, and at the end an index."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._files = count()
        self._file = f"{next(self._files):06}"
        self._new: dict[str, Tensor] = {}

    def put(self, data: Tensor) -> str:
        """Keep a tensor until `flush` writes it, and return its key."""
        name = str(len(self._new))
        self._new[name] = data
        return f"{self._file}/{name}"

    def get(self, key: str) -> Tensor:
        """Read the tensor of a key.

        Raises:
            UserError: the file of the tensor is missing or damaged.
        """
        file, name = key.split("/")
        said = f"{self._folder} is not a complete recording, record it again"
        with opened(self._folder / f"{file}.safetensors", said) as tensors:
            found: Tensor = tensors.get_tensor(name)
        return found

    def flush(self) -> None:
        """Write the tensors since the last `flush` to a new file.

        Raises:
            UserError: the file cannot be written.
        """
        if not self._new:
            return
        with self._writing():
            save_file(self._new, self._folder / f"{self._file}.safetensors")
        self._new = {}
        self._file = f"{next(self._files):06}"

    def write_index(self, specs: dict[str, list[dict[str, Any]]]) -> None:
        """Write the structures of all calls, which completes the recording.

        Raises:
            UserError: the file cannot be written.
        """
        with self._writing():
            (self._folder / INDEX).write_text(json.dumps({"format": FORMAT, "blocks": specs}), encoding="utf-8")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self._folder.mkdir(exist_ok=True)
            yield
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the recording cannot be written to {self._folder.parent} ({error}):"
                " free some space or name another folder"
            ) from error

    def index(self) -> dict[str, list[dict[str, Any]]]:
        """Read the structures of all calls.

        Raises:
            UserError: the folder has no recording, or one of another format.
        """
        path = self._folder / INDEX
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            known = read["format"] == FORMAT
            blocks: dict[str, list[dict[str, Any]]] = dict(read["blocks"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._folder} has no recording of blocks ({INDEX}: {error}): record one") from error
        if not known:
            raise UserError(f"{path} has format {read['format']}, this version reads format {FORMAT}: record it again")
        return blocks


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements of a tensor may share memory, or a new tensor cannot have its strides."""
    reach = 0
    for step, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1:
            if step <= reach:
                return True
            reach += step * (length - 1)
    return False


def _laid_out(data: Tensor, size: list[int], stride: list[int], device: torch.device) -> Tensor:
    """Return a copy of contiguous data with the recorded strides, on which the rounding of some operations depends."""
    laid = torch.empty_strided(data.shape, stride, dtype=data.dtype, device=device)
    return laid.copy_(data).expand(size)
