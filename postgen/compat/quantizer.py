"""The base class of a diffusers quantiser, whose hooks have public names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor


class Quantizer(DiffusersQuantizer):
    """Loads and saves quantised models in `from_pretrained` and `save_pretrained` of diffusers."""

    use_keep_in_fp32_modules = True
    """Modules that diffusers keeps in float32 (norms, modulation tables, timestep embedding) stay in float32."""

    @property
    def is_serializable(self) -> bool:
        """The model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on the quantised model can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The model can be compiled."""
        return True

    @abstractmethod
    def before_weights(self, model: Any) -> None:
        """Change the empty model (on the meta device) before its weights are loaded."""

    @abstractmethod
    def after_weights(self, model: Any) -> None:
        """Change the model after its weights were loaded."""

    @abstractmethod
    def owns(self, model: Any, name: str) -> bool:
        """Return whether a tensor belongs to a quantised layer, so that `put` stores it instead of diffusers."""

    @abstractmethod
    def put(self, model: Any, name: str, tensor: Tensor, stored: torch.dtype) -> None:
        """Store a tensor of a quantised layer, which is on its device.

        Args:
            model: the model.
            name: full name of the tensor.
            tensor: the tensor, in the dtype of the loaded model if it is of a floating-point dtype.
            stored: dtype of the tensor in the checkpoint.
        """

    @abstractmethod
    def check_shape(self, name: str, wanted: tuple[int, ...], found: tuple[int, ...]) -> None:
        """Raise an error for a tensor of a quantised layer whose shape is not that of the layer."""

    @abstractmethod
    def check_complete(self, model: Any, missing: Sequence[str]) -> None:
        """Raise an error if the checkpoint lacks tensors of quantised layers; `missing` is all that it lacks."""

    @abstractmethod
    def to_exact(self, model: Any) -> None:
        """Replace the quantised layers by exact ones."""

    def check_quantized_param_shape(self, name: str, wanted: Tensor, tensor: Tensor) -> bool:
        """diffusers' hook for `check_shape`."""
        self.check_shape(name, tuple(wanted.shape), tuple(tensor.shape))
        return True

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """diffusers' hook for `check_complete`."""
        self.check_complete(model, missing_keys)
        return missing_keys

    def check_if_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, state_dict: Any, **_: Any
    ) -> bool:
        """diffusers' hook for `owns`."""
        return self.owns(model, param_name)

    def create_quantized_param(  # type: ignore[override]
        self,
        model: Any,
        value: Tensor,
        name: str,
        device: torch.device | str,
        state: Mapping[str, Tensor],
        *_: Any,
        **__: Any,
    ) -> None:
        """diffusers' hook for `put`."""
        # Without a dtype for the model, diffusers has cast all tensors to the dtypes of the empty model.
        stored = state[name]
        self.put(model, name, (value if stored.is_floating_point() else stored).to(device), stored.dtype)

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        self.before_weights(model)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        self.after_weights(model)
        return model

    def _dequantize(self, model: Any) -> Any:
        self.to_exact(model)
        return model
