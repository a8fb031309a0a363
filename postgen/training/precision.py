"""Mixed precision per trainer. accelerate has one precision per process, so this module enters autocast itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import convert_outputs_to_fp32, is_bf16_available
from torch import nn

from postgen.errors import UserError


class OwnPrecision(Accelerator):  # type: ignore[misc]
    """An `Accelerator` whose precision does not depend on other accelerators of the process.

    With `bf16`, prepared models and code inside `autocast` compute bitwise the same as with accelerate's
    `mixed_precision="bf16"`: weights keep their dtype, and outputs are float32. If several accelerators prepare a
    module, the last one determines its precision.

    Args:
        bf16: use bfloat16 autocast; otherwise no mixed precision.
        settings: arguments of `Accelerator`, without `mixed_precision`.

    Raises:
        UserError: the device does not support bfloat16.
        ValueError: the process already has an accelerator with fp16, fp8 or another device.
    """

    def __init__(self, *, bf16: bool, **settings: Any) -> None:
        self.bf16 = bf16
        # All accelerators of a process share a state that allows one precision only. This accelerator requests no
        # mixed precision from it, or leaves a "bf16" that another accelerator has set.
        beside = is_initialized() and AcceleratorState().mixed_precision == "bf16"
        super().__init__(mixed_precision=None if beside else "no", **settings)
        self.native_amp = False
        if bf16 and self.device.type not in ("cpu", "xpu", "hpu") and not is_bf16_available(ignore_tpu=True):
            raise UserError(f"bf16 is true, but {self.device} does not support bfloat16: set bf16: false")

    @property
    def mixed_precision(self) -> str:
        """The precision of prepared models: "bf16" or "no"."""
        return "bf16" if self.bf16 else "no"

    @contextmanager
    def autocast(self, autocast_handler: Any = None) -> Iterator[None]:
        """Run the enclosed code in this precision.

        Args:
            autocast_handler: settings of autocast, accelerate's `AutocastKwargs`.
        """
        with self._autocast(autocast_handler):
            yield

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Move a model to the device, and wrap it so that it computes in this precision and averages gradients."""
        _take_off(model)
        if self.bf16:
            _put_on(model, self._autocast())
        prepared: nn.Module = super().prepare_model(model, device_placement, evaluation_mode)
        return prepared

    def _autocast(self, handler: Any = None) -> AbstractContextManager[Any]:
        handler = handler or self.autocast_handler
        settings = {} if handler is None else handler.to_kwargs()
        return torch.autocast(self.device.type, dtype=torch.bfloat16, **settings) if self.bf16 else nullcontext()


def _put_on(model: nn.Module, autocast: Any) -> None:
    """Wrap the forward method of a module so that it runs inside `autocast` and returns float32 outputs."""
    plain = getattr(model.forward, "__func__", model.forward)
    wrapped = convert_outputs_to_fp32(autocast(plain))
    # The attribute also stores the wrapper itself: another wrapper around this one copies its attributes, and
    # `_take_off` must not mistake that one for this.
    wrapped.postgen_plain = wrapped, plain
    _set_forward(model, wrapped)


def _take_off(model: nn.Module) -> None:
    """Undo `_put_on`. Nothing happens if the forward method is not wrapped, or has another wrapper around it."""
    function = getattr(model.forward, "__func__", model.forward)
    wrapped, plain = getattr(function, "postgen_plain", (None, function))
    if wrapped is function:
        _set_forward(model, plain)


def _set_forward(model: nn.Module, function: Callable[..., Any]) -> None:
    # A bound method stays a bound method, so that a deep copy of the module calls the copy and not the original.
    bound = isinstance(model.forward, MethodType)
    if function is getattr(type(model), "forward", None):
        del model.forward
    else:
        model.forward = MethodType(function, model) if bound else function


@contextmanager
def fast_matmul(device: torch.device) -> Iterator[None]:
    """Let matrix products in float32 use TF32 on a CUDA device, and restore the setting of the process afterwards.

    The setting belongs to the whole process: without the restoration, models that run after the training in the same
    process would compute with 10 bits of mantissa.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
