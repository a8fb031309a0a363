"""Find the layers in a LoRA file with the keys of diffusers, peft, ComfyUI or kohya's tools.

Every tensor of a file becomes part of a layer or an offset of a parameter, or its key or layer is listed in
`Found.rest` or `Found.strange`. Only differences (`.diff`, `.diff_b`) that are zero are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError

from .lora import LARGEST
from .lora_file import PREFIX, LoraFile, floating
from .lora_layers import Layer, added, full_rank, split
from .lora_names import NAMES, Names, author_name, own_names

_KEY = re.compile(
    r"(?P<base>.+?)(?:"
    r"(?P<old>_)?(?:(?<=_)|\.)(?P<half>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.[\w-]+)?"
    r"\.(?P<end>weight|bias)"  # peft's adapter name precedes it in a file with the state dict of a whole model
    r"|\.(?P<kind>lora_magnitude_vector)(?:\.[\w-]+)?(?:\.weight)?"
    r"|\.(?P<own>alpha|dora_scale|diff_b|diff)(?:\.default)?(?:\.weight)?)"
)
_FLAT = re.compile(r"lora_(unet|transformer|te[12]?)_")
_DOWN = ("lora_A", "lora_down", "lora.down")


@dataclass(frozen=True, slots=True)
class Found:
    """The changes in a LoRA file, by diffusers' layer names."""

    layers: dict[str, Layer] = field(default_factory=dict)
    """Layer name -> low-rank change of its weight."""
    offsets: dict[str, Tensor] = field(default_factory=dict)
    """Parameter name -> tensor to add to it, for parameters that cannot have a low-rank layer: norms and tables."""
    rest: list[str] = field(default_factory=list)
    """Keys that belong to no known layer."""
    strange: list[str] = field(default_factory=list)
    """Layers that exist in the family, but not in this model."""


def find_layers(
    file: LoraFile, names: Names | None, shapes: Mapping[str, tuple[int, ...]] | None = None, parameters: Any = ()
) -> Found:
    """Return the changes in a LoRA file by diffusers' layer names.

    Args:
        file: the file.
        names: layer names of the family; None reads diffusers' keys only.
        shapes: layer name -> shape of its weight in the network that the file is for; None if the network is unknown.
        parameters: names of all parameters of that network.

    Raises:
        UserError: a pair of matrices is incomplete or has unequal ranks, shapes differ from those of the network, a
            layer appears twice, or DoRA magnitudes belong to inputs instead of outputs.
    """
    groups, found = _grouped(file, names, shapes, parameters)
    # A group is one layer of the file; `members` are the diffusers layers that it consists of.
    for members, parts in groups.items():
        parts = {kind: tensor for kind, tensor in parts.items() if kind not in ("diff", "diff_b") or tensor.any()}
        if not parts:
            continue
        if shapes is not None and members[0] not in shapes:
            _offsets(members[0], parts, found, parameters)
            continue
        layer = _layer(file, members[0], parts, None if shapes is None else shapes[members[0]])
        rows = _rows(layer, members, shapes)
        try:
            pieces = [layer] if len(members) == 1 else split(layer, rows)
        except ValueError as error:
            raise UserError(f"the LoRA {file.path} does not fit the model: {', '.join(members)}: {error}") from None
        for name, piece in zip(members, pieces, strict=True):
            if name in found.layers:
                raise UserError(f"the LoRA {file.path} contains {name} twice, under different keys")
            if piece is not None and _changes(piece):
                found.layers[name] = piece if shapes is None else _shaped(file, name, piece, shapes[name])
    return found


