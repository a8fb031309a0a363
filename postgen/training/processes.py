"""Several processes of one run: check of equal weights, and the end of the process group."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from postgen.errors import UserError


def check_equal(checksum: float) -> None:
    """Check that all processes have the same checksum of the trained weights; every process must call this.

    Raises:
        RuntimeError: the weights differ, so the processes do not average their gradients.
    """
    sums = gather_object([checksum])
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
