"""The cost of each layer type in each block: counted in FLOPs, or measured as time on a device, at one size."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from postgen.errors import UserError, shown
from postgen.families import Grid
from postgen.families.cost import forward_cost
from postgen.families.latency import measure_latency
from postgen.families.own_format import without_note
from postgen.lit.config import LitConfig
from postgen.lit.convert import convert, modules_of_blocks, revert, shape_of, stock_transformer, the_transformer
from postgen.lit.layers import make_layer
from postgen.lit.record import Record, read_record
from postgen.lit.score import check_kinds, usual_kinds

UNITS = {"flops": "FLOPs", "us": "microseconds"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CostTable(Record):
    """The costs of one step (a forward pass) of one model at one size, as whole numbers."""

    transformer: str
    """Class name of the transformer."""
    model: int
    """Checksum of class name and config, which identifies the model."""
    device: str
    """Device name of `families.latency`; empty for FLOPs, which do not depend on the device."""
    unit: str
    """flops or us (microseconds)."""
    shape: tuple[int, int, int]
    """num_frames, and height and width in pixels."""
    base: int
    """Cost of a step with softmax in every block, in `unit`."""
    attention: float
    """Share of the blocks' softmax attention in the FLOPs of such a step, 0 to 1."""
    changes: Mapping[str, tuple[int, ...]]
    """Layer type -> change of the cost of a step if one block has this type, for each block; negative if cheaper."""

    @classmethod
    def load(cls, path: Path) -> CostTable:
        """Read costs from a file that `save` wrote.

        Raises:
            UserError: the file does not hold costs, or it is damaged.
        """
        content = read_record(cls, path, "costs")
        try:
            if content["unit"] not in UNITS:
                raise ValueError("an unknown unit")
            changes = {str(kind): tuple(map(int, row)) for kind, row in content["changes"].items()}
            frames, height, width = map(int, content["shape"])
            return cls(**{**content, "changes": changes, "shape": (frames, height, width)})
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} holds damaged costs ({error})") from error

    def check(self, model: nn.Module, shape: tuple[int, int, int] | None = None, device: str | None = None) -> None:
        """Check that the costs are for this model, size and device.

        Args:
            model: the transformer.
            shape: num_frames, height and width; None for any.
            device: device name of `families.latency`; None for any.

        Raises:
            UserError: the costs are for another model, size or device.
        """
        if model_number(model) != self.model:
            raise UserError(
                f"these costs are for a {self.transformer} whose configuration differs from that of this"
                f" {type(model).__name__}: compute the costs of this model"
            )
        if shape is not None and tuple(shape) != self.shape:
            raise UserError(f"these costs are for {_size(self.shape)}, not for {_size(shape)}: measure that size")
        if device is not None and self.device and device != self.device:
            raise UserError(f"these costs were measured on {self.device}, not on {device}: measure there")


def count(
    transformer: nn.Module,
    *,
    num_frames: int,
    height: int,
    width: int,
    kinds: Sequence[str] | None = None,
    config: LitConfig | None = None,
) -> CostTable:
    """Count the FLOPs of a step, and how each layer type changes them in each block.

    Args:
        transformer: the stock transformer.
        num_frames: frames of the clip; 1 for images.
        height: in pixels.
        width: in pixels.
        kinds: layer types; None for `usual_kinds`.
        config: options of the layer types; None for the defaults.

    Raises:
        UserError: a layer type is unknown, the FLOPs of the class or size cannot be counted, or the transformer is
            converted already.
    """
    model, config = stock_transformer(transformer, "count"), config or LitConfig()
    kinds = usual_kinds(model) if kinds is None else kinds
    check_kinds(kinds)
    modules = modules_of_blocks(model)
    cost = forward_cost(model, num_frames=num_frames, height=height, width=width)
    grid = cost.grid
    if grid is None:
        raise UserError(
            f"the grid of tokens of {cost.transformer} is not known at {_size((num_frames, height, width))}"
        )
    soft = [_softmax(cost.blocks, names) for names in modules]
    changes = {
        kind: tuple(
            _block_flops(model, names, kind, config, grid, flops) - flops
            for names, flops in zip(modules, soft, strict=True)
        )
        for kind in kinds
    }
    return CostTable(
        transformer=type(model).__name__,
        model=model_number(model),
        device="",
        unit="flops",
        shape=(num_frames, height, width),
        base=cost.flops,
        attention=sum(soft) / cost.flops,
        changes=changes,
    )


