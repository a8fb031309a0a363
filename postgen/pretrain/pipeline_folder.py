"""The embedded model as a plain diffusers folder, and its samples during training."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Protocol

import torch

from postgen import world
from postgen.video import contact_sheet
from postgen.world.spec import FPS

EXAMPLES = (
    "a red ball rolls left",
    "a navy box falls and a golden sphere bounces",
    "a green cylinder stays still, the camera orbits left",
)
"""Prompts within the model's vocabulary, shown to users whose prompt is outside it."""


class ModelSettings(Protocol):
    """The settings that these functions read from a configuration."""

    size: int
    lengths: list[int]
    patch: int
    num_layers: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    text_width: int
    shift: float
    eval_prompts: int
    eval_num_inference_steps: int
    eval_guidance_scale: float
    whole_words: bool
    noise_shares: list[float]
    output_dir: str


def new_transformer(settings: ModelSettings, channels: int) -> Any:
    """Return a `WanTransformer3DModel` with random weights, with patches of 1 frame and `settings.patch` in space."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, settings.patch, settings.patch),
        num_attention_heads=settings.num_heads,
        attention_head_dim=settings.head_dim,
        in_channels=channels,
        out_channels=channels,
        text_dim=settings.text_width,
        freq_dim=256,
        ffn_dim=settings.ffn_dim,
        num_layers=settings.num_layers,
        cross_attn_norm=True,
    )


def make_pipeline(components: dict[str, Any], shift: float) -> Any:
    """Return a `WanPipeline` with an Euler flow-matching scheduler of the given shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    pipe: Any = WanPipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=shift), **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_pipeline(folder: Path, components: dict[str, Any], settings: ModelSettings) -> None:
    """Save a pipeline in float16, but its text encoder in float32, because diffusers would load it in float16 too."""
    half = {name: copy.deepcopy(components[name]).to("cpu", torch.float16) for name in ("vae", "transformer")}
    text_encoder = copy.deepcopy(components["text_encoder"]).to("cpu", torch.float32)
    pipe = make_pipeline({**components, **half, "text_encoder": text_encoder}, settings.shift)
    pipe.save_pretrained(folder)
    _name_tokenizer_class(folder)
    defaults: dict[str, Any] = {
        "width": settings.size,
        "height": settings.size,
        "num_frames": settings.lengths[0],
        "num_inference_steps": settings.eval_num_inference_steps,
        "guidance_scale": settings.eval_guidance_scale,
        "fps": FPS,
        "dtype": "float32",
    }
    if settings.whole_words:
        defaults["closed_vocabulary"] = list(EXAMPLES)
    if settings.noise_shares[1]:
        defaults["image_to_video"] = True
    (folder / "postgen.json").write_text(json.dumps(defaults, indent=2) + "\n")


def _name_tokenizer_class(folder: Path) -> None:
    """Write the tokenizer class name that transformers 4 and 5 both know; transformers 5 writes its own name."""
    for path in (folder / "model_index.json", folder / "tokenizer" / "tokenizer_config.json"):
        path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def evaluation_prompts(count: int) -> list[str]:
    """Return plain prompts of scenes that training never renders: one in four has two bodies, the others one."""
    specs = [world.sample(seed, num_bodies=2 if seed % 4 == 3 else 1, camera="static") for seed in range(count)]
    return [world.simple_caption(spec) for spec in specs]


@torch.no_grad()
def sample_sheet(components: dict[str, Any], settings: ModelSettings, device: torch.device) -> dict[str, float]:
    """Sample the evaluation prompts, write their contact sheet into the run folder, and check them with the world."""
    prompts = evaluation_prompts(settings.eval_prompts)
    pipe = make_pipeline(components, settings.shift)
    output = pipe(
        prompts,
        height=settings.size,
        width=settings.size,
        num_frames=settings.lengths[0],
        num_inference_steps=settings.eval_num_inference_steps,
        guidance_scale=settings.eval_guidance_scale,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="pt",
    ).frames
    clips = output.float()
    rows = clips[: min(12, len(clips)), ::4].flatten(0, 1).cpu()
    contact_sheet(rows, Path(settings.output_dir) / "samples.png", columns=clips[0, ::4].shape[0], limit=len(rows))
    return judged(clips, prompts)


def judged(clips_BF3HW: torch.Tensor, prompts: list[str]) -> dict[str, float]:
    """Return the shares of clips that the checker accepts, by attribute and for two bodies, and the mean score."""
    from postgen.world.check import check_batch

    specs = [world.parse(prompt) for prompt in prompts]
    reports = check_batch(clips_BF3HW, [spec for spec in specs if spec is not None])
    names = ("count", "colour", "shape", "direction", "event", "all_right", "score")
    result = {}
    for name in names:
        values = [float(value) for report in reports if (value := getattr(report, name)) is not None]
        if values:
            result[name] = sum(values) / len(values)
    pairs = [report.all_right for report in reports if len(report.bodies) == 2]
    if pairs:
        result["two_objects"] = sum(pairs) / len(pairs)
    return result
