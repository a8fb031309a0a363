"""The attention kernels that may be installed, each behind one function that takes a `Call`.

Nothing is imported before it is tried. A function raises where its kernel is missing or refuses the call; whether
what it returns is right is for `router.py` to find out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from postgen.kernels.attention import naive
from postgen.kernels.dispatch import launching_on

Result = tuple[Tensor, Tensor | None]
"""(B, N, H, D), and (B, H, N) in float32 where the call asks for it."""


class Call(NamedTuple):
    """One attention call; shapes as in `naive.py`."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    key_lengths: Tensor | None
    """(B,), int32, on the device of the queries."""
    lse: bool
    """Whether the logarithm of the divisor is asked for."""
    preparation: str | None = None
    """What FP8 attention does before it rounds, as `attention_fp8.preparation` names it; None is the usual."""

    @property
    def grouped(self) -> bool:
        """Whether several query heads read one key head."""
        return self.query.shape[2] != self.key.shape[2]

    @property
    def work(self) -> int:
        """How many multiplications it takes."""
        return 2 * self.query.numel() * self.key.shape[1]

    @property
    def heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value as (B, H, N, D) views."""
        return self.query.transpose(1, 2), self.key.transpose(1, 2), self.value.transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """An implementation of attention."""

    name: str
    run: Callable[[Call], Result]
    packages: tuple[str, ...] = ("torch",)
    """Distributions whose versions decide how fast it is and whether it works."""
    takes_lengths: bool = True
    takes_groups: bool = True
    """Whether query heads may share key heads."""
    gives_lse: bool = True
    gives_lse_with_lengths: bool = True
    fewest_keys: int = 1
    needs_gpu: bool = True
    races_without_lengths: bool = True
    """Whether the router times it where no keys are masked."""
    tolerance: float | None = None
    """Largest relative error of a backend that rounds to fewer bits than its inputs have; None: as few as they."""
    differentiable: bool = True
    refuses: Callable[[Call], str | None] = lambda call: None
    """What else it says of a call without trying."""

    def refusal(self, call: Call) -> str | None:
        """Return why it cannot take a call, as far as can be said without trying."""
        if self.needs_gpu and not call.query.is_cuda:
            return "needs a CUDA GPU"
        if call.key_lengths is not None and not self.takes_lengths:
            return "takes no key lengths that are on the GPU"
        if call.grouped and not self.takes_groups:
            return "takes no grouped heads"
        if call.lse and not self.gives_lse:
            return "returns no LSE"
        if call.lse and call.key_lengths is not None and not self.gives_lse_with_lengths:
            return "returns no LSE where keys are masked"
        if call.key.shape[1] < self.fewest_keys:
            return f"takes {self.fewest_keys} keys or more"
        return self.refuses(call)


def _math(call: Call) -> Result:
    # Autocast would do the products in half precision.
    with torch.autocast(call.query.device.type, enabled=False):
        out, lse = naive.attention(*call[:3], scale=call.scale, key_lengths=call.key_lengths)
    return out, lse if call.lse else None


def _sdpa(call: Call, kernel: SDPBackend | None = None) -> Result:
    """Call torch's scaled_dot_product_attention, which picks a kernel of its own where none is named."""
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
    # Newer torch returns (B, H, N, 1).
    return found[0].transpose(1, 2), found[1].view(found[1].shape[:3])


def _flash(call: Call) -> Result:
    if call.key_lengths is not None:
        return _flash_with_lengths(call)
    if not call.lse:
        return _sdpa(call, SDPBackend.FLASH_ATTENTION)
    found = torch.ops.aten._scaled_dot_product_flash_attention(*call.heads_first, scale=call.scale)
    return found[0].transpose(1, 2), found[1]


