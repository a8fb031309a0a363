"""The transformers that have fused blocks, and the modules that hold them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from postgen.errors import UserError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedBlock:
    """The fused form of a block of diffusers."""

    forward: Callable[..., Any]
    """The function that replaces the forward of the block, with the same arguments."""
    fingerprints: tuple[str, ...]
    """Fingerprints of the source texts of the block's forward for which the fused form was written."""


def fused_blocks_of(model: nn.Module) -> Mapping[str, FusedBlock]:
    """Return the fused forms of a transformer's blocks: name of the block's class -> fused form.

    Raises:
        UserError: there are no fused forms for this transformer class.
    """
    name = type(model).__name__
    check_known(name)
    blocks: Mapping[str, FusedBlock] = importlib.import_module(f"postgen.fused.{_FILES[name]}").BLOCKS
    return blocks


def check_known(transformer: str) -> None:
    """Check that fused forms exist for a transformer class.

    Args:
        transformer: the name of the class.

    Raises:
        UserError: there are none; the message lists the known classes.
    """
    if transformer not in _FILES:
        raise UserError(f"no fused operations for {transformer}. Known: {', '.join(_FILES)}")


_FILES = {
    "CogVideoXTransformer3DModel": "cogvideox",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "LTXVideoTransformer3DModel": "ltx",
    "WanTransformer3DModel": "wan",
}
"""Transformer class -> module of this package that holds its fused blocks."""
