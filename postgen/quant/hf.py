"""Quantised models in `from_pretrained` and `save_pretrained` of diffusers.

    from postgen import PostgenQuantConfig

    config = PostgenQuantConfig(weight="int4:g64", act="fp8:token")   # rounds to nearest, without data
    model = WanTransformer3DModel.from_pretrained(folder, quantization_config=config, torch_dtype=torch.bfloat16)
    model.save_pretrained("out")
    model = WanTransformer3DModel.from_pretrained("out", torch_dtype=torch.bfloat16)

`import postgen` registers both classes with diffusers, so the last line needs this import and no argument. Without the
import, diffusers refuses the folder: "Unknown quantization type, got postgen".
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from postgen.errors import UserError, did_you_mean, shown
from postgen.families.installed import inner_model
from postgen.families.linear import forget_replaced, record_replaced
from postgen.families.own_format import erase_note
from postgen.families.quantizer import Quantizer, register_quantizer
from postgen.quant.guards import guard_quantized_, unguard_
from postgen.quant.layers import note_shared_inputs_, quantized_layers
from postgen.quant.linear import OWN_TENSORS, QLinear
from postgen.quant.model import OWNER, bare_linear, quantize_weights
from postgen.quant.spec import QuantSpec
from postgen.quant.step_bins import StepBins
from postgen.quant.stored import groups_of, put_layers_
from postgen.quant.transforms.gains import gained_blocks, is_fold_buffer, prepare_gains_
from postgen.quant.transforms.lora import guard_folds_

FIELDS = tuple(each.name for each in fields(QuantSpec))
"""Arguments of a `PostgenQuantConfig` that are those of a `QuantSpec`."""


class Method(enum.StrEnum):
    """The name of the method in the config of a saved model."""

    POSTGEN = "postgen"


class PostgenQuantConfig(QuantizationConfigMixin):
    """What `from_pretrained` quantises, or what a saved model contains."""

    def __init__(
        self,
        weight: str | None = "int4:g64",
        act: str | None = None,
        rotate: int = 0,
        rank: int = 0,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        modulation: str | None = None,
        layers: Sequence[Mapping[str, Any]] | None = None,
        gains: Sequence[str] = (),
        step_bins: Sequence[float] | None = None,
        quant_method: str = Method.POSTGEN,
        **others: Any,
    ) -> None:
        """Choose what to quantise.

        Args:
            weight, act, rotate, rank, overrides, modulation: as in `QuantSpec`. A model that is not quantised is
                rounded to nearest, without data.
            layers: the quantised layers of a saved model, see `stored.groups_of`.
            gains: blocks of a saved model that were folded (`transforms`).
            step_bins: edges of the bins of the noise level by which layers of a saved model clip their inputs.
            quant_method: "postgen".

        Raises:
            UserError: a value is wrong, or an argument is unknown.
        """
        if others:
            known = FIELDS
            name = next(iter(others))
            raise UserError(
                f"PostgenQuantConfig has no argument {shown(name)}.{did_you_mean(name, known)} Arguments:"
                f" {', '.join(known)}"
            )
        if quant_method != Method.POSTGEN:
            raise UserError(f"quant_method of a PostgenQuantConfig must be postgen, got {shown(quant_method)}")
        _check_types(overrides, layers, gains, step_bins)
        self.quant_method = Method.POSTGEN  # type: ignore[assignment]
        self.weight, self.act, self.rotate, self.rank = weight, act, rotate, rank
        self.overrides, self.modulation = dict(overrides or {}), modulation
        self.layers = None if layers is None else list(layers)
        self.gains = list(gains)
        self.step_bins = None if step_bins is None else list(step_bins)
        if layers is None:
            _ = self.spec  # checks the values

    @property
    def spec(self) -> QuantSpec:
        """The spec of a model that is not yet quantised.

        Raises:
            UserError: a value is wrong.
        """
        words = {name: getattr(self, name) for name in FIELDS}
        return QuantSpec(**words)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON values."""
        found = {name: getattr(self, name) for name in FIELDS}
        if self.layers is not None:
            found |= {"layers": self.layers, "gains": self.gains, "step_bins": self.step_bins}
        return {"quant_method": self.quant_method.value, **found}

    def __repr__(self) -> str:
        words = ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items() if name != "layers")
        return f"PostgenQuantConfig({words})"


