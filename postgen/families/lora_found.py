"""Find the layers in a LoRA file, under the keys of diffusers, peft, ComfyUI or kohya's tools.

Every tensor of a file ends as part of a layer, as an offset of a parameter, or in `Found.rest`: none is dropped but
differences (`.diff`, `.diff_b`) that are zero.
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
    r"\.(?P<end>weight|bias)"  # before it peft's name of the adapter, where a whole model was saved
    r"|\.(?P<kind>lora_magnitude_vector)(?:\.[\w-]+)?(?:\.weight)?"
    r"|\.(?P<own>alpha|dora_scale|diff_b|diff)(?:\.default)?(?:\.weight)?)"
)
_FLAT = re.compile(r"lora_(unet|transformer|te[12]?)_")
_DOWN = ("lora_A", "lora_down", "lora.down")


@dataclass(frozen=True, slots=True)
class Found:
    """What a file changes, by diffusers' names."""

    layers: dict[str, Layer] = field(default_factory=dict)
    offsets: dict[str, Tensor] = field(default_factory=dict)
    """Parameter -> what is added to it, where no low-rank layer can be: norms and tables."""
    rest: list[str] = field(default_factory=list)
    """Keys that nobody knows."""
    strange: list[str] = field(default_factory=list)
    """Layers that the family has and this model has not."""


def find_layers(
    file: LoraFile, names: Names | None, shapes: Mapping[str, tuple[int, ...]] | None = None, parameters: Any = ()
) -> Found:
    """Return what a file changes.

    Args:
        file: the file.
        names: of the family; none reads diffusers' own keys only.
        shapes: layer -> shape of its weight, of the network that the file is for; None where that is not known.
        parameters: names of all parameters of that network.

    Raises:
        UserError: a pair of matrices is not whole or of unequal rank, shapes are not those of the network, a layer
            stands there twice, magnitudes that are of inputs.
    """
    groups, found = _grouped(file, names, shapes, parameters)
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
            raise UserError(f"the LoRA {file.path} does not fit: at {', '.join(members)}, {error}") from None
        for name, piece in zip(members, pieces, strict=True):
            if name in found.layers:
                raise UserError(f"the LoRA {file.path} holds {name} twice, under different keys")
            if piece is not None and _changes(piece):
                found.layers[name] = piece if shapes is None else _shaped(file, name, piece, shapes[name])
    return found


