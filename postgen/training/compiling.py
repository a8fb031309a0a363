"""`torch_compile`: the repeated blocks of a trained network are compiled one by one, and share the compiled code.

Blocks are compiled in place (`nn.Module.compile`), so the names in state dicts, checkpoints and exports do not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from postgen.errors import UserError, first_line

from .config import TrainingConfig


def compile_blocks(blocks: Sequence[nn.Module], args: TrainingConfig) -> None:
    """Set modules up for compilation at their first call, with dynamic shapes.

    Args:
        blocks: the modules.
        args: names the backend of `torch.compile`.

    Raises:
        UserError: torch does not have this backend here.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if args.torch_compile_backend not in known:
        raise UserError(
            f"torch_compile_backend is {args.torch_compile_backend!r}, but torch has {', '.join(known)} here: choose"
            " one of these"
        )
    for block in blocks:
        # Windows, text lengths and sizes change between steps. Dynamic shapes avoid a compilation for each of them.
        block.compile(backend=args.torch_compile_backend, dynamic=True)


@contextmanager
def compiled(args: TrainingConfig) -> Iterator[None]:
    """Run the enclosed code so that compiled blocks respect changed hooks, and compiler errors become one line.

    Without `torch_compile` this context does nothing.

    Raises:
        UserError: torch cannot compile a block: a compiler is missing, or the block uses unsupported operations.
    """
    if not args.torch_compile:
        yield
        return
    from torch._dynamo import config
    from torch._dynamo.exc import TorchDynamoException

    try:
        # A plug-in may add a hook to a block for one call. By default torch would not notice the hook, and would run
        # the code that it compiled without it.
        with config.patch(skip_nnmodule_hook_guards=False):
            yield
    except TorchDynamoException as error:
        reason = first_line(getattr(error, "inner_exception", error))
        raise UserError(
            f"torch_compile: {args.torch_compile_backend} cannot compile the blocks here: {reason}. Install"
            " its compiler (inductor: Triton on a GPU, a C++ compiler on a CPU), or set torch_compile: false"
        ) from error
