"""Load LoRA files into a pipeline and refuse those that would not do what they say; write them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postgen.errors import UserError, cut, first_line, shown
from postgen.reading import check_name

if TYPE_CHECKING:
    from collections.abc import Sequence

_NETWORK = re.compile(r"(transformer|transformer_2)=(.*)", re.DOTALL)
LARGEST = 1000.0
"""Scale of a LoRA, either sign: beyond it nothing is left of the model, and soon no finite number."""


@dataclass(frozen=True, slots=True)
class LoraChoice:
    """A LoRA as it is asked for."""

    path: str
    """File, folder or hub id."""
    scale: float = 1.0
    network: str | None = None
    """The one of two networks that it is for."""

    def __str__(self) -> str:
        short = f"{self.scale:g}"
        said = f"{self.path}:{short if float(short) == self.scale else repr(self.scale)}"
        return said if self.network is None else f"{self.network}={said}"


def parse_lora(text: str) -> LoraChoice:
    """Split `[NETWORK=]PATH[:scale]`; the scale is 1 where none is given, NETWORK transformer or transformer_2.

    Raises:
        UserError: a scale that is not finite or too large.

    >>> parse_lora("transformer_2=style.safetensors:0.5")
    LoraChoice(path='style.safetensors', scale=0.5, network='transformer_2')
    """
    match = _NETWORK.fullmatch(text)
    network, rest = (match[1], match[2]) if match else (None, text)
    path, colon, number = rest.rpartition(":")
    try:
        scale = float(number) if colon else 1.0
    except ValueError:
        path, colon, scale = "", "", 1.0  # the colon belongs to the path
    check_name(path if colon else rest, f"the LoRA {shown(text)}")
    if not math.isfinite(scale) or abs(scale) > LARGEST:
        raise UserError(f"the scale of the LoRA {path} is {cut(number)}, it must be from -{LARGEST:g} to {LARGEST:g}")
    return LoraChoice(path if colon else rest, scale, network)


def check_lora(text: str) -> None:
    """Look into a LoRA file without loading a model. A hub id (owner/name) is left to the load.

    Raises:
        UserError: no such file, not safetensors, nothing of LoRA in it, values that are not finite.
    """
    from .lora_file import find_loras, open_lora

    path = Path(parse_lora(text).path).expanduser()
    if not path.exists() and _is_hub_id(parse_lora(text).path):
        return
    for file in find_loras(path).values():
        open_lora(file)


def load_loras(pipe: Any, loras: Sequence[str], *, adapters_only: bool = False) -> None:
    """Load LoRA files, each `[NETWORK=]PATH[:scale]`, and switch all of them on together, as `lora0`, `lora1`, ...

    All that a file holds is applied. Differences of norms and tables, which no adapter can hold, are added to the
    weights for good.

    Args:
        pipe: the pipeline.
        loras: the files.
        adapters_only: whether to refuse such differences.

    Raises:
        UserError: the pipeline takes none, a file is for another model, or some of its tensors cannot be applied.
    """
    if not loras:
        return
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"{type(pipe).__name__} takes no LoRA: leave --lora out")
    from diffusers.utils.peft_utils import set_weights_and_activate_adapters

    from .lora_load import load_one

    scales: dict[str, float] = {}
    for number, choice in enumerate(map(parse_lora, loras)):
        scales[f"lora{number}"] = choice.scale
        for network, path in _files(pipe, choice).items():
            load_one(pipe, network, path, f"lora{number}", choice.scale, adapters_only)
    # Every component: a pipeline's own `set_adapters` passes over most text encoders.
    for part in pipe.components.values():
        if names := [name for name in scales if name in (getattr(part, "peft_config", None) or {})]:
            set_weights_and_activate_adapters(part, names, [scales[name] for name in names])


def networks_of(pipe: Any) -> list[str]:
    """Return the components that LoRA files are for: one, or the two experts."""
    from .lora_file import EXPERTS

    if getattr(pipe, "transformer_2", None) is not None:
        return [name for name in EXPERTS if getattr(pipe, name, None) is not None]
    return ["transformer" if getattr(pipe, "transformer", None) is not None else "unet"]


def _files(pipe: Any, choice: LoraChoice) -> dict[str, Path]:
    """Return the files of a LoRA by the network that each is for.

    Raises:
        UserError: it is not said for which, or the pipeline has no such network.
    """
    from .lora_file import find_loras, open_lora

    path = Path(choice.path).expanduser()
    found = find_loras(_downloaded(choice.path) if not path.exists() and _is_hub_id(choice.path) else path)
    networks = networks_of(pipe)
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
                f"{type(pipe).__name__} here has two transformers, and the LoRA {choice.path} does not say which it is"
                f" for: give it as {networks[0]}={choice.path} (noisy steps) or {networks[1]}={choice.path}"
            )
        return {network: found[None]}
    if missing := [str(network) for network in found if network not in networks]:
        raise UserError(f"the LoRA {choice.path} is for {', '.join(missing)}, this {type(pipe).__name__} has none")
    return {str(network): file for network, file in found.items()}


def _downloaded(name: str) -> Path:
    """Return the file of a LoRA on the hub.

    Raises:
        UserError: it cannot be had, or the repository has several.
    """
    from huggingface_hub import hf_hub_download, list_repo_files

    from .lora_file import WEIGHTS

    try:
        files = [file for file in list_repo_files(name) if file.endswith(".safetensors")]
        if WEIGHTS not in files and len(files) != 1:
            raise UserError(
                f"the LoRA {name} has {len(files)} .safetensors files on the hub ({', '.join(files[:3])}): download"
                " the one that you want and give its path"
            )
        return Path(hf_hub_download(name, WEIGHTS if WEIGHTS in files else files[0]))
    except UserError:
        raise
    except Exception as error:  # the hub raises all kinds
        raise UserError(f"cannot load the LoRA {name}: {first_line(error)}") from error


def save_lora(pipe: Any, folder: Any, name: str, module: Any, adapter: str, state: Any = None) -> None:
    """Write the LoRA of one component as its pipeline does, with rank and alpha in the file, and a note beside it.

    Args:
        pipe: the pipeline.
        folder: where to; the file is `pytorch_lora_weights.safetensors`.
        name: of the component; a second expert is written under the name of the first, as diffusers loads it.
        module: the component.
        adapter: name of its adapter.
        state: its complete adapter weights by parameter name, where the module holds only shards.
    """
    from peft.utils import get_peft_model_state_dict

    from .lora_file import NOTE
    from .lora_found import network_shapes
    from .lora_names import names_of, outputs_of

    part = "unet" if name == "unet" else "transformer"
    layers = get_peft_model_state_dict(module, state_dict=state, adapter_name=adapter)
    layers = {key: value.detach().cpu().contiguous() for key, value in layers.items()}
    metadata = module.peft_config[adapter].to_dict()
    pipe.save_lora_weights(
        folder, **{f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": metadata}, safe_serialization=True
    )
    # For `postgen export-lora`: layers of different families have the same names.
    kind = type(pipe).__name__
    note = {"pipeline": kind, "outputs": outputs_of(network_shapes(module), names_of(module))}
    if len(networks_of(pipe)) > 1:  # one network's alone may go to either of two
        note["network"] = name
    (Path(folder) / NOTE).write_text(json.dumps(note) + "\n")


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith(".safetensors")