def network_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return layer -> shape of its weight of the layers that LoRA can change, adapters that are there left out."""
    found: dict[str, tuple[int, ...]] = {}
    for name, module in network.named_modules():
        if ".lora_" in name:
            continue
        if isinstance(module, nn.Linear):  # a quantised one may store its weight otherwise
            found[name.removesuffix(".base_layer")] = (module.out_features, module.in_features)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            found[name.removesuffix(".base_layer")] = tuple(module.weight.shape)
    return found


def families_like(file: LoraFile) -> list[str]:
    """Return the families that have all the layers of a file."""
    fits = []
    for family, names in NAMES.items():
        found = _grouped(file, names, None, ())[1]
        if not found.rest:
            fits.append(family)
    return fits


def base_layers(file: LoraFile, keys: Iterable[str] | None = None) -> list[str]:
    """Return the layers that a file, or some of its keys, speak of, by diffusers' or the file's own names."""
    matches = ((key, _KEY.fullmatch(key)) for key in (file.tensors if keys is None else keys))
    return list(dict.fromkeys(PREFIX.sub("", match["base"]) if match else key for key, match in matches))


def _grouped(
    file: LoraFile, names: Names | None, shapes: Mapping[str, tuple[int, ...]] | None, parameters: Any
) -> tuple[dict[tuple[str, ...], dict[str, Tensor]], Found]:
    """Return layer, or the layers that are one there -> kind -> tensor."""
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
            raise UserError(f"the LoRA {file.path} holds {members[0]} twice, under different keys")
        else:
            groups[members][kind] = tensor
    return groups, found


def _changes(layer: Layer) -> bool:
    """Whether a layer changes anything, or can be trained to: one of two zero matrices cannot."""
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
    """Return diffusers' names of a key's layer; none where nobody knows it."""
    base = match["base"]
    if (match_flat := _FLAT.match(base)) is not None:
        rest = base[match_flat.end() :]
        # Newer text encoders of transformers lack the level `text_model`.
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
    """Return one layer of a file, or those that are one there."""
    where = f"the LoRA {file.path}"
    layer: Layer | None = None
    if {"down", "up"} <= parts.keys():
        layer = _pair(file, name, parts)
    elif not {"diff", "diff_b"} & parts.keys() or {"down", "up"} & parts.keys():
        raise UserError(f"{where}: {name} has no pair of LoRA matrices, only {', '.join(parts)}")
    magnitude = _magnitude(where, name, parts, shape)
    if (change := parts.get("diff")) is not None:
        if change.ndim < 2:
            raise UserError(
                f"{where}: the difference of {name} is no change of a layer, it has shape {tuple(change.shape)}"
            )
        whole = full_rank(floating(change))
        layer = whole if layer is None else added(layer, whole)
    if (shift := parts.get("diff_b")) is not None:
        if layer is None:
            if shape is None:
                raise UserError(f"{where}: {name} has a difference of its bias alone, which cannot be converted")
            layer = Layer(torch.zeros(1, *shape[1:]), torch.zeros(len(shift), 1, *(1,) * (len(shape) - 2)))
        shift = floating(shift)
        layer = replace(layer, bias=shift if layer.bias is None else layer.bias + shift)
    assert layer is not None
    if magnitude is not None and ("diff" in parts or layer.bias is not None):
        raise UserError(f"{where}: {name} has DoRA and a difference beside it, which cannot be applied together")
    return replace(layer, magnitude=magnitude)


def _pair(file: LoraFile, name: str, parts: Mapping[str, Tensor]) -> Layer:
    down, up = floating(parts["down"]), floating(parts["up"])
    if down.ndim < 2 or up.ndim < 2 or not 0 < len(down) == up.shape[1]:
        raise UserError(
            f"the LoRA {file.path}: the ranks of {name} differ: its matrices are {tuple(down.shape)} and"
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
        raise UserError(f"the LoRA {file.path}: {name} has rank {rank}, its settings say {said:g}")
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
    # As peft looks them up: the end of a layer's name.
    own = (v for pattern, v in (settings.get(patterns) or {}).items() if re.fullmatch(rf"(.*\.)?({pattern})", name))
    return next(own, otherwise)


def _magnitude(where: str, name: str, parts: Mapping[str, Tensor], shape: tuple[int, ...] | None) -> Tensor | None:
    """Return DoRA's lengths of rows, of peft or of LyCORIS, whose formulas are the same then."""
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
    """Return how many outputs each part of a fused layer has; q, k and v as many as inputs where nothing tells."""
    if shapes is not None:
        return [shapes[name][0] for name in members]
    outs, width = len(layer.up), layer.down.shape[1]
    return [outs // 3] * 3 if len(members) == 3 else [width, width, width, outs - 3 * width]


def _shaped(file: LoraFile, name: str, layer: Layer, shape: tuple[int, ...]) -> Layer:
    """Return a layer with the dimensions of a weight: one of 1 x 1 pixels may be written without them, or with."""
    down, up = layer.down, layer.up
    if down.ndim != len(shape) and down[0, 0].numel() == 1:
        down = down.reshape(*down.shape[:2], *(1,) * (len(shape) - 2))
    if up.ndim != len(shape) and up[0, 0].numel() == 1:
        up = up.reshape(*up.shape[:2], *(1,) * (len(shape) - 2))
    found = (len(up), *down.shape[1:])
    wrong = [len(x) for x in (layer.bias, layer.magnitude) if x is not None and len(x) != shape[0]]
    if found != shape or wrong:
        raise UserError(
            f"the LoRA {file.path} does not fit: {name} is {' x '.join(map(str, found))} in it and"
            f" {' x '.join(map(str, shape))} in the model: it was made for a model of another size"
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
