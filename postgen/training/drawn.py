"""Latents to train a student on: sampled once by its teacher for a list of prompts and kept in a folder, or given by
the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families.video_calls import RANGES
from postgen.sampling.conditions import Conditions
from postgen.sampling.sampler import Sample, Sampler
from postgen.sampling.seeds import seed_of
from postgen.settings import Part
from postgen.tensor_files import read_tensors
from postgen.training.latent_files import LatentFiles
from postgen.training.logging import Progress
from postgen.training.transfer import to_device


@dataclass(kw_only=True)
class DrawnConfig(Part):
    """Settings of the trajectories that a teacher samples.

    Raises:
        UserError: a value has the wrong type or lies outside its range.
    """

    num_frames: int
    """Frames of the teacher's clips; 1 for image models."""

    height: int
    """Height in pixels."""

    width: int
    """Width in pixels."""

    num_inference_steps: int = 16
    """Steps of a trajectory. Each step has one noise level."""

    guidance_scale: float = 1.0
    """Guidance scale of the trajectories; values up to 1 switch guidance off."""

    negative_prompt: str = ""
    """Negative prompt of rows that have none of their own."""

    batch_size: int = 1
    """Prompts that go through the teacher together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_frames", "height", "width", "num_inference_steps", "guidance_scale"):
            self.require_in(RANGES[name], name)
        self.require(self.batch_size >= 1, "batch_size", "at least 1")
        self.require(self.num_inference_steps >= 2, "num_inference_steps", "at least 2")

    @property
    def size(self) -> dict[str, int]:
        """The values of `num_frames`, `height` and `width`."""
        return {"num_frames": self.num_frames, "height": self.height, "width": self.width}


def check_teacher(latents: Tensor, prompts: Sequence[int]) -> None:
    """Check that the latents sampled by a teacher are finite.

    Args:
        latents: floating-point latents, (prompts, ...).
        prompts: numbers of the prompts, for the error message.

    Raises:
        UserError: some latents are not finite.
    """
    bad = [prompt for prompt, row in zip(prompts, latents, strict=True) if not row.isfinite().all()]
    if bad:
        raise UserError(
            f"the teacher's own latents are not finite for prompt {bad[0]} (counted from 0)"
            f"{f' and {len(bad) - 1} more' if len(bad) > 1 else ''}: the teacher overflows in its dtype, or its"
            " weights are damaged. Run `postgen generate` with this prompt to see the result, and load the model in"
            " bfloat16 or float32"
        )


class Drawn:
    """Latents of every prompt, sampled by the teacher: the final latents, or the latents before every step too.

    Each batch always holds the same prompts, so the content of a file depends neither on the number of processes nor
    on where a run was interrupted.

    Args:
        folder: the folder of the latents.
        sampler: the sampler of the teacher.
        prompts: number of prompts; each prompt has its own initial noise.
        batch: number of prompts that are sampled together.
        seed: seed of the noise.
        steps: whether to keep the latents before each of the S steps and the final ones, S + 1 in all; False keeps the
            final ones only.
        said: JSON values that identify everything else that determines the latents (teacher, prompts, size).
    """

    def __init__(
        self, folder: Path, sampler: Sampler, prompts: int, *, batch: int, seed: int, steps: bool, said: dict[str, Any]
    ) -> None:
        self.sampler, self.seed = sampler, seed
        last = sampler.schedule.steps
        self.keep = (*range(last + 1),) if steps else (last,)
        said = {"prompts": prompts, "batch": batch, "seed": seed, "kept": len(self.keep), **said}
        self.files = LatentFiles(folder, prompts, batch, {**said, "sigmas": sampler.schedule.sigmas.tolist()})

    def make(self, conditions: Conditions, own: Sequence[int], *, progress: bool) -> None:
        """Sample the missing latents of some files. The network must be in evaluation mode.

        Args:
            conditions: the conditions of the prompts, by prompt number.
            own: numbers of the files (`files.chunks`) that this process makes.
            progress: whether to show a progress bar.

        Raises:
            UserError: the folder holds latents of another run, or the sampled latents are not finite.
        """
        self.files.check()
        missing = set(self.files.missing())
        bar = Progress(step=0, max_steps=len(own), shown=progress, name="draw")
        for chunk in own:
            if chunk in missing:
                self.files.write(chunk, self._draw(chunk, conditions))
            bar.step()
        bar.close()

    def complete(self) -> bool:
        """Whether the latents of all prompts exist, including the parts of other processes."""
        return not self.files.missing()

    def at(self, prompt: int, step: int) -> Tensor:
        """Return the latents of a prompt before a step, in float32 on the CPU.

        Args:
            prompt: number of the prompt.
            step: index of the step; the number of steps selects the final latents.

        Raises:
            UserError: the file is missing or damaged.
        """
        return self.files.at(prompt, self.keep.index(step))

    def finished(self, prompts: Sequence[int], device: torch.device) -> Tensor:
        """Return the final latents of prompts, (B, ...), in float32 on a device."""
        return stacked(self, prompts, [self.sampler.schedule.steps] * len(prompts), device)

    def _draw(self, chunk: int, conditions: Conditions) -> Tensor:
        prompts = self.files.items(chunk)
        samples = [
            Sample(index=n, prompt=n, initial=seed_of(self.seed, "initial", 0, n), step_seed=int, start=0)
            for n in prompts
        ]
        kept = self.sampler.draw(samples, conditions, self.files.batch, keep=self.keep).kept
        assert kept is not None
        check_teacher(kept, prompts)
        return kept


class Given:
    """Final latents that the user provides, one for each prompt, in memory.

    Args:
        place: a safetensors file with a tensor `latents`, (N, ...).
        prompts: N, the number of prompts.
        shape: shape of the latents of one prompt.

    Raises:
        UserError: the file cannot be read, or its tensor is missing, has another shape, or is not finite.
    """

    def __init__(self, place: str | Path, prompts: int, shape: Sequence[int]) -> None:
        found = read_tensors(Path(place), f"latents: {place} cannot be read").get("latents")
        if found is None:
            raise UserError(f"latents: {place} holds no tensor named latents")
        if tuple(found.shape) != (prompts, *shape):
            raise UserError(
                f"latents: {place} has the shape {tuple(found.shape)}, but {prompts} prompts of this size need"
                f" {(prompts, *shape)}, one row for each prompt of train_dataset"
            )
        if not bool(found.isfinite().all()):
            raise UserError(f"latents: {place} holds values that are not finite")
        self._latents = found

    def finished(self, prompts: Sequence[int], device: torch.device) -> Tensor:
        """Return the final latents of prompts, (B, ...), in float32 on a device."""
        return to_device(self._latents[list(prompts)], device).float()


def stacked(drawn: Drawn, prompts: Sequence[int], steps: Sequence[int], device: torch.device) -> Tensor:
    """Return the latents of several prompts, each before its step, (B, ...), on a device."""
    return torch.stack([drawn.at(prompt, step) for prompt, step in zip(prompts, steps, strict=True)]).to(device)
