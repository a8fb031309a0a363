"""Evaluation: deterministic samples of held-out prompts with fixed noise are scored and measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch import Tensor

from postgen.sampling.conditions import Embeddings, Row
from postgen.sampling.meter import Meter
from postgen.sampling.sampler import Sample, Sampler
from postgen.sampling.seeds import seed_of

from .config import EvaluationConfig
from .exact_motion import ExactMotion
from .quality import appearance, clip_statistics, diversity, diversity_of_prompts

if TYPE_CHECKING:
    from postgen.rewards import RewardResult

Rows = list[dict[str, float]]
"""One dict of metrics per sample; a reward without a score has no key."""

Looks = dict[int, dict[str, Tensor]]
"""Position of a prompt -> `appearance` of its first sample."""

Decode = Callable[[Tensor], list[Tensor]]
"""Latents (B, ...) -> B clips (F, 3, H, W) in [0, 1]."""

Score = Callable[[Sequence[Row], Sequence[Tensor], Tensor], "RewardResult"]
"""Prompt rows, clips and their latents -> rewards."""

Gold = Callable[[Sequence[Row], Sequence[Tensor]], "RewardResult"]
"""Prompt rows and clips -> held-out rewards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Results of an evaluation."""

    means: dict[str, float]
    """Means of the metrics over the samples of all processes."""
    clips: list[Tensor]
    """The first sample of some prompts of this process, for the grid in `samples/`."""
    prompts: list[str]
    """The prompt of each clip."""


class Evaluator:
    """Draws and scores samples of held-out prompts.

    Args:
        args: numbers of prompts and samples.
        sampler: a sampler without stochastic steps.
        embeddings: encodes the prompt rows.
        meter: the meter of the training; its totals are reported with each evaluation.
        seed: seed of the run.
        batch: number of samples drawn together.
        decode: decodes latents into clips.
        score: computes the rewards that training uses.
        gold: computes the held-out rewards; None if there are none.
        exact: motion of the exact clips; None if it is not compared.
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
        exact: ExactMotion | None = None,
    ) -> None:
        self.args, self.sampler, self.embeddings, self.meter = args, sampler, embeddings, meter
        self.seed, self.batch = seed, batch
        self.decode, self.score, self.gold, self.exact = decode, score, gold, exact

    def run(self, rows: Sequence[Row], rank: int = 0, processes: int = 1) -> Evaluation:
        """Evaluate the first `eval_prompts` rows; every process must call this and draws its share of them.

        Args:
            rows: all held-out prompt rows.
            rank: rank of this process.
            processes: number of processes that share the rows.
        """
        args = self.args
        chosen = rows[: args.eval_prompts]
        numbers = list(range(len(chosen)))[rank::processes]
        results: Rows = []
        metrics: list[tuple[dict[str, float], int]] = []
        shown: list[Tensor] = []
        looks: Looks = {}
        per_batch = max(1, self.batch // args.num_generations_eval)
        for low in range(0, len(numbers), per_batch):
            part = numbers[low : low + per_batch]
            found, noted, clips = self._batch([chosen[number] for number in part], part)
            results += found
            metrics.append((noted, len(found)))
            firsts = clips[:: args.num_generations_eval]
            shown += firsts[: args.eval_grid - len(shown)]
            looks |= zip(part, map(appearance, firsts), strict=True)
        means = combined(gather_object([(results, metrics, self.meter.read())]))
        if "motion_exact" in means:  # the mean of logarithms
            means["motion_exact"] = math.exp(means["motion_exact"])
        return Evaluation(
            means=means | _diversity(gather_object([looks])),
            clips=shown,
            prompts=[chosen[number]["prompt"] for number in numbers[: len(shown)]],
        )

    def _batch(self, rows: Sequence[Row], numbers: Sequence[int]) -> tuple[Rows, dict[str, float], list[Tensor]]:
        """Draw and score the samples of some prompts.

        Args:
            rows: prompt rows of this batch. `Sample.prompt` below is an index into this list.
            numbers: position of each row among the held-out rows; seeds depend on it, and not on the batch.

        Returns:
            Metrics of each sample, metrics of the batch from the rewards, and the clips.
        """
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
        if self.exact is not None:
            places = [numbers[sample.prompt] for sample in samples]
            moved = [row["motion"] for row in found]
            for row, ratio in zip(found, self.exact.log_ratios(moved, owners, places), strict=True):
                if ratio is not None:
                    row["motion_exact"] = ratio
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


def _diversity(parts: Sequence[Looks]) -> dict[str, float]:
    """Return the diversity over the prompts of all processes."""
    looks = {number: look for part in parts for number, look in part.items()}
    if len(looks) < 2:
        return {}
    found = diversity_of_prompts([looks[number] for number in sorted(looks)])
    return {f"diversity/{name}": value for name, value in found.items()}


def combined(parts: list[tuple[Rows, list[tuple[dict[str, float], int]], dict[str, float]]]) -> dict[str, float]:
    """Return the metrics' means over the samples of all processes, and the sums of the processes' training costs.

    Args:
        parts: for each process its samples, its batch metrics with their sample counts, and the totals of its meter.
    """
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
