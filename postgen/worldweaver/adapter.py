"""Save and load a trained model as a small folder: the two widened layers, the level embedder and the LoRA.

worldweaver.json                   modalities, fingerprint of the base model, settings of the trainer
worldweaver.safetensors            the whole first and last layer (their RGB part is trained too), the level embedder
pytorch_lora_weights.safetensors   the LoRA in the format of diffusers, if there is one
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from postgen.errors import UserError, shown
from postgen.families.installed import installed, transformers_of
from postgen.families.lora import save_lora
from postgen.families.lora_file import WEIGHTS
from postgen.families.lora_load import load_one
from postgen.files import check_place, replacing
from postgen.reading import read_json
from postgen.tensor_files import read_tensors
from postgen.worldweaver.base import Base, base_of
from postgen.worldweaver.embedding import LevelEmbedder
from postgen.worldweaver.latent_scale import checked_scale
from postgen.worldweaver.levels import MODALITIES, Modality
from postgen.worldweaver.widen import NAME, Widened, forget_widening, transformer_of, widen_transformer, widened

CONFIG = "worldweaver.json"
LAYERS = "worldweaver.safetensors"
EMBEDDER = "level_embedder"
_OF_EMBEDDER = f"{EMBEDDER}."
LORA = "worldweaver"
"""Name under which the LoRA of an adapter is loaded."""
SCALE = "latent_scale"
_FIELDS = {"modalities": list, "placed": bool, "base": dict, "level_embedder": dict, "lora": bool, "settings": dict}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedAdapter:
    """Contents of an adapter that are not weights of the transformer."""

    embedder: LevelEmbedder
    modalities: tuple[Modality, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings that were given to `save_adapter`, and also `latent_scale` if the model has one."""


