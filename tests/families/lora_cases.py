"""Tiny pipelines with a LoRA from the trainer, one per family, and the change of every weight by a LoRA file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from postgen.families import denoiser_for
from postgen.families.lora import load_loras, networks_of, save_lora
from postgen.families.lora_export import export_lora
from postgen.families.lora_file import NOTE, WEIGHTS
from postgen.training.lora import AdapterConfig, add_adapters
from tests.families.tiny_pipelines import NO_LORA, PIPELINES
from tests.tiny_wan import LATENT_CHANNELS, wan_components

Changes = dict[str, dict[str, Tensor]]
"""Network -> layer -> change of its weight in float64, without layers that do not change."""


def wan(**config: Any) -> Any:
    from diffusers import WanPipeline

    return WanPipeline(**wan_components(), **config)


def wan_image() -> Any:
    from diffusers import WanImageToVideoPipeline

    return WanImageToVideoPipeline(**wan_components(in_channels=2 * LATENT_CHANNELS + 4))


def two_experts() -> Any:
    from diffusers import WanTransformer3DModel

    pipe = wan(boundary_ratio=0.5)
    pipe.register_modules(transformer_2=WanTransformer3DModel.from_config(pipe.transformer.config).eval())
    return pipe


FAMILIES: dict[str, Callable[[], Any]] = {
    "Wan": wan,
    "Wan, first frame": wan_image,
    "Wan, two experts": two_experts,
    **{name: make for name, (make, _) in PIPELINES.items() if name not in NO_LORA},
}
"""Name of a family -> function that makes its tiny pipeline."""


def trained(pipe: Any, rank: int = 4, alpha: int = 8, **config: Any) -> str:
    """Add the trainer's adapters to a pipeline, fill them with random weights, and return their name."""
    adapter = add_adapters(pipe, denoiser_for(pipe), AdapterConfig(lora_r=rank, lora_alpha=alpha), **config)
    assert adapter is not None
    source = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for network in networks_of(pipe):
            for name, parameter in getattr(pipe, network).named_parameters():
                if f".{adapter}." in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.1)
    return adapter


def save(pipe: Any, folder: Path, adapter: str) -> None:
    """Write the adapters in the form of a run's export."""
    networks = networks_of(pipe)
    for name in networks:
        place = folder if len(networks) == 1 else folder / name
        place.mkdir(parents=True, exist_ok=True)
        save_lora(pipe, place, name, getattr(pipe, name), adapter)


def changes(pipe: Any) -> Changes:
    """Return the change of every weight by the active adapters of a pipeline, at their present scales."""
    from peft.tuners.lora import LoraLayer

    found: Changes = {}
    for part in networks_of(pipe):
        layers = found.setdefault(part, {})
        for name, module in getattr(pipe, part).named_modules():
            if isinstance(module, LoraLayer):
                whole = sum(_change(module, adapter) for adapter in module.active_adapters if adapter in module.lora_A)
                if bool(torch.as_tensor(whole).any()):
                    layers[name] = whole
    return found


def _change(module: Any, adapter: str) -> Tensor:
    down, up = module.lora_A[adapter].weight.double(), module.lora_B[adapter].weight.double()
    change: Tensor = module.scaling[adapter] * up.flatten(1) @ down.flatten(1)
    return change.detach()


def read_by_postgen(pipe: Any, *loras: str) -> Changes:
    """Return the change of every weight by files that postgen loads."""
    load_loras(pipe, loras)
    found = changes(pipe)
    pipe.unload_lora_weights()
    return found


def read_by_diffusers(pipe: Any, files: dict[str, Path]) -> Changes:
    """Return the change of every weight by files that diffusers loads; `files` is network name -> file."""
    for network, file in files.items():
        more = {"load_into_transformer_2": True} if network == "transformer_2" else {}
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="theirs", **more)
    found = changes(pipe)
    pipe.unload_lora_weights()
    return found


def same(one: Changes, other: Changes) -> bool:
    """Whether both change the same layers by exactly the same numbers."""
    return one.keys() == other.keys() and all(
        one[part].keys() == other[part].keys() and all(torch.equal(one[part][k], other[part][k]) for k in one[part])
        for part in one
    )


def converted_by_diffusers(family: str, format: Any, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the changes in diffusers' conversion of an exported file, and the changes that the file was written from.

    The file has the width of the published models, because the conversion supports no other width. A change is
    represented by its products with a few vectors. All numbers are small integers, so sums are exact in any order.
    """
    import diffusers

    kind, network = {
        "FLUX": ("FluxPipeline", "FluxTransformer2DModel"),
        "HunyuanVideo": ("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel"),
    }[family]
    with torch.device("meta"):
        model = getattr(diffusers, network)(num_layers=1, num_single_layers=1)
    source, tensors, expected = torch.Generator().manual_seed(5), {}, {}
    for name, module in model.named_modules():
        if re.fullmatch(r"(single_)?transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0)", name):
            shapes = (4, module.in_features), (module.out_features, 4)
            down, up = (torch.randint(-3, 4, shape, generator=source).float() for shape in shapes)
            tensors |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
            expected[name] = 2 * up.double() @ (down.double() @ _probe(module.in_features))
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", "lora_adapter_metadata": settings})
    (folder / NOTE).write_text(json.dumps({"pipeline": kind}))
    export_lora(folder, folder / "out.safetensors", format)
    state = getattr(diffusers, kind).lora_state_dict(folder / "out.safetensors")
    found = {}
    for key, down in state.items():
        if key.endswith(".lora_A.weight"):
            change = state[key.replace(".lora_A.", ".lora_B.")].double() @ (down.double() @ _probe(down.shape[1]))
            if change.any():
                found[key.removeprefix("transformer.").removesuffix(".lora_A.weight")] = change
    return found, expected


def _probe(width: int) -> Tensor:
    return torch.randint(-3, 4, (width, 8), generator=torch.Generator().manual_seed(6)).double()
