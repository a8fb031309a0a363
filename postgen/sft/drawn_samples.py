"""Samples for held-out captions, drawn in each evaluation with fixed seeds, and their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerState

from postgen.families import Condition, Denoiser
from postgen.rewards import RewardRunner
from postgen.sampling.sampler import Sample
from postgen.sampling.seeds import seed_of
from postgen.training.prompts import columns
from postgen.training.samples import evaluation_sampler, write_samples

from .buckets import Bucket
from .config import SftEvaluationConfig


@dataclass(frozen=True, slots=True)
class Wanted:
    """A sample to draw."""

    number: int
    """Number of the held-out clip, from which the seed is made."""
    prompt: str
    """Its caption."""
    columns: dict[str, Any]
    """Columns of the clip's row, for rewards."""
    bucket: Bucket
    """Size and length of the sample."""
    condition: Condition
    """Its condition, of batch size 1, with the negative prompt if the guidance scale is above 1."""


class DrawnSamples:
    """Draws samples and scores them.

    Args:
        args: settings.
        denoiser: the trained model.
        guidance: guidance scale.
        fps: frames per second.
        batch: number of samples drawn together.
        device: device of the latents and of the rewards.
        state: state of the run, for rewards that depend on the step.

    Raises:
        UserError: a reward is unknown.
    """

    def __init__(
        self,
        args: SftEvaluationConfig,
        denoiser: Denoiser,
        *,
        guidance: float,
        fps: float,
        batch: int,
        device: torch.device,
        state: TrainerState,
    ) -> None:
        self.args, self.denoiser, self.guidance, self.fps = args, denoiser, guidance, fps
        self.batch, self.device, self.state = batch, device, state
        # Learned rewards are not tested on mps, where torch lacks some operations.
        where = torch.device("cpu") if device.type == "mps" else device
        self.runner = RewardRunner(args.eval_reward_funcs, device=where) if args.eval_reward_funcs else None

    def run(self, wanted: Sequence[Wanted], seed: int, folder: Path, step: int, *, writes: bool) -> dict[str, float]:
        """Draw and score samples, and write a grid of them; every process must call this.

        Args:
            wanted: the samples of this process.
            seed: seed of the run.
            folder: folder of the pictures.
            step: steps of the run so far.
            writes: whether this process writes the grid, of its own samples.

        Returns:
            `rewards/NAME/mean` over the samples of all processes that have a score, and `rewards/NAME/failed`, the
            number of those without.
        """
        clips = {each.number: clip for part in _by_bucket(wanted) for each, clip in self._drawn(part, seed)}
        if writes and self.args.eval_grid:
            first = next((clips[each.number].shape for each in wanted), None)
            # A grid has places of one size.
            shown = [each for each in wanted if clips[each.number].shape == first][: self.args.eval_grid]
            pictures, prompts = [clips[each.number] for each in shown], [each.prompt for each in shown]
            write_samples(folder, step, pictures, prompts, self.fps)
        if self.runner is None:
            return {}
        scores = self._scored(wanted, [clips[each.number] for each in wanted]) if wanted else {}
        return _means(self.runner.names, gather_object([scores]))

    @torch.no_grad()
    def _drawn(self, part: Sequence[Wanted], seed: int) -> list[tuple[Wanted, Tensor]]:
        """Draw samples of one bucket, as clips (F, 3, H, W) in [0, 1]."""
        bucket = part[0].bucket
        size = {"num_frames": bucket.num_frames, "height": bucket.height, "width": bucket.width}
        steps = self.args.eval_num_inference_steps
        sampler = evaluation_sampler(self.denoiser, steps, self.guidance, size, self.device)
        samples = [
            Sample(index=n, prompt=n, initial=seed_of(seed, "eval", each.number), step_seed=int, start=0)
            for n, each in enumerate(part)
        ]

        def told(numbers: Sequence[int]) -> Condition:
            found = [part[number].condition for number in numbers]
            return {name: torch.cat([one[name] for one in found]) for name in found[0]}

        latents = sampler.draw(samples, told, self.batch).clean
        clips = [clip for few in latents.split(self.batch) for clip in self.denoiser.decode(few)]
        return list(zip(part, clips, strict=True))

    def _scored(self, wanted: Sequence[Wanted], clips: Sequence[Tensor]) -> dict[str, list[float]]:
        assert self.runner is not None
        prompts = [each.prompt for each in wanted]
        more = columns([each.columns for each in wanted])
        result = self.runner(prompts, clips, fps=self.fps, trainer_state=self.state, must_score=False, **more)
        return {name: result.column(name).tolist() for name in result.names}


def _by_bucket(wanted: Sequence[Wanted]) -> list[list[Wanted]]:
    found: dict[Bucket, list[Wanted]] = {}
    for each in wanted:
        found.setdefault(each.bucket, []).append(each)
    return list(found.values())


def _means(names: Sequence[str], parts: Sequence[dict[str, list[float]]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in names:
        values = [value for part in parts for value in part.get(name, ())]
        known = [value for value in values if value == value]
        found[f"rewards/{name}/failed"] = float(len(values) - len(known))
        if known:
            found[f"rewards/{name}/mean"] = sum(known) / len(known)
    return found
