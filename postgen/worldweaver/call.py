"""Turn the arguments of a pipeline call into a session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from postgen.errors import UserError, check_number, shown
from postgen.families.installed import moved_by
from postgen.worldweaver.given import given_of
from postgen.worldweaver.model import WorldWeaverModel
from postgen.worldweaver.plan import DEFAULTS, check_switch, frames_of_latent, plan_of
from postgen.worldweaver.session import Session, Wanted, check_state
from postgen.worldweaver.state import Prompts, RolloutState
from postgen.worldweaver.told import embedded, encoded, timed

PLANNED = (*DEFAULTS, "overlap_history", "base_num_frames")
BEGUN = ("image", "video", "depth")
_LARGEST = 2**15
"""Largest height and width in pixels."""


def check_transformer(transformer: Any) -> None:
    """Check that a rollout can drive a transformer window by window.

    Raises:
        UserError: a cache of diffusers is enabled, or accelerate offloads the transformer.
    """
    if getattr(transformer, "is_cache_enabled", False):
        raise UserError(
            "a cache of diffusers is enabled on the transformer and reuses outputs of the previous step, but frames of"
            " a window are at different steps: call disable_cache() on the transformer"
        )
    if hook := moved_by(transformer):
        raise UserError(
            f"the transformer is offloaded ({hook}), but a rollout needs the weights on one device: load the pipeline"
            " without offloading"
        )


def session_of(
    model: WorldWeaverModel, said: Mapping[str, Any], settings: Mapping[str, Any], device: torch.device
) -> Session:
    """Begin a video, or continue from `said["state"]`.

    Args:
        model: the model.
        said: every argument of `WorldWeaverPipeline.stream`, by name; None: not set.
        settings: default settings of the model's adapter.
        device: of the latents.

    Raises:
        UserError: an argument is wrong.
    """
    if said["num_frames"] is not None:
        check_number("num_frames", said["num_frames"], 1, whole=True)
    if said["state"] is not None and not isinstance(said["state"], RolloutState):
        raise UserError(f"state must be a RolloutState from chunk.state or load_state, got {shown(said['state'])}")
    check_switch("return_depth", said["return_depth"])
    wanted = Wanted(num_frames=said["num_frames"], output_type=said["output_type"], depth=said["return_depth"])
    # A state determines all settings of the plan; without a state, fill them in.
    if said["state"] is not None:
        return _resumed(model, said, wanted, said["state"], device)
    asked = {name: said[name] for name in PLANNED}
    usual = DEFAULTS | dict(settings)
    height, width = (usual[name] if asked[name] is None else asked[name] for name in ("height", "width"))
    check_number("height", height, 1, _LARGEST, whole=True)
    check_number("width", width, 1, _LARGEST, whole=True)
    time = frames_of_latent(model, height, width)
    plan = plan_of(asked, settings, time)
    prompts = _prompts(model, said, plan.guidance, time)
    rows = len(prompts[0][1]["prompt"])
    given = given_of(model, rows, (height, width), *(said[name] for name in BEGUN))
    return Session.begin(model, plan, prompts, _generators(said["generator"], rows), wanted, given, device)


def _resumed(
    model: WorldWeaverModel, said: Mapping[str, Any], wanted: Wanted, state: RolloutState, device: torch.device
) -> Session:
    fixed = [name for name in (*PLANNED, *BEGUN) if name != "guidance_scale" and said[name] is not None]
    if fixed:
        raise UserError(f"{fixed[0]} is fixed by the state from which the video continues: omit it")
    check_state(model, state)
    guidance = said["guidance_scale"]
    if guidance is not None:
        check_number("guidance_scale", guidance, 0, 1000)
    scale = state.model["guidance"] if guidance is None else guidance
    if said["prompt"] is not None or said["prompt_embeds"] is not None:
        time = frames_of_latent(model, state.model["height"], state.model["width"])
        prompts = _prompts(model, said, scale, time)
    elif said["negative_prompt"] is not None or said["negative_prompt_embeds"] is not None:
        raise UserError(
            "a negative prompt was given without a prompt: give both, or omit both to keep those of the state"
        )
    else:
        prompts = state.prompts
        if scale > 1 and any("negative" not in told for _, told in prompts):
            raise UserError(
                "the state was made without guidance and has no negative prompt: give prompt and negative_prompt again"
            )
    generator = said["generator"]
    generators = state.generators if generator is None else _generators(generator, state.rows)
    return Session.resume(model, state, prompts, generators, wanted, float(scale), device)


def _prompts(model: WorldWeaverModel, said: Mapping[str, Any], guidance: float, time: int) -> Prompts:
    prompt, embeds = said["prompt"], said["prompt_embeds"]
    if (prompt is None) == (embeds is None):
        raise UserError("give either prompt or prompt_embeds, and not both")
    if embeds is None:
        if said["negative_prompt_embeds"] is not None:
            raise UserError("negative_prompt_embeds needs prompt_embeds: give negative_prompt with prompt")
        return encoded(model.denoiser, timed(prompt), said["negative_prompt"], guided=guidance > 1, time=time)
    if said["negative_prompt"] is not None:
        raise UserError("negative_prompt needs prompt: give negative_prompt_embeds with prompt_embeds")
    return embedded(model.denoiser, embeds, said["negative_prompt_embeds"], guided=guidance > 1)


def _generators(generator: torch.Generator | Sequence[torch.Generator] | None, rows: int) -> list[torch.Generator]:
    """Return one generator for each video; the state stores the generator of each video separately."""
    several = list(generator) if isinstance(generator, Sequence) else [] if generator is None else [generator]
    if wrong := [each for each in several if not isinstance(each, torch.Generator)]:
        raise UserError(
            f"generator must be a torch.Generator or a list with one for each video, got {shown(wrong[0])}"
        )
    if isinstance(generator, Sequence):
        if len(generator) != rows or len({id(each) for each in generator}) != rows:
            raise UserError(
                f"{len(generator)} generators for {rows} videos: give one torch.Generator, or a list with a different"
                " torch.Generator for each video"
            )
        return list(generator)
    if generator is not None and rows == 1:
        return [generator]
    device = None if generator is None else generator.device
    seeds = torch.randint(2**62, (rows,), generator=generator, device=device).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]
