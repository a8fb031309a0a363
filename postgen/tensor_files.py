"""Read safetensors files, and write them in blocks. Only this module opens them. Light to import."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from postgen.errors import UserError, first_line
from postgen.reading import check_readable

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def opened(path: str | Path, said: str = "", *, framework: str = "pt") -> Iterator[Any]:
    """Context manager that opens a safetensors file, to read its keys, its metadata or some of its tensors.

    Args:
        path: path of the file.
        said: beginning of the error message, before a colon and the reason; by default "{path} cannot be read".
        framework: "pt" or "numpy". With "numpy", keys and metadata can be read without torch.

    Yields:
        The object of `safetensors.safe_open` with `keys()`, `metadata()` and `get_tensor(name)`; tensors are on the
        CPU.

    Raises:
        UserError: the file is missing or damaged, or does not contain a requested tensor.
    """
    from safetensors import SafetensorError, safe_open

    check_readable(path, said or f"{path} cannot be read")
    try:
        with safe_open(path, framework=framework) as content:
            yield content
    except (OSError, SafetensorError) as error:
        reason = first_line(error)
        if "deserializing header" in reason:
            reason = f"it is not a safetensors file, or it is damaged ({reason})"
        raise UserError(f"{said or f'{path} cannot be read'}: {reason}") from error


def read_tensors(path: str | Path, said: str = "") -> dict[str, Tensor]:
    """Return all tensors of a safetensors file by name, on the CPU; arguments and errors as in `opened`."""
    with opened(path, said) as content:
        # `safe_open` is not a mapping: it has no items().
        return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118


FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Names of the floating-point dtypes of torch that support arithmetic, by their names in safetensors files."""

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_HEAD = struct.Struct("<Q")
"""A file begins with the number of bytes of its JSON header."""


@dataclass(frozen=True, slots=True)
class TensorRow:
    """Dtype and shape of a tensor in a safetensors file, and the place of its values."""

    dtype: str
    """Name in safetensors files, such as BF16."""
    shape: tuple[int, ...]
    size: int
    """Number of bytes of all values."""
    start: int = 0
    """Position of the first value in the file, in bytes."""
    file: int = 0
    """Number of the file, among the files that are read together."""

    @property
    def is_float(self) -> bool:
        """Whether torch can calculate with the values."""
        return self.dtype in FLOATS

    @property
    def count(self) -> int:
        """Number of values; of other dtypes than `FLOATS` the number of bytes."""
        return math.prod(self.shape) if self.is_float else self.size


class TensorBlocks:
    """The tensors of safetensors files, read in blocks of values. The memory does not grow with their size.

    Args:
        files: files that together hold the tensors of a model, or the tensors of one file.
        prefix: read only the tensors whose names begin so; the names are without it.

    Attributes:
        rows: tensor name -> dtype, shape and place.
        metadata: texts in the header of each file.

    Raises:
        UserError: a file is missing or damaged, or a tensor is in two files.
    """

    def __init__(self, files: Sequence[Path], prefix: str = "") -> None:
        self.rows: dict[str, TensorRow] = {}
        self.metadata: list[dict[str, str]] = []
        self._stack = ExitStack()
        try:
            self._files = [self._stack.enter_context(_checked(path).open("rb", buffering=0)) for path in files]
            for number, (path, file) in enumerate(zip(files, self._files, strict=True)):
                found, metadata = _rows(file, number)
                self.metadata.append(metadata)
                for name, row in found.items():
                    if not name.startswith(prefix):
                        continue
                    short = name.removeprefix(prefix)
                    if short in self.rows:
                        raise UserError(f"{path} cannot be read: {name} is also in {files[self.rows[short].file]}")
                    self.rows[short] = row
        except BaseException:
            self.close()
            raise

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the values `start` to `stop` of a tensor in a row; bytes (uint8) if the dtype is not in `FLOATS`.

        Raises:
            UserError: the file has become shorter since it was opened.
        """
        import torch

        row = self.rows[name]
        size = _SIZES.get(row.dtype, 1)
        dtype = getattr(torch, FLOATS[row.dtype]) if row.is_float else torch.uint8
        values = torch.empty(stop - start, dtype=dtype)
        target, file = raw_bytes(values), self._files[row.file]
        file.seek(row.start + start * size)
        done = 0
        while done < len(target):
            got = file.readinto(target[done:])
            if not got:
                raise UserError(f"{file.name} cannot be read: it has become shorter")
            done += got
        return values

    def close(self) -> None:
        """Close the files."""
        self._stack.close()


@contextmanager
def writing_blocks(
    path: Path, rows: Mapping[str, TensorRow], metadata: Mapping[str, str]
) -> Iterator[Callable[[Tensor], object]]:
    """Context manager that writes a safetensors file in blocks of values.

    Args:
        path: the file; write it under a temporary name (`postgen.files.replacing`).
        rows: dtype, shape and size of each tensor by name, in the order of `written_order`.
        metadata: texts for the header.

    Yields:
        A function that writes the next block of values. The blocks must come in the order of `rows`.

    Raises:
        OSError: the file cannot be written.
    """
    assert list(rows) == written_order(rows), "the rows are not in the order of the file"
    head: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, row in rows.items():
        head[name] = {"dtype": row.dtype, "shape": list(row.shape), "data_offsets": [place, place + row.size]}
        place += row.size
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(_HEAD.pack(len(text)) + text)

        yield lambda block: file.write(raw_bytes(block))
        assert file.tell() == _HEAD.size + len(text) + place, "the blocks do not have the size of the rows"


def written_order(rows: Mapping[str, TensorRow]) -> list[str]:
    """Return the names of tensors in the order of a file: wide dtypes first, so that all values are aligned."""
    return sorted(rows, key=lambda name: (-_SIZES.get(rows[name].dtype, 1), name))


def raw_bytes(values: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, without a copy."""
    import torch

    return memoryview(cast(Any, values.view(torch.uint8).numpy()))


def _checked(path: Path) -> Path:
    with opened(path, framework="numpy"):  # safetensors checks the header and the size of the file
        return path


def _rows(file: Any, number: int) -> tuple[dict[str, TensorRow], dict[str, str]]:
    """Return the tensors and the metadata in the header of a file."""
    (length,) = _HEAD.unpack(file.read(_HEAD.size))
    head = json.loads(file.read(length))
    metadata = head.pop("__metadata__", {})
    rows = {}
    for name, row in head.items():
        start, end = row["data_offsets"]
        rows[name] = TensorRow(row["dtype"], tuple(row["shape"]), end - start, _HEAD.size + length + start, number)
    return rows, metadata
