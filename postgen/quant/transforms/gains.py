"""The gain of a block: factors of the timestep embedding that all blocks share.

The modulation of Wan and of similar models is `table + embedding`, where the table belongs to the block and the
embedding to the model. A scale that is folded into the modulation of one block must also scale the embedding, for this
block alone: the block multiplies the embedding by its gain before it uses it.

The gain is a buffer of the block, so checkpoints contain it. It is stored as the bits of float32 numbers in int32,
because diffusers casts floating-point tensors when it loads a checkpoint.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families import blocks_of
from postgen.families.folds import Table, folds_of, has_folds
from postgen.quant.transforms.records import RECORD, prepare_records_

GAIN = "gain"
"""Last word of the buffer's name, after the name of the argument that it multiplies: "temb_gain"."""


def gain_(block: nn.Module, table: Table) -> Tensor:
    """Return the gain of a block, float32 (slots, C); changes in place change the block.

    The first call registers the buffer, with ones, and the hook that multiplies the embedding.
    """
    name = _name(table)
    if name not in _buffers(block):
        values = getattr(block, table.name)
        ones = torch.ones(values.shape[-2:], dtype=torch.float32, device=values.device)
        block.register_buffer(name, ones.view(torch.int32))
        names = tuple(inspect.signature(type(block).forward).parameters)[1:]
        hook = functools.partial(_multiplied, table=table, place=names.index(table.embedding))
        block.register_forward_pre_hook(hook, with_kwargs=True)
    found: Tensor = block.get_buffer(name)
    return found.view(torch.float32)


def gained_blocks(model: nn.Module) -> list[str]:
    """Return the names of the blocks with buffers of folds (a gain, a record), in the order in which they run.

    A loader calls `prepare_gains_` with these names before it loads the weights of a checkpoint.
    """
    return [block.name for block in blocks_of(model) if any(map(_is_ours, _buffers(block.module)))]


def prepare_gains_(model: nn.Module, blocks: Iterable[str]) -> None:
    """Give blocks the buffers of folds, without any fold, so that a checkpoint of a folded model can be loaded.

    Args:
        model: a transformer.
        blocks: names from `gained_blocks` of the model that was saved.

    Raises:
        UserError: the model has no such block, or no folds are known for blocks of its class.
    """
    known = {block.name: block.module for block in blocks_of(model)}
    for name in blocks:
        if name not in known or not has_folds(known[name]):
            raise UserError(
                f"the checkpoint has folds in {name}, but {type(model).__name__} has no such block that can be folded:"
                " load it into the class that it was made from"
            )
        for table in _tables(known[name]):
            gain_(known[name], table)
        prepare_records_(known[name])


def _buffers(block: nn.Module) -> list[str]:
    return [name for name, _ in block.named_buffers(recurse=False)]


def _name(table: Table) -> str:
    return f"{table.embedding}_{GAIN}"


def _is_ours(name: str) -> bool:
    return name.rpartition("_")[2] == GAIN or name.startswith(RECORD)


def _tables(block: nn.Module) -> list[Table]:
    writers = (writer for fold in folds_of(block) for writer in fold.writers)
    found = [each for each in writers if isinstance(each, Table) and hasattr(block, each.name)]
    return list({each.embedding: each for each in found}.values())


def _multiplied(
    block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, table: Table, place: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Multiply the embedding among the arguments of a block by the gain of the block."""
    named, changed = dict(kwargs), list(args)
    bits: Tensor = block.get_buffer(_name(table))
    # The table is added in its own dtype: models keep it in float32 if they compute the modulation in float32.
    dtype = getattr(block, table.name).dtype
    if table.embedding in named:
        named[table.embedding] = _times(named[table.embedding], bits, table, dtype)
    else:
        changed[place] = _times(changed[place], bits, table, dtype)
    return tuple(changed), named


def _times(embedding: Tensor, bits: Tensor, table: Table, dtype: torch.dtype) -> Tensor:
    gain = bits.view(torch.float32)
    if table.shape == "flat":
        gain = gain.flatten()
    elif table.shape == "slots_first":
        gain = gain.reshape(gain.shape[0], *(1,) * (embedding.dim() - 3), gain.shape[1])
    exact = torch.promote_types(embedding.dtype, torch.float32)
    return (embedding.to(exact) * gain).to(torch.promote_types(embedding.dtype, dtype))
