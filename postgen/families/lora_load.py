"""Apply a LoRA file to the components of a pipeline: either everything in the file, or nothing."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from postgen.compat import put_lora
from postgen.errors import UserError, cut

from .lora import networks_of
from .lora_file import LoraFile, open_lora
from .lora_found import Found, families_like, find_layers, network_shapes
from .lora_guard import FIELD, check_mark, is_guarded
from .lora_layers import adapter_settings, adapter_state, shortened
from .lora_names import NAMES, names_of
from .lora_trace import left_out

_SUFFIX = re.compile(r"\.(lora_[AB]|lora[._](up|down)|lora_magnitude_vector|lora_linear_layer)\b.*$")
_OLD = re.compile(r"_lora\.(up|down)\b.*$")
_HALF = re.compile(r"(?:_lora|\.lora|\.lora_linear_layer)\.(up|down)\.weight$")
_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def load_one(pipe: Any, network: str, path: Path, name: str, scale: float, adapters_only: bool) -> None:
    """Load a LoRA file into a network of a pipeline, and into its text encoders if the file changes them.

    Args:
        pipe: the pipeline.
        network: component name of the network.
        path: the file.
        name: name of the new adapter.
        scale: scale of the LoRA. This function uses it for differences that an adapter cannot hold: it adds them to
            the weights. The caller sets the scale of the adapter.
        adapters_only: whether to refuse a file with such differences.

    Raises:
        UserError: the file is for another model, or some of its tensors cannot be applied.
    """
    file = open_lora(path)
    try:
        # If the names of `lora_names` do not cover all keys, diffusers converts the file.
        found = _found(pipe, network, file)
        if rest := [key for part in found.values() for key in part.rest]:
            file = _converted(pipe, file, rest)
            found = _found(pipe, network, file)
        if strange := [layer for part in found.values() for layer in part.strange]:
            total = len(strange) + sum(len(part.layers) for part in found.values())
            raise _misfit(pipe, file, strange, total)
        if rest := [key for part in found.values() for key in part.rest]:
            # diffusers' loader would leave the layers of such keys uninitialised: zeros, or any content of memory.
            raise _unknown(pipe, file, rest, len(file.tensors))
        offsets = [parameter for part in found.values() for parameter in part.offsets]
        if offsets and adapters_only:
            raise UserError(
                f"the LoRA {path} contains differences of norms or tables, which cannot be trained further and saved:"
                f" {shortened(offsets)}"
            )
        # Check every component before the first one changes.
        settings = {part: _settings(pipe, part, file, own, scale) for part, own in found.items()}
        for part, own in found.items():
            _apply(pipe, part, own, settings[part], name, scale)
    except UserError:
        raise
    except Exception as error:  # diffusers, peft and the hub's library raise many types of errors
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"cannot load the LoRA {path}: {text}{_made_for(pipe, file)}") from error


def _found(pipe: Any, network: str, file: LoraFile) -> dict[str, Found]:
    """Return component name -> the changes of the file in this component."""
    found = {}
    for name, part in file.parts(network).items():
        if (module := getattr(pipe, name, None)) is None:
            found[name] = Found(rest=list(part.tensors))
            continue
        names = names_of(module) if name == network else None
        found[name] = find_layers(part, names, network_shapes(module), _parameters(module))
    return found


def _settings(pipe: Any, part: str, file: LoraFile, found: Found, scale: float) -> dict[str, Any] | None:
    """Check the changes of a component and return the `peft.LoraConfig` arguments of its adapter; None: no adapter.

    Raises:
        UserError: the changes cannot be applied.
    """
    layers, module = found.layers, getattr(pipe, part)
    if scale != 1 and any(layer.magnitude is not None for layer in layers.values()):
        raise UserError(
            f"the LoRA {file.path} is DoRA, whose magnitudes cannot be scaled: its scale must be 1, got {scale:g}"
        )
    own = _parameters(module)
    if found.offsets and is_guarded(module):
        raise UserError(
            f"the LoRA {file.path} contains differences of norms, tables or biases, which do not fit the folded"
            f" weights of this {type(module).__name__}: {shortened(list(found.offsets))}"
        )
    for name, offset in found.offsets.items():
        if own[name].shape != offset.shape:
            raise UserError(
                f"the LoRA {file.path} does not fit the model: {name} has the shape {tuple(offset.shape)} in the LoRA"
                f" and {tuple(own[name].shape)} in the model"
            )
        if own[name].is_meta:
            raise UserError(
                f"the LoRA {file.path} changes {name}, which is offloaded: load the model without --offload"
            )
    if not layers:
        return None
    try:
        settings = adapter_settings(layers)
        said = file.settings if part in networks_of(pipe) else file.settings.get(part, {})
        check_mark(module, said)
    except UserError as error:
        raise UserError(f"the LoRA {file.path} cannot be applied: {error}") from None
    # A text such as "all-linear" as target_modules would match more layers.
    kept = {"lora_dropout": float | int, "target_modules": list, FIELD: dict}
    return settings | {key: said[key] for key, kind in kept.items() if isinstance(said.get(key), kind)}


def _apply(pipe: Any, part: str, found: Found, settings: dict[str, Any] | None, name: str, scale: float) -> None:
    """Add an adapter to a component, and add differences to the parameters that an adapter cannot change."""
    module = getattr(pipe, part)
    if settings is not None:
        with warnings.catch_warnings():
            # peft also applies a bias difference to a layer without a bias; it only cannot merge such an adapter.
            warnings.filterwarnings("ignore", message=".*lora_bias=True")
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            # The adapter has exactly the layers of the file, even if other layers have the same last part of the name.
            warnings.filterwarnings("ignore", message="While injecting the PEFT adapters")
            put_lora(pipe, module, adapter_state(found.layers), name, settings)
    own = _parameters(module)
    with torch.no_grad():
        for parameter, offset in found.offsets.items():
            own[parameter].add_((scale * offset.double()).to(own[parameter]))


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module by their names in the model without adapters."""
    return {
        name.replace(".base_layer", ""): value for name, value in module.named_parameters() if ".lora_" not in name
    }


