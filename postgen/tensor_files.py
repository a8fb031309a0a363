"""Read safetensors files: the one place that opens them. Light to import."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postgen.errors import UserError, first_line
from postgen.reading import check_readable

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def opened(path: str | Path, said: str = "", *, framework: str = "pt") -> Iterator[Any]:
    """Open a safetensors file, to read names, notes or a few tensors of it.

    Args:
        path: of the file.
        said: what the error begins with, before a colon and the reason; "{path} cannot be read" by default.
        framework: "numpy" needs no torch for names and notes.

    Yields:
        `safetensors.safe_open`: `keys()`, `metadata()`, `get_tensor(name)`, on the CPU.

    Raises:
        UserError: it is missing or damaged, or lacks a tensor that is asked for.
    """
    from safetensors import SafetensorError, safe_open

    check_readable(path, said or f"{path} cannot be read")
    try:
        with safe_open(path, framework=framework) as content:
            yield content
    except (OSError, SafetensorError) as error:
        raise UserError(f"{said or f'{path} cannot be read'}: {first_line(error)}") from error


def read_tensors(path: str | Path, said: str = "") -> dict[str, Tensor]:
    """Return every tensor of a safetensors file by its name, on the CPU; arguments and errors as of `opened`."""
    with opened(path, said) as content:
        # No mapping: it has no items.
        return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
