"""Save a converted transformer, and load it without the one that it was made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import diffusers
from safetensors import SafetensorError
from torch import nn

from postgen.errors import UserError, first_line, shown
from postgen.families.installed import transformers_of
from postgen.families.model_folder import is_hub_id
from postgen.families.own_format import read_note
from postgen.files import check_place, replacing, replacing_all
from postgen.lit.config import LiTConfig
from postgen.lit.conversion import CHILD
from postgen.lit.convert import LOADER, conversion_of, convert
from postgen.reading import read_json
from postgen.tensor_files import opened

if TYPE_CHECKING:
    from torch import Tensor

_CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_WRAPPED = ".base_layer."
"""In the names of weights that an adapter of peft is around."""


def save(transformer: nn.Module, folder: str | Path) -> None:
    """Write a converted transformer: what its `save_pretrained` writes, safetensors and config.json with the spec.

    A pipeline's `save_pretrained` writes the same into its folder of the transformer. diffusers refuses to load it by
    itself ("Unknown quantization type, got postgen.lit.load(folder)"), as it would leave the new layers out. Files of
    an earlier saving are replaced when the new ones are complete; others in the folder stay.

    Args:
        transformer: converted.
        folder: where to.

    Raises:
        UserError: it is not converted, a LoRA is attached, or the folder cannot be written, or is a whole pipeline's.
    """
    conversion_of(transformer)
    place = Path(folder)
    check_place(place, folder=True)
    if (place / "model_index.json").exists():
        raise UserError(f"{place} is a whole pipeline: give the folder of its transformer, {place / 'transformer'}")
    model: Any = next(iter(transformers_of(transformer).values()))
    if any(_WRAPPED in f".{name}" for name in model.state_dict()):
        raise UserError(
            "a LoRA is attached, whose names of weights `load` could not read: save it by itself (save_lora_adapter)"
            " and take it off (unload_lora), or merge it before that (fuse_lora)"
        )
    try:
        _write(model, place)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {place}: {first_line(error)}") from error


def _write(model: Any, place: Path) -> None:
    if not place.is_dir() or not any(place.iterdir()):
        with replacing(place) as part:
            model.save_pretrained(part)
        return
    with TemporaryDirectory(dir=place, prefix=".") as folder:  # there, so that names change and nothing is copied
        made = Path(folder)
        model.save_pretrained(made)
        names = sorted(file.name for file in made.iterdir())
        with replacing_all([place / name for name in names]) as parts:
            for name, part in zip(names, parts, strict=True):
                (made / name).rename(part)
    for old in (*place.glob("diffusion_pytorch_model*.safetensors"), place / _INDEX):
        if old.name not in names:  # parts of an earlier saving, whose list would be read first
            old.unlink(missing_ok=True)


def load(source: str | Path, *, subfolder: str | None = None) -> Any:
    """Load a converted transformer, in evaluation mode on the CPU, with the dtypes that were saved.

    The transformer that it was converted from is not needed.

    Args:
        source: a folder, or a hub id.
        subfolder: of it, as "transformer" in the folder of a pipeline.

    Raises:
        UserError: no such folder, no converted transformer in it, or weights that are not those of its layers.

    Example:
        transformer = postgen.lit.load("out", subfolder="transformer")
        pipe = postgen.pipelines.WanPipeline.from_pretrained("out", transformer=transformer)
    """
    folder = _local(str(source), subfolder)
    config = read_json(folder / _CONFIG, f"{folder / _CONFIG} cannot be read")
    try:
        model = empty(config if isinstance(config, dict) else {})
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    _fill(model, folder)
    return model.eval()


def empty(config: Mapping[str, Any]) -> Any:
    """Build a converted transformer whose weights are still to be given: it has no memory for them, as far as it can.

    Tables of angles, which are no weights, are computed. What began anew is put in the place of layers that are in
    memory, so such a transformer has memory.

    Args:
        config: of a converted transformer, as its config.json has it.

    Raises:
        UserError: it is none of a converted transformer.
    """
    note = read_note(config, LOADER)
    if note is None:
        raise UserError("no transformer that postgen.lit converted: its config says nothing of it")
    settings = LiTConfig.from_json(note)
    name = config.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if kind is None or not hasattr(kind, "from_config"):
        raise UserError(f"diffusers {diffusers.__version__} has no transformer {shown(name)}")
    with no_memory() if settings.inherit == "all" else nullcontext():
        try:
            model = kind.from_config(dict(config))
        except Exception as error:  # a class does with values that it does not know whatever Python does
            raise UserError(
                f"its {_CONFIG} does not make a {name} ({type(error).__name__}: {first_line(error)}): it is damaged,"
                " or of another diffusers"
            ) from error
        convert(model, settings)
    return model


def _local(source: str, subfolder: str | None) -> Path:
    """Return the folder of the transformer, fetched from the hub where that is meant."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if folder.exists() or not is_hub_id(source):
            raise UserError(f"there is no folder {shown(source)} (a hub id has the form owner/name)")
        from huggingface_hub import snapshot_download

        patterns = [f"{subfolder}/{name}" if subfolder else name for name in ("*.json", "*.safetensors")]
        try:
            folder = Path(snapshot_download(source, allow_patterns=patterns))
        except Exception as error:  # every kind of network and hub trouble means the same here
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"there is no folder {source}, and the hub does not give it: {reason}") from error
    folder = folder / subfolder if subfolder else folder
    if not (folder / _CONFIG).is_file():
        inside = [each.parent.name for each in sorted(folder.glob(f"transformer*/{_CONFIG}"))]
        hint = f": give subfolder={inside[0]!r}" if inside else ""
        raise UserError(f"{folder} has no {_CONFIG} of a transformer{hint}")
    return folder


