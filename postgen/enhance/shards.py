"""Context parallelism (Ulysses): each rank holds a part of the tokens, so the frames are spread over the ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from postgen.errors import UserError
from postgen.families.attention.dispatch import mesh_group


def ulysses_group(parallel_config: Any) -> dist.ProcessGroup | None:
    """Return the process group over which Ulysses attention splits the tokens; None without context parallelism.

    Raises:
        UserError: the configuration uses ring attention or uneven shards.
    """
    config = getattr(parallel_config, "context_parallel_config", None)
    if config is None:
        return None
    if config.ring_degree > 1:
        raise UserError(
            f"Enhance-A-Video does not work with ring attention (ring_degree={config.ring_degree}): use ulysses_degree"
        )
    if config.ulysses_anything:
        raise UserError("Enhance-A-Video needs shards of equal size: set ulysses_anything=False")
    return mesh_group(config)


def whole_sequence(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Exchange tokens for heads (all-to-all): from (B, L/P, H, D) on each of P ranks to all tokens, (B, L, H/P, D).

    A mean over tokens and heads is then the mean over the ranks. Needs twice the memory of `shard`.

    Raises:
        UserError: the number of heads is not divisible by the number of ranks.
    """
    ranks = group.size()
    batch, tokens, heads, channels = shard.shape
    if heads % ranks:
        raise UserError(f"{heads} attention heads cannot be divided among {ranks} ranks: change ulysses_degree")
    parts = shard.unflatten(2, (ranks, heads // ranks)).permute(2, 0, 1, 3, 4).contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received.transpose(0, 1).reshape(batch, ranks * tokens, heads // ranks, channels)