def _flash_with_lengths(call: Call) -> Result:
    # The form for packed samples, told that the samples begin at multiples of M and end where their keys end.
    assert call.key_lengths is not None
    batch, tokens, heads, _ = call.query.shape
    keys = call.key.shape[1]
    starts = torch.arange(batch + 1, dtype=torch.int32, device=call.query.device)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(x.flatten(0, 1) for x in call[:3]), starts * tokens, starts * keys, tokens, keys, 0.0, False, False,
        scale=call.scale, seqused_k=call.key_lengths,
    )  # fmt: skip
    # (H, B * N) from newer torch, (B, H, N) from older.
    lse = lse.view(heads, batch, tokens).transpose(0, 1) if lse.dim() == 2 else lse
    return out.unflatten(0, (batch, tokens)), lse if call.lse else None


def _efficient(call: Call) -> Result:
    if not call.lse:
        return _sdpa(call, SDPBackend.EFFICIENT_ATTENTION)
    found = torch.ops.aten._scaled_dot_product_efficient_attention(*call.heads_first, None, True, scale=call.scale)
    # Its rows are padded to a multiple of 32.
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
    # Builds differ: older ones return the LSE always, newer ones where it is asked for.
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
    """Return the argument that makes Flex attention return it; older torch knows another."""
    from torch.nn.attention import flex_attention

    request = getattr(flex_attention, "AuxRequest", None)
    return {"return_lse": True} if request is None else {"return_aux": request(lse=True)}


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # `fullgraph` makes it raise where torch gives up compiling: uncompiled it would hold all N * M logits.
    return torch.compile(flex_attention, fullgraph=True)


def key_blocks(key_lengths: Tensor, queries: int, keys: int, size: int = 128) -> Any:
    """Return the block mask of Flex attention that shows sample b its first `key_lengths[b]` keys.

    Blocks beyond them are skipped. Made without a map of all queries and keys, and without waiting for the GPU.
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
        return "takes bfloat16, float16 and float32"
    return graphs.refusal(call.query.device, call.query.shape[-1]) or graphs.unrecorded(call)


def _pair(found: Any, lse: bool) -> Result:
    """Return what a kernel returned as (out, LSE or None): most return one tensor or a tuple that begins so."""
    out = found[0] if isinstance(found, tuple) else found
    return out, found[1] if lse else None


CUDNN = Backend(name="cudnn", run=_cudnn, takes_lengths=False, fewest_keys=2)
FLASH_4 = Backend(name="fa4", run=_flash_4, packages=("flash-attn-4", "nvidia-cutlass-dsl"))
FLASH_3 = Backend(name="fa3", run=_flash_3, packages=("flash-attn-3",), takes_lengths=False)
XFORMERS = Backend(name="xformers", run=_xformers, packages=("xformers",), takes_lengths=False, takes_groups=False)
FLASH = Backend(name="flash", run=_flash)
EFFICIENT = Backend(name="efficient", run=_efficient, takes_groups=False, gives_lse_with_lengths=False)
# It compiles for many seconds, and only among those that mask keys has it ever been the fastest.
FLEX = Backend(name="flex", run=_flex, packages=("torch", "triton"), races_without_lengths=False)
SDPA = Backend(name="sdpa", run=_sdpa, gives_lse=False, needs_gpu=False)
MATH = Backend(name="math", run=_math, needs_gpu=False)

CUDNN_FP8 = Backend(
    name="cudnn_fp8", run=_cudnn_fp8, packages=("nvidia-cudnn-frontend",), takes_groups=False, fewest_keys=2,
    tolerance=0.1, differentiable=False, refuses=_no_fp8,
)  # fmt: skip

TIMED = (FLASH_4, FLASH_3, CUDNN, XFORMERS, FLASH, EFFICIENT, FLEX)
"""Those that the router times against each other. cuDNN's masks are left out: their gradients were wrong."""
LAST_RESORTS = (SDPA, FLASH, MATH)
"""Those that run, untimed, where none of the above can or where timing is not worth it: the first that can."""
ASKED_FOR = (CUDNN_FP8,)
"""Those that run where they are asked for by name only: they round to fewer bits than their inputs have."""
