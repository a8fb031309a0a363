"""Call the pipeline of a job, with callbacks that can inspect the latents after each denoising step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from postgen.compat import interrupt
from postgen.enhancing import enhanced
from postgen.errors import UserError
from postgen.families.loading import RATES
from postgen.plug_ins import plug_ins_for_call

if TYPE_CHECKING:
    from torch import Tensor

    from postgen.generate import Job

StepCallback = Callable[[int, int], None]
"""Callback after each denoising step, with (steps done, all steps)."""

CALL = ("width", "height", "num_frames", "num_inference_steps", "guidance_scale", "true_cfg_scale")
"""Numeric settings of a request that have the same name as an argument of the pipeline's `__call__`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """State of a pipeline after a denoising step."""

    done: int
    """Number of steps done."""
    total: int
    """Number of all steps."""
    pipe: Any
    """The pipeline."""
    latents: Tensor
    """Noisy latents after this step, in the shape that the pipeline uses."""
    before: Tensor | None
    """Noisy latents before this step; None after the first step."""

    def clean(self) -> Tensor | None:
        """Return the network's current estimate of the clean latents, in the shape of `latents`.

        Returns None if the estimate cannot be computed, for example after the first step of most schedulers.
        """
        from postgen.sampling.clean import clean_estimate

        return clean_estimate(self.pipe.scheduler, self.before, self.latents, self.done - 1)


@dataclass(kw_only=True, slots=True)
class Watch:
    """Observer of the generation of a video, which can also stop it early."""

    look: Callable[[Moment], None]
    """Callback after each step. An exception of this callback ends the call of the pipeline."""
    early: Callable[[], bool] = lambda: False
    """Callback after each step. If it returns True, the remaining steps are skipped, and the video is decoded from the
    current clean estimate."""
    stopped_after: int | None = field(default=None, init=False)
    """Number of steps after which the generation was stopped early; None: it was not stopped."""
    latents: Tensor | None = field(default=None, init=False)
    """Latents of the finished video, in the shape that the pipeline uses."""


def run(pipe: Any, job: Job, on_step: StepCallback | None = None, watch: Watch | None = None) -> Tensor:
    """Run the pipeline of a job, and return the clip: (F, 3, H, W) float32 in [0, 1] on the CPU.

    Args:
        pipe: the pipeline, from `postgen.generate.load`.
        job: the job.
        on_step: callback after each denoising step.
        watch: observer of the generation. It is not called for a pipeline without `callback_on_step_end`.

    Raises:
        UserError: the pipeline refuses the settings, or memory runs out.
    """
    import torch

    job = enhanced(job)
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
    """Call the observer after a step, stop the pipeline if the observer requests it, and return the step's tensors."""
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
    """Context manager that converts a ValueError of a pipeline, and out-of-memory errors, to a `UserError`.

    Args:
        pipeline: class name of the pipeline, for the message.

    Raises:
        UserError: the pipeline refuses the settings, or memory runs out.
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
        raise UserError(f"{pipeline} refuses the settings: {' '.join(str(error).split())[:300]}") from error


def _no_memory(error: RuntimeError) -> bool:
    """Return whether an error of torch means that CPU memory is too small; torch has no exception class for this."""
    return any(text in str(error) for text in ("can't allocate memory", "Storage size calculation overflowed"))


def _call(job: Job) -> dict[str, Any]:
    """Return the keyword arguments for the call of the pipeline of a job."""
    config, takes = job.config, job.facts.arguments
    call = {name: getattr(config, name) for name in ("prompt", "negative_prompt", *CALL) if name in takes}
    call = {name: value for name, value in call.items() if value is not None}
    if config.enhanced_prompt is not None and "prompt" in takes:
        call["prompt"] = config.enhanced_prompt
    rate = config.fps if config.fps is not None else job.facts.defaults.fps
    # A whole frame rate is passed as an int, like the pipelines' own defaults.
    call |= {name: int(rate) if rate == int(rate) else rate for name in RATES if name in takes}
    return call if config.image is None else {**call, "image": first_frame(config.image)}


def first_frame(path: str) -> Any:
    """Read the image of a first frame.

    Raises:
        VideoError: the file cannot be read.
    """
    from postgen.video import read_picture

    return read_picture(path)
