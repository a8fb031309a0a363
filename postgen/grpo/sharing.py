"""A run that goes on in another number of processes: what each of them takes of what the others kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from postgen.errors import UserError

from .batches import Batches
from .config import GroupConfig

_SHARES = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "generation_batch_size"),
)


def shared_anew(
    states: Sequence[Mapping[str, Any]], before: Mapping[str, Any], args: GroupConfig, batches: Batches
) -> dict[str, Any]:
    """Return the state of this process out of those that another number of processes kept.

    Args:
        states: of each of those processes.
        before: the settings of that run.
        args, batches: of this one.

    Raises:
        UserError: an update or a rollout has another number of samples than before; the message says what to set.
    """
    known = {name: before[name] for name in _SHARES}
    old = Batches.of(dataclasses.replace(args, **known), len(states), 0)
    _check_same(old, batches)
    costs = [state["cost"] for state in states]
    found = {
        **{name: states[0][name] for name in ("history", "parted")},
        "micro": states[0]["micro"] // old.accumulation * batches.accumulation,
        # Each has done the same part of the work.
        "cost": {name: sum(cost.get(name, 0.0) for cost in costs) / batches.processes for name in costs[0]},
    }
    return found | (_samples(states, batches) if "number" in states[0] else {})


def _samples(states: Sequence[Mapping[str, Any]], batches: Batches) -> dict[str, Any]:
    """Return the samples that this process trains on, of all of a rollout that is not used up."""
    mine = set(batches.mine())
    order = sorted(
        (sample, rank, row)
        for rank, state in enumerate(states)
        for row, sample in enumerate(state["samples"])
        if sample in mine
    )
    tensors = [name for name in states[0] if name.startswith("buffer.")]
    return {
        "number": states[0]["number"],
        **{name: [states[rank][name][row] for _, rank, row in order] for name in ("prompts", "samples")},
        **{name: torch.stack([states[rank][name][row] for _, rank, row in order]) for name in tensors},
    }


def _check_same(before: Batches, now: Batches) -> None:
    old, size = (each.processes * each.per_device * each.accumulation for each in (before, now))
    if (size, now.updates) == (old, before.updates):
        return
    told = f"an update had {old} samples and a rollout {before.updates} updates, here {size} and {now.updates}. "
    at_once = now.per_device * now.processes
    if old % at_once:
        raise UserError(
            f"{told}Choose per_device_train_batch_size and gradient_accumulation_steps so that their product times "
            f"{now.processes} is {old}, or start {before.processes} processes"
        )
    steps = old // at_once
    raise UserError(
        f"{told}Set gradient_accumulation_steps {steps} and steps_per_generation {steps * before.updates}, or start "
        f"{before.processes} processes"
    )