def no_memory() -> AbstractContextManager[Any]:
    """While open, weights of modules that are made have shapes and no memory."""
    from accelerate import init_empty_weights

    context: AbstractContextManager[Any] = init_empty_weights(include_buffers=False)
    return context


def _fill(model: nn.Module, folder: Path) -> None:
    """Give every weight what the files say: none may be missing or left over."""
    files = _files(folder)
    wanted, unknown = dict(model.state_dict()), []
    for path in files:
        with opened(path) as content:
            state: dict[str, Tensor] = {}
            for name in content.keys():  # noqa: SIM118
                tensor = content.get_tensor(name)
                there = wanted.pop(name, None)
                if there is None:
                    unknown.append(name)
                elif there.shape != tensor.shape:
                    raise UserError(
                        f"{path}: {name} has the shape {tuple(tensor.shape)}, the layer takes {tuple(there.shape)}:"
                        " it was saved with other options than its config.json says"
                    )
                elif there.is_floating_point() != tensor.is_floating_point():
                    raise UserError(f"{path}: {name} is {tensor.dtype}, the layer takes {there.dtype}: it is damaged")
                else:
                    # In memory of its own: in a file it begins anywhere, by which products on the CPU round.
                    state[name] = tensor.clone()
            if not unknown:
                model.load_state_dict(state, strict=False, assign=True)
    layers = {name for name in model.state_dict() if f".{CHILD}." in name}
    for problem, names in (("unknown", unknown), ("missing", [*wanted])):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            if any(_WRAPPED in name for name in names):
                more += " (a LoRA was attached when it was saved: take it off or merge it before)"
            elif layers and layers <= {*wanted}:
                more += (
                    " (a stock model, which from_config made of a converted one's config: convert it, or take the mark"
                    " off with postgen.lit.revert, and save it again)"
                )
            raise UserError(f"{folder} is not what its {_CONFIG} says: {problem} weights {names[0]}{more}")


def _files(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX, f"{folder / _INDEX} cannot be read")
        try:
            names = sorted({str(name) for name in index["weight_map"].values()})
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / _INDEX} is no index of weights: it has no weight_map") from error
        if any(Path(name).name != name for name in names):
            raise UserError(f"{folder / _INDEX} names files outside of its folder: {json.dumps(names)[:80]}")
        return [folder / name for name in names]
    return [folder / _WEIGHTS]
