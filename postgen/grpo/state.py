"""What trainers of the family keep beside weights, and how other processes than those that kept it share it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from postgen.errors import UserError
from postgen.sampling.meter import Meter
from postgen.training import Trainer
from postgen.training.processes import counted

from .batches import Batches
from .buffer import Buffer
from .config import GroupConfig
from .guards import HackingGuard

G = TypeVar("G", bound=GroupConfig)


class KeptState(Trainer[G]):
    """A trainer whose position, costs and samples stand in checkpoints."""

    batches: Batches
    micro: int
    """Micro-batches done."""
    buffer: Buffer | None
    meter: Meter
    hacking: HackingGuard

    def state_dict(self) -> dict[str, Any]:
        """Return the position, what the run has cost, and the rollout if it is not used up."""
        state: dict[str, Any] = {"micro": self.micro, "cost": self.meter.read(), **self.hacking.state()}
        if self.buffer is not None and self.micro % self.batches.per_rollout:
            state |= self.buffer.state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.micro = int(state["micro"])
        self.meter.load(state["cost"])
        self.hacking.load(state["history"], state["parted"])
        self.buffer = Buffer.of(state, self.device)

    def state_of_others(self, states: Sequence[dict[str, Any]], before: Mapping[str, Any]) -> dict[str, Any]:
        """Share out what they kept: all draws follow from the numbers of samples."""
        return shared_anew(states, before, self.args, self.batches)


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
    shares = {name: before[name] for name in args.named_in("share_out")}
    old = Batches.of(dataclasses.replace(args, **shares), len(states), 0)
    _check_same(old, batches)
    costs = [state["cost"] for state in states]
    spent = dict.fromkeys(name for cost in costs for name in cost)
    found = {
        **{name: states[0][name] for name in ("history", "parted")},
        "micro": states[0]["micro"] // old.accumulation * batches.accumulation,
        # Each has done the same part of the work.
        "cost": {name: sum(cost.get(name, 0.0) for cost in costs) / batches.processes for name in spent},
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
            f"{now.processes} is {old}, or start {counted(before.processes)}"
        )
    steps = old // at_once
    raise UserError(
        f"{told}Set gradient_accumulation_steps {steps} and steps_per_generation {steps * before.updates} (and no "
        f"generation_batch_size), or start {counted(before.processes)}"
    )
