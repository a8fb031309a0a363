"""Which transformers have fused blocks, and where they are."""

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
    """What runs instead of its forward, with the same arguments."""
    fingerprints: tuple[str, ...]
    """Of the texts of the block's forward that it was written for."""


def fused_blocks_of(model: nn.Module) -> Mapping[str, FusedBlock]:
    """Return the fused forms of a transformer's blocks, by the name of the class of the block.

    Raises:
        UserError: nothing is known of its class.
    """
    name = type(model).__name__
    check_known(name)
    blocks: Mapping[str, FusedBlock] = importlib.import_module(f"postgen.fused.{_FILES[name]}").BLOCKS
    return blocks


def check_known(transformer: str) -> None:
    """Refuse a transformer class, by its name, of which nothing is known.

    Raises:
        UserError: it names those that are.
    """
    if transformer not in _FILES:
        raise UserError(f"no fused operations for {transformer}. Known: {', '.join(_FILES)}")


_FILES = {
    "CogVideoXTransformer3DModel": "cogvideox",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "LTXVideoTransformer3DModel": "ltx",
    "WanTransformer3DModel": "wan",
}
"""Transformer class -> file that knows its blocks."""
