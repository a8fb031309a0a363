"""`torch_compile`: the repeated blocks of a trained network are compiled, one by one, and share their code.

A block is compiled in place (`nn.Module.compile`): names of weights, checkpoints, exports and copies stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from postgen.errors import UserError, first_line

from .config import TrainingConfig


def compile_blocks(blocks: Sequence[nn.Module], args: TrainingConfig) -> None:
    """Compile modules as the configuration says; each at its first call, for all shapes.

    Raises:
        UserError: no such backend of `torch.compile` here.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if args.torch_compile_backend not in known:
        raise UserError(
            f"torch_compile_backend is {args.torch_compile_backend!r}, torch has {', '.join(known)} here: name one of"
            " these"
        )
    for block in blocks:
        # Windows, lengths and sizes change from step to step: compiled once for all, not once for each.
        block.compile(backend=args.torch_compile_backend, dynamic=True)


@contextmanager
def compiled(args: TrainingConfig) -> Iterator[None]:
    """Inside, compiled blocks notice hooks that come and go, and a compiler that fails is told in one line.

    Raises:
        UserError: torch cannot compile a block, because it has no compiler or the block does what it does not know.
    """
    if not args.torch_compile:
        yield
        return
    from torch._dynamo import config
    from torch._dynamo.exc import TorchDynamoException

    try:
        # A plug-in may listen to a block for one call; torch would go on with what it compiled without it.
        with config.patch(skip_nnmodule_hook_guards=False):
            yield
    except TorchDynamoException as error:
        said = first_line(getattr(error, "inner_exception", error))
        raise UserError(
            f"torch_compile: {args.torch_compile_backend} cannot compile the blocks here: {said}. Install"
            " what it needs (inductor: Triton on a GPU, a C++ compiler on a CPU), or leave torch_compile out"
        ) from error
