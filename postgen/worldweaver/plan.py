"""Fill in and check the settings of a long video before anything is computed.

Settings count frames of the video (pixel frames). The plan counts latent frames. The first latent frame stands for
one video frame; each later one stands for as many video frames as the autoencoder compresses into one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from postgen.errors import UserError, check_number, shown
from postgen.sampling.schedule import Schedule, linspace_schedule, schedule_of
from postgen.worldweaver.latent_scale import scale_words
from postgen.worldweaver.levels import MODALITIES
from postgen.worldweaver.memory import MemoryBank, capacity_for
from postgen.worldweaver.model import WorldWeaverModel
from postgen.worldweaver.rollout import Rollout
from postgen.worldweaver.segments import Segments
from postgen.worldweaver.selection import Policy
from postgen.worldweaver.state import RolloutState

DEFAULTS: dict[str, Any] = {
    "height": 480,
    "width": 832,
    "num_inference_steps": 30,
    "guidance_scale": 5.0,
    "causal_block_size": 3,
    "ar_step": 10,
    "history_sizes": (4, 2),
    "keep_first_frame": True,
    "addnoise_condition": 120.0,
    "memory_policy": "logspace",
    "flow_shift": None,
}
"""Values of settings that neither the call nor the adapter sets."""
TRAINED: dict[str, Any] = {"flow_noise": 0.5, "depth_in_memory": True}
"""Settings that only an adapter sets, under the names that `method: worldweaver` writes: the noise level of the flow
in long memory, and whether memory frames include depth and flow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The checked settings of a rollout."""

    height: int
    """Pixels."""
    width: int
    """Pixels."""
    segments: Segments
    frames: int
    """F, latent frames of a group."""
    guidance: float
    long: int
    """Latent frames of long memory, including the sink (the first frame of the video)."""
    short: int
    sink: int
    mem_noise: float
    """Noise level of RGB in long memory."""
    flow_noise: float
    """Noise level of flow in long memory."""
    shows_depth: bool
    """Whether memory frames include depth and flow beside RGB."""
    policy: str | Policy
    shift: float | None
    """Shift of the noise levels; None: the shift of the scheduler."""

    def bank(self, modalities: int, rows: int) -> MemoryBank:
        """Return an empty memory bank for `rows` videos with these settings."""
        least = self.long + max(1, self.short) + 1
        capacity = max(least, capacity_for(self.policy, rows, long=self.long, short=self.short, sink=self.sink))
        return MemoryBank(
            self.long,
            self.short,
            self.sink,
            capacity,
            self.policy,
            self.mem_noise,
            flow_noise=self.flow_noise,
            modalities=modalities,
            hidden=() if self.shows_depth else MODALITIES[1:modalities],
        )


def plan_of(given: Mapping[str, Any], settings: Mapping[str, Any], time: int) -> Plan:
    """Fill in and check the settings of a call.

    Args:
        given: settings of the call, by the names of `DEFAULTS` and also `overlap_history` and `base_num_frames`;
            None: not set.
        settings: settings of the adapter, by the names of `DEFAULTS` and `TRAINED`. Missing settings have the values
            of `DEFAULTS` and `TRAINED`.
        time: number of video frames of a latent frame.

    Raises:
        UserError: a number out of its range, or settings that contradict each other.
    """
    # Precedence: the call, then the adapter, then the defaults.
    own = {name: settings[name] for name in DEFAULTS if settings.get(name) is not None}
    trained = TRAINED | {name: settings[name] for name in TRAINED if settings.get(name) is not None}
    usual = DEFAULTS | own
    said = {name: value for name, value in given.items() if value is not None}
    asked = usual | said
    check_number("guidance_scale", asked["guidance_scale"], 0, 1000)
    check_number("addnoise_condition", asked["addnoise_condition"], 0, 1000)
    check_number("causal_block_size", asked["causal_block_size"], 1, whole=True)
    check_switch("keep_first_frame", asked["keep_first_frame"])
    check_switch("depth_in_memory", trained["depth_in_memory"])
    if asked["flow_shift"] is not None:
        check_number("flow_shift", asked["flow_shift"], 0.01, 1000)
    segments = _segments(asked, usual, "ar_step" in said)
    long, short = _history(said, usual, segments.groups * asked["causal_block_size"], time)
    return Plan(
        height=asked["height"],
        width=asked["width"],
        segments=segments,
        frames=asked["causal_block_size"],
        guidance=float(asked["guidance_scale"]),
        long=long,
        short=short,
        sink=min(1, long) if asked["keep_first_frame"] else 0,
        mem_noise=asked["addnoise_condition"] / 1000,
        flow_noise=trained["flow_noise"],
        shows_depth=trained["depth_in_memory"],
        policy=asked["memory_policy"],
        shift=asked["flow_shift"],
    )


def check_switch(name: str, value: object) -> None:
    """Check that a setting is True or False.

    Raises:
        UserError: the value is neither.
    """
    if not isinstance(value, bool):
        raise UserError(f"{name} must be True or False, got {shown(value)}")


def rollout_of(model: WorldWeaverModel, plan: Plan, device: torch.device) -> Rollout:
    """Return the rollout for a plan.

    Raises:
        UserError: the noise levels of the scheduler depend on the size of the clip, and the plan has no shift.
    """
    schedule = _schedule(model, plan, device)
    return Rollout(model, schedule, plan.segments, frames=plan.frames, guidance=plan.guidance, alpha_bar=_bars(model))


def rollout_again(model: WorldWeaverModel, state: RolloutState, guidance: float, device: torch.device) -> Rollout:
    """Return a rollout that continues from a state, with the noise levels and segments of the state."""
    bars, sigmas = _bars(model), state.sigmas.to(device)
    kind = model.denoiser.prediction_type
    schedule = Schedule(sigmas, kind, None if bars is None else bars(sigmas.float()).double())
    return Rollout(model, schedule, state.segments, frames=state.frames, guidance=guidance, alpha_bar=bars)


def frames_of_latent(model: WorldWeaverModel, height: int, width: int) -> int:
    """Return the number of video frames for which each latent frame after the first stands.

    Raises:
        UserError: a size that the model does not support, or a network that merges several latent frames into a token.
    """
    denoiser: Any = model.denoiser
    if (patch := denoiser.patch[0]) != 1:
        raise UserError(
            f"this model merges {patch} latent frames into one token: a rollout needs a model with a temporal patch"
            " size of 1"
        )
    step = denoiser.multiples[2]
    return int(step // (model.latent_shape(1 + step, height, width)[1] - 1))


def identity_of(model: WorldWeaverModel) -> dict[str, Any]:
    """Return the identity of a model for a state: class and modality names, and a hash of sampled weight values."""
    pipe: Any = getattr(model.denoiser, "pipe", None)
    digest = hashlib.sha256()
    for module in (model.transformer, model.embedder, pipe.vae):
        _look_at(module, digest.update)
    return {
        "pipeline": type(pipe).__name__,
        "modalities": scale_words(model.modalities, model.latent_scale),
        "dtype": str(model.transformer.dtype).removeprefix("torch."),
        "weights": digest.hexdigest()[:16],
    }


def _look_at(module: nn.Module, put: Any) -> None:
    for name, value in sorted(module.state_dict().items()):
        if value.is_meta:
            raise UserError(f"the weight {name} is offloaded: load the model without offloading")
        flat = value.detach().flatten()
        places = [place * (len(flat) - 1) // 3 for place in range(4)] if len(flat) else []
        put(f"{name} {tuple(value.shape)}".encode() + flat[places].float().cpu().numpy().tobytes())


def _segments(asked: Mapping[str, Any], usual: Mapping[str, Any], said: bool) -> Segments:
    steps = asked["num_inference_steps"]
    check_number("num_inference_steps", steps, 2, whole=True)
    if said:
        return Segments.staggered(steps, asked["ar_step"])
    # Keep the number of groups in flight of the usual settings, because the model was trained with that number.
    lag = usual["ar_step"]
    check_number("ar_step", lag, 0, whole=True)
    check_number("num_inference_steps", usual["num_inference_steps"], 2, whole=True)
    groups = math.ceil(usual["num_inference_steps"] / lag) if lag else 1
    if steps < groups:
        raise UserError(
            f"num_inference_steps={steps} is less than {groups} groups in flight: give at least {groups}, or set"
            " ar_step"
        )
    return Segments.of(steps, groups)


def _history(said: Mapping[str, Any], usual: Mapping[str, Any], flying: int, time: int) -> tuple[int, int]:
    """Return the number of latent frames in long and in short memory."""
    names = [name for name in ("overlap_history", "base_num_frames") if name in said]
    if names and "history_sizes" in said:
        raise UserError(f"history_sizes and {names[0]} set the same value: give one of them")
    sizes = said.get("history_sizes", usual["history_sizes"])
    if not isinstance(sizes, list | tuple) or len(sizes) != 2:
        raise UserError(f"history_sizes must be two numbers (long memory, short memory), got {shown(sizes)}")
    long, short = sizes
    check_number("history_sizes", long, 0, whole=True)
    check_number("history_sizes", short, 0, whole=True)
    for name in names:
        check_number(name, said[name], 1, whole=True)
    if "overlap_history" in said:
        short = (said["overlap_history"] - 1) // time + 1
    if "base_num_frames" in said:
        window = (said["base_num_frames"] - 1) // time + 1
        long = window - flying - short
        if long < 0:
            least = (flying + short - 1) * time + 1
            raise UserError(
                f"base_num_frames={said['base_num_frames']} is a window of {window} latent frames, but {flying} frames"
                f" in flight and {short} frames of short memory must fit into the window: give at least {least}"
            )
    return long, short


def _schedule(model: WorldWeaverModel, plan: Plan, device: torch.device) -> Schedule:
    denoiser: Any = model.denoiser
    steps, shift = plan.segments.steps, plan.shift
    if denoiser.prediction_type != "flow":
        if shift is not None:
            raise UserError(
                f"flow_shift applies to flow models only, and this model predicts {denoiser.prediction_type}: omit it"
            )
        schedule = schedule_of(denoiser, steps)
        return Schedule(schedule.sigmas.to(device), schedule.prediction_type, schedule.alpha_bars)
    config = denoiser.pipe.scheduler.config
    if shift is None and not config.get("use_dynamic_shifting", False):
        shift = config.get("flow_shift", config.get("shift"))
    if shift is None:
        raise UserError(
            "the noise levels of this scheduler depend on the size of a clip: give flow_shift, or load an adapter that"
            " has it"
        )
    return linspace_schedule(denoiser, steps, float(shift), device)


def _bars(model: WorldWeaverModel) -> Any:
    return None if model.denoiser.prediction_type == "flow" else model.denoiser.alpha_bar
