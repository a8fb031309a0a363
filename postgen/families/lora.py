"""Load LoRA files into a pipeline, and write them. A file that cannot be applied completely is refused."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postgen.errors import UserError, cut, first_line, shown
from postgen.reading import check_name

if TYPE_CHECKING:
    from collections.abc import Sequence

_NETWORK = re.compile(r"(transformer|transformer_2)=(.*)", re.DOTALL)
LARGEST = 1000.0
"""Largest absolute scale of a LoRA. A larger scale destroys the model, and values soon become infinite."""


@dataclass(frozen=True, slots=True)
class LoraChoice:
    """One LoRA that the user chose: its place, its scale, and the network that it is for."""

    path: str
    """File, folder or hub id."""
    scale: float = 1.0
    """Factor on the change of the weights, from -1000 to 1000."""
    network: str | None = None
    """`transformer` or `transformer_2`, in a pipeline with two networks; None: not given."""

    def __str__(self) -> str:
        short = f"{self.scale:g}"
        said = f"{self.path}:{short if float(short) == self.scale else repr(self.scale)}"
        return said if self.network is None else f"{self.network}={said}"


def parse_lora(text: str) -> LoraChoice:
    """Parse the text `[NETWORK=]PATH[:SCALE]` of `--lora`.

    NETWORK is transformer or transformer_2. SCALE is from -1000 to 1000 and defaults to 1.

    Raises:
        UserError: PATH is empty or not a valid name, or SCALE is not finite or too large.

    >>> parse_lora("transformer_2=style.safetensors:0.5")
    LoraChoice(path='style.safetensors', scale=0.5, network='transformer_2')
    """
    match = _NETWORK.fullmatch(text)
    network, rest = (match[1], match[2]) if match else (None, text)
    path, colon, number = rest.rpartition(":")
    try:
        scale = float(number) if colon else 1.0
    except ValueError:
        path, colon, scale = "", "", 1.0  # the text after the colon is not a number, so the colon is part of the path
    check_name(path if colon else rest, f"the LoRA {shown(text)}")
    if not math.isfinite(scale) or abs(scale) > LARGEST:
        raise UserError(f"the scale of the LoRA {path} is {cut(number)}, it must be from -{LARGEST:g} to {LARGEST:g}")
    return LoraChoice(path if colon else rest, scale, network)


def check_lora(text: str) -> None:
    """Check a LoRA file without loading a model. A hub id (owner/name) is not checked before the model is loaded.

    Args:
        text: as in `parse_lora`.

    Raises:
        UserError: the file does not exist, is not safetensors, contains no LoRA, or contains NaN or infinity; or the
            scale or the network is wrong.
    """
    from .lora_file import find_loras, open_lora

    choice = parse_lora(text)
    path = Path(choice.path).expanduser()
    if not path.exists():
        _check_form(choice.path)
        if _is_hub_id(choice.path):
            return
    for file in find_loras(path).values():
        open_lora(file)


def _check_form(name: str) -> None:
    """Refuse a name that does not exist because its scale or its network is wrong.

    Raises:
        UserError: the text after a colon is not a number, or the text before an equals sign is not a network.
    """
    place, colon, number = name.rpartition(":")
    if colon and (place.endswith(".safetensors") or Path(place).expanduser().exists()):
        raise UserError(f"the scale of the LoRA {place} is {shown(number)}, it must be a number: PATH:0.5")
    network, equals, place = name.partition("=")
    if equals and Path(place).expanduser().exists():
        raise UserError(f"unknown network {shown(network)} of the LoRA {place}. Known: transformer, transformer_2")


def load_loras(pipe: Any, loras: Sequence[str], *, adapters_only: bool = False) -> None:
    """Load LoRA files as adapters `lora0`, `lora1`, ... and activate all of them together.

    Everything in a file is applied. Differences of norms and tables, which an adapter cannot hold, are added to the
    weights of the pipeline permanently.

    Args:
        pipe: the pipeline.
        loras: texts as in `parse_lora`, `[NETWORK=]PATH[:SCALE]`.
        adapters_only: whether to refuse files with such differences.

    Raises:
        UserError: the pipeline supports no LoRA, a file is for another model, or some tensors cannot be applied.
    """
    if not loras:
        return
    adaptable = any(hasattr(getattr(pipe, name, None), "load_lora_adapter") for name in networks_of(pipe))
    if not hasattr(pipe, "load_lora_weights") and not adaptable:
        raise UserError(f"{type(pipe).__name__} supports no LoRA: leave --lora out")
    from diffusers.utils.peft_utils import set_weights_and_activate_adapters

    from .lora_load import load_one

    scales: dict[str, float] = {}
    for number, choice in enumerate(map(parse_lora, loras)):
        scales[f"lora{number}"] = choice.scale
        for network, path in _files(pipe, choice).items():
            load_one(pipe, network, path, f"lora{number}", choice.scale, adapters_only)
    # Set the scales in every component: the `set_adapters` of a pipeline skips most text encoders.
    for part in pipe.components.values():
        if names := [name for name in scales if name in (getattr(part, "peft_config", None) or {})]:
            set_weights_and_activate_adapters(part, names, [scales[name] for name in names])
            part.train(part.training)  # new layers are in training mode, in which a dropout of the file acts


def networks_of(pipe: Any) -> list[str]:
    """Return the names of the networks that LoRA changes: the transformer, both experts of Wan 2.2, or the UNet."""
    from .lora_file import EXPERTS

    if getattr(pipe, "transformer_2", None) is not None:
        return [name for name in EXPERTS if getattr(pipe, name, None) is not None]
    return ["transformer" if getattr(pipe, "transformer", None) is not None else "unet"]


def _files(pipe: Any, choice: LoraChoice) -> dict[str, Path]:
    """Return network name -> LoRA file.

    Raises:
        UserError: the pipeline has two networks and the network of the file is unknown, or the pipeline has no such
            network.
    """
    from .lora_file import find_loras, open_lora

    path = Path(choice.path).expanduser()
    found = find_loras(_downloaded(choice.path) if not path.exists() and _is_hub_id(choice.path) else path)
    networks = networks_of(pipe)
    # The user's choice comes first, then the only network, then the note of the file, then the names of the folders.
    if choice.network is not None and len(found) == 1:
        found = dict.fromkeys([choice.network], next(iter(found.values())))
    elif choice.network is not None:
        found = {choice.network: found[choice.network]}
    if len(networks) == 1 and set(found) == {None}:
        return {networks[0]: found[None]}
    if None in found:
        network = open_lora(found[None]).note.get("network")
        if network not in networks:
            raise UserError(
                f"this {type(pipe).__name__} has two transformers, and the LoRA {choice.path} does not name its one:"
                f" give it as {networks[0]}={choice.path} (high noise) or {networks[1]}={choice.path}"
            )
        return {network: found[None]}
    if missing := [str(network) for network in found if network not in networks]:
        raise UserError(
            f"the LoRA {choice.path} is for {', '.join(missing)}, which this {type(pipe).__name__} does not have"
        )
    return {str(network): file for network, file in found.items()}


def _downloaded(name: str) -> Path:
    """Download a LoRA from the hub and return the local file.

    Raises:
        UserError: the download fails, or the repository has several LoRA files.
    """
    from huggingface_hub import hf_hub_download, list_repo_files

    from .lora_file import WEIGHTS

    try:
        files = [file for file in list_repo_files(name) if file.endswith(".safetensors")]
        if WEIGHTS not in files and len(files) != 1:
            raise UserError(
                f"the LoRA {name} has {len(files)} .safetensors files on the hub ({', '.join(files[:3])}): download"
                " one of them and give its path"
            )
        return Path(hf_hub_download(name, WEIGHTS if WEIGHTS in files else files[0]))
    except UserError:
        raise
    except Exception as error:  # the hub's library raises many types of errors
        raise UserError(f"cannot load the LoRA {name}: {first_line(error)}") from error


def save_lora(pipe: Any, folder: Any, name: str, module: Any, adapter: str, state: Any = None) -> None:
    """Write the LoRA of one component in diffusers' format, and the note `lora.json` beside it.

    The metadata of the file contain rank and alpha. `network.load_lora_adapter` reads the file, and so does the
    pipeline's `load_lora_weights` if diffusers has one for this pipeline.

    Args:
        pipe: the pipeline.
        folder: the output folder; the file is `pytorch_lora_weights.safetensors`.
        name: name of the component. The keys of a second expert have the prefix of the first, as diffusers loads them.
        module: the component.
        adapter: name of the adapter in the component.
        state: the complete adapter weights by parameter name, if the module holds shards only; None takes the weights
            of the module.
    """
    from peft.utils import get_peft_model_state_dict

    from .lora_file import NOTE
    from .lora_found import network_shapes
    from .lora_names import names_of, outputs_of

    part = "unet" if name == "unet" else "transformer"
    layers = get_peft_model_state_dict(module, state_dict=state, adapter_name=adapter)
    layers = {key: value.detach().cpu().contiguous() for key, value in layers.items()}
    # Dropout belongs to the training, and diffusers leaves the layers of a loaded LoRA in training mode.
    metadata = {**module.peft_config[adapter].to_dict(), "lora_dropout": 0.0}
    _saver(pipe, part).save_lora_weights(
        folder, **{f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": metadata}, safe_serialization=True
    )
    # `postgen export-lora` needs the note, because layers of different families have the same names.
    kind = type(pipe).__name__
    note = {"pipeline": kind, "outputs": outputs_of(network_shapes(module), names_of(module))}
    if len(networks_of(pipe)) > 1:  # the layers do not show which of the two networks they belong to
        note["network"] = name
    (Path(folder) / NOTE).write_text(json.dumps(note) + "\n")


def _saver(pipe: Any, part: str) -> Any:
    """Return the object whose `save_lora_weights` writes the LoRA of a `transformer` or `unet`.

    A pipeline that is not in diffusers may have no such method; all of them write the same format.
    """
    if hasattr(pipe, "save_lora_weights"):
        return pipe
    loaders: Any = import_module("diffusers.loaders")
    return loaders.StableDiffusionLoraLoaderMixin if part == "unet" else loaders.WanLoraLoaderMixin


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith(".safetensors")
