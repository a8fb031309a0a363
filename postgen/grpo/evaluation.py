"""Evaluation: deterministic samples of held-out prompts with fixed noise, scored and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch import Tensor

from postgen.families import Denoiser
from postgen.sampling.conditions import Embeddings, Row
from postgen.sampling.meter import Meter
from postgen.sampling.sampler import Sample, Sampler, Sampling
from postgen.sampling.schedule import schedule_of
from postgen.sampling.seeds import seed_of

from .config import EvaluationConfig
from .quality import clip_statistics, diversity

if TYPE_CHECKING:
    from postgen.rewards import RewardResult

Rows = list[dict[str, float]]
"""One dict of numbers per sample; a missing reward is absent."""

Decode = Callable[[Tensor], list[Tensor]]
"""Latents -> clips."""

Score = Callable[[Sequence[Row], Sequence[Tensor], Tensor], "RewardResult"]
"""Rows, clips and their latents -> rewards."""

Gold = Callable[[Sequence[Row], Sequence[Tensor]], "RewardResult"]
"""Rows and clips -> held-out rewards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What an evaluation found."""

    means: dict[str, float]
    """Over the samples of all processes."""
    clips: list[Tensor]
    """The first sample of some prompts of this process, to be shown."""
    prompts: list[str]
    """Their prompts."""


def evaluation_sampler(
    denoiser: Denoiser, steps: int, guidance: float, size: dict[str, int], device: torch.device
) -> Sampler:
    """Return a sampler with the pipeline's own noise levels and Euler's steps (for models with alpha-bar: DDIM's).

    Args:
        denoiser: what is evaluated.
        steps: their number.
        guidance: scale of classifier-free guidance.
        size: `num_frames`, `height` and `width`.
        device: of the latents.
    """
    schedule = schedule_of(denoiser, steps, denoiser.latent_shape(**size))
    how = Sampling(kind="ode", guidance=guidance, size=size)
    # A meter of its own: what evaluation costs is no cost of training.
    return Sampler(denoiser, schedule, how, Meter(device), device)


class Evaluator:
    """Draws and scores samples of held-out prompts.

    Args:
        args: how many samples.
        sampler: draws them; one without stochastic steps.
        embeddings: conditions of rows.
        meter: of the training, whose cost so far is reported.
        seed: of the run.
        batch: samples that are drawn at a time.
        decode: makes clips of latents.
        score: the rewards that are trained on.
        gold: held-out rewards.
    """

    def __init__(
        self,
        args: EvaluationConfig,
        sampler: Sampler,
        embeddings: Embeddings,
        meter: Meter,
        *,
        seed: int,
        batch: int,
        decode: Decode,
        score: Score,
        gold: Gold | None,
    ) -> None:
        self.args, self.sampler, self.embeddings, self.meter = args, sampler, embeddings, meter
        self.seed, self.batch = seed, batch
        self.decode, self.score, self.gold = decode, score, gold

    def run(self, rows: Sequence[Row], rank: int = 0, processes: int = 1) -> Evaluation:
        """Evaluate the first rows; every process calls this and draws its share of them.

        Args:
            rows: held-out prompts.
            rank: of this process.
            processes: how many share the rows.
        """
        args = self.args
        chosen = rows[: args.eval_prompts]
        numbers = list(range(len(chosen)))[rank::processes]
        results: Rows = []
        metrics: list[tuple[dict[str, float], int]] = []
        shown: list[Tensor] = []
        per_batch = max(1, self.batch // args.num_generations_eval)
        for low in range(0, len(numbers), per_batch):
            part = numbers[low : low + per_batch]
            found, noted, clips = self._batch([chosen[number] for number in part], part)
            results += found
            metrics.append((noted, len(found)))
            shown += clips[:: args.num_generations_eval][: args.eval_grid - len(shown)]
        return Evaluation(
            means=combined(gather_object([(results, metrics, self.meter.read())])),
            clips=shown,
            prompts=[chosen[number]["prompt"] for number in numbers[: len(shown)]],
        )

    def _batch(self, rows: Sequence[Row], numbers: Sequence[int]) -> tuple[Rows, dict[str, float], list[Tensor]]:
        count = self.args.num_generations_eval
        samples = [
            Sample(
                index=number * count + copy,
                prompt=prompt,
                initial=seed_of(self.seed, "eval", number, copy),
                step_seed=lambda step: step,
                start=0,
            )
            for prompt, number in enumerate(numbers)
            for copy in range(count)
        ]
        condition = self.embeddings.table(lambda prompt: rows[prompt])
        latents = self.sampler.draw(samples, condition, self.batch).clean
        clips = self.decode(latents)
        owners = [rows[sample.prompt] for sample in samples]
        result = self.score(owners, clips, latents)
        found = [clip_statistics(clip) for clip in clips]
        _enter(found, result, "rewards")
        weighted = result.weighted().tolist()
        for row, value in zip(found, weighted, strict=True):
            if value == value:
                row["reward"] = value
        if self.gold is not None:
            _enter(found, self.gold(owners, clips), "gold")
        if count > 1:
            for row in found:
                row["diversity"] = diversity(latents, [sample.prompt for sample in samples])
        return found, result.metrics, clips


def combined(parts: list[tuple[Rows, list[tuple[dict[str, float], int]], dict[str, float]]]) -> dict[str, float]:
    """Return means over the samples of all processes, and the sums of what these have spent on training."""
    rows = [row for found, _, _ in parts for row in found]
    names = dict.fromkeys(name for row in rows for name in row)
    means = {name: _mean([row[name] for row in rows if name in row]) for name in names}
    noted = [pair for _, metrics, _ in parts for pair in metrics]
    for name in dict.fromkeys(name for values, _ in noted for name in values):
        pairs = [(values[name], count) for values, count in noted if name in values]
        means[name] = sum(value * count for value, count in pairs) / sum(count for _, count in pairs)
    means["samples"] = float(len(rows))
    for name in ("forward_equivalents", "transformer_seconds"):
        means[f"cost/{name}"] = sum(spent[name] for _, _, spent in parts)
    return means


def _enter(rows: Rows, result: RewardResult, kind: str) -> None:
    for name in result.names:
        for row, value in zip(rows, result.column(name).tolist(), strict=True):
            if value == value:
                row[f"{kind}/{name}/mean"] = value


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())