def _converted(pipe: Any, file: LoraFile, rest: list[str]) -> LoraFile:
    """Return the file with its keys converted by diffusers' own conversion.

    Args:
        pipe: the pipeline.
        file: the file.
        rest: the keys that the names of `lora_names` do not cover, for the error message.

    Raises:
        UserError: the conversion fails, drops some of the tensors, or results in layers that the pipeline does not
            have.
    """
    kind = type(pipe)
    if not hasattr(kind, "lora_state_dict"):  # a pipeline that is not in diffusers
        raise _unknown(pipe, file, rest, len(file.tensors), _made_for(pipe, file))
    # The loader of Stable Diffusion XL passes this extra argument to its conversion.
    more = {"unet_config": pipe.unet.config} if hasattr(pipe, "unet") and hasattr(pipe, "text_encoder_2") else {}
    convert = functools.partial(kind.lora_state_dict, **more)
    try:
        out = convert(dict(file.tensors))
        lost = left_out(convert, file.tensors)
    except Exception as error:  # conversions raise many types of errors
        raise _unknown(pipe, file, rest, len(file.tensors), _made_for(pipe, file)) from error
    state, alphas = out if isinstance(out, tuple) else (out, None)
    _check_layers(pipe, file, state)
    if lost:
        raise _unknown(pipe, file, lost, len(file.tensors))
    return dataclasses.replace(file, tensors=_plain(state, alphas or {}))


def _plain(state: dict[str, Any], alphas: dict[str, Any]) -> dict[str, Any]:
    """Return a converted state dict with the newest keys of diffusers, and with the alphas as tensors."""
    tensors = {}
    for key, tensor in state.items():
        half = {"down": "lora_A", "up": "lora_B"}.get(match[1]) if (match := _HALF.search(key)) else None
        tensors[key if half is None else f"{_layer_of(key)}.{half}.weight"] = tensor
    return tensors | {
        f"{_layer_of(key.removesuffix('.alpha'))}.alpha": torch.as_tensor(v) for key, v in alphas.items()
    }


def _check_layers(pipe: Any, file: LoraFile, state: dict[str, Any]) -> None:
    wanted = {_layer_of(key) for key in state if not key.endswith(".alpha")}
    layers = {
        # Newer text encoders of the package transformers have no submodule `text_model`; diffusers then drops it too.
        f"{part}.{name}".replace(".text_model.", ".")
        for part, module in pipe.components.items()
        if hasattr(module, "named_modules")
        # A layer with an adapter is named `<layer>.base_layer` in the module tree.
        for name in (layer.replace(".base_layer", "") for layer, _ in module.named_modules())
    }
    if missing := sorted(name for name in wanted if name.replace(".text_model.", ".") not in layers):
        raise _misfit(pipe, file, missing, len(wanted))


def _layer_of(key: str) -> str:
    """Return the layer name in a key of diffusers, including older forms of keys."""
    if _OLD.search(key):
        layer, _, part = _OLD.sub("", key).replace(".processor", "").rpartition(".")
        own = f"{part}.0" if part == "to_out" else part
        return f"{layer}.{_TEXT.get(part, part) if key.startswith('text_encoder') else own}"
    return _SUFFIX.sub("", key)


def _misfit(pipe: Any, file: LoraFile, missing: list[str], total: int) -> UserError:
    some = ", ".join(cut(name, 160) for name in missing[:3]) + (", ..." if len(missing) > 3 else "")
    return UserError(
        f"the LoRA {file.path} does not fit {type(pipe).__name__}: {total - len(missing)} of its {total} layer names"
        f" match, these match no layer: {some}{_made_for(pipe, file)}"
    )


def _unknown(pipe: Any, file: LoraFile, keys: list[str], total: int, hint: str = "") -> UserError:
    return UserError(
        f"the LoRA {file.path}: {len(keys)} of its {total} tensors cannot be applied to {type(pipe).__name__}:"
        f" {shortened(keys)}{hint}"
    )


def _made_for(pipe: Any, file: LoraFile) -> str:
    """Return a sentence for an error message about the model that the file was made for; "" if it is not known."""
    here = type(pipe).__name__
    if (said := file.note.get("pipeline")) not in (None, here):
        return f". It was made for {said}"
    networks = [type(part).__name__ for part in pipe.components.values()]
    fits = [family for family in families_like(file) if not set(networks) & set(NAMES[family].networks)]
    return f". Its layers are those of {' or '.join(fits)}" if fits else ""
