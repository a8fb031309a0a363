"""Convert a LoRA file to the keys of ComfyUI, of kohya's tools or of diffusers, without changing its effect.

    diffusers  transformer.<diffusers' name>.lora_A.weight, .lora_B.weight, alpha in the metadata  (UNet: unet.)
    comfyui    diffusion_model.<author's name>.lora_A.weight, .lora_B.weight        (Wan, HunyuanVideo, LTX)
               diffusion_model.<author's name>.lora_down.weight, .lora_up.weight, .alpha                 (FLUX)
    kohya      lora_unet_<author's name, dots as underscores>.lora_down.weight, .lora_up.weight, .alpha

"Author" means the authors of the model. `postgen.families.lora_names` has the names of the layers. Where one layer of
the author is several layers of diffusers (for instance q, k and v), their LoRAs become one LoRA whose rank is the sum
of their ranks: A is stacked and B is block-diagonal. The fused weight then changes by exactly the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from postgen.errors import UserError, first_line, shown
from postgen.files import replacing

from .lora_file import PREFIX, SAID, LoraFile, find_loras, open_lora
from .lora_found import base_layers, families_like, find_layers
from .lora_layers import Layer, adapter_settings, adapter_state, folded, fuse, shortened
from .lora_names import NAMES, Names, author_name

Format = Literal["comfyui", "kohya", "diffusers"]
FORMATS: tuple[Format, ...] = get_args(Format)

_OTHER_KEYS = ("diffusion_model.", "lora_unet_")
"""Beginnings of keys with the author's names of the layers."""
_WAN_MLPS = {1536: 8960, 3072: 14336, 5120: 13824}
"""Width of a published Wan model -> outputs of the first layer of its MLPs."""


def export_lora(source: str | Path, target: str | Path, format: Format, family: str | None = None) -> list[str]:
    """Write a LoRA with the keys of another format and return the names of the written layers.

    Args:
        source: a LoRA file in any of the formats, a folder with one such file (a run or its export), or a folder that
            peft wrote.
        target: the output file; the name must end in .safetensors.
        format: comfyui, kohya or diffusers.
        family: a key of `NAMES`; None takes the family from the note beside the LoRA or from the names of its layers.

    Raises:
        UserError: the source cannot be read, the format or family is unknown, the family does not have some of the
            layers, the layers fit several families, or the format cannot hold the file's DoRA magnitudes or
            differences of biases.
    """
    if format not in FORMATS:
        raise UserError(f"format is {format!r}. Allowed: {', '.join(FORMATS)}")
    target = Path(target)
    if target.suffix != ".safetensors":
        raise UserError(f"a LoRA is written as .safetensors, got {target}")
    # The family decides the names of the layers.
    file = open_lora(find_lora(Path(source).expanduser()))
    family = (_noted_family(file) or _guess(file)) if family is None else family
    if family not in NAMES:
        raise UserError(f"unknown family {shown(family)}. Known: {', '.join(NAMES)}")
    names = NAMES[family]
    if format == "kohya" and not names.kohya:
        raise UserError(f"kohya's tools have no keys for {family}: use --format comfyui")
    layers = _layers(file, names, family)
    note: dict[str, Any] = {key: file.note[key] for key in ("pipeline", "network", "outputs") if key in file.note}
    if format == "diffusers":
        _write(target, *_as_diffusers(layers, "unet" if family == "stable_diffusion" else "transformer"), note)
        return list(layers)
    # Programs read DoRA and differences of biases from these formats in different ways, or not at all.
    for what, key in (("DoRA", "magnitude"), ("differences of biases", "bias")):
        if having := [name for name, layer in layers.items() if getattr(layer, key) is not None]:
            raise UserError(
                f"{file.path} has {what}, which programs read in different ways from {format} files:"
                f" {shortened(having)}. Use --format diffusers"
            )
    renamed = rename(layers, names, f"{file.path} as {family}", file.note.get("outputs"))
    if format == "kohya" and names.kohya_whole:
        renamed = whole_blocks(renamed, names, file)
    _write(target, keyed(renamed, names.comfyui if format == "comfyui" else "kohya"), {}, note)
    return list(renamed)


