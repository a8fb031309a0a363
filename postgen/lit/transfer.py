"""Stage 1 of distillation: the new layers of each block learn to give what softmax gave, block by block.

blocks = [block.name for block in blocks_of(pipe.transformer)]
records = collect(denoiser_for(pipe), blocks, prompts, RecordsConfig(...), where="records")  # of the stock model
convert(pipe.transformer, config)
report = reconstruct(transfer_tasks(pipe.transformer, grid), records, ReconstructConfig(output_dir="stage-1"))
take_weights(pipe.transformer, report)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from postgen.families import blocks_of
from postgen.lit.conversion import CHILD
from postgen.lit.convert import conversion_of, set_grid, the_transformer
from postgen.reconstruct import ReconstructTask, block_task

if TYPE_CHECKING:
    from postgen.families import Block, Grid
    from postgen.reconstruct import Report


def transfer_tasks(transformer: nn.Module, grid: Grid, *, inherited: bool = False) -> list[ReconstructTask]:
    """Return a task of `postgen.reconstruct` for each converted block.

    A student is a copy of the converted block, the teacher what was recorded of the block before the conversion; its
    inputs are the teacher's, so that errors do not add up.

    Args:
        transformer: converted.
        grid: of the tokens of the records.
        inherited: whether the weights of the base in these blocks are trained too (with `learning_rate`), and not only
            the new ones (with `learning_rate_new`).

    Raises:
        UserError: it is not converted.
    """
    set_grid(transformer, grid)  # refuses one that is not converted
    config = conversion_of(transformer).config.as_json()

    def prepared(block: nn.Module) -> nn.Module:
        for name, weight in block.named_parameters():
            weight.requires_grad_(inherited or is_new(name))
        return block

    def on_grid(task: ReconstructTask) -> ReconstructTask:
        def build() -> nn.Module:
            set_grid(transformer, grid)  # anew, where the transformer was called in between
            return task.build()

        return dataclasses.replace(task, build=build)

    settings = {"lit": config, "inherited": inherited}
    return [
        on_grid(block_task(block, prepared, is_new=is_new, settings=settings))
        for block in _converted_blocks(transformer)
    ]


def take_weights(transformer: nn.Module, report: Report) -> None:
    """Put what was trained into the converted blocks.

    Args:
        transformer: that `transfer_tasks` was given.
        report: of `reconstruct`.

    Raises:
        UserError: it is not converted, or a block was not trained to its end.
    """
    for block in _converted_blocks(transformer):
        block.module.load_state_dict(report.weights(block.name))


def is_new(name: str) -> bool:
    """Whether a parameter of a block is one that the conversion made."""
    return f".{CHILD}." in name or ".fresh." in name


def _converted_blocks(transformer: nn.Module) -> Sequence[Block]:
    modules = [each.module for each in conversion_of(transformer).converted]
    blocks = blocks_of(the_transformer(transformer))
    return [block for block in blocks if any(name.startswith(f"{block.name}.") for name in modules)]
