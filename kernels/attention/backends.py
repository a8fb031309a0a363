"""The attention kernels that may be installed, each behind one function that takes a `Call`.

The package of a kernel is imported when its function runs for the first time. A function raises if its kernel is not
installed or refuses the call. `router.py` checks whether the results are right.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from postgen.kernels.attention import naive
from postgen.kernels.attention.store import installed_version
from postgen.kernels.dispatch import launching_on

Result = tuple[Tensor, Tensor | None]
"""The output (B, N, H, D), and the LSE (B, H, N) in float32, or None where the call does not need it."""


class Call(NamedTuple):
    """One attention call; shapes as in `naive.py`."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    key_lengths: Tensor | None
    """(B,), int32, on the device of the queries."""
    lse: bool
    """Whether the caller also needs the LSE, the logarithm of the softmax divisor."""
    preparation: str | None = None
    """The preparation of FP8 attention as text (`attention_fp8.preparation`); None is the default one."""

    @property
    def grouped(self) -> bool:
        """Return whether several query heads share one key head."""
        return self.query.shape[2] != self.key.shape[2]

    @property
    def work(self) -> int:
        """Return the number of multiplications."""
        return 2 * self.query.numel() * self.key.shape[1]

    @property
    def heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value as (B, H, N, D) views."""
        return self.query.transpose(1, 2), self.key.transpose(1, 2), self.value.transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """An implementation of attention and the calls that it supports."""

    name: str
    run: Callable[[Call], Result]
    packages: tuple[str, ...] = ("torch",)
    """Distributions on whose versions its speed and its correctness depend."""
    takes_lengths: bool = True
    """Whether it supports key lengths on the GPU."""
    takes_groups: bool = True
    """Whether it supports grouped heads: several query heads share one key head."""
    gives_lse: bool = True
    """Whether it returns the LSE."""
    gives_lse_with_lengths: bool = True
    """Whether it returns the LSE in calls with key lengths."""
    fewest_keys: int = 1
    """The smallest number of keys that it supports."""
    needs_gpu: bool = True
    races_without_lengths: bool = True
    """Whether the router times it for calls without key lengths."""
    tolerance: float | None = None
    """The largest relative error of a backend that computes with fewer bits than its inputs have. None means the
    tolerance of the input's dtype (`router.TOLERANCE`)."""
    differentiable: bool = True
    refuses: Callable[[Call], str | None] = lambda call: None
    """A further check: returns why the backend does not support a call, or None, without running a kernel."""

    def installed(self) -> bool:
        """Return whether all its packages are installed."""
        return all(installed_version(name) is not None for name in self.packages)

    def refusal(self, call: Call) -> str | None:
        """Return why the backend does not support a call, or None, without running a kernel."""
        if self.needs_gpu and not call.query.is_cuda:
            return "needs a CUDA GPU"
        if call.key_lengths is not None and not self.takes_lengths:
            return "does not support key lengths on the GPU"
        if call.grouped and not self.takes_groups:
            return "does not support grouped heads"
        if call.lse and not self.gives_lse:
            return "returns no LSE"
        if call.lse and call.key_lengths is not None and not self.gives_lse_with_lengths:
            return "returns no LSE for calls with key lengths"
        if call.key.shape[1] < self.fewest_keys:
            return f"needs {self.fewest_keys} keys or more"
        return self.refuses(call)

    def compute(self, call: Call) -> Result:
        """Run a call for the caller of `attention`, and remember the name of the backend for `last_backend`."""
        result = self.run(call)
        if not torch.compiler.is_compiling():
            _last.name = self.name
        return result


_last = threading.local()


def last_backend() -> str | None:
    """Return the name of the backend that computed the last call of `attention` in this thread.

    None if there was no call in this thread, and while torch.compile traces. The replay of a CUDA graph is not a call.
    """
    return None if torch.compiler.is_compiling() else getattr(_last, "name", None)


def _math(call: Call) -> Result:
    # Autocast would compute the products in half precision.
    with torch.autocast(call.query.device.type, enabled=False):
        out, lse = naive.attention(*call[:3], scale=call.scale, key_lengths=call.key_lengths)
    return out, lse if call.lse else None


