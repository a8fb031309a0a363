"""What arms are held against that needs no adapter: the embedded model as it is, and its autoencoder.

`sliding`: windows of the length that the model was trained with, 9 latents, of which the first N are the last N of the
window before, at level 0; the model was trained with a level for each latent. Clean latents go on as they are, as in
diffusers' SkyReels-V2 with diffusion forcing. `sliding_pixels`: the same, but the last 4 N - 3 frames are decoded and
encoded again, so that a window begins with a latent of one frame, as all clips of training do: what one does with
diffusers' own pipelines of Wan. `ceiling`: the true clip after the autoencoder, which is the best that any can do.
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
"""Names of arms without a folder."""
WINDOW = 9
"""Latents that the embedded model was trained with."""
CONTEXT = 5
"""N: latents of the 17 frames that arms are given."""


def kind_of(name: str) -> str | None:
    """Return which of `KINDS` an arm's name says; None is an arm with an adapter.

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
        device: where to.
        pipe: instead of the embedded model.
        steps: of a window.
        context: N, 1 to 8; None is 5.

    Raises:
        UserError: a context that leaves nothing to make.
    """
    shown = CONTEXT if context is None else context
    check_number("context", shown, 1, WINDOW - 1, whole=True)
    made, defaults = load_model(embedded_model() if pipe is None else pipe, ModelConfig(), device)
    widened(made, ("rgb",))
    with torch.random.fork_rng(devices=[]):
        # Its last layer is zero: it adds nothing.
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
    """Return the clips of an arm of `stock_arm`; arguments as of `make_clips`.

    Raises:
        UserError: a kind that there is not.
    """
    if kind == "sliding":
        return make_clips(arm, specs, truth, given=given, seed=seed, captions=captions)
    if kind == "sliding_pixels":
        return _encoded_again(arm, specs, truth, given, seed, captions)
    if kind == "ceiling":
        latents = given_latents(arm, truth, truth.rgb_BF3HW.shape[1])[0]
        with torch.no_grad():
            return Made(frames=arm.model.decode(latents), disparity=None, latents=latents, seconds=0.0)
    raise UserError(f"an arm without a folder is one of {', '.join(KINDS)}, got {kind}")


def _encoded_again(
    arm: Arm, specs: Sequence[world.Spec], truth: world.Frames, given: int, seed: int, captions: str
) -> Made:
    """Window after window, each a video of its own that begins with the last frames of the one before."""
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
        # Of given frames the autoencoder's round trip, as of all arms; what was handed out stays.
        fresh = 0 if done == given else context
        frames = torch.cat([frames[:, : done - context + fresh], made.frames[:, fresh:]], 1)
        seconds += made.seconds
    with torch.no_grad():
        return Made(frames=frames, disparity=None, latents=arm.model.encode(frames), seconds=seconds)


def _window(truth: world.Frames, start: int, stop: int) -> world.Frames:
    """Return some frames of a render, as far as rollouts look at them."""
    parts = {"rgb_BF3HW", "pose_BF34", "depth_BFHW", "ids_BFHW"}
    cut = {name: getattr(truth, name)[:, start:stop] for name in parts}
    return dataclasses.replace(truth, **cut, flow_BF2HW=None)
