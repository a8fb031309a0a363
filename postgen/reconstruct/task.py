"""What a method says of one block: its student, what the student is shown, what it should give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from postgen.families import Block
from postgen.families.recording import RecordedCall

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Call:
    """One recorded call of a module of the teacher, read when it is asked for."""

    recorded: RecordedCall
    device: torch.device
    """Where its tensors are put."""
    widen: bool
    """Whether half precision becomes float32: a student in float32 without autocast needs it."""

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments."""
        args, kwargs = self.recorded.inputs(self.device)
        return (_widened(args), _widened(kwargs)) if self.widen else (args, kwargs)

    def output(self) -> Any:
        """Return what the module returned."""
        output = self.recorded.output(self.device)
        return _widened(output) if self.widen else output


def _nothing(name: str) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class ReconstructTask:
    """One block, or a part of one, and the student that takes its place."""

    name: str
    """Of the task, and of its folder: that of the block, or of the part."""

    build: Callable[[], nn.Module]
    """Makes the student, when its turn comes. What requires a gradient is trained; half precision becomes float32.
    Random states are seeded by the run's seed and `name` before. Modules keep the mode (training or eval) that they
    have here."""

    run: Callable[[nn.Module, Sequence[Call]], Sequence[Tensor]]
    """(student, one call of each of `reads`) -> what the student gives, (B, tokens ..., channels) each. Its arguments
    are the teacher's own, so errors of one block do not reach the next."""

    target: Callable[[Sequence[Call]], Sequence[Tensor]]
    """The same calls -> what the teacher gave, of the same shapes."""

    reads: tuple[str, ...] = ()
    """Modules of the teacher whose calls it needs; empty is the one called `name`. The n-th calls of all of them go
    together."""

    is_new: Callable[[str], bool] = _nothing
    """Name of a parameter of the student -> whether it is new, with the rate `learning_rate_new`, or inherited."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that say what the student is (kind, rank, ...): a resume with others is refused."""

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that it reads."""
        return self.reads or (self.name,)


def block_task(
    block: Block,
    change: Callable[[nn.Module], nn.Module],
    *,
    is_new: Callable[[str], bool] = _nothing,
    settings: Mapping[str, Any] | None = None,
) -> ReconstructTask:
    """Return the task of a whole block: what its changed copy returns should be what it returned.

    Both streams count where a block returns two, latents and text.

    Args:
        block: of the teacher, as `blocks_of` gives it.
        change: copy of the block -> the student; what of it requires a gradient is trained.
        is_new: see `ReconstructTask`.
        settings: see `ReconstructTask`.
    """

    def run(student: nn.Module, calls: Sequence[Call]) -> tuple[Tensor, ...]:
        args, kwargs = calls[0].inputs()
        return _streams(block, student(*args, **kwargs))

    return ReconstructTask(
        name=block.name,
        build=lambda: change(copy.deepcopy(block.module)),
        run=run,
        target=lambda calls: _streams(block, calls[0].output()),
        is_new=is_new,
        settings=settings or {},
    )


def _streams(block: Block, output: Any) -> tuple[Tensor, ...]:
    return tuple(stream for stream in block.outputs(output) if stream is not None)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in _HALVES else value
    if isinstance(value, dict):
        return {key: _widened(each) for key, each in value.items()}
    return type(value)(map(_widened, value)) if isinstance(value, tuple | list) else value