def find_lora(path: Path) -> Path:
    """Return the one LoRA file at a path, a file or a folder.

    Raises:
        UserError: there is no LoRA file, or the folder has one for each of two networks.
    """
    found = find_loras(path)
    if len(found) > 1:
        both = " or ".join(str(file.parent) for file in found.values())
        raise UserError(f"{path} holds a LoRA for each of two networks: give {both}")
    return next(iter(found.values()))


def read_lora(path: Path, names: Names | None = None, family: str | None = None) -> dict[str, Layer]:
    """Return the layers of a LoRA file by diffusers' layer names, without the prefix of the network.

    Args:
        path: the file.
        names: layer names of its family; None reads diffusers' keys only.
        family: name of the family in error messages.

    Raises:
        UserError: the file cannot be read, or some tensors belong to no known layer.
    """
    return _layers(open_lora(path), names, family)


def layers_of(file: LoraFile) -> dict[str, Layer]:
    """Return the layers of a LoRA file, or of one part of it, by diffusers' layer names; all formats are read.

    Raises:
        UserError: some tensors belong to no known layer, or the file has other keys than those of diffusers and peft
            and its family is unknown.
    """
    if not any(key.startswith(_OTHER_KEYS) for key in file.tensors):
        return _layers(file, None, None)
    family = _noted_family(file) or _guess(file)
    return _layers(file, NAMES[family], family)


def rename(
    layers: Mapping[str, Layer], names: Names, place: str, outputs: Mapping[str, int] | None = None
) -> dict[str, Layer]:
    """Return the layers by the author's names, with fused layers where the author has one layer for several.

    Args:
        layers: the layers by diffusers' names.
        names: layer names of the family.
        place: beginning of error messages.
        outputs: known numbers of outputs, by diffusers' layer names with `{}` in place of block numbers.

    Raises:
        UserError: the family has no name for some of the layers.
    """
    renamed: dict[str, Layer] = {}
    fused: dict[str, list[Layer | None]] = {}
    patterns: dict[str, str] = {}
    missed = []
    for name, layer in layers.items():
        found = author_name(name, names)
        if found is None:
            missed.append(name)
        elif found.pattern not in names.fused:
            renamed[found.theirs] = layer
        else:
            patterns[found.theirs] = found.pattern
            fused.setdefault(found.theirs, [None] * len(names.fused[found.pattern]))[found.part] = layer
    if missed:
        raise UserError(_unnamed(place, missed, len(layers)))
    for theirs, parts in fused.items():
        renamed[theirs] = fuse(parts, _rows(parts, names.fused[patterns[theirs]], outputs or {}))
    return renamed


def whole_blocks(layers: Mapping[str, Layer], names: Names, file: LoraFile) -> dict[str, Layer]:
    """Add zero layers for the missing layers of every block, because diffusers reads all layers of a block or none.

    Args:
        layers: the layers by the author's names.
        names: layer names of the family.
        file: the file that the layers come from.

    Raises:
        UserError: a layer is outside the blocks, or the size of a missing layer is unknown.
    """
    # diffusers looks for the layers of image keys only if the file has some of them.
    whole = dict.fromkeys(names.kohya_whole)
    if any("cross_attn.k_img" in name or "cross_attn.v_img" in name for name in layers):
        whole |= {"cross_attn.k_img": None, "cross_attn.v_img": None}
    inside = {name: name.split(".", 2) for name in layers if name.startswith("blocks.")}
    if outside := [name for name in layers if name not in inside or inside[name][2] not in whole]:
        raise UserError(
            f"{file.path}: kohya's tools only know layers inside the blocks, not {shortened(outside)}: use --format"
            " comfyui"
        )
    count = 1 + max(int(number) for _, number, _ in inside.values())
    filled = dict(layers)
    for name in (f"blocks.{number}.{part}" for number in range(count) for part in whole):
        if name not in filled:
            outs, ins = _wan_shape(name.split(".", 2)[2], layers, file)
            like = next(iter(layers.values())).down
            filled[name] = Layer(like.new_zeros(1, ins), like.new_zeros(outs, 1))
    return filled


