"""Several processes of one run: that they hold the same weights, and how they leave their group."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from postgen.errors import UserError


def check_equal(checksum: float) -> None:
    """Compare a checksum of the trained weights over all processes; every process calls this.

    Raises:
        RuntimeError: the processes train different weights: each would waste what the others learn.
    """
    sums = gather_object([checksum])
    if any(other != sums[0] for other in sums):
        raise RuntimeError(
            "the processes hold different weights: passes that carry gradients must go through self.models[name], "
            "not through unwrap(name), so that gradients are averaged"
        )


def check_group(accelerator: Accelerator) -> None:
    """Look whether processes that are to train together can still speak with each other.

    Raises:
        UserError: their group has ended, with an earlier run of theirs.
    """
    if accelerator.num_processes > 1 and not torch.distributed.is_initialized():
        raise UserError(
            f"the group of these {accelerator.num_processes} processes has ended with an earlier run: several "
            "processes train one run, start them again for the next"
        )


def leave_group(accelerator: Accelerator) -> None:
    """End the group of processes; without one, nothing happens. The caller has let go of the prepared models before.

    The wrappers that average gradients hold the group too. Freed after it, they would take it down while they hold
    Python's lock, and wait for gloo's thread, which may need that lock to free its last work: the process would hang.
    """
    if accelerator.num_processes > 1:
        accelerator.free_memory()
    accelerator.state.destroy_process_group()


def counted(processes: int) -> str:
    """Say how many processes there are.

    >>> counted(1), counted(2)
    ('1 process', '2 processes')
    """
    return f"{processes} process{'' if processes == 1 else 'es'}"
