"""What each layer type costs in each block: counted in FLOPs, or measured on a device at a size."""

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
from postgen.lit.config import LiTConfig
from postgen.lit.convert import convert, modules_of_blocks, revert, shape_of, stock_transformer, the_transformer
from postgen.lit.layers import make_layer
from postgen.lit.record import Record, read_record
from postgen.lit.score import check_kinds, usual_kinds

UNITS = {"flops": "FLOPs", "us": "microseconds"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CostTable(Record):
    """Costs of one step of one model at one size, whole numbers."""

    transformer: str
    """Class name."""
    model: int
    """A number for class and config."""
    device: str
    """As `families.latency` names it; empty for FLOPs, which are the same everywhere."""
    unit: str
    """flops or us (microseconds)."""
    shape: tuple[int, int, int]
    """num_frames, height and width in pixels."""
    base: int
    """A step with softmax in every block."""
    attention: float
    """Share of it that softmax attention in the blocks has, in FLOPs."""
    changes: Mapping[str, tuple[int, ...]]
    """Layer type -> what the step costs more when one block is that; negative where it costs less."""

    @classmethod
    def load(cls, path: Path) -> CostTable:
        """Read what `save` wrote.

        Raises:
            UserError: it is something else.
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
        """Refuse another model, size or device than the costs are of.

        Raises:
            UserError: it names both.
        """
        if model_number(model) != self.model:
            raise UserError(
                f"these costs are of a {self.transformer} with another configuration than this {type(model).__name__}"
            )
        if shape is not None and tuple(shape) != self.shape:
            raise UserError(f"these costs are of {_size(self.shape)}, not of {_size(shape)}: measure that size")
        if device is not None and self.device and device != self.device:
            raise UserError(f"these costs were measured on {self.device}, not on {device}: measure there")


def count(
    transformer: nn.Module,
    *,
    num_frames: int,
    height: int,
    width: int,
    kinds: Sequence[str] | None = None,
    config: LiTConfig | None = None,
) -> CostTable:
    """Count the FLOPs of a step, and what each layer type adds to or saves of them in each block.

    Args:
        transformer: the stock one.
        num_frames: of the clip; 1 for pictures.
        height: in pixels.
        width: in pixels.
        kinds: layer types; None is `usual_kinds`.
        config: their options.

    Raises:
        UserError: an unknown type, a class or size that cannot be counted, or it is converted already.
    """
    model, config = stock_transformer(transformer, "count"), config or LiTConfig()
    kinds = usual_kinds(model) if kinds is None else kinds
    check_kinds(kinds)
    modules = modules_of_blocks(model)
    cost = forward_cost(model, num_frames=num_frames, height=height, width=width)
    grid = cost.grid
    if grid is None:
        raise UserError(f"{cost.transformer} does not tell its tokens at {_size((num_frames, height, width))}")
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
    config: LiTConfig | None = None,
    repeats: int = 5,
) -> CostTable:
    """Time a step with softmax in every block, and with each layer type in every block but the first.

    What a type saves is shared equally by the blocks. The transformer is converted and reverted on the way; time it on
    the device, in the dtype and with the plug-ins that it will run with.

    Args:
        transformer: the stock one, on the device.
        num_frames: as of `count`.
        height: in pixels.
        width: in pixels.
        kinds: layer types; None is `usual_kinds`.
        config: their options.
        repeats: timed forwards, whose median counts.

    Raises:
        UserError: as `count`, or it has one block only.
    """
    model, config = the_transformer(transformer), config or LiTConfig()
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
                raise UserError(f"{counted.transformer} has one block: there is nothing to choose")
            found = measure_latency(model, [shape], repeats=repeats)
        finally:
            revert(model)
        saved = (found.rows[0].seconds - base.rows[0].seconds) / blocks
        changes[kind] = (math.ceil(saved * 1e6),) * len(report.types)
    return dataclasses.replace(
        counted, device=base.device, unit="us", base=round(base.rows[0].seconds * 1e6), changes=changes
    )


def model_number(model: nn.Module) -> int:
    """Return a number for class and config, to know a model by."""
    inner: Any = the_transformer(model)
    config = {name: value for name, value in without_note(inner.config).items() if not name.startswith("_")}
    return zlib.crc32(json.dumps([type(inner).__name__, config], sort_keys=True, default=str).encode())


def _softmax(blocks: Mapping[str, Any], names: list[str]) -> int:
    """FLOPs of softmax attention in the block that has these modules."""
    (block,) = (name for name in blocks if names[0].startswith(f"{name}."))
    flops: int = blocks[block]["self-attention"].flops
    return flops


def _block_flops(model: nn.Module, names: list[str], kind: str, config: LiTConfig, grid: Grid, softmax: int) -> int:
    """FLOPs of the layers of one block, which are not made: their weights are shapes."""
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
