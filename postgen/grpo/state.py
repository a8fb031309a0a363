"""State of the reward trainers besides weights, and its redistribution over another number of processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from postgen.errors import UserError
from postgen.sampling.meter import Meter
from postgen.training.networks import PolicyTrainer
from postgen.training.processes import counted
from postgen.training.prompts import Prompts

from .batches import Batches
from .buffer import Buffer
from .config import GroupConfig
from .guards import HackingGuard

G = TypeVar("G", bound=GroupConfig)


class KeptState(PolicyTrainer[G]):
    """Base of the reward trainers: saves position, costs, hacking guard and unfinished rollout in checkpoints."""

    batches: Batches
    """Division of rollouts over updates and processes."""
    micro: int
    """Micro-batches that this process has done in the run."""
    buffer: Buffer | None
    """Samples of the last rollout; None before the first."""
    meter: Meter
    """Passes and seconds of the run."""
    hacking: HackingGuard
    """Detector of reward hacking."""
    prompts: Prompts
    """Prompts to train on."""
    eval_prompts: Prompts | None
    """Held-out prompts."""

    def inputs(self) -> dict[str, Any]:
        """Return the rows of the prompts, which all processes must have read alike."""
        sets = {"train_dataset": self.prompts, "eval_dataset": self.eval_prompts}
        return {name: prompts.rows for name, prompts in sets.items() if prompts is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return position, costs, state of the hacking guard, and the buffer if its rollout is not used up."""
        state: dict[str, Any] = {"micro": self.micro, "cost": self.meter.read(), **self.hacking.state()}
        if self.buffer is not None and self.micro % self.batches.per_rollout:
            state |= self.buffer.state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.micro = int(state["micro"])
        self.meter.load(state["cost"])
        self.hacking.load(state["history"], state["parted"])
        self.buffer = Buffer.of(state, self.device)

    def state_of_others(self, states: Sequence[dict[str, Any]], before: Mapping[str, Any]) -> dict[str, Any]:
        """Redistribute the states of another number of processes.

        This is possible because all random draws depend on sample numbers and not on the process.
        """
        return shared_anew(states, before, self.args, self.batches)


def shared_anew(
    states: Sequence[Mapping[str, Any]], before: Mapping[str, Any], args: GroupConfig, batches: Batches
) -> dict[str, Any]:
    """Build the state of this process from the states of another number of processes.

    Args:
        states: state of each process that wrote the checkpoint.
        before: settings of the run that wrote the checkpoint.
        args: configuration of this run.
        batches: batches of this run and process.

    Raises:
        UserError: the number of samples per update, or of updates per rollout, differs from the checkpoint's run; the
            message says what to set.
    """
    shares = {name: before[name] for name in args.named_in("share_out")}
    old = Batches.of(dataclasses.replace(args, **shares), len(states), 0)
    _check_same(old, batches)
    costs = [state["cost"] for state in states]
    spent = dict.fromkeys(name for cost in costs for name in cost)
    found = {
        **{name: states[0][name] for name in ("history", "parted")},
        "micro": states[0]["micro"] // old.accumulation * batches.accumulation,
        # The log sums the costs of all processes, so each process takes an equal share.
        "cost": {name: sum(cost.get(name, 0.0) for cost in costs) / batches.processes for name in spent},
    }
    return found | (_samples(states, batches) if "number" in states[0] else {})


def _samples(states: Sequence[Mapping[str, Any]], batches: Batches) -> dict[str, Any]:
    """Return the buffer state of this process, collected from the buffers of all processes of the checkpoint."""
    mine = set(batches.mine())
    # (sample number, rank that holds it, row in the buffer of that rank), in the order of sample numbers.
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
    difference = (
        f"the checkpoint's run has {old} samples per update and {before.updates} updates per rollout, this run has "
        f"{size} and {now.updates}. "
    )
    at_once = now.per_device * now.processes
    if old % at_once:
        raise UserError(
            f"{difference}Choose per_device_train_batch_size and gradient_accumulation_steps so that their product "
            f"times {now.processes} is {old}, or start {counted(before.processes)}"
        )
    steps = old // at_once
    raise UserError(
        f"{difference}Set gradient_accumulation_steps {steps} and steps_per_generation {steps * before.updates} (and "
        f"no generation_batch_size), or start {counted(before.processes)}"
    )
