"""Save a converted transformer, and load it without the stock transformer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn

from postgen.errors import UserError, first_line, shown
from postgen.families.empty import network_from
from postgen.families.installed import transformers_of
from postgen.families.model_folder import is_hub_id
from postgen.families.own_format import read_note
from postgen.files import check_place, replacing, replacing_all
from postgen.lit.config import LitConfig
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
"""Part of the name of a weight inside a PEFT layer."""


def save(transformer: nn.Module, folder: str | Path) -> None:
    """Write a converted transformer to a folder: safetensors, and config.json with the settings of the conversion.

    The files are those of `save_pretrained`; `save_pretrained` of a pipeline writes the same files into its
    transformer folder. Plain diffusers refuses to load them ("Unknown quantization type, got
    postgen.lit.load(folder)"), because it would ignore the new layers. Files of an earlier `save` are replaced once
    the new files are complete. Other files in the folder stay.

    Args:
        transformer: the converted transformer.
        folder: the folder to write.

    Raises:
        UserError: the transformer is not converted, a LoRA is attached, the folder cannot be written, or the folder
            contains a whole pipeline.
    """
    conversion_of(transformer)
    place = Path(folder)
    check_place(place, folder=True)
    if (place / "model_index.json").exists():
        raise UserError(
            f"{place} contains a whole pipeline, and this would write a transformer over it: use the folder of its"
            f" transformer, {place / 'transformer'}"
        )
    model: Any = next(iter(transformers_of(transformer).values()))
    if any(_WRAPPED in f".{name}" for name in model.state_dict()):
        raise UserError(
            "a LoRA is attached, and a saved converted transformer cannot hold it: save the LoRA separately"
            " (save_lora_adapter) and remove it (unload_lora); call fuse_lora before unload_lora to keep its effect"
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
    with TemporaryDirectory(dir=place, prefix=".") as folder:  # on the same disk, so files are renamed, not copied
        made = Path(folder)
        model.save_pretrained(made)
        names = sorted(file.name for file in made.iterdir())
        with replacing_all([place / name for name in names]) as parts:
            for name, part in zip(names, parts, strict=True):
                (made / name).rename(part)
    for old in (*place.glob("diffusion_pytorch_model*.safetensors"), place / _INDEX):
        if old.name not in names:  # shards of an earlier save; loaders would read their index first
            old.unlink(missing_ok=True)


def load(source: str | Path, *, subfolder: str | None = None) -> Any:
    """Load a converted transformer, in evaluation mode on the CPU, with the saved dtypes.

    The stock transformer is not needed.

    Args:
        source: a folder, or a hub id.
        subfolder: sub-folder of the source, such as "transformer" for the folder of a pipeline.

    Raises:
        UserError: the folder does not exist or holds no converted transformer, or its weights do not fit its config.

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
    """Create a converted transformer with weights on the meta device, which take no memory.

    Buffers, such as tables of rotary angles, are computed. With `inherit="output"` the weights do take memory, because
    the new projections replace layers that must be in memory.

    Args:
        config: the content of the config.json of a converted transformer.

    Raises:
        UserError: the config is not that of a converted transformer.
    """
    note = read_note(config, LOADER)
    if note is None:
        raise UserError(
            "this is not a transformer that postgen.lit converted: its config has no entry of a conversion"
        )
    settings = LitConfig.from_json(note)
    with no_memory() if settings.inherit == "all" else nullcontext():
        model = network_from(config)
        convert(model, settings)
    return model


def _local(source: str, subfolder: str | None) -> Path:
    """Return the local folder of the transformer; a hub id is downloaded."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if folder.exists() or not is_hub_id(source):
            raise UserError(f"there is no folder {shown(source)}, and this is no hub id (owner/name)")
        from huggingface_hub import snapshot_download

        patterns = [f"{subfolder}/{name}" if subfolder else name for name in ("*.json", "*.safetensors")]
        try:
            folder = Path(snapshot_download(source, allow_patterns=patterns))
        except Exception as error:  # any network or hub error has the same consequence here
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"there is no folder {source}, and the download from the hub failed: {reason}") from error
    folder = folder / subfolder if subfolder else folder
    if not (folder / _CONFIG).is_file():
        inside = [each.parent.name for each in sorted(folder.glob(f"transformer*/{_CONFIG}"))]
        hint = f": set subfolder={inside[0]!r}" if inside else ""
        raise UserError(f"{folder} has no {_CONFIG} of a transformer{hint}")
    return folder


def no_memory() -> AbstractContextManager[Any]:
    """Return a context in which new modules have their weights on the meta device, without memory."""
    from accelerate import init_empty_weights

    context: AbstractContextManager[Any] = init_empty_weights(include_buffers=False)
    return context


def _fill(model: nn.Module, folder: Path) -> None:
    """Load every weight from the files of a folder; no weight may be missing or left over."""
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
                        f"{path}: {name} has the shape {tuple(tensor.shape)}, the layer needs {tuple(there.shape)}:"
                        " the weights and the options in config.json do not belong together"
                    )
                elif there.is_floating_point() != tensor.is_floating_point():
                    raise UserError(
                        f"{path}: {name} is {tensor.dtype}, but the layer needs {there.dtype}: the file is damaged"
                    )
                else:
                    # Cloned: tensors in the mapped file have arbitrary alignment, which changes rounding on the CPU.
                    state[name] = tensor.clone()
            if not unknown:
                model.load_state_dict(state, strict=False, assign=True)
    layers = {name for name in model.state_dict() if f".{CHILD}." in name}
    for problem, names in (("unknown", unknown), ("missing", [*wanted])):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            if any(_WRAPPED in name for name in names):
                more += " (a LoRA was attached when the model was saved: save again with the LoRA removed or merged)"
            elif layers and layers <= {*wanted}:
                more += (
                    " (these are weights of a stock model that from_config created from the config of a converted one:"
                    " call postgen.lit.convert on that model, or postgen.lit.revert to clean its config, and save it"
                    " again)"
                )
            raise UserError(f"the weights in {folder} do not fit its {_CONFIG}: {problem} weights {names[0]}{more}")


def _files(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX, f"{folder / _INDEX} cannot be read")
        try:
            names = sorted({str(name) for name in index["weight_map"].values()})
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / _INDEX} is not an index of weights: it has no valid weight_map") from error
        if any(Path(name).name != name for name in names):
            raise UserError(f"{folder / _INDEX} names files outside its folder: {json.dumps(names)[:80]}")
        return [folder / name for name in names]
    return [folder / _WEIGHTS]
