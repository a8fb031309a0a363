"""Which samples a process draws and trains on. The updates do not depend on the number of processes."""

import math
from dataclasses import dataclass

from postgen.errors import UserError
from postgen.training.processes import counted

from .config import GroupConfig
from .numbers import PromptNumber, SampleNumber


@dataclass(frozen=True, kw_only=True, slots=True)
class Batches:
    """Division of a rollout into updates (optimiser steps), and of each update into one part per process.

    Samples of a rollout are numbered prompt by prompt, `group` samples for each prompt. An update trains on the next
    samples in this order. Each process gets an equal, contiguous part of an update, so a group may span processes.
    Two processes therefore make the same updates as one process with twice the accumulation. With best-of-N
    (`kept` < `group`) each part holds whole prompts.
    """

    processes: int
    """Number of processes of the run."""
    rank: int
    """Rank of this process, from 0."""
    per_device: int
    """Samples in a micro-batch of one process."""
    accumulation: int
    """Micro-batches of one process in an update."""
    updates: int
    """Updates in one pass over a rollout."""
    iterations: int
    """Passes over a rollout (`num_iterations`)."""
    group: int
    """Samples drawn for each prompt (`num_generations`)."""
    kept: int
    """Samples of each prompt that are trained on (`best_of_n`, or all)."""

    @classmethod
    def of(cls, args: GroupConfig, processes: int, rank: int) -> "Batches":
        """Return the batches that a configuration describes.

        Args:
            args: the configuration.
            processes: number of processes of the run.
            rank: rank of this process.

        Raises:
            UserError: sizes do not divide; the message names the settings and the required multiple.
        """
        group, kept = args.num_generations, args.kept
        per_device, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        at_once = per_device * processes
        steps = args.steps_per_generation or accumulation
        if (size := args.generation_batch_size) is not None:
            if size % group:
                raise UserError(f"generation_batch_size is {size}: it must be a multiple of num_generations {group}.")
            if size * kept % (group * at_once):
                raise UserError(
                    f"generation_batch_size is {size}: its {size * kept // group} samples to train on must be a "
                    f"multiple of {at_once} (per_device_train_batch_size {per_device} x {counted(processes)})."
                )
            steps = size * kept // (group * at_once)
        if steps % accumulation:
            raise UserError(
                f"a rollout has {steps} micro-batches (steps_per_generation): this must be a multiple of "
                f"gradient_accumulation_steps ({accumulation})."
            )
        if (count := steps * at_once) % kept:
            name = "num_generations" if args.best_of_n is None else "best_of_n"
            raise UserError(
                f"a rollout trains on {count} samples (per_device_train_batch_size {per_device} x {counted(processes)}"
                f" x {steps} micro-batches): this must be a multiple of {name}, which is {kept}. Use {name}"
                f" {_fitting(count, kept)}, or another batch size."
            )
        if args.whole_groups and accumulation * at_once % kept:
            name = "num_generations" if args.best_of_n is None else "best_of_n"
            raise UserError(
                f"an update trains on {accumulation * at_once} samples (per_device_train_batch_size {per_device} x "
                f"{counted(processes)} x gradient_accumulation_steps {accumulation}). Its loss compares the samples "
                f"of a prompt, so this must be a multiple of {name}, which is {kept}. Set gradient_accumulation_steps "
                f"to a multiple of {kept // math.gcd(kept, at_once)}."
            )
        if kept < group and accumulation * per_device % kept:
            raise UserError(
                f"best_of_n: the {accumulation * per_device} samples of a process in an update "
                "(per_device_train_batch_size x gradient_accumulation_steps) must be a multiple of "
                f"best_of_n ({kept}), so that no prompt is split."
            )
        return cls(
            processes=processes,
            rank=rank,
            per_device=per_device,
            accumulation=accumulation,
            updates=steps // accumulation,
            iterations=args.num_iterations,
            group=group,
            kept=kept,
        )

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of a process in one pass over a rollout."""
        return self.updates * self.accumulation

    @property
    def per_rollout(self) -> int:
        """Number of micro-batches of a process between two rollouts (all passes over one)."""
        return self.micro_batches * self.iterations

    @property
    def samples(self) -> int:
        """Number of samples in a rollout, over all processes."""
        return self.micro_batches * self.per_device * self.processes * self.group // self.kept

    @property
    def prompts(self) -> int:
        """Number of prompts in a rollout, over all processes."""
        return self.samples // self.group

    @property
    def part(self) -> int:
        """Number of consecutive samples that a process draws for an update."""
        return self.accumulation * self.per_device * self.group // self.kept

    def prompt_of(self, sample: SampleNumber) -> PromptNumber:
        """Return the number of the prompt that a sample belongs to, within the same rollout."""
        return PromptNumber(sample // self.group)

    def mine(self) -> list[SampleNumber]:
        """Return the numbers of the samples that this process draws, update by update."""
        part = self.part
        starts = (part * (update * self.processes + self.rank) for update in range(self.updates))
        return [SampleNumber(start + offset) for start in starts for offset in range(part)]


def _fitting(count: int, given: int) -> str:
    """Return the divisors of a count that are nearest to a number, at least 2: "2 or 4"."""
    divisors = [number for number in range(2, count + 1) if count % number == 0]
    near = [*[number for number in divisors if number < given][-1:], *[n for n in divisors if n > given][:1]]
    return " or ".join(map(str, near))