def keyed(layers: Mapping[str, Layer], style: Literal["peft", "alpha", "kohya", "diffusers"]) -> dict[str, Tensor]:
    """Return the tensors of a LoRA file by key, in one of the styles of `Names.comfyui`."""
    tensors: dict[str, Tensor] = {}
    prefix = {"diffusers": "transformer.", "kohya": "lora_unet_"}.get(style, "diffusion_model.")
    for name, layer in layers.items():
        key = prefix + (name.replace(".", "_") if style == "kohya" else name)
        if style in ("peft", "diffusers"):
            # These keys have no alpha, so the scale is multiplied into the matrices.
            down, up = folded(layer)
            tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        else:
            tensors |= {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": layer.up}
            tensors[f"{key}.alpha"] = torch.tensor(layer.scale * layer.rank)
    return tensors


def _layers(file: LoraFile, names: Names | None, family: str | None) -> dict[str, Layer]:
    found = find_layers(file, names)
    if found.rest:
        place = f"{file.path} as {family}" if family else str(file.path)
        bases = base_layers(file, found.rest)
        raise UserError(_unnamed(place, bases, len(base_layers(file))))
    if not found.layers:
        raise UserError(f"{file.path} changes no layer: there is nothing to convert")
    return found.layers


def _unnamed(place: str, missed: list[str], total: int) -> str:
    some = ", ".join(missed[:3]) + (", ..." if len(missed) > 3 else "")
    return f"{place}: {len(missed)} of {total} layers are unknown: {some}"


def _rows(parts: list[Layer | None], members: tuple[str, ...], outputs: Mapping[str, int]) -> list[int]:
    """Return the number of outputs of each part of a fused layer.

    For a missing part the number comes from `outputs`, or else from the usual ratios to the width of the model.
    """
    known = next(part for part in parts if part is not None)
    width = known.down.shape[1]  # q, k and v have as many outputs as inputs: the width of the hidden states
    usual = [width, width, width, 4 * width]
    rows = zip(parts, members, usual, strict=False)
    return [len(part.up) if part is not None else outputs.get(mine, otherwise) for part, mine, otherwise in rows]


def _wan_shape(part: str, layers: Mapping[str, Layer], file: LoraFile) -> tuple[int, int]:
    """Return (outputs, inputs) of a layer of Wan's blocks, derived from the layers in the file."""
    for name, layer in layers.items():
        if name.endswith(f".{part}"):
            return len(layer.up), layer.down.shape[1]
    name, layer = next(iter(layers.items()))
    width = len(layer.up) if name.endswith("ffn.2") else layer.down.shape[1]
    if not part.startswith("ffn"):
        return width, width
    others = [each for key, each in layers.items() if ".ffn." in key]
    said = file.note.get("outputs", {}).get("blocks.{}.ffn.net.0.proj", _WAN_MLPS.get(width))
    inner = max((*others[0].down.shape[1:2], len(others[0].up))) if others else said
    if inner is None:
        raise UserError(
            f"{file.path}: diffusers reads kohya's keys of Wan only if the MLPs have keys too, and their width is"
            f" unknown for a model of width {width}: convert the folder of the run, whose lora.json contains it"
        )
    return (inner, width) if part == "ffn.0" else (width, inner)


def _as_diffusers(layers: Mapping[str, Layer], part: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file, in the form that diffusers writes."""
    tensors = {f"{part}.{key}": value for key, value in adapter_state(layers).items()}
    settings = {f"{part}.{key}": value for key, value in adapter_settings(layers).items()}
    return tensors, {"lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True)}


def _noted_family(file: LoraFile) -> str | None:
    if (pipeline := file.note.get("pipeline")) is None:
        return None
    for family, names in NAMES.items():
        if pipeline in names.pipelines:
            return family
    known = ", ".join(pipeline for names in NAMES.values() for pipeline in names.pipelines)
    raise UserError(f"the LoRA keys of {pipeline} in other formats are unknown. Known: {known}")


def _guess(file: LoraFile) -> str:
    fits = families_like(file)
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise UserError(f"the layers of {file.path} fit {' and '.join(fits)}: choose one with --family")
    first = next(iter(base_layers(file)), next(iter(file.tensors)))
    raise UserError(
        f"the layers of {file.path} fit no family, the first is {PREFIX.sub('', first)}. Known: {', '.join(NAMES)};"
        " with --family, the error lists the layers that the family does not have"
    )


def _write(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], note: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    said = {SAID: json.dumps(note)} if note else {}
    try:
        with replacing(target) as part:
            save_file(whole, part, metadata={"format": "pt", **metadata, **said})
    except Exception as error:  # on a full disk safetensors raises its own error type, not OSError
        raise UserError(f"cannot write {target}: {getattr(error, 'strerror', None) or first_line(error)}") from error
