"""A linear layer that computes in FP8 and keeps its original weight."""

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
    """A linear layer whose weight and input are rounded to E4M3, with one scale per output channel and per token.

    The layer holds the parameters of the layer that it replaces. So checkpoints, LoRA and `.to()` work on the
    original weight, and only the matrix product differs. Gradients ignore the rounding (straight-through): the
    gradient of the input uses the rounded weight, and the gradient of the weight uses the unrounded input. The codes
    are stored as integer buffers, so `.to(dtype)` does not change them.
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
        """Quantise the weight of a linear layer.

        Args:
            linear: the layer to replace. The FP8 matrix product needs numbers of channels that are multiples of 16;
                plain torch simulates it for other layers.
            place: the name of the layer in the model; `wanted` reads it.
            wanted: a function that every forward pass calls with this layer. It returns whether the layer computes in
                FP8. None means always. It must survive deepcopy and pickle.
            shared: whether the layers that run next read the same input tensor (queries, keys and values), so that
                they can share one quantisation.
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
        """Compute the layer.

        Args:
            input: (..., in_features).

        Returns:
            (..., out_features), in the dtype of the input, or in the autocast dtype where autocast is on.
        """
        if self.wanted is not None and not self.wanted(self):
            return super().forward(input)
        device, dtype = input.device.type, input.dtype
        # Like torch itself: autocast does not cast float64.
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
        """Quantise the weight again if it has changed, for example because a checkpoint was loaded or LoRA fused.

        Args:
            merged: names of the adapters that are fused into the weight.
            sample: a sample of the current weight (`samples.samples_of`). It is needed because peft changes weights
                without increasing the tensor's version. None skips this check.
        """
        now = self._weight_now(merged, self._of[2] if sample is None else sample)
        if now == self._of or self.weight.is_meta:
            return
        # In place, because compiled code and CUDA graphs hold the addresses of these buffers.
        codes, scales = self._rounded()
        self.codes.copy_(codes)
        self.scales.copy_(scales)
        self._of = now

    # A tensor made in inference mode can neither be written outside inference mode nor be saved for backward.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _rounded(self) -> tuple[Tensor, Tensor]:
        # Weights that diffusers stores in 8 bits (`enable_layerwise_casting`) support no arithmetic.
        weight = self.weight.float() if self.weight.element_size() == 1 else self.weight
        codes, scales = quantize_rows(weight)
        return codes.view(torch.uint8), scales.view(torch.int32)

    def _weight_now(self, merged: tuple[str, ...], sample: bytes) -> tuple[int, tuple[str, ...], bytes]:
        # Tensors made in inference mode have no version counter.
        return 0 if self.weight.is_inference() else self.weight._version, merged, sample


def may_be_inline(device: torch.device) -> bool:
    """Return whether torch.compile may fuse the rounding on a device: Triton has no E4M3 on GPUs without FP8."""
    return device.type != "cuda" or why_not_fp8(device) is None
