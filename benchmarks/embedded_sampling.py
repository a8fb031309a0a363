"""Clips of the embedded model for benchmarks: text- and image-to-video by diffusers' own pipelines, in batches.

A clip depends on its own seed alone, up to rounding: the noise of every row comes from a generator of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from tqdm import tqdm

from postgen.errors import UserError

#: Most clips of 33 frames of 128 px or less at once; larger ones come in smaller batches.
BATCH = {"cpu": 8, "cuda": 128}
_FULL = 33 * 128 * 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """How a model folder wants to be sampled: pixels, frames, steps and guidance of its `postgen.json`."""

    size: int
    frames: int
    steps: int
    guidance: float

    @classmethod
    def of(cls, folder: Path) -> Defaults:
        """Read them.

        Raises:
            UserError: the folder has no `postgen.json`, or asks for pictures that are not square.
        """
        path = folder / "postgen.json"
        if not path.is_file():
            raise UserError(f"{folder} has no postgen.json: give a folder that method text_to_video exported.")
        said = json.loads(path.read_text(encoding="utf-8"))
        if said["width"] != said["height"]:
            raise UserError(f"{path} asks for {said['width']}x{said['height']} px: the benchmark's world is square.")
        return cls(
            size=said["width"],
            frames=said["num_frames"],
            steps=said["num_inference_steps"],
            guidance=said["guidance_scale"],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Clips to make; `images` (B,3,H,W) in [0,1] are first frames that are given."""

    prompts: list[str]
    seeds: list[int]
    size: int
    frames: int
    steps: int
    guidance: float
    images: Tensor | None = None
    autocast: bool = False


class BatchedImageToVideo(WanImageToVideoPipeline):  # type: ignore[misc]
    """diffusers' pipeline, which pairs every prompt of a batch with every image; here row i has prompt and image i."""

    def prepare_latents(
        self,
        image: Tensor,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        num_frames: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: list[torch.Generator],
        *rest: Any,
    ) -> Any:
        """Noise (B,C,T,h,w), encoded images (B,C,1,h,w), and the mask of what is not given."""
        frames, scale = (num_frames - 1) // self.vae_scale_factor_temporal + 1, self.vae_scale_factor_spatial
        shape = (batch_size, num_channels_latents, frames, height // scale, width // scale)
        noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        # One row and no generator: each image is encoded once. The noise is given, so none is drawn.
        size = (num_channels_latents, height, width, num_frames)
        return super().prepare_latents(image, 1, *size, dtype, device, None, noise)


def load(folder: Path, device: str) -> Any:
    """The text-to-video pipeline as any user of diffusers loads it."""
    pipe: Any = WanPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_to_video(pipe: Any) -> Any:
    """Image-to-video on the same weights: the first latent is given and has noise level 0, as Wan2.2-TI2V-5B does it.

    Raises:
        UserError: a patch other than 2x2 latents, which diffusers' `expand_timesteps` counts on.
    """
    if tuple(pipe.transformer.config.patch_size[1:]) != (2, 2):
        raise UserError(
            f"patch {tuple(pipe.transformer.config.patch_size)}: image-to-video by expand_timesteps needs 2x2 latents."
        )
    names = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    made = BatchedImageToVideo(**{name: getattr(pipe, name) for name in names}, expand_timesteps=True)
    made.set_progress_bar_config(disable=True)
    return made


def batches(pipe: Any, job: Job, label: str = "") -> Iterator[tuple[slice, Tensor]]:
    """Which rows, and their clips (B,F,3,H,W) in [0,1], float32 on the pipeline's device."""
    place = pipe.device.type
    batch = max(1, min(BATCH[place], BATCH[place] * _FULL // (job.frames * job.size**2)))
    made = pipe if job.images is None else image_to_video(pipe)
    for low in tqdm(range(0, len(job.prompts), batch), desc=label, unit="batch", leave=False, disable=not label):
        rows = slice(low, min(low + batch, len(job.prompts)))
        given = {} if job.images is None else {"image": job.images[rows].to(pipe.device)}
        with torch.autocast(place, torch.bfloat16) if job.autocast else nullcontext():
            output = made(
                prompt=job.prompts[rows],
                height=job.size,
                width=job.size,
                num_frames=job.frames,
                num_inference_steps=job.steps,
                guidance_scale=job.guidance,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in job.seeds[rows]],
                output_type="pt",
                **given,
            )
        yield rows, output.frames.float()


def generate(pipe: Any, job: Job, label: str = "") -> Tensor:
    """All clips (B,F,3,H,W) of a job."""
    return torch.cat([clips for _, clips in batches(pipe, job, label)])


def one_clip(pipe: Any, defaults: Defaults) -> float:
    """Seconds of one default clip."""
    start = time.perf_counter()
    generate(
        pipe,
        Job(
            prompts=["a red ball rolls left"],
            seeds=[0],
            size=defaults.size,
            frames=defaults.frames,
            steps=defaults.steps,
            guidance=defaults.guidance,
        ),
    )
    return time.perf_counter() - start


def seconds_on_two_cores(folder: Path, repeats: int = 3) -> float:
    """Median seconds of a default clip on two CPU cores, in a process of its own that sees no GPU."""
    code = (
        "import json, os, sys, pathlib\n"
        "if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])\n"
        "import torch; torch.set_num_threads(2)\n"
        "from benchmarks import embedded_sampling as b\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "pipe, defaults = b.load(folder, 'cpu'), b.Defaults.of(folder)\n"
        "times = [b.one_clip(pipe, defaults) for _ in range(1 + int(sys.argv[2]))]\n"
        "print(json.dumps(times[1:]))\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(repeats)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(statistics.median(json.loads(told.stdout.splitlines()[-1])))
