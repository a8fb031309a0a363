"""Base of the reward trainers: models, micro-batches of rollouts, evaluation, export."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from postgen.errors import UserError, shown
from postgen.sampling.conditions import Embeddings
from postgen.sampling.meter import Meter
from postgen.sampling.sampler import Sampler, Sampling
from postgen.sampling.schedule import chosen_schedule
from postgen.training import Reason, TrainingConfig, TrainResult, Weights
from postgen.training.memory import bytes_of, memory_numbers, memory_plan, memory_table, trained_in
from postgen.training.policy import load_policy
from postgen.training.prompts import Prompts
from postgen.training.run_curves import Curves
from postgen.training.samples import evaluation_sampler, write_samples

from .batches import Batches
from .config import GroupConfig
from .cost import Plan, Work, estimate, report
from .evaluation import Evaluator
from .exact_motion import ExactMotion, check_scenes
from .guards import HackingGuard, check_columns, check_equal_calls, check_experts, check_groups, load_rewards
from .rollout import Metrics, Rollouts
from .rows import check_data
from .scoring import Rewards, Scoring
from .state import G


class GroupTrainer(Rollouts[G]):
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
            if args.eval_motion_exact:
                check_scenes(self.eval_prompts.rows[: args.eval_prompts])
        elif self.gold is not None or args.evaluates:
            raise UserError(
                "eval_reward_funcs, eval_steps, eval_motion_exact, merge_metric, eval_on_start and evaluate_only need"
                " held-out prompts: give eval_dataset"
            )
        check_columns([self.runner], self.prompts)
        check_columns([self.runner, self.gold], self.eval_prompts)
        check_data(args, self.source, self.prompts, self.eval_prompts, here=True)
        self.check_brakes()
        self.batches = Batches.of(args, self.accelerator.num_processes, self.accelerator.process_index)
        check_groups(self.runner, self.batches)
        self.micro = 0
        self.buffer = None
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
    def shares_levels(self) -> bool:
        """Whether all samples of a rollout are also trained at the same noise levels."""
        return False

    @property
    def copies(self) -> int:
        """Number of copies of the trained weights that are kept (average, reference), for the cost estimate."""
        return int(self.args.ema_decay > 0) + int(self.needs_reference and self.policy.copies_reference)

    def prepare(self) -> None:
        """Set up the method once the models are loaded, before a checkpoint is read and before the first rollout."""

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
        self.policy = load_policy(self.source, args, args, self.device, self._peft_config, memory=args)
        self.size = args.clip_size(self.policy.pipe, self.policy.defaults)
        if args.motion_residual and self.size["num_frames"] == 1:
            raise UserError("motion_residual must be 0 for a model that makes images, which have no motion")
        if args.shuffle_advantages:
            warnings.warn("shuffle_advantages: a control experiment, in which nothing can be learned", stacklevel=2)
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
            self.embeddings.encode(self.rows_of_clips())
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
            exact=ExactMotion(self.size, self.device) if args.eval_motion_exact else None,
        )
        self.prepare()
        self.make_brakes()
        if self.sharded and len(self.policy.modules) > 1:
            check_experts(self.shares_levels and not self.rows_of_clips())
        if self.needs_reference:
            self.policy.check_reference(args.init_from)
        if not args.dry_run:
            load_rewards([self.runner, self.gold])
        return self.policy.modules

    def on_models_ready(self) -> None:
        """Keep a copy of the weights as the reference policy, if the loss needs one, and make the clips."""
        if self.needs_reference:
            self.policy.keep_reference()
        super().on_models_ready()

    def training_step(self) -> tuple[Tensor, Metrics]:
        """Compute the loss of the next micro-batch. Draws a new rollout first if the last one is used up."""
        position = self.micro % self.batches.per_rollout
        metrics = self._new_rollout() if position == 0 else {}
        size = self.batches.per_device
        low = position % self.batches.micro_batches * size
        rows = torch.arange(low, low + size, device=self.device)
        with self._networks(wrapped=True):
            metrics |= self.data_step(rows)
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
        if process.is_main_process and not self.on_trial:
            write_samples(args.folder / "samples", self.global_step, found.clips, found.prompts, self.fps)
        watched = {} if self.gold is None or self.on_trial else self.hacking.watch(found.means, self.gold.names[0])
        if watched.get("hacking") and args.on_hacking == "stop":
            self.request_stop()
        return found.means | watched | self.fm_loss()

    def export(self, folder: Path, weights: Weights) -> None:
        """Write the LoRA or the trained models, and a model card, into an export folder."""
        self.policy.save(folder, weights)
        weighted = zip(self.runner.names, self.runner.weights, strict=True)
        rewards = ", ".join(f"{name} (weight {weight:g})" for name, weight in weighted)
        sources = self.args.train_dataset or "rows given in Python"
        self.write_card(folder, self.curves, [f"Rewards: {rewards}", f"Prompts: {len(self.prompts)} of {sources}"])

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass, and add its time to the meter."""
        with self.meter.time("transformer_seconds"):
            super().backward(loss)

    def _dry_run(self) -> TrainResult:
        """Load the model, print the cost estimate of the run, and return without training."""
        args, modules = self.args, self.build()
        plan = Plan(
            batches=self.batches,
            work=self.with_clips(self.work()),
            weights=bytes_of(self.policy.pipe.components.values()),
            trained=trained_in(modules.values()),
            latent=math.prod(self.policy.denoiser.latent_shape(**self.size)),
            clip=3 * math.prod(self.size.values()),
            backward=self.meter.backward,
            max_steps=args.max_steps,
        )
        numbers = estimate(plan)
        encoders = [name for name in self.policy.pipe.components if name.startswith("text_encoder")]
        memory = memory_plan(
            self.policy.pipe,
            self.policy.denoiser,
            args,
            args,
            size=self.size,
            rows=self.batches.per_device,
            passes=self.sampler.passes,
            copies=self.copies,
            unused=encoders if args.precompute_prompt_embeds else (),
            extra=int(numbers["bytes/rollout"] + numbers["bytes/clips"]),
        )
        numbers |= memory_numbers(memory)
        if self.accelerator.is_main_process:
            print(report(plan, numbers))
            print(memory_table(memory))
        return TrainResult(global_step=0, reason=Reason.DONE, metrics=numbers)


__all__ = ["GroupTrainer", "Metrics"]
