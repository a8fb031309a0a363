"""Write a LoRA under the keys of ComfyUI, of kohya's tools or of diffusers; the changed weights stay the same.

    diffusers  transformer.<diffusers' name>.lora_A.weight, .lora_B.weight, alpha in the metadata  (unet. of a UNet)
    comfyui    diffusion_model.<author's name>.lora_A.weight, .lora_B.weight        (Wan, HunyuanVideo, LTX)
               diffusion_model.<author's name>.lora_down.weight, .lora_up.weight, .alpha                 (FLUX)
    kohya      lora_unet_<author's name, dots as underscores>.lora_down.weight, .lora_up.weight, .alpha

What the layers are called is in `postgen.families.lora_names`. Where the author's layer holds several of diffusers'
(q, k and v in one), theirs become one LoRA of the sum of their ranks: A is stacked, B is block-diagonal, which changes
the fused weight by exactly what the parts change theirs.
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

_WAN_MLPS = {1536: 8960, 3072: 14336, 5120: 13824}
"""Width of Wan -> outputs of the first layer of its MLPs, of the models that are published."""


def export_lora(source: str | Path, target: str | Path, format: Format, family: str | None = None) -> list[str]:
    """Write a LoRA under other keys and return the names of the layers written.

    Args:
        source: a LoRA file under any of the keys, a folder with one (an export of a run, or the run's folder), or a
            folder that peft has written.
        target: the file to write; it ends in .safetensors.
        format: comfyui, kohya or diffusers.
        family: a key of `NAMES`; none finds it from the note beside the LoRA, or from the names of its layers.

    Raises:
        UserError: nothing to read, an unknown format or family, layers that the family does not have or whose names
            fit several families, what the format has no place for (DoRA, differences of biases).
    """
    if format not in FORMATS:
        raise UserError(f"format is {format!r}. Allowed: {', '.join(FORMATS)}")
    target = Path(target)
    if target.suffix != ".safetensors":
        raise UserError(f"a LoRA is written as .safetensors, got {target}")
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
    for what, key in (("DoRA", "magnitude"), ("differences of biases", "bias")):
        if having := [name for name, layer in layers.items() if getattr(layer, key) is not None]:
            raise UserError(
                f"{file.path} has {what}, for which {format} has no place that is read alike everywhere:"
                f" {shortened(having)}. Use --format diffusers"
            )
    renamed = rename(layers, names, f"{file.path} as {family}", file.note.get("outputs"))
    if format == "kohya" and names.kohya_whole:
        renamed = whole_blocks(renamed, names, file)
    _write(target, keyed(renamed, names.comfyui if format == "comfyui" else "kohya"), {}, note)
    return list(renamed)


def find_lora(path: Path) -> Path:
    """Return the LoRA file that a path means.

    Raises:
        UserError: there is none, or there are two.
    """
    found = find_loras(path)
    if len(found) > 1:
        both = " or ".join(str(file.parent) for file in found.values())
        raise UserError(f"{path} holds a LoRA of each of two networks: give {both}")
    return next(iter(found.values()))


def read_lora(path: Path, names: Names | None = None, family: str | None = None) -> dict[str, Layer]:
    """Return the layers of a LoRA by diffusers' names, without the name of the network.

    Args:
        path: of the file.
        names: of its family; none reads diffusers' own keys.
        family: what the family is called in errors.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    return _layers(open_lora(path), names, family)


def rename(
    layers: Mapping[str, Layer], names: Names, place: str, outputs: Mapping[str, int] | None = None
) -> dict[str, Layer]:
    """Return the layers by the author's names.

    Args:
        layers: by diffusers' names.
        names: of the family.
        place: what errors begin with.
        outputs: of layers, by diffusers' names with `{}` for the numbers, where they are known.

    Raises:
        UserError: some match none of the family's.
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
    """Add layers that change nothing, so that diffusers finds all of the blocks' layers that it looks for.

    Args:
        layers: by the author's names.
        names: of the family.
        file: where they are from.

    Raises:
        UserError: a layer that is in no block, or the size of a missing layer is not known.
    """
    whole = dict.fromkeys(names.kohya_whole)
    if any("cross_attn.k_img" in name or "cross_attn.v_img" in name for name in layers):
        whole |= {"cross_attn.k_img": None, "cross_attn.v_img": None}
    inside = {name: name.split(".", 2) for name in layers if name.startswith("blocks.")}
    if outside := [name for name in layers if name not in inside or inside[name][2] not in whole]:
        raise UserError(
            f"{file.path}: kohya's tools know layers of the blocks alone, not {shortened(outside)}: use --format"
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
    """Return the tensors of a file; the styles are those of `Names.comfyui`."""
    tensors: dict[str, Tensor] = {}
    prefix = {"diffusers": "transformer.", "kohya": "lora_unet_"}.get(style, "diffusion_model.")
    for name, layer in layers.items():
        key = prefix + (name.replace(".", "_") if style == "kohya" else name)
        if style in ("peft", "diffusers"):
            # Nothing says that these are scaled.
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
        raise UserError(f"{file.path} changes no layer: there is nothing to write")
    return found.layers


def _unnamed(place: str, missed: list[str], total: int) -> str:
    some = ", ".join(missed[:3]) + (", ..." if len(missed) > 3 else "")
    return f"{place}: {len(missed)} of {total} layers have no name there: {some}"


def _rows(parts: list[Layer | None], members: tuple[str, ...], outputs: Mapping[str, int]) -> list[int]:
    """Return the outputs of each part of a fused layer; of parts that are not there as said, or as usual."""
    known = next(part for part in parts if part is not None)
    width = known.down.shape[1]  # what q, k and v, which read the hidden states, give as well
    usual = [width, width, width, 4 * width]
    rows = zip(parts, members, usual, strict=False)
    return [len(part.up) if part is not None else outputs.get(mine, otherwise) for part, mine, otherwise in rows]


def _wan_shape(part: str, layers: Mapping[str, Layer], file: LoraFile) -> tuple[int, int]:
    """Return outputs and inputs of a layer of Wan's blocks, from those that are there."""
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
            f"{file.path}: diffusers reads kohya's keys of Wan only where the MLPs have some too, and how wide they"
            f" are is not known for a width of {width}: convert the folder of the run, whose lora.json says so"
        )
    return (inner, width) if part == "ffn.0" else (width, inner)


def _as_diffusers(layers: Mapping[str, Layer], part: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file as diffusers writes it."""
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
    raise UserError(f"nothing is known of the keys of {pipeline} outside diffusers. Known: {known}")


def _guess(file: LoraFile) -> str:
    fits = families_like(file)
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise UserError(f"the layers of {file.path} fit {' and '.join(fits)}: say which with --family")
    first = next(iter(base_layers(file)), next(iter(file.tensors)))
    raise UserError(
        f"the layers of {file.path} fit no family, the first is {PREFIX.sub('', first)}. Known: {', '.join(NAMES)};"
        " --family says which of its layers have no name there"
    )


def _write(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], note: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    said = {SAID: json.dumps(note)} if note else {}
    try:
        with replacing(target) as part:
            save_file(whole, part, metadata={"format": "pt", **metadata, **said})
    except Exception as error:  # a full disk is the writer's own error
        raise UserError(f"cannot write {target}: {getattr(error, 'strerror', None) or first_line(error)}") from error
