"""Hybrid linear attention: convert a trained transformer's self-attention to it, block by block (LiT,
arXiv:2501.12976; Video DeltaNet, arXiv:2609.20744; and others).

    report = convert(pipe.transformer, LiTConfig(layers="every 2nd:window_delta"))
    save(pipe.transformer, "out")
    transformer = load("out")  # without the one it was made of
    revert(pipe.transformer)
"""

from postgen.lit.config import LiTConfig
from postgen.lit.convert import conversion_of, convert, layers_of, on_grid, revert
from postgen.lit.options import AnchorOptions, ChunkOptions, LitOptions, MhlaOptions, WindowOptions
from postgen.lit.report import Report
from postgen.lit.saving import load, save

__all__ = [
    "AnchorOptions",
    "ChunkOptions",
    "LiTConfig",
    "LitOptions",
    "MhlaOptions",
    "Report",
    "WindowOptions",
    "conversion_of",
    "convert",
    "layers_of",
    "load",
    "on_grid",
    "revert",
    "save",
]