def network_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return layer name -> shape of its weight for all layers that LoRA can change, without layers of adapters."""
    found: dict[str, tuple[int, ...]] = {}
    for name, module in network.named_modules():
        if ".lora_" in name:
            continue
        if isinstance(module, nn.Linear):  # a quantised layer may store its weight in another shape
            found[name.removesuffix(".base_layer")] = (module.out_features, module.in_features)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            found[name.removesuffix(".base_layer")] = tuple(module.weight.shape)
    return found


def families_like(file: LoraFile) -> list[str]:
    """Return the families that have names for all layers of a file."""
    fits = []
    for family, names in NAMES.items():
        found = _grouped(file, names, None, ())[1]
        if not found.rest:
            fits.append(family)
    return fits


def base_layers(file: LoraFile, keys: Iterable[str] | None = None) -> list[str]:
    """Return the layer names in all or some keys of a file, spelled as in the file, without prefixes."""
    matches = ((key, _KEY.fullmatch(key)) for key in (file.tensors if keys is None else keys))
    return list(dict.fromkeys(PREFIX.sub("", match["base"]) if match else key for key, match in matches))


def _grouped(
    file: LoraFile, names: Names | None, shapes: Mapping[str, tuple[int, ...]] | None, parameters: Any
) -> tuple[dict[tuple[str, ...], dict[str, Tensor]], Found]:
    """Group the tensors of a file by layer.

    Returns:
        diffusers' names of the layer (several names for a fused layer) -> kind of tensor -> tensor; and a `Found` with
        `rest` and `strange` filled in.
    """
    groups: dict[tuple[str, ...], dict[str, Tensor]] = {}
    found = Found()
    own = None if shapes is None else {*shapes, *parameters, *(name.rpartition(".")[0] for name in parameters)}
    flat = {name.replace(".", "_"): name for name in own or ()}
    for key, tensor in file.tensors.items():
        match = _KEY.fullmatch(key)
        kind = "" if match is None else _kind(match)
        if kind.startswith("diff") and not tensor.any():
            continue
        members = _members(match, names, own, flat) if match is not None and kind else ()
        if not members:
            found.rest.append(key)
        elif own is not None and not own.issuperset(members):
            found.strange.extend(name for name in members if name not in own and name not in found.strange)
        elif kind in groups.setdefault(members, {}):
            raise UserError(f"the LoRA {file.path} contains {members[0]} twice, under different keys")
        else:
            groups[members][kind] = tensor
    return groups, found


def _changes(layer: Layer) -> bool:
    """Whether a layer changes anything or can be trained: a pair of two zero matrices has zero gradients."""
    parts = (layer.down, layer.up, *(x for x in (layer.bias, layer.magnitude) if x is not None))
    return any(bool(part.any()) for part in parts)


def _kind(match: re.Match[str]) -> str:
    if match["half"] is None:
        return str(match["kind"] or match["own"])
    half = "down" if match["half"] in _DOWN else "up"
    return half if match["end"] == "weight" else {"up": "bias"}.get(half, "")


def _members(
    match: re.Match[str], names: Names | None, own: set[str] | None, flat: Mapping[str, str]
) -> tuple[str, ...]:
    """Return diffusers' names of the layer in a key, several for a fused layer; empty if the layer is unknown."""
    base = match["base"]
    if (match_flat := _FLAT.match(base)) is not None:
        rest = base[match_flat.end() :]
        # Newer text encoders of the package transformers do not have the submodule `text_model`.
        if found := flat.get(rest, flat.get(rest.removeprefix("text_model_"))):
            return (found,)
        return () if names is None else own_names(rest, names, underscored=True)
    rest = PREFIX.sub("", base.removeprefix("diffusion_model."))
    if match["old"]:  # older UNets: attn1.processor.to_q_lora.down.weight
        rest = re.sub(r"\.to_out$", ".to_out.0", rest.replace(".processor", ""))
    if own is not None and (known := {rest, rest.removeprefix("text_model.")} & own):
        return (known.pop(),)
    if own is None and (names is None or author_name(rest, names) is not None):
        return (rest,)
    return () if names is None else own_names(rest, names)


def _layer(file: LoraFile, name: str, parts: dict[str, Tensor], shape: tuple[int, ...] | None) -> Layer:
    """Return one layer of a file, from its tensors by kind. A fused layer stays fused."""
    where = f"the LoRA {file.path}"
    layer: Layer | None = None
    if {"down", "up"} <= parts.keys():
        layer = _pair(file, name, parts)
    elif not {"diff", "diff_b"} & parts.keys() or {"down", "up"} & parts.keys():
        raise UserError(f"{where}: {name} has no complete pair of LoRA matrices, only {', '.join(parts)}")
    magnitude = _magnitude(where, name, parts, shape)
    if (change := parts.get("diff")) is not None:
        if change.ndim < 2:
            raise UserError(
                f"{where}: the difference of {name} has shape {tuple(change.shape)}, which no weight of a layer has"
            )
        whole = full_rank(floating(change))
        layer = whole if layer is None else added(layer, whole)
    if (shift := parts.get("diff_b")) is not None:
        if layer is None:
            if shape is None:
                raise UserError(f"{where}: {name} has only a difference of its bias, which cannot be converted")
            layer = Layer(torch.zeros(1, *shape[1:]), torch.zeros(len(shift), 1, *(1,) * (len(shape) - 2)))
        shift = floating(shift)
        layer = replace(layer, bias=shift if layer.bias is None else layer.bias + shift)
    assert layer is not None
    if magnitude is not None and ("diff" in parts or layer.bias is not None):
        raise UserError(f"{where}: {name} has both DoRA and a difference, which cannot be applied together")
    return replace(layer, magnitude=magnitude)


