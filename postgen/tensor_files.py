"""Read safetensors files. Only this module opens them. Light to import."""

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
