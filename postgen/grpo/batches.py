"""Which samples a process draws and trains on: the same updates however many processes share them."""

from dataclasses import dataclass

from postgen.errors import UserError

from .config import GroupConfig
from .numbers import PromptNumber, SampleNumber


@dataclass(frozen=True, kw_only=True, slots=True)
class Batches:
    """A rollout cut into updates, and each update into the parts of the processes.

    The samples of a rollout are numbered prompt by prompt, `group` each. An update takes the next of them, and each
    process an equal part in a row, so that groups may span processes, and two processes do what one does with twice
    the accumulation. When only some samples of a prompt are kept, a part holds whole prompts instead.
    """

    processes: int
    rank: int
    per_device: int
    """Samples of a micro-batch."""
    accumulation: int
    """Micro-batches of an update."""
    updates: int
    """Updates of one pass over a rollout."""
    iterations: int
    """Passes over a rollout."""
    group: int
    """Samples of a prompt."""
    kept: int
    """Samples of a prompt that are trained on."""

    @classmethod
    def of(cls, args: GroupConfig, processes: int, rank: int) -> "Batches":
        """Return the batches of a configuration.

        Raises:
            UserError: something does not divide; the message says by how much.
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
                    f"multiple of {at_once} (per_device_train_batch_size {per_device} x {processes} processes)."
                )
            steps = size * kept // (group * at_once)
        if steps % accumulation:
            raise UserError(
                f"a rollout has {steps} micro-batches (steps_per_generation), they must be a multiple of "
                f"gradient_accumulation_steps ({accumulation})."
            )
        if steps * at_once % kept:
            raise UserError(
                f"a rollout trains on {steps * at_once} samples (per_device_train_batch_size {per_device} x "
                f"{processes} processes x {steps} steps), they must be a multiple of the {kept} of a prompt."
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
        """Micro-batches of a process in one pass over a rollout."""
        return self.updates * self.accumulation

    @property
    def per_rollout(self) -> int:
        """Micro-batches of a process between two rollouts."""
        return self.micro_batches * self.iterations

    @property
    def samples(self) -> int:
        """Samples of a rollout over all processes."""
        return self.micro_batches * self.per_device * self.processes * self.group // self.kept

    @property
    def prompts(self) -> int:
        """Prompts of a rollout."""
        return self.samples // self.group

    @property
    def part(self) -> int:
        """Samples that a process draws for an update, in a row."""
        return self.accumulation * self.per_device * self.group // self.kept

    def prompt_of(self, sample: SampleNumber) -> PromptNumber:
        """Return the prompt of a sample."""
        return PromptNumber(sample // self.group)

    def mine(self) -> list[SampleNumber]:
        """Return the numbers of the samples that this process draws, update by update."""
        part = self.part
        starts = (part * (update * self.processes + self.rank) for update in range(self.updates))
        return [SampleNumber(start + offset) for start in starts for offset in range(part)]