def measure(
    transformer: nn.Module,
    *,
    num_frames: int,
    height: int,
    width: int,
    kinds: Sequence[str] | None = None,
    config: LitConfig | None = None,
    repeats: int = 5,
) -> CostTable:
    """Time a step with softmax in every block, and a step with each layer type in every block but the first.

    The saved time of a layer type is divided equally among the blocks. `measure` converts the transformer for each
    layer type and reverts it again. Use the device, dtype and plug-ins of the later inference.

    Args:
        transformer: the stock transformer, on the device.
        num_frames: frames of the clip; 1 for images.
        height: in pixels.
        width: in pixels.
        kinds: layer types; None for `usual_kinds`.
        config: options of the layer types; None for the defaults.
        repeats: number of timed forward passes; their median is used.

    Raises:
        UserError: see `count`; or the transformer has only one block.
    """
    model, config = the_transformer(transformer), config or LitConfig()
    size: dict[str, Any] = {"num_frames": num_frames, "height": height, "width": width}
    counted = count(model, **size, kinds=kinds, config=config)
    shape = counted.shape
    base = measure_latency(model, [shape], repeats=repeats)
    changes = {}
    for kind in counted.changes:
        report = convert(model, dataclasses.replace(config, layers=f"all:{kind}", first_block=False, inherit="all"))
        try:
            blocks = sum(each != "softmax" for each in report.types)
            if not blocks:
                raise UserError(
                    f"this {counted.transformer} has only one block, block 0, which stays softmax: there is no layer"
                    " type to choose"
                )
            found = measure_latency(model, [shape], repeats=repeats)
        finally:
            revert(model)
        saved = (found.rows[0].seconds - base.rows[0].seconds) / blocks
        changes[kind] = (math.ceil(saved * 1e6),) * len(report.types)
    return dataclasses.replace(
        counted, device=base.device, unit="us", base=round(base.rows[0].seconds * 1e6), changes=changes
    )


def model_number(model: nn.Module) -> int:
    """Return a checksum of class name and config, which identifies a model."""
    inner: Any = the_transformer(model)
    config = {name: value for name, value in without_note(inner.config).items() if not name.startswith("_")}
    return zlib.crc32(json.dumps([type(inner).__name__, config], sort_keys=True, default=str).encode())


def _softmax(blocks: Mapping[str, Any], names: list[str]) -> int:
    """Return the FLOPs of softmax attention in the block that contains these modules."""
    (block,) = (name for name in blocks if names[0].startswith(f"{name}."))
    flops: int = blocks[block]["self-attention"].flops
    return flops


def _block_flops(model: nn.Module, names: list[str], kind: str, config: LitConfig, grid: Grid, softmax: int) -> int:
    """Return the FLOPs of the new layers of one block. The layers are created on the meta device, without memory."""
    total = 0
    for place, name in enumerate(names):
        shape = shape_of(model.get_submodule(name), config)
        with torch.device("meta"):
            layer = make_layer(kind, shape, config.options(kind))
        # Softmax costs 4 (N + L)^2 H D in the first attention of a block, where L tokens of text attend too, and
        # 4 N^2 H D in a second one, over the picture alone.
        pairs = softmax // (4 * shape.heads * shape.channels) - (len(names) - 1) * grid.tokens**2
        text = math.isqrt(pairs) - grid.tokens if place == 0 else 0
        everything = 4 * (grid.tokens + text) ** 2 * shape.heads * shape.channels
        total += everything if layer.covers(grid) else layer.flops(grid, text)
    return total


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) if len(shape) == 3 else shown(shape)
