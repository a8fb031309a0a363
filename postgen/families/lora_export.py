"""Write a LoRA of diffusers or peft under the keys of ComfyUI or of kohya's tools; the changed weights stay the same.

    comfyui    diffusion_model.<author's name>.lora_A.weight, .lora_B.weight        (Wan, HunyuanVideo, LTX)
               diffusion_model.<author's name>.lora_down.weight, .lora_up.weight, .alpha                 (FLUX)
    kohya      lora_unet_<author's name, dots as underscores>.lora_down.weight, .lora_up.weight, .alpha

What the layers are called is in `postgen.families.lora_names`. Where the author's layer holds several of diffusers'
(q, k and v in one), theirs become one LoRA of the sum of their ranks: A is stacked, B is block-diagonal, which changes
the fused weight by exactly what the parts change theirs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.files import replacing
from postgen.tensor_files import opened, read_tensors

from .lora import WEIGHTS
from .lora_names import NAMES, Names

Format = Literal["comfyui", "kohya"]
FORMATS: tuple[Format, ...] = get_args(Format)
NOTE = "lora.json"
"""Beside a LoRA that we wrote: `pipeline`, the class of its base model."""

_PEFT_WEIGHTS, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_KEY = re.compile(r"(.+?)\.(lora_A|lora_B|lora\.down|lora\.up)(?:\.default)?\.weight|(.+)\.(alpha)")
_SHARES = {3: (1, 1, 1), 4: (1, 1, 1, 4)}
"""Outputs of the parts of a fused layer, relative to one another: q, k, v, and the first layer of an MLP."""
_PREFIX = re.compile(r"^(base_model\.model\.|transformer\.|unet\.)+")


@dataclass(frozen=True, slots=True)
class Layer:
    """A low-rank change of one weight: scale * up @ down."""

    down: Tensor
    """(r, in, ...)"""
    up: Tensor
    """(out, r, ...)"""
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return len(self.down)


def export_lora(source: str | Path, target: str | Path, format: Format, family: str | None = None) -> list[str]:
    """Write a LoRA under other keys and return the names of the layers written.

    Args:
        source: a LoRA file of diffusers, a folder with one (an export of a run, or the run's folder), or a folder that
            peft has written.
        target: the file to write; it ends in .safetensors.
        format: comfyui or kohya.
        family: a key of `NAMES`; none finds it from the note beside the LoRA, or from the names of its layers.

    Raises:
        UserError: nothing to read, an unknown format or family, layers that the family does not have or whose names
            fit several families, DoRA.
    """
    if format not in FORMATS:
        raise UserError(f"format is {format!r}. Allowed: {', '.join(FORMATS)}")
    target = Path(target)
    if target.suffix != ".safetensors":
        raise UserError(f"a LoRA is written as .safetensors, got {target}")
    path = find_lora(Path(source).expanduser())
    layers = read_lora(path)
    family = family or _noted_family(path) or _guess(layers, path)
    if family not in NAMES:
        raise UserError(f"unknown family {family!r}. Known: {', '.join(NAMES)}")
    if format == "kohya" and not NAMES[family].kohya:
        raise UserError(f"kohya's tools have no keys for {family}: use --format comfyui")
    renamed = rename(layers, NAMES[family], f"{path} as {family}")
    _write(target, keyed(renamed, NAMES[family].comfyui if format == "comfyui" else "kohya"))
    return list(renamed)


def find_lora(path: Path) -> Path:
    """Return the LoRA file that a path means.

    Raises:
        UserError: there is none, or there are two.
    """
    if path.is_file():
        return path
    places = (path, path / "export")
    for found in (folder / name for folder in places for name in (WEIGHTS, _PEFT_WEIGHTS)):
        if found.is_file():
            return found
    for folder in places:
        experts = [found.parent for found in sorted(folder.glob(f"transformer*/{WEIGHTS}"))]
        if experts:
            raise UserError(f"{folder} holds a LoRA of each of two networks: give {' or '.join(map(str, experts))}")
        if any(folder.glob("*/config.json")):
            raise UserError(f"{folder} holds a whole model and no LoRA: there is nothing to convert")
    raise UserError(f"there is no LoRA at {path}: give a .safetensors file, or a folder with {WEIGHTS}")


def read_lora(path: Path) -> dict[str, Layer]:
    """Return the layers of a LoRA of diffusers or peft by diffusers' names, without the name of the network.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    said = f"cannot read the LoRA {path}"
    tensors = read_tensors(path, said)
    with opened(path, said) as content:
        metadata = content.metadata() or {}
    try:
        settings = _settings(path, metadata)
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{said}: {error}") from error
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or key.startswith("text_encoder"):
            raise UserError(f"{path} holds {key}, which is no plain LoRA of a denoiser: it cannot be converted")
        part = {"lora.down": "lora_A", "lora.up": "lora_B"}.get(match[2], match[2] or "alpha")
        found.setdefault(_PREFIX.sub("", match[1] or match[3]), {})[part] = tensor
    whole = {name: parts for name, parts in found.items() if {"lora_A", "lora_B"} <= parts.keys()}
    if len(whole) < len(found) or not whole:
        raise UserError(f"{path}: {next((n for n in found if n not in whole), 'it')} has no pair of LoRA matrices")
    return {
        name: Layer(parts["lora_A"], parts["lora_B"], _scale(name, parts, settings)) for name, parts in whole.items()
    }


def rename(layers: Mapping[str, Layer], names: Names, place: str) -> dict[str, Layer]:
    """Return the layers by the author's names.

    Raises:
        UserError: some match none of the family's.
    """
    renamed: dict[str, Layer] = {}
    fused: dict[str, list[Layer | None]] = {}
    missed = []
    for name, layer in layers.items():
        found = _author_name(name, names)
        if found is None:
            missed.append(name)
        elif found[1] not in names.fused:
            renamed[found[0]] = layer
        else:
            theirs, pattern, part = found
            fused.setdefault(theirs, [None] * len(names.fused[pattern]))[part] = layer
    if missed:
        some = ", ".join(missed[:3]) + (", ..." if len(missed) > 3 else "")
        raise UserError(f"{place}: {len(missed)} of {len(layers)} layers have no name there: {some}")
    return renamed | {name: fuse(parts, _SHARES[len(parts)]) for name, parts in fused.items()}


def fuse(parts: Sequence[Layer | None], shares: Sequence[int]) -> Layer:
    """Return one layer whose outputs are those of the parts one after another; a part that is None changes nothing.

    Args:
        parts: at least one is there.
        shares: outputs of each, relative to one another.
    """
    known = [(part, share) for part, share in zip(parts, shares, strict=True) if part is not None]
    unit = len(known[0][0].up) // known[0][1]
    up = known[0][0].up.new_zeros(unit * sum(shares), sum(part.rank for part, _ in known))
    row = column = 0
    for part, share in zip(parts, shares, strict=True):
        if part is not None:
            up[row : row + unit * share, column : column + part.rank] = part.up * part.scale
            column += part.rank
        row += unit * share
    return Layer(torch.cat([part.down for part, _ in known]), up)


def keyed(layers: Mapping[str, Layer], style: Literal["peft", "alpha", "kohya", "diffusers"]) -> dict[str, Tensor]:
    """Return the tensors of a file; the styles are those of `Names.comfyui`."""
    tensors: dict[str, Tensor] = {}
    prefix = {"diffusers": "transformer.", "kohya": "lora_unet_"}.get(style, "diffusion_model.")
    for name, layer in layers.items():
        key = prefix + (name.replace(".", "_") if style == "kohya" else name)
        if style in ("peft", "diffusers"):
            # Nothing says that these are scaled.
            tensors |= {f"{key}.lora_A.weight": layer.down, f"{key}.lora_B.weight": layer.up * layer.scale}
        else:
            tensors |= {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": layer.up}
            tensors[f"{key}.alpha"] = torch.tensor(layer.scale * layer.rank, dtype=layer.down.dtype)
    return tensors


def _author_name(name: str, names: Names) -> tuple[str, str, int] | None:
    """Return the author's name of a layer, its pattern, and which part of that layer this is."""
    rows = [
        *((mine, mine, 0) for mine in names.unchanged),
        *((mine, theirs, 0) for mine, theirs in names.plain.items()),
        *((mine, theirs, place) for theirs, members in names.fused.items() for place, mine in enumerate(members)),
    ]
    for mine, theirs, place in rows:
        if (match := re.fullmatch(re.escape(mine).replace(r"\{\}", r"(\d+)"), name)) is not None:
            return theirs.format(*match.groups()), theirs, place
    return None


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what peft was told, from the file itself or from the configuration beside it."""
    if path.name == _PEFT_WEIGHTS and (path.parent / _PEFT_CONFIG).is_file():
        settings: dict[str, Any] = json.loads((path.parent / _PEFT_CONFIG).read_text(encoding="utf-8"))
    else:
        packed = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        settings = {_PREFIX.sub("", key): value for key, value in packed.items()}
    if settings.get("use_dora"):
        raise UserError(f"{path} is DoRA, whose magnitudes have no place in a LoRA: merge it into the model instead")
    return settings


def _scale(name: str, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> float:
    """Return the factor of a layer: alpha / rank; without any alpha it is 1, as for diffusers."""
    rank = len(parts["lora_A"])
    if "alpha" in parts:
        return parts["alpha"].item() / rank
    if "lora_alpha" not in settings:
        return 1.0
    alphas: Mapping[str, float] = settings.get("alpha_pattern") or {}
    # As peft looks them up: the end of a layer's name.
    own = (alpha for pattern, alpha in alphas.items() if re.fullmatch(rf"(.*\.)?({pattern})", name))
    alpha = float(next(own, settings["lora_alpha"]))
    return alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank


def _noted_family(path: Path) -> str | None:
    try:
        pipeline = json.loads((path.parent / NOTE).read_text(encoding="utf-8"))["pipeline"]
    except FileNotFoundError:
        return None
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path.parent / NOTE} cannot be read: {error}. Give --family") from error
    for family, names in NAMES.items():
        if pipeline in names.pipelines:
            return family
    known = ", ".join(pipeline for names in NAMES.values() for pipeline in names.pipelines)
    raise UserError(f"nothing is known of the keys of {pipeline} outside diffusers. Known: {known}")


def _guess(layers: Mapping[str, Layer], path: Path) -> str:
    fits = [family for family, names in NAMES.items() if all(_author_name(name, names) is not None for name in layers)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise UserError(f"the layers of {path} fit {' and '.join(fits)}: say which with --family")
    raise UserError(
        f"the layers of {path} fit no family, the first is {next(iter(layers))}. Known: {', '.join(NAMES)}; --family "
        "says which of its layers have no name there"
    )


def _write(target: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(target) as part:
            save_file(whole, part, metadata={"format": "pt"})
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
