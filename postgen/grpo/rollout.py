"""Rollouts of groups: samples are drawn, decoded and scored, and put into the buffer with their advantages."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.rewards import RewardResult, RewardRunner
from postgen.sampling.conditions import Conditions, Row
from postgen.sampling.sampler import Sample, Trajectories
from postgen.sampling.seeds import seed_of

from .advantages import Advantages, best_and_worst, compute_advantages
from .braked import Braked
from .buffer import Buffer
from .logging import CompletionLog
from .motion import log_motions, motion_metrics, motions
from .numbers import PromptNumber, RolloutNumber, SampleNumber
from .quality import diversity
from .scoring import Scoring, gathered, in_order, reward_metrics
from .state import G

Metrics = dict[str, float | Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """The samples of a rollout that this process drew; all sequences have one entry per sample, in the same order."""

    number: RolloutNumber
    """Number of the rollout in the run."""
    samples: list[SampleNumber]
    """Sample numbers."""
    paths: Trajectories
    """Latents and log-probabilities."""
    rows: list[Row]
    """Prompt rows."""
    clips: list[Tensor]
    """Clips (F, 3, H, W) in [0, 1]."""
    result: RewardResult
    """Rewards."""


class Rollouts(Braked[G]):
    """Base of the reward trainers: draws and scores rollouts. `GroupTrainer` sets the attributes."""

    scoring: Scoring
    """The rewards of the run."""
    runner: RewardRunner
    """The rewards that training uses."""
    fps: float
    """Frames per second of a clip."""

    # Hooks that DanceGRPO and DiffusionNFT implement.

    @property
    def loss_per_reward(self) -> bool:
        """Whether each reward has its own loss, so that the buffer keeps the positive parts of the advantages."""
        return False

    @abstractmethod
    def window_start(self, rollout: RolloutNumber, prompt: PromptNumber, sample: SampleNumber) -> int:
        """Return the step index of the first stochastic step of a sample."""

    @contextmanager
    def rollout_policy(self) -> Iterator[None]:
        """Enclose the drawing of a rollout; a method may swap other weights in."""
        yield

    def before_rollout(self) -> None:
        """Act before a rollout is drawn, for example update an old policy."""

    # A rollout.

    def row_of(self, rollout: RolloutNumber, prompt: PromptNumber) -> Row:
        """Return the prompt row (columns of the data set) of a prompt of a rollout."""
        return self.prompts.at(rollout * self.batches.prompts + prompt)

    def conditions(self, rollout: RolloutNumber) -> Conditions:
        """Return a function from the prompt numbers of a rollout to their stacked conditions."""
        return self.embeddings.table(lambda prompt: self.row_of(rollout, PromptNumber(prompt)))

    def _new_rollout(self) -> Metrics:
        """Draw and score the samples of the next rollout, put those to train on into the buffer, return metrics."""
        for module in self.policy.modules.values():
            module.eval()  # no dropout, neither here nor in training passes
        self.before_rollout()
        before = self.meter.read()
        drawn = self._drawn(RolloutNumber(self.micro // self.batches.per_rollout))
        # Rewards and advantages are in the order of sample numbers, over all processes.
        everyone = gathered(drawn.result.values, drawn.samples, self.batches.samples, self.global_step + 1)
        self.scoring.check_alive(everyone, self.global_step + 1)
        motion = in_order(motions(drawn.clips)[:, None], drawn.samples, self.batches.samples)[:, 0]
        advantages = self.advantages(everyone, motion, drawn.number)
        self.buffer = self._kept(drawn, advantages, motion)
        self._log_completions(drawn, advantages)
        spent = {key: value - before.get(key, 0.0) for key, value in self.meter.read().items()}
        group = self.batches.group
        metrics: Metrics = {**advantages.metrics(), **reward_metrics(drawn.result, spent, everyone, group)}
        if self.size["num_frames"] > 1:
            metrics |= motion_metrics(motion, advantages.plain, advantages.values, group)
        prompts = [self.batches.prompt_of(sample) for sample in drawn.samples]
        metrics["diversity/latent_pairwise"] = diversity(drawn.paths.clean, prompts)
        return metrics

    def _drawn(self, number: RolloutNumber) -> Drawn:
        """Draw, decode and score the samples of this process."""
        mine = self.batches.mine()
        with self.meter.time("rollout_seconds"):
            paths = self.draw(number, [self._sample(number, sample) for sample in mine])
        rows = [self.row_of(number, self.batches.prompt_of(sample)) for sample in mine]
        clips = self.decode(paths.clean)
        with self.meter.time("reward_seconds"):
            result = self.score(rows, clips, paths.clean)
        return Drawn(number=number, samples=mine, paths=paths, rows=rows, clips=clips, result=result)

    def choose(self, advantages: Advantages, motion: Tensor) -> Tensor:
        """Return the numbers of the samples to train on; `motion` (N,) is that of the clips of the whole rollout."""
        return best_and_worst(advantages.unclipped, self.batches.group, self.batches.kept)

    def _kept(self, drawn: Drawn, advantages: Advantages, motion: Tensor) -> Buffer:
        """Return the buffer with those samples of this process that are trained on."""
        chosen = self.choose(advantages, motion).tolist()
        row_of = {sample: row for row, sample in enumerate(drawn.samples)}
        mine = [SampleNumber(sample) for sample in chosen if sample in row_of]
        picked = torch.tensor([row_of[sample] for sample in mine], device=self.device)
        own = advantages.values[torch.tensor(mine)].to(self.device)
        gains = advantages.gains[torch.tensor(mine)].to(self.device) if self.loss_per_reward else None
        prompts = [self.batches.prompt_of(sample) for sample in mine]
        return Buffer(drawn.number, drawn.paths.rows(picked), own, prompts, mine, gains)

    def _log_completions(self, drawn: Drawn, advantages: Advantages) -> None:
        args = self.args
        if args.log_completions and self.accelerator.is_main_process and self.global_step % args.logging_steps == 0:
            values = [advantages.values[sample].item() for sample in drawn.samples]
            log = CompletionLog(args.folder / "completions", args.num_completions_to_log, self.fps)
            log.write(self.global_step, drawn.rows, drawn.clips, drawn.result, values)

    def draw(self, number: RolloutNumber, samples: Sequence[Sample]) -> Trajectories:
        """Draw the given samples of rollout `number`; the rows of the result are in their order."""
        with self._networks(wrapped=False), self.rollout_policy():
            return self.sampler.draw(samples, self.conditions(number), self.args.rollout_batch)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Tensor]:
        """Decode latents (n, ...) into n clips (F, 3, H, W) in [0, 1]."""
        size = self.args.decode_batch_size or self.args.rollout_batch
        with self.meter.time("decode_seconds"):
            return [clip for part in latents.split(size) for clip in self.policy.denoiser.decode(part)]

    def score(self, rows: Sequence[Row], clips: Sequence[Tensor], latents: Tensor) -> RewardResult:
        """Compute the rewards of samples of this process, given their prompt rows, clips and clean latents."""
        return self.scoring.score(rows, clips, latents, fps=self.fps)

    def advantages(self, rewards: Tensor, motion: Tensor, rollout: RolloutNumber) -> Advantages:
        """Compute advantages from the rewards (N, K) and the motion (N,) of a whole rollout, by sample number."""
        args = self.args
        found = compute_advantages(
            rewards,
            torch.tensor(self.runner.weights),
            args.num_generations,
            aggregation=args.multi_objective_aggregation,
            scale=args.scale_rewards,
            clip=args.advantage_clip,
            clip_per=args.advantage_clip_per,
            eps=args.advantage_eps,
            dead_zone=args.rank_dead_zone,
            log_motion=log_motions(motion),
            kappa=args.motion_residual,
        )
        if not args.shuffle_advantages:
            return found
        return found.shuffled([seed_of(args.seed, "shuffle", rollout, p) for p in range(self.batches.prompts)])

    def _sample(self, number: RolloutNumber, sample: SampleNumber) -> Sample:
        prompt, seed = self.batches.prompt_of(sample), self.args.seed
        shared = self.args.share_initial_noise
        initial = ("initial", number, prompt, 0) if shared else ("initial", number, prompt, sample + 1)
        return Sample(
            index=sample,
            prompt=prompt,
            initial=seed_of(seed, *initial),
            step_seed=lambda step: seed_of(seed, "step", number, sample, step),
            start=self.window_start(number, prompt, sample),
        )
