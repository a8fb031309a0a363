"""Stage 1 of distillation: the new layers of each block learn to give what softmax gave, block by block.

blocks = [block.name for block in blocks_of(pipe.transformer)]
records = collect(denoiser_for(pipe), blocks, prompts, RecordsConfig(...), where="records")  # of the stock model
convert(pipe.transformer, config)
report = reconstruct(transfer_tasks(pipe.transformer, grid), records, ReconstructConfig(output_dir="stage-1"))
take_weights(pipe.transformer, report)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from postgen.errors import UserError
from postgen.families import blocks_of
from postgen.lit.conversion import CHILD
from postgen.lit.convert import conversion_of, layers_of, set_grid, the_transformer
from postgen.reconstruct import ReconstructTask, block_task
from postgen.reconstruct.report import finished

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
        UserError: it is not converted, or only new weights are to be trained and a layer is softmax on this grid.
    """
    set_grid(transformer, grid)
    softmax = [name for name, layer in layers_of(transformer).items() if layer.covers(grid)]
    if softmax and not inherited:
        raise UserError(
            f"{', '.join(softmax)}: softmax sees all of {grid.frames} latent frames there, so that nothing new can be"
            " trained: record longer clips, or convert with less softmax (WindowOptions(radius=...) and the like)"
        )
    config = conversion_of(transformer).config.as_json()

    def prepared(block: nn.Module) -> nn.Module:
        for name, weight in block.named_parameters():
            weight.requires_grad_(inherited or is_new(name))
        return block

    return [
        block_task(block, prepared, is_new=is_new, settings={"lit": config, "inherited": inherited})
        for block in _converted_blocks(transformer)
    ]


def take_weights(transformer: nn.Module, report: Report) -> None:
    """Put what was trained into the converted blocks.

    Args:
        transformer: that `transfer_tasks` was given.
        report: of `reconstruct`.

    Raises:
        UserError: it is not converted, or a block was not trained to its end; nothing is changed then.
    """
    blocks = _converted_blocks(transformer)
    if missing := [block.name for block in blocks if not finished(report.folder, block.name).is_dir()]:
        raise UserError(
            f"{', '.join(missing)} of the converted blocks are not finished in {report.folder}: train them to their"
            " end there (resume=True goes on)"
        )
    for block in blocks:
        block.module.load_state_dict(report.weights(block.name))


def is_new(name: str) -> bool:
    """Whether a parameter of a block is one that the conversion made."""
    return f".{CHILD}." in name or ".fresh." in name


def _converted_blocks(transformer: nn.Module) -> Sequence[Block]:
    modules = [each.module for each in conversion_of(transformer).converted]
    blocks = blocks_of(the_transformer(transformer))
    return [block for block in blocks if any(name.startswith(f"{block.name}.") for name in modules)]