def _sdpa(call: Call, kernel: SDPBackend | None = None) -> Result:
    """Call torch's scaled_dot_product_attention with the given kernel, or with the kernel that torch chooses."""
    mask = None if call.key_lengths is None else naive.key_mask(call.key_lengths, call.key.shape[1])
    attend = functools.partial(
        F.scaled_dot_product_attention, *call.heads_first, attn_mask=mask, scale=call.scale, enable_gqa=call.grouped
    )
    if kernel is None:
        return attend().transpose(1, 2), None
    with sdpa_kernel(kernel):
        return attend().transpose(1, 2), None


def _cudnn(call: Call) -> Result:
    if not call.lse:
        return _sdpa(call, SDPBackend.CUDNN_ATTENTION)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(*call.heads_first, None, True, scale=call.scale)
    # Newer versions of torch return the LSE as (B, H, N, 1).
    return found[0].transpose(1, 2), found[1].view(found[1].shape[:3])


def _flash(call: Call) -> Result:
    if call.key_lengths is not None:
        return _flash_with_lengths(call)
    if not call.lse:
        return _sdpa(call, SDPBackend.FLASH_ATTENTION)
    found = torch.ops.aten._scaled_dot_product_flash_attention(*call.heads_first, scale=call.scale)
    return found[0].transpose(1, 2), found[1]


def _flash_with_lengths(call: Call) -> Result:
    # The variant for packed samples: sample b begins at key b * M, and `seqused_k` sets how many keys it uses.
    assert call.key_lengths is not None
    batch, tokens, heads, _ = call.query.shape
    keys = call.key.shape[1]
    starts = torch.arange(batch + 1, dtype=torch.int32, device=call.query.device)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(x.flatten(0, 1) for x in call[:3]), starts * tokens, starts * keys, tokens, keys, 0.0, False, False,
        scale=call.scale, seqused_k=call.key_lengths,
    )  # fmt: skip
    # Newer versions of torch return (H, B * N), older ones (B, H, N).
    lse = lse.view(heads, batch, tokens).transpose(0, 1) if lse.dim() == 2 else lse
    return out.unflatten(0, (batch, tokens)), lse if call.lse else None


def _efficient(call: Call) -> Result:
    if not call.lse:
        return _sdpa(call, SDPBackend.EFFICIENT_ATTENTION)
    found = torch.ops.aten._scaled_dot_product_efficient_attention(*call.heads_first, None, True, scale=call.scale)
    # The kernel pads the rows of the LSE to a multiple of 32.
    return found[0].transpose(1, 2), found[1][..., : call.query.shape[1]]


def _flash_4(call: Call) -> Result:
    with launching_on(call.query):
        if call.key_lengths is None:
            attend = import_module("flash_attn.cute").flash_attn_func
            found = attend(*call[:3], softmax_scale=call.scale, return_lse=call.lse)
        else:
            attend = import_module("flash_attn.cute").flash_attn_varlen_func
            found = attend(*call[:3], seqused_k=call.key_lengths, softmax_scale=call.scale, return_lse=call.lse)
    return _pair(found, call.lse)


def _flash_3(call: Call) -> Result:
    attend = import_module("flash_attn_interface").flash_attn_func
    # Older builds always return the LSE, newer builds only with `return_attn_probs`.
    asked = {"return_attn_probs": True} if call.lse else {}
    with launching_on(call.query):
        return _pair(attend(*call[:3], softmax_scale=call.scale, **asked), call.lse)


def _xformers(call: Call) -> Result:
    ops = import_module("xformers.ops")
    if call.lse:
        return _pair(ops.memory_efficient_attention_forward_requires_grad(*call[:3], scale=call.scale), True)
    return ops.memory_efficient_attention(*call[:3], scale=call.scale), None


def _flex(call: Call) -> Result:
    lengths, queries, keys = call.key_lengths, call.query.shape[1], call.key.shape[1]
    options: dict[str, Any] = {"scale": call.scale, "enable_gqa": call.grouped}
    if lengths is not None:
        options["block_mask"] = key_blocks(lengths, queries, keys)
    if not call.lse:
        return _compiled_flex()(*call.heads_first, **options).transpose(1, 2), None
    out, lse = _compiled_flex()(*call.heads_first, **options, **_asking_for_lse())
    return out.transpose(1, 2), lse if isinstance(lse, Tensor) else lse.lse


