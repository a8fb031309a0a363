"""The task of one block, which a method defines: its student, the inputs of the student and its targets."""

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
    """One recorded call of a module of the teacher. Its tensors are read on use."""

    recorded: RecordedCall
    device: torch.device
    """Device of the returned tensors."""
    widen: bool
    """Whether half precision tensors are converted to float32, which a float32 student without autocast needs."""

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and keyword arguments of the call."""
        args, kwargs = self.recorded.inputs(self.device)
        return (_widened(args), _widened(kwargs)) if self.widen else (args, kwargs)

    def output(self) -> Any:
        """Return the output of the module in this call."""
        output = self.recorded.output(self.device)
        return _widened(output) if self.widen else output


def _nothing(name: str) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class ReconstructTask:
    """The reconstruction of one block, or of a part of a block, by a student."""

    name: str
    """Name of the task and of its folder; by default also the name of the module whose calls it reads."""

    build: Callable[[], nn.Module]
    """Creates the student. Parameters that require a gradient are trained; half-precision tensors become float32. The
    engine seeds the random states from the run's seed and `name` first. Each module keeps the mode (training or
    evaluation) that `build` sets."""

    run: Callable[[nn.Module, Sequence[Call]], Sequence[Tensor]]
    """(student, one call of each module in `reads`) -> outputs of the student, each (B, tokens ..., channels). The
    calls hold the teacher's inputs, so errors of one block do not reach the next."""

    target: Callable[[Sequence[Call]], Sequence[Tensor]]
    """The same calls -> outputs of the teacher, with the same shapes."""

    reads: tuple[str, ...] = ()
    """Names of the teacher's modules whose calls the task needs; empty for the module `name`. The n-th calls of all
    modules belong together."""

    penalty: Callable[[nn.Module, Sequence[Call], Sequence[Tensor]], Tensor] | None = None
    """(student, calls, outputs of the student) -> scalar that is added to the loss of training; errors do not include
    it."""

    is_new: Callable[[str], bool] = _nothing
    """Name of a parameter of the student -> True if the parameter is new (learning rate `learning_rate_new`), False if
    it is inherited from the teacher (`learning_rate`)."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that identify the student (kind, rank, ...). A resume with other values is refused."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules whose calls the task reads."""
        return self.reads or (self.name,)


def block_task(
    block: Block,
    change: Callable[[nn.Module], nn.Module],
    *,
    is_new: Callable[[str], bool] = _nothing,
    settings: Mapping[str, Any] | None = None,
) -> ReconstructTask:
    """Return the task of a whole block: a changed copy of the block is trained to reproduce the block's output.

    If the block returns two streams, latents and text, both are targets.

    Args:
        block: a block of the teacher, from `blocks_of`.
        change: copy of the block -> student. Parameters that require a gradient are trained.
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
