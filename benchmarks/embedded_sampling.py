"""Generate clips of the embedded model in batches for benchmarks: text- and image-to-video with diffusers' pipelines.

A clip depends only on its own seed, up to rounding: each row of a batch draws its noise from its own generator.
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

#: Largest batch of clips up to 33 frames of 128 px. Batches of larger clips are smaller.
BATCH = {"cpu": 8, "cuda": 128}
_FULL = 33 * 128 * 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """Default sampling settings of a model folder, from its `postgen.json`: pixels, frames, steps, guidance scale."""

    size: int
    frames: int
    steps: int
    guidance: float

    @classmethod
    def of(cls, folder: Path) -> Defaults:
        """Read the defaults of a model folder.

        Raises:
            UserError: if the folder has no `postgen.json`, or if the width and height in it differ.
        """
        path = folder / "postgen.json"
        if not path.is_file():
            raise UserError(f"{folder} has no postgen.json: give a folder that method text_to_video exported.")
        said = json.loads(path.read_text(encoding="utf-8"))
        if said["width"] != said["height"]:
            raise UserError(
                f"{path} has width {said['width']} and height {said['height']}: the benchmark needs equal sides"
            )
        return cls(
            size=said["width"],
            frames=said["num_frames"],
            steps=said["num_inference_steps"],
            guidance=said["guidance_scale"],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Clips to generate. `images` (B,3,H,W) in [0,1] are the first frames for image-to-video."""

    prompts: list[str]
    seeds: list[int]
    size: int
    frames: int
    steps: int
    guidance: float
    images: Tensor | None = None
    autocast: bool = False


class BatchedImageToVideo(WanImageToVideoPipeline):  # type: ignore[misc]
    """diffusers' image-to-video pipeline for batches in which row i uses prompt i and image i.

    diffusers' own pipeline combines every prompt of a batch with every image.
    """

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
        """Return the noise (B,C,T,h,w), the encoded images (B,C,1,h,w), and the mask of latents to generate."""
        frames, scale = (num_frames - 1) // self.vae_scale_factor_temporal + 1, self.vae_scale_factor_spatial
        shape = (batch_size, num_channels_latents, frames, height // scale, width // scale)
        noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        # Batch size 1 encodes each image once. The noise is an argument, so no generator is needed.
        size = (num_channels_latents, height, width, num_frames)
        return super().prepare_latents(image, 1, *size, dtype, device, None, noise)


def load(folder: Path, device: str) -> Any:
    """Load the text-to-video pipeline with diffusers' `from_pretrained`."""
    pipe: Any = WanPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_to_video(pipe: Any) -> Any:
    """Return an image-to-video pipeline that shares the weights of `pipe`.

    The first latent frame is the encoded image and has noise level 0, as in Wan2.2-TI2V-5B.

    Raises:
        UserError: if the patch size is not 2x2 latents, which diffusers' `expand_timesteps` assumes.
    """
    if tuple(pipe.transformer.config.patch_size[1:]) != (2, 2):
        raise UserError(
            f"the transformer's patch_size is {tuple(pipe.transformer.config.patch_size)}: image-to-video with"
            " expand_timesteps needs patches of 2x2 latents"
        )
    names = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    made = BatchedImageToVideo(**{name: getattr(pipe, name) for name in names}, expand_timesteps=True)
    made.set_progress_bar_config(disable=True)
    return made


def batches(pipe: Any, job: Job, label: str = "") -> Iterator[tuple[slice, Tensor]]:
    """Generate a job in batches.

    Yields:
        The rows of a batch, and their clips (B,F,3,H,W) in [0,1], float32 on the pipeline's device.
    """
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
    """Generate all clips (B,F,3,H,W) of a job."""
    return torch.cat([clips for _, clips in batches(pipe, job, label)])


def one_clip(pipe: Any, defaults: Defaults) -> float:
    """Return the seconds that one clip with the default settings takes."""
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
    """Return the median seconds of a default clip on two CPU cores, measured in a new process that sees no GPU."""
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