def _asking_for_lse() -> dict[str, Any]:
    """Return the argument that makes Flex attention return the LSE; its name differs between versions of torch."""
    from torch.nn.attention import flex_attention

    request = getattr(flex_attention, "AuxRequest", None)
    return {"return_lse": True} if request is None else {"return_aux": request(lse=True)}


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # With `fullgraph` a failed compilation raises. Uncompiled Flex attention would hold all N * M logits in memory.
    return torch.compile(flex_attention, fullgraph=True)


def key_blocks(key_lengths: Tensor, queries: int, keys: int, size: int = 128) -> Any:
    """Return the block mask of Flex attention that lets sample b attend to its first `key_lengths[b]` keys.

    Flex attention skips the blocks beyond these keys. The function builds no (N, M) mask and does not wait for the
    GPU.

    Args:
        key_lengths: (B,) integers.
        queries: the number of queries, N.
        keys: the number of keys, M.
        size: queries and keys per block.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows, columns = -(-queries // size), -(-keys // size)
    counts = ((key_lengths.to(torch.int32) + size - 1) // size).view(-1, 1, 1).repeat(1, 1, rows)
    order = torch.arange(columns, dtype=torch.int32, device=key_lengths.device).repeat(*counts.shape, 1)

    def counts_key(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < key_lengths[sample]

    return BlockMask.from_kv_blocks(
        counts, order, BLOCK_SIZE=size, mask_mod=counts_key, seq_lengths=(queries, keys), compute_q_blocks=False
    )


def _cudnn_fp8(call: Call) -> Result:
    from postgen.kernels.attention_fp8.ops import attend
    from postgen.kernels.attention_fp8.preparation import Preparation

    given = None if call.preparation is None else Preparation.parsed(call.preparation)
    lengths = call.key_lengths
    return attend(*call[:3], scale=call.scale, key_lengths=lengths, lse=call.lse, preparation=given)


def _no_fp8(call: Call) -> str | None:
    from postgen.kernels.attention_fp8 import graphs

    if call.query.dtype == torch.float64:
        return "supports bfloat16, float16 and float32 only"
    return graphs.refusal(call.query.device, call.query.shape[-1]) or graphs.unrecorded(call)


def _pair(found: Any, lse: bool) -> Result:
    """Convert the result of a kernel to (out, LSE or None): kernels return a tensor, or a tuple (out, LSE, ...)."""
    out = found[0] if isinstance(found, tuple) else found
    return out, found[1] if lse else None


CUDNN = Backend(name="cudnn", run=_cudnn, takes_lengths=False, fewest_keys=2)
FLASH_4 = Backend(name="fa4", run=_flash_4, packages=("flash-attn-4", "nvidia-cutlass-dsl"))
FLASH_3 = Backend(name="fa3", run=_flash_3, packages=("flash-attn-3",), takes_lengths=False)
XFORMERS = Backend(name="xformers", run=_xformers, packages=("xformers",), takes_lengths=False, takes_groups=False)
FLASH = Backend(name="flash", run=_flash)
EFFICIENT = Backend(name="efficient", run=_efficient, takes_groups=False, gives_lse_with_lengths=False)
# Flex attention compiles for many seconds, and it has been the fastest only in calls with key lengths.
FLEX = Backend(name="flex", run=_flex, packages=("torch", "triton"), races_without_lengths=False)
SDPA = Backend(name="sdpa", run=_sdpa, gives_lse=False, needs_gpu=False)
MATH = Backend(name="math", run=_math, needs_gpu=False)

CUDNN_FP8 = Backend(
    name="cudnn_fp8", run=_cudnn_fp8, packages=("nvidia-cudnn-frontend",), takes_groups=False, fewest_keys=2,
    tolerance=0.1, differentiable=False, refuses=_no_fp8,
)  # fmt: skip

TIMED = (FLASH_4, FLASH_3, CUDNN, XFORMERS, FLASH, EFFICIENT, FLEX)
"""The backends that the router times against each other. cuDNN runs without masks only: with a mask its gradients were
wrong."""
LAST_RESORTS = (SDPA, FLASH, MATH)
"""The fallbacks, which are not timed. The first one that supports a call runs if no backend above can run, or if the
call is too small to be worth timing."""
ASKED_FOR = (CUDNN_FP8,)
"""The backends that run only if the caller names them, because they compute with fewer bits than their inputs have."""
