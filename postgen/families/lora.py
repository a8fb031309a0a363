"""Load LoRA files into a pipeline and refuse those that would not do what they say; write them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postgen.errors import UserError
from postgen.tensor_files import opened

if TYPE_CHECKING:
    from collections.abc import Sequence

WEIGHTS = "pytorch_lora_weights.safetensors"
_SUFFIX = re.compile(r"\.(lora_[AB]|lora\.(up|down)|lora_magnitude_vector)\b.*$")


def parse_lora(text: str) -> tuple[str, float]:
    """Split `PATH[:scale]`; the scale is 1 where none is given.

    >>> parse_lora("style.safetensors:0.5")
    ('style.safetensors', 0.5)
    """
    path, colon, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0  # the colon belongs to the path


def check_lora(text: str) -> None:
    """Look into a LoRA file without loading a model. A hub id (owner/name) is left to the load.

    Raises:
        UserError: no such file, not safetensors, nothing of LoRA in it.
    """
    path = Path(parse_lora(text)[0]).expanduser()
    if path.is_dir():
        path = path / WEIGHTS
    elif not path.exists() and path.parts and _is_hub_id(parse_lora(text)[0]):
        return
    if not path.is_file():
        raise UserError(f"there is no LoRA file {path}: give a .safetensors file or a folder with {WEIGHTS}")
    with opened(path, f"cannot read the LoRA {path}", framework="numpy") as content:
        names = list(content.keys())
    if not any("lora" in name for name in names):
        raise UserError(f"{path} is no LoRA: none of its {len(names)} tensors has 'lora' in its name")


def load_loras(pipe: Any, loras: Sequence[str]) -> None:
    """Load LoRA files, each `PATH[:scale]`, and switch all of them on together.

    Raises:
        UserError: the pipeline takes none, or a name in the file matches no layer of the model.
    """
    if not loras:
        return
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"{type(pipe).__name__} takes no LoRA: leave --lora out")
    if getattr(pipe, "transformer_2", None) is not None:
        raise UserError("--lora cannot say which of the model's two transformers it is for: leave it out")
    scales = []
    for number, (path, scale) in enumerate(map(parse_lora, loras)):
        _load_one(pipe, str(Path(path).expanduser()), f"lora{number}")
        scales.append(scale)
    pipe.set_adapters([f"lora{number}" for number in range(len(loras))], scales)


def _load_one(pipe: Any, path: str, name: str) -> None:
    try:
        _check_layers(pipe, path, type(pipe).lora_state_dict(path))
        pipe.load_lora_weights(path, adapter_name=name)
    except UserError:
        raise
    except Exception as error:  # diffusers, peft and the hub raise all kinds
        raise UserError(f"cannot load the LoRA {path}: {' '.join(str(error).split())[:300]}") from error


def _check_layers(pipe: Any, path: str, state: dict[str, Any]) -> None:
    wanted = {_SUFFIX.sub("", key) for key in state if not key.endswith(".alpha")}
    layers = {
        f"{part}.{name}"
        for part, module in pipe.components.items()
        if hasattr(module, "named_modules")
        # A layer that already carries an adapter hides its own name one level down.
        for name in (layer.replace(".base_layer", "") for layer, _ in module.named_modules())
    }
    if missing := sorted(wanted - layers):
        matched = len(wanted) - len(missing)
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"the LoRA {path} does not fit {type(pipe).__name__}: {matched} of its {len(wanted)} layer names match,"
            f" these match no layer: {some}"
        )


def save_lora(pipe: Any, folder: Any, name: str, module: Any, adapter: str, state: Any = None) -> None:
    """Write the LoRA of one component as its pipeline does, with rank and alpha in the file.

    Args:
        pipe: the pipeline.
        folder: where to; the file is `pytorch_lora_weights.safetensors`.
        name: of the component; a second expert is written under the name of the first, as diffusers loads it.
        module: the component.
        adapter: name of its adapter.
        state: its complete adapter weights by parameter name, where the module holds only shards.
    """
    from peft.utils import get_peft_model_state_dict

    part = "unet" if name == "unet" else "transformer"
    layers = get_peft_model_state_dict(module, state_dict=state, adapter_name=adapter)
    layers = {key: value.detach().cpu().contiguous() for key, value in layers.items()}
    metadata = module.peft_config[adapter].to_dict()
    pipe.save_lora_weights(
        folder, **{f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": metadata}, safe_serialization=True
    )


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith(".safetensors")
