"""Evaluation: deterministic samples of held-out prompts with fixed noise, scored, measured and shown."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from .data import Prompts, Row, columns
from .kernels import schedule_of
from .logging import write_samples
from .quality import clip_statistics, diversity
from .rollout import Sample, Sampler, Sampling, latent_shape
from .seeds import seed_of

if TYPE_CHECKING:
    from postgen.rewards import RewardResult, RewardRunner

    from .group import GroupTrainer

Rows = list[dict[str, float]]
"""One dict of numbers per sample; a missing reward is absent."""


class Evaluator:
    """Samples with the pipeline's own noise levels and Euler's steps (for models with alpha-bar: DDIM's).

    Args:
        trainer: what is evaluated; the average of the weights is swapped in by it.
        guidance: of the samples.
    """

    def __init__(self, trainer: GroupTrainer[Any], guidance: float) -> None:
        self.trainer, args = trainer, trainer.args
        denoiser = trainer.policy.denoiser
        shape = latent_shape(denoiser, trainer.size, trainer.device)
        schedule = schedule_of(denoiser, args.eval_num_inference_steps or args.num_inference_steps, shape)
        how = Sampling(kind="ode", guidance=guidance, size=trainer.size)
        # A meter of its own: what evaluation costs is no cost of training.
        meter = type(trainer.meter)(trainer.device)
        self.sampler = Sampler(denoiser, schedule, how, meter, trainer.device)

    def run(self, prompts: Prompts) -> dict[str, float]:
        """Return the means over all processes; the first of them writes the grid of samples."""
        trainer = self.trainer
        process, args = trainer.accelerator, trainer.args
        chosen = prompts.rows[: args.eval_prompts]
        numbers = list(range(len(chosen)))[process.process_index :: process.num_processes]
        rows: Rows = []
        metrics: list[tuple[dict[str, float], int]] = []
        shown: list[Tensor] = []
        per_batch = max(1, args.rollout_batch // args.num_generations_eval)
        for low in range(0, len(numbers), per_batch):
            part = numbers[low : low + per_batch]
            found, noted, clips = self._batch([chosen[number] for number in part], part)
            rows += found
            metrics.append((noted, len(found)))
            shown += clips[:: args.num_generations_eval][: args.eval_grid - len(shown)]
        if process.is_main_process and args.eval_grid:
            texts = [chosen[number]["prompt"] for number in numbers[: len(shown)]]
            write_samples(args.folder / "samples", trainer.global_step, shown, texts, trainer.policy.fps)
        return self.combined(gather_object([(rows, metrics, trainer.meter.read())]))

    def _batch(self, rows: Sequence[Row], numbers: Sequence[int]) -> tuple[Rows, dict[str, float], list[Tensor]]:
        trainer, count = self.trainer, self.trainer.args.num_generations_eval
        samples = [
            Sample(
                index=number * count + copy,
                prompt=place,
                initial=seed_of(trainer.args.seed, "eval", number, copy),
                step_seed=lambda step: step,
                start=0,
            )
            for place, number in enumerate(numbers)
            for copy in range(count)
        ]
        condition = trainer.embeddings.table(lambda place: rows[place])
        latents = self.sampler.draw(samples, condition, trainer.args.rollout_batch).clean
        clips = trainer.decode(latents)
        owners = [rows[sample.prompt] for sample in samples]
        result = trainer.score(owners, clips, latents)
        found = [clip_statistics(clip) for clip in clips]
        _enter(found, result, "rewards")
        weighted = result.weighted().tolist()
        for row, value in zip(found, weighted, strict=True):
            if value == value:
                row["reward"] = value
        if trainer.gold is not None:
            _enter(found, self._gold(trainer.gold, owners, clips), "gold")
        if count > 1:
            for row in found:
                row["diversity"] = diversity(latents, [sample.prompt for sample in samples])
        return found, result.metrics, clips

    def _gold(self, runner: RewardRunner, rows: Sequence[Row], clips: Sequence[Tensor]) -> RewardResult:
        return runner(
            [row["prompt"] for row in rows],
            clips,
            fps=self.trainer.policy.fps,
            trainer_state=self.trainer.callbacks.state,
            must_score=False,
            **columns(rows),
        )

    def combined(
        self, parts: list[tuple[Rows, list[tuple[dict[str, float], int]], dict[str, float]]]
    ) -> dict[str, float]:
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
        return means | self._watch(means)

    def _watch(self, means: dict[str, float]) -> dict[str, float]:
        """Compare the trained reward with the first gold reward."""
        trainer = self.trainer
        if trainer.gold is None or "reward" not in means:
            return {}
        gold = means.get(f"gold/{trainer.gold.names[0]}/mean")
        if gold is None:
            return {}
        hacked = trainer.hacking.see(means["reward"], gold)
        if hacked:
            warnings.warn(
                f"reward hacking? Over {trainer.hacking.parted} evaluations the reward rose to {means['reward']:.4g} "
                f"while {trainer.gold.names[0]} fell to {gold:.4g}",
                stacklevel=2,
            )
            if trainer.args.on_hacking == "stop":
                trainer.callbacks.control.should_training_stop = True
        return {"hacking": float(hacked)}


def _enter(rows: Rows, result: RewardResult, kind: str) -> None:
    for name in result.names:
        for row, value in zip(rows, result.column(name).tolist(), strict=True):
            if value == value:
                row[f"{kind}/{name}/mean"] = value


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())