def _pair(file: LoraFile, name: str, parts: Mapping[str, Tensor]) -> Layer:
    down, up = floating(parts["down"]), floating(parts["up"])
    if down.ndim < 2 or up.ndim < 2 or not 0 < len(down) == up.shape[1]:
        raise UserError(
            f"the LoRA {file.path}: the ranks of {name} differ: its matrices have the shapes {tuple(down.shape)} and"
            f" {tuple(up.shape)}"
        )
    scale = _scale(file, name, len(down), parts.get("alpha"))
    bias = None if "bias" not in parts else floating(parts["bias"]) * scale
    if scale == 0:
        return Layer(down, torch.zeros_like(up), bias=bias)
    return Layer(down, up, scale, bias)


def _scale(file: LoraFile, name: str, rank: int, alpha: Tensor | None) -> float:
    if alpha is not None:
        if alpha.numel() != 1:
            raise UserError(
                f"the LoRA {file.path}: alpha of {name} has shape {tuple(alpha.shape)}, it must be a number"
            )
        return _bounded(file, name, float(alpha.item()) / rank)
    settings = file.settings
    said = _of(settings, "rank_pattern", name, settings.get("r", rank))
    if "r" in settings and said != rank:
        raise UserError(f"the LoRA {file.path}: {name} has rank {rank}, but its settings have rank {said:g}")
    if "lora_alpha" not in settings:
        return 1.0
    value = float(_of(settings, "alpha_pattern", name, settings["lora_alpha"]))
    return _bounded(file, name, value / rank**0.5 if settings.get("use_rslora") else value / rank)


def _bounded(file: LoraFile, name: str, scale: float) -> float:
    if abs(scale) > LARGEST:
        raise UserError(
            f"the LoRA {file.path} is damaged: the alpha of {name} is {scale:g} times its rank, at most {LARGEST:g} is"
            " allowed"
        )
    return scale


def _of(settings: Mapping[str, Any], patterns: str, name: str, otherwise: Any) -> Any:
    # As in peft, a pattern matches the end of a layer's name.
    own = (v for pattern, v in (settings.get(patterns) or {}).items() if re.fullmatch(rf"(.*\.)?({pattern})", name))
    return next(own, otherwise)


def _magnitude(where: str, name: str, parts: Mapping[str, Tensor], shape: tuple[int, ...] | None) -> Tensor | None:
    """Return the DoRA magnitudes (out,) of a layer, or None; for magnitudes of outputs, peft and LyCORIS agree."""
    kinds = [kind for kind in ("lora_magnitude_vector", "dora_scale") if kind in parts]
    if not kinds:
        return None
    value, outs = floating(parts[kinds[0]]), len(parts["up"]) if "up" in parts else (shape or (0,))[0]
    of_rows = len(value) == outs if kinds[0] == "dora_scale" else True
    if len(kinds) > 1 or not of_rows or value.numel() != outs:
        raise UserError(
            f"{where}: {', '.join(kinds)} of {name} has shape {tuple(value.shape)}: only DoRA with a magnitude for"
            f" each of the {outs} outputs can be applied"
        )
    return value.flatten()


def _rows(layer: Layer, members: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]] | None) -> list[int]:
    """Return the number of outputs of each part of a fused layer.

    Without the shapes of a network: three equal parts, or q, k and v with as many outputs as inputs, and an MLP.
    """
    if shapes is not None:
        return [shapes[name][0] for name in members]
    outs, width = len(layer.up), layer.down.shape[1]
    return [outs // 3] * 3 if len(members) == 3 else [width, width, width, outs - 3 * width]


def _shaped(file: LoraFile, name: str, layer: Layer, shape: tuple[int, ...]) -> Layer:
    """Return a layer whose matrices have the dimensions of a weight: files may omit or add kernel sizes of 1 x 1."""
    down, up = layer.down, layer.up
    if down.ndim != len(shape) and down[0, 0].numel() == 1:
        down = down.reshape(*down.shape[:2], *(1,) * (len(shape) - 2))
    if up.ndim != len(shape) and up[0, 0].numel() == 1:
        up = up.reshape(*up.shape[:2], *(1,) * (len(shape) - 2))
    found = (len(up), *down.shape[1:])
    wrong = [len(x) for x in (layer.bias, layer.magnitude) if x is not None and len(x) != shape[0]]
    if found != shape or wrong:
        raise UserError(
            f"the LoRA {file.path} does not fit the model: {name} is {' x '.join(map(str, found))} in the LoRA and"
            f" {' x '.join(map(str, shape))} in the model: the LoRA was made for a model of another size"
        )
    return replace(layer, down=down, up=up)


def _offsets(name: str, parts: Mapping[str, Tensor], found: Found, parameters: Any) -> None:
    for kind, tensor in parts.items():
        ending = {"diff": "weight", "diff_b": "bias"}.get(kind, "")
        parameter = name if kind == "diff" and name in parameters else f"{name}.{ending}"
        if parameter in parameters:
            found.offsets[parameter] = floating(tensor)
        else:
            found.rest.append(f"{name}.{kind}")
