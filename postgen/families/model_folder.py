"""The small files of a model folder, read and checked: what they cannot mean is said before any weights are read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgen.errors import UserError, is_number, shown
from postgen.families.exports import NOTE
from postgen.families.own_format import noted_words
from postgen.families.video_calls import RANGES
from postgen.families.wan_sizes import multiples
from postgen.reading import check_name, read_json

DTYPES = ("auto", "float32", "bfloat16", "float16")

_NETWORKS = ("transformer", "transformer_2", "unet", "vae")
_WHOLE = ("width", "height", "num_frames", "num_inference_steps")
_LARGEST_SCALE = 1024
"""Of an autoencoder or a patch, in one direction."""
_LARGEST = 2**31
"""Of any number of a configuration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """What a call uses where the user says nothing. None leaves it to the pipeline.

    A model folder may carry its own in `postgen.json`, under these names.
    """

    width: int | None = None
    """Pixels."""
    height: int | None = None
    """Pixels."""
    num_frames: int | None = None
    """Frames of the clip."""
    num_inference_steps: int | None = None
    """Denoising steps."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance."""
    fps: float = 8.0
    """Frames per second of the written video, of which a network is told that is conditioned on them."""
    dtype: str | None = None
    """Number type that `auto` stands for, whatever the device."""


def is_hub_id(model: str | Path) -> bool:
    """Whether a model is not on this machine and may be on the hub, where names have the form owner/name."""
    name = str(model)
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def small_files(model: str) -> tuple[Path, str]:
    """Return a folder with the model's JSON files, and what to load it by.

    Raises:
        UserError: no such folder, and the hub gives none.
    """
    check_name(model, f"the model {shown(model)}")
    local = Path(model).expanduser()
    if local.is_dir():
        return local, str(local.resolve())
    if local.exists():
        raise UserError(f"{model} is a file: a model is a folder with a model_index.json, or a hub id")
    if not is_hub_id(model):
        raise UserError(f"there is no model folder {model} (a hub id has the form owner/name)")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["model_index.json", "postgen.json", NOTE, "*/config.json", "scheduler/scheduler_config.json"]
        return Path(snapshot_download(model, allow_patterns=patterns)), model
    except Exception as error:  # every kind of network and hub trouble means the same here
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"there is no model folder {model}, and the hub does not give it: {reason}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file.

    Raises:
        UserError: it cannot be read, or is no object.
    """
    content = read_json(path, f"cannot read {path}")
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: expected a JSON object")
    return content


def optional(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; nothing where there is none."""
    return read_object(path) if path.exists() else {}


