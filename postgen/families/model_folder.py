"""Read and check the small files of a model folder, so that errors in them are found before weights are read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgen.assets import EMBEDDED, model_folder
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
"""Largest accepted scale factor of an autoencoder, or patch size, along one axis."""
_LARGEST = 2**31
"""Largest accepted number in a config file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """Values of the settings that the user does not give. None: the pipeline's own default.

    The `postgen.json` of a model folder may contain its own values under these names.
    """

    width: int | None = None
    """Width in pixels."""
    height: int | None = None
    """Height in pixels."""
    num_frames: int | None = None
    """Number of frames of the clip."""
    num_inference_steps: int | None = None
    """Number of denoising steps."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance."""
    fps: float = 8.0
    """Frames per second of the written video. A network that is conditioned on the frame rate receives it too."""
    dtype: str | None = None
    """The dtype that `--dtype auto` means, on every device."""


def is_hub_id(model: str | Path) -> bool:
    """Whether a model name has the form of a hub id (owner/name) and is not a path on this machine."""
    name = str(model)
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def small_files(model: str) -> tuple[Path, str]:
    """Find the JSON files of a model; those of a model on the hub are downloaded.

    Args:
        model: a local folder, a hub id, or `embedded` for the embedded model.

    Returns:
        A local folder with the JSON files, and the folder or hub id to load the model from.

    Raises:
        UserError: there is no such folder, and the download from the hub fails.
    """
    check_name(model, f"the model {shown(model)}")
    local = model_folder(model).expanduser()
    if local.is_dir():
        return local, str(local.resolve())
    if local.exists():
        raise UserError(f"{model} is a file: give a model folder with a model_index.json, or a hub id")
    if not is_hub_id(model):
        raise UserError(
            f"there is no model folder {model}: give a folder, a hub id (owner/name), or {EMBEDDED} for the embedded"
            " model"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = ["model_index.json", "postgen.json", NOTE, "*/config.json", "scheduler/scheduler_config.json"]
        return Path(snapshot_download(model, allow_patterns=patterns)), model
    except Exception as error:  # any error of the network or the hub means that the model cannot be read
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"there is no model folder {model}, and it cannot be read from the hub: {reason}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file.

    Raises:
        UserError: the file cannot be read, or its content is not an object.
    """
    content = read_json(path, f"cannot read {path}")
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: expected a JSON object")
    return content


def optional(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; an empty dict if the file does not exist."""
    return read_object(path) if path.exists() else {}


def read_index(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the content of a `model_index.json`, and the name of the pipeline class in it.

    Raises:
        UserError: the file cannot be read, names no pipeline class, or the entry of a network is invalid.
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
    """Refuse an entry that is neither like `["diffusers", "WanTransformer3DModel"]` nor [null, null] for none."""
    if isinstance(entry, list) and entry == [None, None]:
        return
    if not (isinstance(entry, list) and len(entry) == 2 and entry[0] == "diffusers" and isinstance(entry[1], str)):
        raise UserError(
            f'{path}: {name} is {shown(entry)}, it must be ["diffusers", CLASS], or [null, null] for no network'
        )


def _check_class(folder: Path, name: str, kind: str | None) -> None:
    """Refuse a class that differs from the class in the network's own config.

    diffusers would load such a network silently: the class ignores unknown entries and uses defaults for missing ones.
    """
    path = folder / name / "config.json"
    said = optional(path).get("_class_name", kind) if kind is not None else None
    if name.startswith("transformer") and said != kind:
        raise UserError(
            f"{path} is the config of a {shown(said)}, but model_index.json names a {kind}: correct one of them"
        )


def check_configs(folder: Path) -> None:
    """Check the values in the configs of a pipeline's networks before diffusers builds the networks.

    Without this check, an invalid value fails deep inside a library, or only in the first forward pass: for instance a
    text in place of an epsilon.

    Args:
        folder: the folder of a pipeline, or its snapshot from the hub.

    Raises:
        UserError: a class is not a network of diffusers, or a value has another type than its default, or is out of
            range.
    """
    import diffusers

    for name in _NETWORKS:
        path = folder / name / "config.json"
        config = optional(path)
        kind = getattr(diffusers, str(config.get("_class_name")), None)
        if not config or kind is None:
            continue
        if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
            raise UserError(f"{path}: _class_name is {shown(config['_class_name'])}, which is not a diffusers network")
        for field in inspect.signature(kind.__init__).parameters.values():
            # Only plain numbers are checked: other annotations also allow lists or None. An annotation is a text in
            # modules with postponed annotations.
            if config.get(field.name) is not None and field.annotation in (int, float, "int", "float"):
                _check_value(path, field.name, config[field.name], field.default)


def _check_value(path: Path, name: str, value: Any, default: Any) -> None:
    """Refuse a value that is not a number of the same type as its default, and a count below 1."""
    if not is_number(default):
        return
    count = name.startswith("num_") or name.endswith(("dim", "channels"))
    least = 1 if count and default > 0 else -_LARGEST
    whole = isinstance(default, int)
    if not (is_number(value) and least <= value <= _LARGEST and (not whole or value == int(value))):
        told = f"a {'whole ' if whole else ''}number{' of at least 1' if least == 1 else ''}, as {default} is"
        raise UserError(f"{path}: {name} is {shown(value)}, it must be {told}")


def class_of(index: Mapping[str, Any], *names: str) -> str | None:
    """Return the class name of the first of the named networks that is in a `model_index.json`; None if none is."""
    return next((index[name][1] for name in names if name in index and index[name][1] is not None), None)


def own_defaults(path: Path) -> dict[str, Any]:
    """Return the fields of `Defaults` in a `postgen.json`; see `own_words`.

    Raises:
        UserError: the file is damaged.
    """
    return own_words(path)[0]


def own_words(path: Path) -> tuple[dict[str, Any], tuple[str, ...], bool]:
    """Return the content of the `postgen.json` of a model folder.

    Args:
        path: the file. If it does not exist, as in a folder that `pipe.save_pretrained` wrote, the content comes from
            the config of a transformer with postgen's layers, which keeps the `postgen.json` of the folder from which
            it was loaded. Without such a config the content is empty.

    Returns:
        The fields of `Defaults`; example prompts of a tokenizer with a fixed list of words (`closed_vocabulary`); and
        whether the model also continues a first frame (`image_to_video`).

    Raises:
        UserError: the file cannot be read, or an entry is invalid.
    """
    own = optional(path) if path.exists() else noted_words(path.parent)
    if not isinstance(own, dict):
        raise UserError(
            f"{path.parent}: the config of a network in it has {shown(own)} as {path.name}, it must be an object"
        )
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
            raise UserError(f"{path}: invalid entry {name}={shown(value)}. Known: {', '.join(known)}")
    return own, tuple(examples), continues


def _fits(name: str, value: Any) -> bool:
    if name == "dtype":
        return isinstance(value, str) and value in DTYPES
    least, most = RANGES[name]
    return is_number(value) and least <= value <= most and (name not in _WHOLE or isinstance(value, int))


def wan_multiples(folder: Path) -> tuple[int, int, int]:
    """Return the numbers of which height, width and frames - 1 of a Wan pipeline must be multiples.

    Raises:
        UserError: a config is missing or invalid.
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
