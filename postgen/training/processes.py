"""Several processes of one run: that they hold the same weights, and how they leave their group."""

from accelerate import Accelerator
from accelerate.utils import gather_object


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


def leave_group(accelerator: Accelerator) -> None:
    """End the group of processes; without one, nothing happens. The caller has let go of the prepared models before.

    The wrappers that average gradients hold the group too. Freed after it, they would take it down while they hold
    Python's lock, and wait for gloo's thread, which may need that lock to free its last work: the process would hang.
    """
    if accelerator.num_processes > 1:
        accelerator.free_memory()
    accelerator.state.destroy_process_group()
