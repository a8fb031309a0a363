"""A linear layer in FP8 beside the weight that it was made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from postgen.fp8_linear.samples import sample_of
from postgen.fp8_linear.sharing import quantized
from postgen.kernels.fp8 import E4M3
from postgen.kernels.fp8_rows.naive import quantize_rows
from postgen.kernels.fp8_rows.ops import rows_linear, rows_matmul, why_not_fp8


class FP8Linear(nn.Linear):
    """A linear layer whose weight and input are rounded to E4M3, a scale for each output channel and each token.

    It has the very parameters of the layer it was made of, so checkpoints, LoRA and `.to()` see those, and only the
    product is another one. Gradients pass the rounding by: that of the input is of the rounded weight, that of the
    weight of the input itself. The codes are no floating-point buffers: `.to(dtype)` leaves them.
    """

    codes: Tensor
    scales: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        *,
        place: str = "",
        wanted: Callable[[FP8Linear], bool] | None = None,
        shared: bool = False,
    ) -> None:
        """Round the weight of a layer.

        Args:
            linear: the layer; input and output channels are multiples of 16 where the product is to be fast.
            place: its name in the model, for `wanted`.
            wanted: asked in every call, with this layer, whether to compute in FP8; None is always. It must survive
                deepcopy and pickle.
            shared: whether layers that are called next read the same tensor.
        """
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.place, self.wanted, self.shared = place, wanted, shared
        self.inline = may_be_inline(linear.weight.device)
        codes, scales = self._rounded()
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self._of = self._weight_now((), sample_of(self.weight))

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out_features) in the dtype of the input, or in that of mixed precision."""
        if self.wanted is not None and not self.wanted(self):
            return super().forward(input)
        device, dtype = input.device.type, input.dtype
        # As torch itself, which leaves float64 alone.
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        codes, scale = quantized(input, dtype, shared=self.shared, inline=self.inline)
        weight, weight_scale = self.codes.view(E4M3), self.scales.view(torch.float32)
        if torch.is_grad_enabled() and (input.requires_grad or any(each.requires_grad for each in self.parameters())):
            original = self.weight if self.weight.requires_grad else None
            out: Tensor = rows_linear(input.to(dtype), codes, scale, weight, weight_scale, self.bias, original)
            return out
        plain: Tensor = rows_matmul(codes, scale, weight, weight_scale, self.bias, dtype)
        return plain

    def refresh(self, merged: tuple[str, ...] = (), sample: bytes | None = None) -> None:
        """Round the weight again if it changed since: loaded anew, or with LoRA fused into it.

        Args:
            merged: names of the adapters that are fused into it.
            sample: of the weight as it is now (`samples.samples_of`): peft writes past the version of a tensor. None
                goes without.
        """
        now = self._weight_now(merged, self._of[2] if sample is None else sample)
        if now == self._of or self.weight.is_meta:
            return
        # In place: compiled code and CUDA graphs know the memory.
        codes, scales = self._rounded()
        self.codes.copy_(codes)
        self.scales.copy_(scales)
        self._of = now

    # Tensors that are made in inference mode could not be written into outside of it, nor kept for a gradient.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _rounded(self) -> tuple[Tensor, Tensor]:
        # What diffusers stores in eight bits (`enable_layerwise_casting`) has no arithmetic of its own.
        weight = self.weight.float() if self.weight.element_size() == 1 else self.weight
        codes, scales = quantize_rows(weight)
        return codes.view(torch.uint8), scales.view(torch.int32)

    def _weight_now(self, merged: tuple[str, ...], sample: bytes) -> tuple[int, tuple[str, ...], bytes]:
        # Tensors of inference mode have no version.
        return 0 if self.weight.is_inference() else self.weight._version, merged, sample


def may_be_inline(device: torch.device) -> bool:
    """Whether a compiler may fuse the rounding on a device: Triton has no E4M3 on GPUs without FP8."""
    return device.type != "cuda" or why_not_fp8(device) is None
