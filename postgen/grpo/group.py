"""What the trainers of the family share: rollouts of groups, their rewards and advantages, evaluation, the state."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from postgen.errors import UserError, shown
from postgen.rewards import RewardResult
from postgen.sampling.conditions import Conditions, Embeddings, Row
from postgen.sampling.meter import Meter
from postgen.sampling.sampler import Sample, Sampler, Sampling, Trajectories
from postgen.sampling.schedule import chosen_schedule
from postgen.sampling.seeds import seed_of
from postgen.training import Reason, TrainingConfig, TrainResult, Weights
from postgen.training.policy import Policy, load_policy
from postgen.training.prompts import Prompts

from .advantages import Advantages, best_and_worst, compute_advantages
from .batches import Batches
from .buffer import Buffer
from .card import Card, write_card
from .config import GroupConfig
from .cost import Plan, Work, bytes_of, estimate, report, trained_in
from .curves import Curves
from .evaluation import Evaluator, evaluation_sampler
from .guards import HackingGuard, check_columns, check_equal_calls, check_groups, load_rewards
from .logging import CompletionLog, write_samples
from .numbers import PromptNumber, RolloutNumber, SampleNumber
from .quality import diversity
from .rows import check_data
from .scoring import Rewards, Scoring, gathered, reward_metrics
from .state import G, KeptState

Metrics = dict[str, float | Tensor]


class GroupTrainer(KeptState[G]):
    """Rolls groups of samples out, scores them and hands micro-batches with advantages to `learn`.

    Args:
        model: a diffusers folder, a hub id, or a pipeline. What is not given, here and below, is taken from `args`.
        reward_funcs: what `postgen.rewards.get_reward` takes, one or several.
        args: the configuration.
        train_dataset: prompts, as in the configuration or as rows.
        eval_dataset: held-out prompts.
        peft_config: a `peft.LoraConfig`, instead of the one that `args` describes.
        callbacks: `transformers.TrainerCallback`s.
        eval_reward_funcs: gold rewards, only ever measured.

    Raises:
        UserError: no prompts or rewards, batches that do not divide, an unknown reward, sizes that the model
            cannot make.
    """

    config_class: ClassVar[type[TrainingConfig]] = GroupConfig

    def __init__(
        self,
        model: Any = None,
        reward_funcs: Rewards = (),
        args: G | None = None,
        train_dataset: str | Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: str | Iterable[Mapping[str, Any]] | None = None,
        peft_config: Any = None,
        callbacks: Iterable[TrainerCallback] = (),
        eval_reward_funcs: Rewards = (),
    ) -> None:
        if not isinstance(args, self.config_class):
            raise UserError(f"{type(self).__name__} needs args, a {self.config_class.__name__}, got {shown(args)}")
        super().__init__(args, callbacks)
        self.source, self._peft_config = args.model if model is None else model, peft_config
        train_dataset = args.train_dataset if train_dataset is None else train_dataset
        eval_dataset = args.eval_dataset if eval_dataset is None else eval_dataset
        if train_dataset is None:
            raise UserError("there are no prompts: give train_dataset")
        self.scoring = Scoring(args, reward_funcs, eval_reward_funcs, self.callbacks.state)
        self.runner, self.gold = self.scoring.runner, self.scoring.gold
        self.prompts = Prompts(train_dataset, "train_dataset", seed=args.seed, shuffle=args.shuffle_dataset)
        self.eval_prompts = None
        if eval_dataset is not None:
            self.eval_prompts = Prompts(eval_dataset, "eval_dataset", seed=args.seed, shuffle=False)
        elif self.gold is not None or args.evaluate_only or args.eval_steps or args.eval_on_start:
            raise UserError("eval_reward_funcs, eval_steps and the like need held-out prompts: give eval_dataset")
        check_columns([self.runner], self.prompts)
        check_columns([self.runner, self.gold], self.eval_prompts)
        check_data(args, self.source, self.prompts, self.eval_prompts, here=True)
        self.batches = Batches.of(args, self.accelerator.num_processes, self.accelerator.process_index)
        check_groups(self.runner, self.batches)
        self.micro = 0
        self.buffer: Buffer | None = None
        if self.sharded:
            evaluated = 0 if self.eval_prompts is None else min(args.eval_prompts, len(self.eval_prompts))
            check_equal_calls(self.batches.processes, evaluated, one_window=self.shares_rollout_window)
        self.meter = Meter(self.device, backward=3.0 if args.gradient_checkpointing else 2.0)
        self.hacking = HackingGuard(args.hacking_patience)
        self.curves = Curves(args.folder / "metrics.jsonl")

    @classmethod
    def from_config(cls, args: G) -> Self:
        """Return the trainer of a recipe."""
        return cls(args=args)

    # Hooks of the family.

    @abstractmethod
    def sampling(self) -> Sampling:
        """Return how rollouts are drawn."""

    @abstractmethod
    def window_start(self, rollout: RolloutNumber, prompt: PromptNumber, sample: SampleNumber) -> int:
        """Return the first stochastic step of a sample."""

    @abstractmethod
    def learn(self, rows: Tensor, first_update: bool) -> tuple[Tensor, Metrics]:
        """Return loss and metrics of some rows of `self.buffer`, as `training_step` does.

        Args:
            rows: (B,) row numbers.
            first_update: whether the policy is still the one that drew them.
        """

    @abstractmethod
    def work(self) -> Work:
        """Return what the method does with one sample; called after `prepare`."""

    @property
    def shares_rollout_window(self) -> bool:
        """Whether all samples of a rollout take the same steps through the network."""
        return True

    @property
    def needs_reference(self) -> bool:
        """Whether the loss asks for the model as it was before training."""
        return False

    @property
    def copies(self) -> int:
        """Copies of the trained weights that are kept beside them."""
        return int(self.args.ema_decay > 0) + int(self.needs_reference and self.policy.copies_reference)

    def prepare(self) -> None:
        """Do something once the models stand, before the first rollout and before a checkpoint is read."""

    @contextmanager
    def rollout_policy(self) -> Iterator[None]:
        """Inside, rollouts are drawn; a method may put other weights in."""
        yield

    def before_rollout(self) -> None:
        """Do something between two rollouts."""

    # The trainer's hooks.

    def train(self) -> TrainResult:
        """Run as `Trainer.train`; `dry_run` prints an estimate instead, `evaluate_only` the numbers it found."""
        if self.args.dry_run:
            return self._dry_run()
        result = super().train()
        if self.args.evaluate_only and self.accelerator.is_main_process:
            print("\n".join(f"{name:36s} {value:10.4g}" for name, value in result.metrics.items()))
        return result

    def build(self) -> Mapping[str, nn.Module]:
        """Load the model, add adapters, encode prompts."""
        args = self.args
        check_data(args, self.source, self.prompts, self.eval_prompts)
        self.policy: Policy = load_policy(self.source, args, args, self.device, self._peft_config)
        self.size = args.clip_size(self.policy.pipe, self.policy.defaults)
        self.fps = self.policy.rate(args.fps)
        evaluated = args.guidance_scale if args.eval_guidance_scale is None else args.eval_guidance_scale
        self.embeddings = Embeddings(
            self.policy.denoiser,
            size=self.size,
            guidance=max(args.guidance_scale, evaluated) > 1,
            negative_prompt=args.negative_prompt,
            keep_all=args.precompute_prompt_embeds,
            device=self.device,
        )
        if args.precompute_prompt_embeds:
            self.embeddings.encode(
                row for part in (self.prompts, self.eval_prompts) if part is not None for row in part.rows
            )
            self.policy.park_text_encoders()
        denoiser, steps = self.policy.denoiser, args.num_inference_steps
        shape = denoiser.latent_shape(**self.size)
        schedule = chosen_schedule(args.sigma_schedule, denoiser, self.policy.pipe, steps, shape, self.device)
        self.sampler = Sampler(denoiser, schedule, self.sampling(), self.meter, self.device)
        self.evaluator = Evaluator(
            args,
            evaluation_sampler(denoiser, args.eval_num_inference_steps or steps, evaluated, self.size, self.device),
            self.embeddings,
            self.meter,
            seed=args.seed,
            batch=args.rollout_batch,
            decode=self.decode,
            score=self.score,
            gold=None if self.gold is None else partial(self.scoring.score_gold, fps=self.fps),
        )
        self.prepare()
        if self.needs_reference:
            self.policy.check_reference(args.init_from)
        if not args.dry_run:
            load_rewards([self.runner, self.gold])
        return self.policy.modules

    def on_models_ready(self) -> None:
        """Keep a copy of the weights as the reference, where one is needed."""
        if self.needs_reference:
            self.policy.keep_reference()

    def training_step(self) -> tuple[Tensor, Metrics]:
        """Train on the next micro-batch, after a new rollout where the last one is used up."""
        position = self.micro % self.batches.per_rollout
        metrics = self._new_rollout() if position == 0 else {}
        size = self.batches.per_device
        low = position % self.batches.micro_batches * size
        rows = torch.arange(low, low + size, device=self.device)
        with self._networks(wrapped=True):
            loss, found = self.learn(rows, position < self.batches.accumulation)
        self.micro += 1
        return loss, {**metrics, **found}

    def evaluate(self) -> dict[str, float]:
        """Score deterministic samples of the held-out prompts; nothing without any."""
        if self.eval_prompts is None:
            return {}
        args, process = self.args, self.accelerator
        with self._networks(wrapped=False):
            found = self.evaluator.run(self.eval_prompts.rows, process.process_index, process.num_processes)
        if process.is_main_process:
            write_samples(args.folder / "samples", self.global_step, found.clips, found.prompts, self.fps)
        watched = {} if self.gold is None else self.hacking.watch(found.means, self.gold.names[0])
        if watched.get("hacking") and args.on_hacking == "stop":
            self.request_stop()
        return found.means | watched

    def export(self, folder: Path, weights: Weights) -> None:
        """Write the LoRA or the trained models, and a model card."""
        args, policy = self.args, self.policy
        policy.save(folder, weights)
        card = Card(
            source=self.source,
            pipeline=type(policy.pipe).__name__,
            trainer=type(self).__name__,
            method=args.method,
            step=self.global_step,
            lora=policy.adapter is not None,
            modules=policy.modules,
            rewards=list(zip(self.runner.names, self.runner.weights, strict=True)),
            prompts=len(self.prompts),
            train_dataset=args.train_dataset,
            settings=args.to_dict(),
        )
        write_card(card, self.curves, args.folder, folder)

    def backward(self, loss: Tensor) -> None:
        """Add gradients, and the time that takes."""
        with self.meter.time("transformer_seconds"):
            super().backward(loss)

    # A rollout.

    def row_of(self, rollout: RolloutNumber, prompt: PromptNumber) -> Row:
        """Return the row of a prompt of a rollout."""
        return self.prompts.at(rollout * self.batches.prompts + prompt)

    def conditions(self, rollout: RolloutNumber) -> Conditions:
        """Return the function from prompt numbers of a rollout to their stacked conditions."""
        return self.embeddings.table(lambda prompt: self.row_of(rollout, PromptNumber(prompt)))

    def _new_rollout(self) -> Metrics:
        """Draw, score and select the samples of the next rollout."""
        for module in self.policy.modules.values():
            module.eval()  # no dropout, neither here nor in training passes
        self.before_rollout()
        number = RolloutNumber(self.micro // self.batches.per_rollout)
        before, drawn = self.meter.read(), self.batches.mine()
        samples = [self._sample(number, index) for index in drawn]
        with self.meter.time("rollout_seconds"):
            paths = self.draw(number, samples)
        rows = [self.row_of(number, self.batches.prompt_of(index)) for index in drawn]
        clips = self.decode(paths.clean)
        with self.meter.time("reward_seconds"):
            result = self.score(rows, clips, paths.clean)
        everyone = gathered(result.values, drawn, self.batches.samples, self.global_step + 1)
        self.scoring.check_alive(everyone, self.global_step + 1)
        advantages = self.advantages(everyone)
        chosen = best_and_worst(advantages.unclipped, self.batches.group, self.batches.kept).tolist()
        row_of = {index: row for row, index in enumerate(drawn)}
        mine = [SampleNumber(index) for index in chosen if index in row_of]
        picked = torch.tensor([row_of[index] for index in mine], device=self.device)
        own = advantages.values[torch.tensor(mine)].to(self.device)
        self.buffer = Buffer(number, paths.rows(picked), own, [self.batches.prompt_of(index) for index in mine], mine)
        args = self.args
        if args.log_completions and self.accelerator.is_main_process and self.global_step % args.logging_steps == 0:
            values = [advantages.values[index].item() for index in drawn]
            log = CompletionLog(args.folder / "completions", args.num_completions_to_log, self.fps)
            log.write(self.global_step, rows, clips, result, values)
        spent = {key: value - before.get(key, 0.0) for key, value in self.meter.read().items()}
        metrics: Metrics = {**advantages.metrics(), **reward_metrics(result, spent)}
        metrics["diversity/latent_pairwise"] = diversity(paths.clean, [sample.prompt for sample in samples])
        return metrics

    def draw(self, number: RolloutNumber, samples: Sequence[Sample]) -> Trajectories:
        """Draw the samples of rollout `number`."""
        with self._networks(wrapped=False), self.rollout_policy():
            return self.sampler.draw(samples, self.conditions(number), self.args.rollout_batch)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Tensor]:
        """Turn latents into clips (F,3,H,W) in [0,1]."""
        size = self.args.decode_batch_size or self.args.rollout_batch
        with self.meter.time("decode_seconds"):
            return [clip for part in latents.split(size) for clip in self.policy.denoiser.decode(part)]

    def score(self, rows: Sequence[Row], clips: Sequence[Tensor], latents: Tensor) -> RewardResult:
        """Call the rewards on samples of this process."""
        return self.scoring.score(rows, clips, latents, fps=self.fps)

    def advantages(self, rewards: Tensor) -> Advantages:
        """Turn the rewards (N, K) of a whole rollout into advantages."""
        args = self.args
        return compute_advantages(
            rewards,
            torch.tensor(self.runner.weights),
            args.num_generations,
            aggregation=args.multi_objective_aggregation,
            scale=args.scale_rewards,
            clip=args.advantage_clip,
            eps=args.advantage_eps,
        )

    def _sample(self, number: RolloutNumber, index: SampleNumber) -> Sample:
        prompt, seed = self.batches.prompt_of(index), self.args.seed
        shared = self.args.share_initial_noise
        initial = ("initial", number, prompt, 0) if shared else ("initial", number, prompt, index + 1)
        return Sample(
            index=index,
            prompt=prompt,
            initial=seed_of(seed, *initial),
            step_seed=lambda step: seed_of(seed, "step", number, index, step),
            start=self.window_start(number, prompt, index),
        )

    # Networks.

    @contextmanager
    def _networks(self, *, wrapped: bool) -> Iterator[None]:
        """Let the denoiser call the networks that average gradients, or those inside, whose calls may be unequal."""
        table = self.policy.denoiser.transformers
        for name in self.policy.modules.keys() & self.models.keys():  # the models stand only once they are prepared
            table[name] = self.models[name] if wrapped else self.unaveraged(name)
        # In TF32 a convolution rounds by its batch size, and the policy's ratio would show that instead of learning.
        cudnn = torch.backends.cudnn
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic, allow_tf32=False):
            yield

    def _dry_run(self) -> TrainResult:
        """Load the model, print what the run would cost, and return without training."""
        modules = self.build()
        plan = Plan(
            batches=self.batches,
            work=self.work(),
            weights=bytes_of(self.policy.pipe.components.values()),
            trained=trained_in(modules.values()),
            copies=self.copies,
            latent=math.prod(self.policy.denoiser.latent_shape(**self.size)),
            clip=3 * math.prod(self.size.values()),
            backward=self.meter.backward,
            max_steps=self.args.max_steps,
        )
        numbers = estimate(plan)
        if self.accelerator.is_main_process:
            print(report(plan, numbers))
        return TrainResult(global_step=0, reason=Reason.DONE, metrics=numbers)
