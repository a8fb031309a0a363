"""Base of the reward trainers: rollouts of groups, their rewards and advantages, evaluation, export."""

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
    """Draws rollouts of groups of samples, scores them, and passes micro-batches with advantages to `learn`.

    Arguments that are None or empty are taken from `args`.

    Args:
        model: a diffusers folder, a hub id, or a pipeline.
        reward_funcs: one or several rewards, as `postgen.rewards.get_reward` takes them.
        args: the configuration.
        train_dataset: training prompts: a source as in the configuration, or rows.
        eval_dataset: held-out prompts, of the same kinds.
        peft_config: a `peft.LoraConfig`; None uses the one that `args` describes.
        callbacks: `transformers.TrainerCallback`s.
        eval_reward_funcs: held-out (gold) rewards, which are only measured.

    Raises:
        UserError: there are no prompts or rewards, batch sizes do not divide, a reward is unknown, or the model cannot
            make clips of the given sizes.
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
        self.scoring = Scoring(args, reward_funcs, eval_reward_funcs, self.callbacks.state, self.device)
        self.runner, self.gold = self.scoring.runner, self.scoring.gold
        self.prompts = Prompts(train_dataset, "train_dataset", seed=args.seed, shuffle=args.shuffle_dataset)
        self.eval_prompts = None
        if eval_dataset is not None:
            self.eval_prompts = Prompts(eval_dataset, "eval_dataset", seed=args.seed, shuffle=False)
        elif self.gold is not None or args.evaluate_only or args.eval_steps or args.eval_on_start:
            raise UserError(
                "eval_reward_funcs, eval_steps, eval_on_start and evaluate_only need held-out prompts:"
                " give eval_dataset"
            )
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
        """Return the trainer of a recipe, which has only its configuration."""
        return cls(args=args)

    # Hooks that DanceGRPO and DiffusionNFT implement.

    @abstractmethod
    def sampling(self) -> Sampling:
        """Return the settings with which rollouts are drawn."""

    @abstractmethod
    def window_start(self, rollout: RolloutNumber, prompt: PromptNumber, sample: SampleNumber) -> int:
        """Return the step index of the first stochastic step of a sample."""

    @abstractmethod
    def learn(self, rows: Tensor, first_update: bool) -> tuple[Tensor, Metrics]:
        """Return loss and metrics of a micro-batch, as `training_step` does.

        Args:
            rows: (B,) rows of `self.buffer`.
            first_update: whether the policy has not changed since it drew these samples.
        """

    @abstractmethod
    def work(self) -> Work:
        """Return how many passes and kept latents one sample costs, for the estimate of a dry run, after `prepare`."""

    @property
    def shares_rollout_window(self) -> bool:
        """Whether all samples of a rollout take the same steps through the network."""
        return True

    @property
    def needs_reference(self) -> bool:
        """Whether the loss needs the reference policy, the model before training."""
        return False

    @property
    def copies(self) -> int:
        """Number of copies of the trained weights that are kept (average, reference), for the cost estimate."""
        return int(self.args.ema_decay > 0) + int(self.needs_reference and self.policy.copies_reference)

    def prepare(self) -> None:
        """Set up the method once the models are loaded, before a checkpoint is read and before the first rollout."""

    @contextmanager
    def rollout_policy(self) -> Iterator[None]:
        """Enclose the drawing of a rollout; a method may swap other weights in."""
        yield

    def before_rollout(self) -> None:
        """Act before a rollout is drawn, for example update an old policy."""

    # Hooks of `Trainer`.

    def train(self) -> TrainResult:
        """Run `Trainer.train`. `dry_run` prints a cost estimate instead; `evaluate_only` also prints the metrics."""
        if self.args.dry_run:
            return self._dry_run()
        result = super().train()
        if self.args.evaluate_only and self.accelerator.is_main_process:
            print("\n".join(f"{name:36s} {value:10.4g}" for name, value in result.metrics.items()))
        return result

    def build(self) -> Mapping[str, nn.Module]:
        """Load the model, add adapters, encode prompts, make sampler and evaluator; return the trained modules."""
        args = self.args
        check_data(args, self.source, self.prompts, self.eval_prompts)
        self.policy: Policy = load_policy(self.source, args, args, self.device, self._peft_config)
        self.size = args.clip_size(self.policy.pipe, self.policy.defaults)
        self.fps = self.policy.rate(args.fps)
        evaluated = args.guidance_scale if args.eval_guidance_scale is None else args.eval_guidance_scale
        self.embeddings = Embeddings(
            self.policy.denoiser,
            size=self.size,
            guidance=max(args.guidance_scale, args.reference_guidance, evaluated) > 1,
            negative_prompt=args.negative_prompt,
            keep_all=args.precompute_prompt_embeds,
            device=self.device,
        )
        if args.precompute_prompt_embeds:  # afterwards the text encoders are not needed on the device
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
        """Keep a copy of the weights as the reference policy, if the loss needs one."""
        if self.needs_reference:
            self.policy.keep_reference()

    def training_step(self) -> tuple[Tensor, Metrics]:
        """Compute the loss of the next micro-batch. Draws a new rollout first if the last one is used up."""
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
        """Score deterministic samples of the held-out prompts; an empty dict if there are no held-out prompts."""
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
        """Write the LoRA or the trained models, and a model card, into an export folder."""
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
        """Run the backward pass, and add its time to the meter."""
        with self.meter.time("transformer_seconds"):
            super().backward(loss)

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
        number = RolloutNumber(self.micro // self.batches.per_rollout)
        # `drawn` holds the sample numbers of this process; samples, paths, rows and clips are in the same order.
        before, drawn = self.meter.read(), self.batches.mine()
        samples = [self._sample(number, sample) for sample in drawn]
        with self.meter.time("rollout_seconds"):
            paths = self.draw(number, samples)
        rows = [self.row_of(number, self.batches.prompt_of(sample)) for sample in drawn]
        clips = self.decode(paths.clean)
        with self.meter.time("reward_seconds"):
            result = self.score(rows, clips, paths.clean)
        # Rewards, advantages and `chosen` are in the order of sample numbers, over all processes.
        everyone = gathered(result.values, drawn, self.batches.samples, self.global_step + 1)
        self.scoring.check_alive(everyone, self.global_step + 1)
        advantages = self.advantages(everyone)
        chosen = self.choose(advantages, clips).tolist()
        row_of = {sample: row for row, sample in enumerate(drawn)}
        mine = [SampleNumber(sample) for sample in chosen if sample in row_of]
        picked = torch.tensor([row_of[sample] for sample in mine], device=self.device)
        own = advantages.values[torch.tensor(mine)].to(self.device)
        prompts = [self.batches.prompt_of(sample) for sample in mine]
        self.buffer = Buffer(number, paths.rows(picked), own, prompts, mine)
        args = self.args
        if args.log_completions and self.accelerator.is_main_process and self.global_step % args.logging_steps == 0:
            values = [advantages.values[sample].item() for sample in drawn]
            log = CompletionLog(args.folder / "completions", args.num_completions_to_log, self.fps)
            log.write(self.global_step, rows, clips, result, values)
        spent = {key: value - before.get(key, 0.0) for key, value in self.meter.read().items()}
        metrics: Metrics = {**advantages.metrics(), **reward_metrics(result, spent)}
        metrics["diversity/latent_pairwise"] = diversity(paths.clean, [sample.prompt for sample in samples])
        return metrics

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

    def advantages(self, rewards: Tensor) -> Advantages:
        """Compute advantages from the rewards (N, K) of a whole rollout, in the order of sample numbers."""
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

    def choose(self, advantages: Advantages, clips: Sequence[Tensor]) -> Tensor:
        """Return the sample numbers of a rollout to train on; `clips` are those of this process."""
        return best_and_worst(advantages.unclipped, self.batches.group, self.batches.kept)

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

    # Networks.

    @contextmanager
    def _networks(self, *, wrapped: bool) -> Iterator[None]:
        """Choose which networks the denoiser calls: the prepared models, or the modules without gradient averaging.

        Processes must call prepared (`wrapped`) models equally often.
        """
        table = self.policy.denoiser.transformers
        for name in self.policy.modules.keys() & self.models.keys():  # `models` is empty before they are prepared
            table[name] = self.models[name] if wrapped else self.unaveraged(name)
        # TF32 convolutions round differently for different batch sizes, which would move the ratio away from 1.
        cudnn = torch.backends.cudnn
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic, allow_tf32=False):
            yield

    def _dry_run(self) -> TrainResult:
        """Load the model, print the cost estimate of the run, and return without training."""
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
