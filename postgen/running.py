"""Call a pipeline for a job, and let others look on: after each step, at the latents and what they are going to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from postgen.compat import interrupt
from postgen.errors import UserError
from postgen.families.loading import RATES
from postgen.plug_ins import plug_ins_for_call

if TYPE_CHECKING:
    from torch import Tensor

    from postgen.generate import Job

StepCallback = Callable[[int, int], None]
"""Called after each denoising step with (steps done, steps in all)."""

CALL = ("width", "height", "num_frames", "num_inference_steps", "guidance_scale", "true_cfg_scale")
"""Numbers of a request that a pipeline's call takes under the same names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """A pipeline after one of its denoising steps."""

    done: int
    """Steps that are done."""
    total: int
    """Steps in all."""
    pipe: Any
    """The pipeline."""
    latents: Tensor
    """As they are now, noisy: in the pipeline's own form."""
    before: Tensor | None
    """As they were before this step; None at the first."""

    def clean(self) -> Tensor | None:
        """Return what the latents are going to be by the network's present estimate, of their shape.

        None where that is not known, as after the first step of most schedulers.
        """
        from postgen.sampling.clean import clean_estimate

        return clean_estimate(self.pipe.scheduler, self.before, self.latents, self.done - 1)


@dataclass(kw_only=True, slots=True)
class Watch:
    """Looks on while a video is made, and may end it early."""

    look: Callable[[Moment], None]
    """Called after each step. What it raises ends the call."""
    early: Callable[[], bool] = lambda: False
    """Asked after each step: whether to leave out the steps that follow and take the clean estimate for the video."""
    stopped_after: int | None = field(default=None, init=False)
    """Steps after which that was done; None where all were made."""
    latents: Tensor | None = field(default=None, init=False)
    """Of the finished video, in the pipeline's own form."""


def run(pipe: Any, job: Job, on_step: StepCallback | None = None, watch: Watch | None = None) -> Tensor:
    """Return the clip of a job, (F, 3, H, W) float32 in [0, 1] on the CPU.

    Args:
        pipe: from `postgen.generate.load`.
        job: what is asked for.
        on_step: called after each denoising step.
        watch: looks on; a pipeline whose call takes no callback shows nothing.

    Raises:
        UserError: the pipeline refuses the settings, or memory runs out.
    """
    import torch

    config = job.config
    total = config.num_inference_steps or 0
    before: list[Tensor] = []

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps = total or pipe.num_timesteps
        if on_step is not None:
            on_step(step + 1, steps)
        if watch is not None and "latents" in tensors:
            now, last = tensors["latents"], before[0] if before else None
            moment = Moment(done=step + 1, total=steps, pipe=pipe, latents=now, before=last)
            tensors = _watched(watch, moment, tensors)
            before[:] = [now]
        return tensors

    call = _call(job) | ({"callback_on_step_end": after_step} if "callback_on_step_end" in job.facts.arguments else {})
    generator = torch.Generator().manual_seed(config.seed)
    with refusals(job.facts.pipeline), plug_ins_for_call(pipe, job.plug_ins):
        frames = pipe(**call, generator=generator, output_type="pt").frames
    clip: Tensor = frames[0].float().cpu()
    return clip


def _watched(watch: Watch, moment: Moment, tensors: dict[str, Any]) -> dict[str, Any]:
    """Let somebody look, and end the call where he asks for it and the pipeline can; return what it goes on with."""
    watch.look(moment)
    watch.latents = moment.latents
    if moment.done == moment.total or watch.stopped_after is not None or not watch.early():
        return tensors
    if (clean := moment.clean()) is None or not interrupt(moment.pipe):
        return tensors
    watch.stopped_after, watch.latents = moment.done, clean
    return tensors | {"latents": clean}


@contextmanager
def refusals(pipeline: str) -> Iterator[None]:
    """Say in one line what a pipeline refuses, or that memory ran out.

    Args:
        pipeline: its name.

    Raises:
        UserError: instead of the errors of libraries.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "out of GPU memory: use --offload auto or model, a smaller size, fewer frames or bfloat16"
        ) from error
    except MemoryError as error:
        raise UserError("out of memory: use a smaller size or fewer frames") from error
    except RuntimeError as error:
        if not _no_memory(error):
            raise
        raise UserError("out of memory: use a smaller size or fewer frames") from error
    except ValueError as error:
        raise UserError(f"{pipeline} refuses: {' '.join(str(error).split())[:300]}") from error


def _no_memory(error: RuntimeError) -> bool:
    """Whether torch found no memory on the CPU, of which it has no class, or sizes that no memory has."""
    return any(text in str(error) for text in ("can't allocate memory", "Storage size calculation overflowed"))


def _call(job: Job) -> dict[str, Any]:
    """Return what the pipeline of a job is called with."""
    config, takes = job.config, job.facts.arguments
    call = {name: getattr(config, name) for name in ("prompt", "negative_prompt", *CALL) if name in takes}
    call = {name: value for name, value in call.items() if value is not None}
    rate = config.fps if config.fps is not None else job.facts.defaults.fps
    # A whole rate is an int, as the pipelines' own defaults are.
    call |= {name: int(rate) if rate == int(rate) else rate for name in RATES if name in takes}
    return call if config.image is None else {**call, "image": first_frame(config.image)}


def first_frame(path: str) -> Any:
    """Return the picture of a first frame.

    Raises:
        VideoError: it cannot be read.
    """
    from postgen.video import read_picture

    return read_picture(path)
