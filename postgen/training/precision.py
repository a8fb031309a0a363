"""The precision of one trainer: accelerate keeps one for a whole process, so bfloat16's autocast is entered here."""

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
    """accelerate's `Accelerator` with a precision of its own, whatever others of the process have.

    Models that it prepares, and what stands inside `autocast`, compute as with accelerate's `mixed_precision="bf16"`,
    to the bit: weights stay as they are, and outputs are float32. A module that several accelerators prepare computes
    as the last of them says.

    Args:
        bf16: bfloat16, or no mixed precision.
        settings: those of `Accelerator`, without `mixed_precision`.

    Raises:
        UserError: a device without bfloat16.
        ValueError: the process has had an accelerator of fp16, fp8 or another device.
    """

    def __init__(self, *, bf16: bool, **settings: Any) -> None:
        self.bf16 = bf16
        # All accelerators of a process share a state, which takes one precision only: this one asks for none of it.
        beside = is_initialized() and AcceleratorState().mixed_precision == "bf16"
        super().__init__(mixed_precision=None if beside else "no", **settings)
        self.native_amp = False
        if bf16 and self.device.type not in ("cpu", "xpu", "hpu") and not is_bf16_available(ignore_tpu=True):
            raise UserError(f"bf16 is true, but {self.device} has no bfloat16: set bf16: false")

    @property
    def mixed_precision(self) -> str:
        """What models compute in: "bf16" or "no"."""
        return "bf16" if self.bf16 else "no"

    @contextmanager
    def autocast(self, autocast_handler: Any = None) -> Iterator[None]:
        """Inside, computations are in this precision; the handler is accelerate's `AutocastKwargs`."""
        with self._autocast(autocast_handler):
            yield

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Bring a model to its device, and let it compute in this precision and average its gradients."""
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
    """Let the forward passes of a module run inside a context, with outputs in float32."""
    plain = getattr(model.forward, "__func__", model.forward)
    wrapped = convert_outputs_to_fp32(autocast(plain))
    # With itself, so that a wrapper around it, which takes over its attributes, is not mistaken for it.
    wrapped.postgen_plain = wrapped, plain
    _set_forward(model, wrapped)


def _take_off(model: nn.Module) -> None:
    """Undo `_put_on`; nothing happens where somebody has put more around it, or nobody this."""
    function = getattr(model.forward, "__func__", model.forward)
    wrapped, plain = getattr(function, "postgen_plain", (None, function))
    if wrapped is function:
        _set_forward(model, plain)


def _set_forward(model: nn.Module, function: Callable[..., Any]) -> None:
    # A method, where it was one, so that a deep copy of the module calls its own.
    bound = isinstance(model.forward, MethodType)
    if function is getattr(type(model), "forward", None):
        del model.forward
    else:
        model.forward = MethodType(function, model) if bound else function