def save_adapter(
    target: Any,
    folder: str | Path,
    embedder: LevelEmbedder | None = None,
    *,
    lora: str | None = None,
    weights: Mapping[str, Mapping[str, Tensor]] | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the trained weights to a folder. An existing folder is replaced only when the new one is complete.

    Args:
        target: a pipeline with a widened transformer, or a widened transformer without LoRA.
        folder: folder to write.
        embedder: the level embedder; None: the component `level_embedder` of the pipeline.
        lora: name of the PEFT adapter; None: the only LoRA on the transformer.
        weights: complete weights to write instead of those in the modules (EMA weights, gathered shards), by
            component ("transformer" or "level_embedder") and parameter name.
        settings: JSON values to save with the weights.
        dtype: dtype to write; None: the dtype of each tensor.

    Raises:
        UserError: the transformer is not widened, there is no level embedder, the LoRA is ambiguous, or the folder
            cannot be written.
    """
    place = Path(folder)
    check_place(place, folder=True)
    model, wide = transformer_of(target), widened(target)
    embedder = embedder if embedder is not None else getattr(target, EMBEDDER, None)
    if embedder is None:
        raise UserError("no level embedder: give embedder, or a pipeline with the component level_embedder")
    adapter = _lora_name(target, model, lora)
    given = weights or {}
    # Weights: the two layers and the level embedder.
    tensors = _layers(model, wide, given.get("transformer", {}))
    tensors |= {f"{EMBEDDER}.{name}": value for name, value in given.get(EMBEDDER, embedder.state_dict()).items()}
    tensors = {name: _written(value, dtype) for name, value in tensors.items()}
    # Description: what is needed to check the base model and to rebuild the embedder.
    said = dict(settings or {})
    if wide.latent_scale is not None:
        said[SCALE] = list(wide.latent_scale)
    note = {
        "modalities": list(wide.modalities),
        "placed": wide.placed,
        "base": base_of(model, wide).to_json(),
        "level_embedder": {name: value for name, value in embedder.config.items() if not name.startswith("_")},
        "lora": adapter is not None,
        "settings": said,
    }
    with replacing(place) as part:
        part.mkdir()
        save_file(tensors, part / LAYERS)
        if adapter is not None:
            state = given.get("transformer", model.state_dict())
            state = {name: _written(value, dtype) for name, value in state.items() if "lora_" in name}
            save_lora(target, part, _component(target, model), model, adapter, state)
        (part / CONFIG).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


def load_adapter(target: Any, folder: str | Path) -> LoadedAdapter:
    """Load an adapter into its base model. A stock transformer is widened first. An error leaves the model unchanged.

    If the pipeline has a component `level_embedder`, that component is replaced by the embedder of the adapter.

    Args:
        target: a pipeline, or a transformer for an adapter without LoRA. The transformer is stock, or widened with the
            same modalities.
        folder: folder that `save_adapter` wrote.

    Raises:
        UserError: the folder is no adapter, is damaged, or belongs to another model; or the transformer already has
            a LoRA.
    """
    place, model = Path(folder).expanduser(), transformer_of(target)
    note = _read_note(place)
    modalities = tuple(note["modalities"])
    # Adapters of older versions have no scale. Their scale is 1.
    scale = note["settings"].get(SCALE)
    if scale is not None:
        scale = checked_scale(scale, len(modalities), f"the adapter {place} is damaged: {SCALE}")
    there: Widened | None = installed(model).plug_ins.get(NAME)
    grows = len(modalities) > 1 or note["placed"]
    fresh = there is None or not (there.aux or there.placed)
    wide = None if fresh else widened(model, modalities)
    if wide is not None and wide.placed != note["placed"]:
        raise UserError(
            f"the adapter {place} is for a model {'with' if note['placed'] else 'without'} placed memory: widen the"
            f" transformer with placed={note['placed']}"
        )
    Base.from_json(note["base"], place).check(model, wide, place)
    _check_lora(target, model, note, place)
    tensors = read_tensors(place / LAYERS, f"the adapter {place} cannot be read")
    embedder = _embedder(note[EMBEDDER], tensors, place, len(modalities))
    if fresh and grows:
        widen_transformer(model, modalities[1:], placed=note["placed"])
    try:
        wide = widened(model, modalities)
        parts = _parts(model, wide)
        _check_tensors(tensors, parts, place)
        if note["lora"]:
            load_one(target, _component(target, model), place / WEIGHTS, LORA, 1.0, True)
    except BaseException:
        if fresh:
            forget_widening(model)
        raise
    for name, parameter in parts.items():
        parameter.data.copy_(tensors[name])
    wide.latent_scale = scale
    wide.driven_by(embedder, note["settings"])
    embedder.to(next(model.parameters()).device).eval()
    if EMBEDDER in getattr(target, "components", {}):
        target.register_modules(**{EMBEDDER: embedder})
    return LoadedAdapter(embedder=embedder, modalities=modalities, settings=note["settings"])


def carried_adapter(target: Any, aux: Sequence[Modality] = ("depth",)) -> LoadedAdapter:
    """Return the adapter that a transformer carries, or else an untrained level embedder.

    Args:
        target: a pipeline, or a transformer. A stock transformer is widened.
        aux: modalities to add to a stock transformer; () keeps RGB only.

    Raises:
        UserError: as in `widen_transformer`.
    """
    model = transformer_of(target)
    stock = NAME not in installed(model).plug_ins
    if stock and aux:
        widen_transformer(model, aux)
    wide = widened(model, MODALITIES[:1] if stock and not aux else None)
    embedder: Any = wide.embedder
    if embedder is None:
        # A fixed seed: every process makes the same embedder, so that a state recognises the model.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # seeds only the CPU; fork_rng does not restore GPU generators
            embedder = LevelEmbedder.for_transformer(model)
        wide.driven_by(embedder)
    embedder.to(next(model.parameters()).device)
    return LoadedAdapter(embedder=embedder, modalities=wide.modalities, settings=dict(wide.settings))


def _parts(model: nn.Module, wide: Widened) -> dict[str, nn.Parameter]:
    """Return the parameters of the first and last layer by their names in the transformer."""
    names = (wide.widths.first, wide.widths.last)
    return {f"{name}.{own}": value for name in names for own, value in model.get_submodule(name).named_parameters()}


def _layers(model: nn.Module, wide: Widened, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: given.get(name, value) for name, value in _parts(model, wide).items()}


def _written(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()


def _component(target: Any, model: nn.Module) -> str:
    return next(name for name, each in transformers_of(target).items() if each is model)


def _lora_name(target: Any, model: Any, name: str | None) -> str | None:
    """Return the name of the LoRA to write; None: there is no LoRA."""
    names = [*(getattr(model, "peft_config", None) or {})]
    if name is not None and name not in names:
        raise UserError(f"the transformer has no LoRA {name!r}: choose from {', '.join(names) or 'none'}")
    if name is None and len(names) > 1:
        raise UserError(
            f"the transformer has several LoRAs ({', '.join(names)}): give the name of the trained one as lora="
        )
    if names and isinstance(target, nn.Module):
        raise UserError("the transformer has a LoRA, which only a pipeline can write: give the pipeline")
    return name or next(iter(names), None)


def _read_note(place: Path) -> dict[str, Any]:
    if not (place / CONFIG).is_file():
        raise UserError(f"{place} is not a WorldWeaver adapter: the file {CONFIG} is missing")
    note = read_json(place / CONFIG, f"{place / CONFIG} cannot be read")
    if not isinstance(note, dict) or note.keys() != _FIELDS.keys():
        raise UserError(f"{place / CONFIG} must have {', '.join(_FIELDS)}: write the adapter with save_adapter")
    for name, kind in _FIELDS.items():
        if not isinstance(note[name], kind):
            raise UserError(f"{place / CONFIG}: {name} must be a {kind.__name__}, got {shown(note[name])}")
    if note["modalities"] not in [list(MODALITIES[:count]) for count in (1, 2, 3)]:
        raise UserError(
            f"{place / CONFIG}: modalities must be the first of {', '.join(MODALITIES)}, got"
            f" {shown(note['modalities'])}"
        )
    return note


def _check_lora(target: Any, model: Any, note: dict[str, Any], place: Path) -> None:
    if not note["lora"]:
        return
    if isinstance(target, nn.Module):
        raise UserError(f"the adapter {place} has a LoRA, which only a pipeline can load: give the pipeline")
    if names := [*(getattr(model, "peft_config", None) or {})]:
        raise UserError(
            f"the adapter {place} has a LoRA, but the transformer already has {', '.join(names)}: load the adapter"
            " before other LoRAs"
        )


def _embedder(config: dict[str, Any], tensors: dict[str, Tensor], place: Path, modalities: int) -> LevelEmbedder:
    """Build the level embedder of an adapter, and remove its tensors from `tensors`."""
    said = f"the adapter {place} is damaged"
    state = {
        name.removeprefix(_OF_EMBEDDER): value for name, value in tensors.items() if name.startswith(_OF_EMBEDDER)
    }
    for name in state:
        del tensors[_OF_EMBEDDER + name]
    known = {"width", "modalities", "frequencies", "hidden"}
    # Configs of older versions have no `skip` and no `refine`.
    skip, refine = config.get("skip", False), {name: config.get(name, 0) for name in ("refine", "channels")}
    sizes = {name: value for name, value in config.items() if name != "skip" and name not in refine}
    fits = sizes.keys() == known and all(type(value) is int and 0 < value <= 2**16 for value in sizes.values())
    fits = fits and all(type(value) is int and 0 <= value <= 1024 for value in refine.values())
    if (
        not fits
        or type(skip) is not bool
        or (refine["refine"] and not (skip and modalities > 1 and refine["channels"]))
    ):
        raise UserError(f"{said}: the level embedder config is {shown(config)}, it needs {', '.join(sorted(known))}")
    if config["modalities"] != modalities:
        raise UserError(
            f"{said}: the level embedder has {config['modalities']} modalities, the adapter has {modalities}"
        )
    embedder: LevelEmbedder = LevelEmbedder(**config)
    _check_tensors(state, dict(embedder.named_parameters()), place)
    embedder.load_state_dict(state)
    return embedder


def _check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], place: Path) -> None:
    """Check that no tensor is missing, unknown, of another shape or not finite."""
    said = f"the adapter {place} is damaged"
    if odd := sorted(found.keys() ^ wanted.keys()):
        raise UserError(f"{said}: {odd[0]} is {'unknown' if odd[0] in found else 'missing'}")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{said}: {name} has shape {tuple(tensor.shape)}, the layer needs {tuple(wanted[name].shape)}"
            )
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise UserError(f"{said}: {name} has values that are not finite")
