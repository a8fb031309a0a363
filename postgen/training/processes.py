"""Several processes of one run: checks of equal inputs and weights, and the end of the process group."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from postgen.errors import UserError

from .config import TrainingConfig


def check_same(args: TrainingConfig, inputs: Mapping[str, Any]) -> None:
    """Check that all processes have the same settings and inputs; every process must call this.

    Settings that are texts may differ, because paths may, and those that may differ between two calls of a run.

    Args:
        args: the configuration.
        inputs: JSON values by name.

    Raises:
        UserError: a process differs from the first one; the message names what differs.
    """
    may = args.named_in("may_change")
    plain = {
        name: value for name, value in args.to_dict().items() if name not in may and not isinstance(value, str | None)
    }
    digests = {name: _digest(value) for name, value in {**plain, **inputs}.items()}
    first, *others = gather_object([digests])
    for rank, other in enumerate(others, 1):
        if names := [name for name in first | other if first.get(name) != other.get(name)]:
            raise UserError(
                f"process {rank} has another value of {', '.join(names)} than process 0: all processes of a run need"
                " the same recipe, the same options and the same data files"
            )


def _digest(value: Any) -> str:
    text = json.dumps(value, default=lambda other: type(other).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


def check_equal(checksum: float) -> None:
    """Check that all processes have the same checksum of the trained weights; every process must call this.

    Raises:
        FloatingPointError: the weights are not finite.
        RuntimeError: the weights differ, so the processes do not average their gradients.
    """
    sums = gather_object([checksum])
    if not all(map(math.isfinite, sums)):
        raise FloatingPointError(
            "the trained weights are not finite, so nothing is saved; lower learning_rate or max_grad_norm, or resume"
            " from the last checkpoint"
        )
    if any(other != sums[0] for other in sums):
        raise RuntimeError(
            "the processes hold different weights: forward passes with gradients must call self.models[name], not "
            "unwrap(name), so that gradients are averaged"
        )


def check_group(accelerator: Accelerator) -> None:
    """Check that the process group of a run still exists.

    Raises:
        UserError: an earlier run of the same processes has ended the group.
    """
    if accelerator.num_processes > 1 and not torch.distributed.is_initialized():
        raise UserError(
            f"the group of these {accelerator.num_processes} processes has ended with an earlier run: several "
            "processes can train one run only, start them again for the next run"
        )


def leave_group(accelerator: Accelerator) -> None:
    """Destroy the process group, if there is one. The caller must drop its references to the prepared models first.

    The DDP wrappers hold the group as well. If they were freed after this call, they would destroy the group while
    they hold Python's GIL, and would wait for gloo's thread. That thread may need the GIL to finish, so the process
    would hang.
    """
    if accelerator.num_processes > 1:
        accelerator.free_memory()
    accelerator.state.destroy_process_group()


def counted(processes: int) -> str:
    """Return a number of processes as text.

    >>> counted(1), counted(2)
    ('1 process', '2 processes')
    """
    return f"{processes} process{'' if processes == 1 else 'es'}"


def average_gradients(weights: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Average the gradients of weights over processes, for backward passes that do not start in prepared models.

    A process without a gradient counts as 0. A weight without a gradient in any process keeps none, as in one process,
    so that the optimiser leaves it out. Every process must call this with the same weights.
    """
    if accelerator.num_processes == 1:
        return
    weights = list(weights)
    known = torch.tensor([float(weight.grad is not None) for weight in weights], device=accelerator.device)
    for weight, count in zip(weights, accelerator.reduce(known, reduction="sum").tolist(), strict=True):
        if count:
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad = accelerator.reduce(gradient, reduction="mean")