class PostgenQuantizer(Quantizer):
    """Loads models that are quantised, and quantises models after they were loaded."""

    quantization_config: PostgenQuantConfig

    def before_weights(self, model: Any) -> None:
        """Put quantised layers without values into the empty model of a saved quantised model.

        Raises:
            UserError: the model has other layers than the saved one, or the config of a saved model is given for an
                exact one.
        """
        config = self.quantization_config
        if not self.pre_quantized:
            if config.layers is not None or config.gains or config.step_bins is not None:
                raise UserError(
                    "layers, gains and step_bins of a PostgenQuantConfig describe a saved quantised model, but this"
                    " checkpoint is exact: leave them out"
                )
            return
        if config.layers is None:
            raise UserError("the config of this checkpoint does not name its quantised layers: save the model again")
        put_layers_(model, config.layers)
        if config.gains:
            prepare_gains_(model, config.gains)
            guard_folds_(model)

    def after_weights(self, model: Any) -> None:
        """Quantise a model that is not quantised, or finish the layers of a saved one."""
        config = self.quantization_config
        if not self.pre_quantized:
            quantize_weights(model, config.spec)
            self.quantization_config = model.hf_quantizer.quantization_config
            return
        layers = quantized_layers(model)
        if config.step_bins is not None:
            bins = StepBins(config.step_bins)
            for layer in layers.values():
                layer.bins = None if layer.act_clip is None else bins
            bins.attach(model)
        note_shared_inputs_(model)
        record_replaced(model, layers, owner=OWNER)
        guard_quantized_(model)

    def owns(self, model: Any, name: str) -> bool:
        """Return whether a tensor belongs to a quantised layer."""
        return isinstance(model.get_submodule(name.rpartition(".")[0]), QLinear)

    def put(self, model: Any, name: str, tensor: Tensor, stored: torch.dtype) -> None:
        """Store a tensor of a quantised layer; bits stay as they are in the file.

        Raises:
            UserError: its dtype is not that of the layer.
        """
        place, _, last = name.rpartition(".")
        layer = model.get_submodule(place)
        own: Tensor = getattr(layer, last)
        # Zero points that are no bytes are views of float32.
        others = {torch.int32} if last == "weight_zero" else set()
        if stored not in {own.dtype, *others} and not (own.is_floating_point() and stored.is_floating_point):
            raise UserError(f"{name} must be {own.dtype} in a quantised checkpoint, got {stored}")
        setattr(layer, last, nn.Parameter(tensor, requires_grad=False) if isinstance(own, nn.Parameter) else tensor)

    def check_shape(self, name: str, wanted: tuple[int, ...], found: tuple[int, ...]) -> None:
        """Raise an error for a tensor that has another shape than the layer.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{name} must have the shape {wanted}, got {found}: the checkpoint is of a model of another size, or its"
            " config is of another checkpoint"
        )

    def to_exact(self, model: Any) -> None:
        """Replace the quantised layers by linear layers with the numbers that they represent (`model.dequantize()`).

        Raises:
            UserError: blocks were folded, for which they have tensors that stock blocks do not have.
        """
        if blocks := gained_blocks(model):
            raise UserError(
                f"{blocks[0]} was folded, which a stock {type(model).__name__} has no place for: load the exact model"
                " instead"
            )
        dtype = model.dtype
        for name, layer in [(name, each) for name, each in model.named_modules() if isinstance(each, QLinear)]:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _exact(layer, dtype))
        unguard_(model)
        forget_replaced(model, owner=OWNER)
        erase_note(model)

    def check_complete(self, model: Any, missing: Sequence[str], unknown: Sequence[str]) -> None:
        """Refuse a checkpoint whose quantised layers and folded blocks have not exactly the tensors of its config.

        Raises:
            UserError: tensors are missing, or the config does not tell about some.
        """
        if not self.pre_quantized:
            return
        layers = {name for name, module in model.named_modules() if isinstance(module, QLinear)}

        def ours(name: str) -> bool:
            layer, _, last = name.rpartition(".")
            return layer in layers or last in OWN_TENSORS or is_fold_buffer(name)

        for found, said in (
            (missing, "the checkpoint lacks {} tensors of quantised layers, the first is {}: it is incomplete, or"),
            (unknown, "the checkpoint has {} tensors that its config does not tell about, the first is {}:"),
        ):
            if own := sorted(filter(ours, found)):
                raise UserError(f"{said.format(len(own), own[0])} its config is of another checkpoint")

    def check_saved(self, names: Collection[str]) -> None:
        """Refuse to write adapters, whose names no loader of models knows.

        Raises:
            UserError: a LoRA is attached.
        """
        if any(".base_layer." in name for name in names):
            raise UserError(
                "a LoRA is attached, and a saved quantised model cannot hold it: save the LoRA separately"
                " (save_lora_adapter) and remove it (unload_lora), or merge it (postgen.quant.merge_lora_)"
            )


def mark_quantized(model: nn.Module, spec: QuantSpec | None = None) -> None:
    """Make `save_pretrained` of a model write its quantised layers, so that `from_pretrained` can load them.

    Call it again after a change of quantised layers, other than of values. Bins of the noise level by which layers
    clip their inputs are attached to the model, if they are not yet.

    Args:
        model: a diffusers model with quantised layers; it may be wrapped (peft, compiled).
        spec: the spec by which it was quantised, which the config then shows; None: the one before.

    Raises:
        UserError: the config of the model has the note of another method, or layers have different bins.
    """
    inner: Any = inner_model(model)
    layers = quantized_layers(inner)
    before = config_of(inner)
    words = {} if spec is None else spec.to_dict()
    if spec is None and before is not None:
        words = {name: getattr(before, name) for name in FIELDS}
    note_shared_inputs_(inner)
    bins = _attached_bins(inner, layers)
    config = PostgenQuantConfig(
        **words, layers=groups_of(layers), gains=gained_blocks(inner), step_bins=None if bins is None else bins.edges
    )
    inner.hf_quantizer = PostgenQuantizer(config)
    inner.is_quantized, inner.quantization_method = True, config.quant_method
    inner.register_to_config(quantization_config=config)
    guard_quantized_(inner)


def config_of(model: nn.Module) -> PostgenQuantConfig | None:
    """Return the config of a model that is quantised; None for an exact model.

    Raises:
        UserError: the config of the model has the note of another method.
    """
    inner: Any = inner_model(model)
    found = inner.config.get("quantization_config")
    if found is None or isinstance(found, PostgenQuantConfig):
        return found
    way = dict(found).get("quant_method", "an unknown way")
    raise UserError(
        f"this {type(inner).__name__} has the format of {way} in its config, which cannot be combined with"
        " quantisation"
    )


def _check_types(overrides: Any, layers: Any, gains: Any, step_bins: Any) -> None:
    if overrides is not None and not isinstance(overrides, Mapping):
        raise UserError(f"overrides must map patterns of layer names to settings, got {shown(overrides)}")
    lists = {"layers": (layers, Mapping), "gains": (gains, str), "step_bins": (step_bins, int | float)}
    for name, (value, kind) in lists.items():
        if value is None and name != "gains":
            continue
        if not isinstance(value, list | tuple) or not all(isinstance(each, kind) for each in value):
            raise UserError(f"{name} of a PostgenQuantConfig must be a list as postgen wrote it, got {shown(value)}")


def _attached_bins(model: nn.Module, layers: Mapping[str, QLinear]) -> StepBins | None:
    found = {id(layer.bins): layer.bins for layer in layers.values() if layer.bins is not None}
    if len(found) > 1:
        raise UserError(f"the layers have {len(found)} sets of bins of the noise level: give them all the same object")
    bins = next(iter(found.values()), None)
    hooks = model._forward_pre_hooks.values()
    if bins is not None and not any(getattr(hook, "__self__", None) is bins for hook in hooks):
        bins.attach(model)
    return bins


def _exact(layer: QLinear, dtype: torch.dtype) -> nn.Linear:
    """Return a linear layer with the weight that a quantised layer represents; it shares the bias."""
    found = bare_linear(layer.effective_weight().to(dtype))
    found.bias = layer.bias
    return found.train(layer.training)


register_quantizer(Method.POSTGEN.value, __name__, PostgenQuantizer.__name__, PostgenQuantConfig.__name__)
