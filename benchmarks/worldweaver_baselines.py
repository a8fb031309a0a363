"""Baselines that need no adapter: the embedded model without changes, and its autoencoder.

- `sliding`: windows of 9 latent frames, the length with which the model was trained. The first N latent frames of a
  window are the last N of the window before, at noise level 0; the model was trained with a noise level for each
  latent frame. Clean latents stay as they are, as in diffusers' SkyReels-V2 with diffusion forcing.
- `sliding_pixels`: the same, but the last 4 N - 3 video frames are decoded and encoded again, so that a window begins
  with a latent frame of a single video frame, like all training clips. Users of diffusers' Wan pipelines do this.
- `ceiling`: the true clip, encoded and decoded by the autoencoder. No model can be better.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.worldweaver import Arm, Made, given_latents, make_clips
from postgen import world
from postgen.assets import embedded_model
from postgen.errors import UserError, check_number
from postgen.families import denoiser_for
from postgen.training.policy import ModelConfig, load_model
from postgen.worldweaver.embedding import LevelEmbedder
from postgen.worldweaver.model import WorldWeaverModel
from postgen.worldweaver.widen import widened

KINDS = ("sliding", "sliding_pixels", "ceiling")
"""Names of arms that need no folder."""
WINDOW = 9
"""Number of latent frames with which the embedded model was trained."""
CONTEXT = 5
"""N: number of latent frames of the 17 given video frames."""


def kind_of(name: str) -> str | None:
    """Return the kind (one of `KINDS`) from the name of an arm; None: an arm with an adapter.

    >>> kind_of("sliding"), kind_of("sliding-1"), kind_of("sliding_pixels.0"), kind_of("e.0")
    ('sliding', 'sliding', 'sliding_pixels', None)
    """
    stem = name.split(".")[0].split("-")[0]
    return stem if stem in KINDS else None


def stock_arm(
    kind: str, device: torch.device, pipe: Any = None, *, steps: int = 21, context: int | None = None
) -> Arm:
    """Return the embedded model, or another pipeline, as an arm: no depth, no adapter, its own guidance and shift.

    Args:
        kind: one of `KINDS`.
        device: device of the model.
        pipe: pipeline to use instead of the embedded model.
        steps: denoising steps of a window.
        context: N, 1 to 8; None: 5.

    Raises:
        UserError: a context outside 1 to 8.
    """
    shown = CONTEXT if context is None else context
    check_number("context", shown, 1, WINDOW - 1, whole=True)
    made, defaults = load_model(embedded_model() if pipe is None else pipe, ModelConfig(), device)
    widened(made, ("rgb",))
    with torch.random.fork_rng(devices=[]):
        # The last layer of the untrained embedder is zero, so it does not change the model.
        model = WorldWeaverModel(denoiser_for(made), LevelEmbedder.for_transformer(made).eval())
    told = {
        "causal_block_size": WINDOW - shown,
        "num_inference_steps": steps,
        "ar_step": steps,
        "history_sizes": [0, shown],
        "keep_first_frame": False,
        "memory_policy": "recent",
        "addnoise_condition": 0.0,
        "flow_noise": 0.0,
        "depth_in_memory": True,
        "flow_shift": float(made.scheduler.config.shift),
    }
    guidance = None if defaults is None else defaults.guidance_scale
    return Arm(name=kind, model=model, settings=told, guidance=float(guidance or 1.0))


def stock_clips(
    kind: str,
    arm: Arm,
    specs: Sequence[world.Spec],
    truth: world.Frames,
    *,
    given: int,
    seed: int = 0,
    captions: str = "along",
) -> Made:
    """Generate the clips of an arm from `stock_arm`. The arguments are those of `make_clips`.

    Raises:
        UserError: an unknown kind.
    """
    if kind == "sliding":
        return make_clips(arm, specs, truth, given=given, seed=seed, captions=captions)
    if kind == "sliding_pixels":
        return _encoded_again(arm, specs, truth, given, seed, captions)
    if kind == "ceiling":
        latents = given_latents(arm, truth, truth.rgb_BF3HW.shape[1])[0]
        with torch.no_grad():
            return Made(frames=arm.model.decode(latents), disparity=None, latents=latents, seconds=0.0)
    raise UserError(f"an arm without a folder must be one of {', '.join(KINDS)}, got {kind}")


def _encoded_again(
    arm: Arm, specs: Sequence[world.Spec], truth: world.Frames, given: int, seed: int, captions: str
) -> Made:
    """Generate window after window. Each window is a separate video that begins with the last frames before it."""
    shown, total, seconds = arm.settings["history_sizes"][1], truth.rgb_BF3HW.shape[1], 0.0
    frames = truth.rgb_BF3HW[:, :given]
    while frames.shape[1] < total:
        done = frames.shape[1]
        context = min(done, 4 * shown - 3)
        stop = min(total, done - context + 4 * WINDOW - 3)
        window = _window(truth, done - context, stop)
        window.rgb_BF3HW = torch.cat([frames[:, done - context :], window.rgb_BF3HW[:, context:]], 1)
        first = done - context
        made = make_clips(arm, specs, window, given=context, seed=seed + done, captions=captions, first=first)
        # Given frames are replaced by their reconstruction, as in all arms. Frames of earlier windows stay.
        fresh = 0 if done == given else context
        frames = torch.cat([frames[:, : done - context + fresh], made.frames[:, fresh:]], 1)
        seconds += made.seconds
    with torch.no_grad():
        return Made(frames=frames, disparity=None, latents=arm.model.encode(frames), seconds=seconds)


def _window(truth: world.Frames, start: int, stop: int) -> world.Frames:
    """Return some frames of a render, with the fields that rollouts use."""
    parts = {"rgb_BF3HW", "pose_BF34", "depth_BFHW", "ids_BFHW"}
    cut = {name: getattr(truth, name)[:, start:stop] for name in parts}
    return dataclasses.replace(truth, **cut, flow_BF2HW=None)