def read_index(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the content of a `model_index.json`, and the class of the pipeline that it names.

    Raises:
        UserError: it cannot be read, names no class, or an entry of a network is none.
    """
    path = folder / "model_index.json"
    index = read_object(path)
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or not pipeline:
        raise UserError(f"{path} does not name a pipeline class")
    for name in _NETWORKS:
        if name in index:
            _check_entry(path, name, index[name])
            _check_class(folder, name, index[name][1])
    return index, pipeline


def _check_entry(path: Path, name: str, entry: Any) -> None:
    """An entry is such as `["diffusers", "WanTransformer3DModel"]`; an absent one is [null, null]."""
    if isinstance(entry, list) and entry == [None, None]:
        return
    if not (isinstance(entry, list) and len(entry) == 2 and entry[0] == "diffusers" and isinstance(entry[1], str)):
        raise UserError(
            f'{path}: {name} is {shown(entry)}, it must be ["diffusers", CLASS], or [null, null] where there is none'
        )


def _check_class(folder: Path, name: str, kind: str | None) -> None:
    """Another class than the configuration is of would read what it knows of it, and leave the rest as it likes."""
    path = folder / name / "config.json"
    said = optional(path).get("_class_name", kind) if kind is not None else None
    if name.startswith("transformer") and said != kind:
        raise UserError(f"{path} is of a {shown(said)}, model_index.json beside it says {kind}: one of them is wrong")


def check_configs(folder: Path) -> None:
    """Look at what the configurations of the networks of a folder say, before their classes are made of it.

    A number that its class cannot have ends deep in there, if at all: the first call finds a word for an epsilon.

    Args:
        folder: a pipeline's; a hub's snapshot as well.

    Raises:
        UserError: a class that diffusers lacks, or a value of another kind than its default has.
    """
    import diffusers

    for name in _NETWORKS:
        path = folder / name / "config.json"
        config = optional(path)
        kind = getattr(diffusers, str(config.get("_class_name")), None)
        if not config or kind is None:
            continue
        if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
            raise UserError(f"{path}: _class_name is {shown(config['_class_name'])}, which is no network of diffusers")
        for field in inspect.signature(kind.__init__).parameters.values():
            # Others take lists, or nothing, as well; classes are written with and without postponed annotations.
            if config.get(field.name) is not None and field.annotation in (int, float, "int", "float"):
                _check_value(path, field.name, config[field.name], field.default)


def _check_value(path: Path, name: str, value: Any, default: Any) -> None:
    """Hold a number to the kind that its default has, and a count to at least 1."""
    if not is_number(default):
        return
    count = name.startswith("num_") or name.endswith(("dim", "channels"))
    least = 1 if count and default > 0 else -_LARGEST
    whole = isinstance(default, int)
    if not (is_number(value) and least <= value <= _LARGEST and (not whole or value == int(value))):
        told = f"a {'whole ' if whole else ''}number{' of at least 1' if least == 1 else ''}, as {default} is"
        raise UserError(f"{path}: {name} is {shown(value)}, it must be {told}")


def class_of(index: Mapping[str, Any], *names: str) -> str | None:
    """Return the class of the first of some networks that a `model_index.json` has; None where it has none."""
    return next((index[name][1] for name in names if name in index and index[name][1] is not None), None)


def own_defaults(path: Path) -> dict[str, Any]:
    """Return what a `postgen.json` says of the fields of `Defaults`; nothing where there is none.

    Raises:
        UserError: it is damaged.
    """
    return own_words(path)[0]


def own_words(path: Path) -> tuple[dict[str, Any], tuple[str, ...], bool]:
    """What a folder says of itself: defaults of a call, example prompts of a closed vocabulary, image-to-video too.

    Args:
        path: its `postgen.json`. Where there is none, as in a folder that `pipe.save_pretrained` wrote, what networks
            of ours know of the one that they were loaded from.

    Raises:
        UserError: it cannot be read, or an entry is none.
    """
    own = optional(path) if path.exists() else noted_words(path.parent)
    if not isinstance(own, dict):
        raise UserError(f"{path.parent}: a network there says {shown(own)} for {path.name}, it must be an object")
    own = dict(own)
    examples = own.pop("closed_vocabulary", [])
    if not isinstance(examples, list) or not all(isinstance(text, str) for text in examples):
        raise UserError(f"{path}: closed_vocabulary must be a list of example prompts, got {shown(examples)}")
    continues = own.pop("image_to_video", False)
    if not isinstance(continues, bool):
        raise UserError(f"{path}: image_to_video must be true or false, got {shown(continues)}")
    known = Defaults.__dataclass_fields__
    for name, value in own.items():
        if name not in known or not _fits(name, value):
            raise UserError(f"{path}: bad entry {name}={shown(value)}. Known: {', '.join(known)}")
    return own, tuple(examples), continues


def _fits(name: str, value: Any) -> bool:
    if name == "dtype":
        return isinstance(value, str) and value in DTYPES
    least, most = RANGES[name]
    return is_number(value) and least <= value <= most and (name not in _WHOLE or isinstance(value, int))


def wan_multiples(folder: Path) -> tuple[int, int, int]:
    """Return what height, width and frames - 1 of a Wan pipeline must divide by.

    Raises:
        UserError: a configuration is missing, or says what no such model has.
    """
    vae_path = folder / "vae" / "config.json"
    vae = read_object(vae_path)
    transformer = next((name for name in ("transformer", "transformer_2") if (folder / name).is_dir()), "transformer")
    path = folder / transformer / "config.json"
    patch = read_object(path).get("patch_size", (1, 2, 2))
    if not (isinstance(patch, list | tuple) and len(patch) == 3 and all(map(_is_scale, patch))):
        raise UserError(f"{path}: patch_size is {shown(patch)}, it must be three whole numbers of at least 1")
    scales = [vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)]
    for name, value in zip(("scale_factor_spatial", "scale_factor_temporal"), scales, strict=True):
        if not _is_scale(value):
            raise UserError(f"{vae_path}: {name} is {shown(value)}, it must be a whole number of at least 1")
    return multiples(scales[0], scales[1], patch)


def _is_scale(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST_SCALE
