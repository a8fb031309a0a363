"""What a long video is asked to be: the settings of a call, filled in and checked before anything is computed.

Frames of settings are those of the video (pixels); what follows from them counts latent frames, of which the first
stands for one frame and each other one for as many as the autoencoder puts together.
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
from postgen.worldweaver.memory import MemoryBank
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
"""What holds where neither the call nor the adapter says anything."""
TRAINED: dict[str, Any] = {"flow_noise": 0.5, "depth_in_memory": True}
"""What only an adapter says, as `method: worldweaver` writes it: the noise level of the flow of long memory, and
whether memory shows depth and flow at all."""
CAPACITY = 64
"""Latent frames that are stored, of which the memory is chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A checked rollout."""

    height: int
    """Pixels."""
    width: int
    """Pixels."""
    segments: Segments
    frames: int
    """F, latent frames of a group."""
    guidance: float
    long: int
    """Frames of long memory, the sink among them."""
    short: int
    sink: int
    mem_noise: float
    """Noise level of the RGB of long memory."""
    flow_noise: float
    """Noise level of its flow."""
    shows_depth: bool
    """Whether memory shows more than RGB."""
    policy: str | Policy
    shift: float | None
    """Of the noise levels; None is the scheduler's."""

    def bank(self, modalities: int) -> MemoryBank:
        """Return an empty memory."""
        capacity = max(CAPACITY, self.long + max(1, self.short) + 1)
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
        given: by the names of `DEFAULTS`, and `overlap_history` and `base_num_frames`; None is not said.
        settings: of the adapter, by the names of `DEFAULTS` and `TRAINED`; what it does not say is as there.
        time: frames of a latent frame.

    Raises:
        UserError: a number out of its range, or settings that contradict each other.
    """
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
    """Hold a setting to True and False.

    Raises:
        UserError: it is neither.
    """
    if not isinstance(value, bool):
        raise UserError(f"{name} must be True or False, got {shown(value)}")


def rollout_of(model: WorldWeaverModel, plan: Plan, device: torch.device) -> Rollout:
    """Return the rollout of a plan.

    Raises:
        UserError: the noise levels of the scheduler depend on the size, and the plan has no shift.
    """
    schedule = _schedule(model, plan, device)
    return Rollout(model, schedule, plan.segments, frames=plan.frames, guidance=plan.guidance, alpha_bar=_bars(model))


def rollout_again(model: WorldWeaverModel, state: RolloutState, guidance: float, device: torch.device) -> Rollout:
    """Return a rollout with which a state goes on."""
    bars, sigmas = _bars(model), state.sigmas.to(device)
    kind = model.denoiser.prediction_type
    schedule = Schedule(sigmas, kind, None if bars is None else bars(sigmas.float()).double())
    return Rollout(model, schedule, state.segments, frames=state.frames, guidance=guidance, alpha_bar=bars)


def frames_of_latent(model: WorldWeaverModel, height: int, width: int) -> int:
    """Return the frames that a latent frame, but for the first, stands for.

    Raises:
        UserError: a size that the model cannot make, or a network that takes several latent frames as one token.
    """
    denoiser: Any = model.denoiser
    if (patch := denoiser.patch[0]) != 1:
        raise UserError(f"{patch} latent frames in a row are one token of this model: groups cannot be cut there")
    step = denoiser.multiples[2]
    return int(step // (model.latent_shape(1 + step, height, width)[1] - 1))


def identity_of(model: WorldWeaverModel) -> dict[str, Any]:
    """Return what a state says of its model: names, and a number for some of the values of every weight."""
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
    # As many groups in flight as with the usual numbers: that is what was trained.
    lag = usual["ar_step"]
    check_number("ar_step", lag, 0, whole=True)
    check_number("num_inference_steps", usual["num_inference_steps"], 2, whole=True)
    groups = math.ceil(usual["num_inference_steps"] / lag) if lag else 1
    if steps < groups:
        raise UserError(
            f"num_inference_steps={steps} for {groups} groups in flight: give at least {groups}, or ar_step"
        )
    return Segments.of(steps, groups)


def _history(said: Mapping[str, Any], usual: Mapping[str, Any], flying: int, time: int) -> tuple[int, int]:
    """Return the frames of long and short memory."""
    names = [name for name in ("overlap_history", "base_num_frames") if name in said]
    if names and "history_sizes" in said:
        raise UserError(f"history_sizes and {names[0]} say the same: give one of them")
    sizes = said.get("history_sizes", usual["history_sizes"])
    if not isinstance(sizes, list | tuple) or len(sizes) != 2:
        raise UserError(f"history_sizes must be two numbers, of long and of short memory, got {shown(sizes)}")
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
                f"base_num_frames={said['base_num_frames']} is a window of {window} latent frames, and {flying} are in"
                f" flight behind {short} of short memory: give at least {least}"
            )
    return long, short


def _schedule(model: WorldWeaverModel, plan: Plan, device: torch.device) -> Schedule:
    denoiser: Any = model.denoiser
    steps, shift = plan.segments.steps, plan.shift
    if denoiser.prediction_type != "flow":
        if shift is not None:
            raise UserError(f"flow_shift is for flow models, this predicts {denoiser.prediction_type}: leave it out")
        schedule = schedule_of(denoiser, steps)
        return Schedule(schedule.sigmas.to(device), schedule.prediction_type, schedule.alpha_bars)
    config = denoiser.pipe.scheduler.config
    if shift is None and not config.get("use_dynamic_shifting", False):
        shift = config.get("flow_shift", config.get("shift"))
    if shift is None:
        raise UserError(
            "the noise levels of this scheduler depend on the size of a clip: give flow_shift, or an adapter with it"
        )
    return linspace_schedule(denoiser, steps, float(shift), device)


def _bars(model: WorldWeaverModel) -> Any:
    return None if model.denoiser.prediction_type == "flow" else model.denoiser.alpha_bar
