"""The training method `sft`: fine-tune a model on images and videos with captions, by the model's own training loss.

Clips and captions are encoded once (`postgen.sft.cache`). A step noises some of them at random levels and minimises

    w(level) |prediction - target|^2

averaged over the latents, with the target of the model: noise - clean for flow models, the noise for epsilon models,
and so on (`postgen.sampling.forward`). Of two experts, each row trains the one of its noise level.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from postgen.errors import UserError
from postgen.families import Condition
from postgen.rewards.batches import RESERVED
from postgen.sampling.forward import noised, wanted_of
from postgen.sampling.seeds import normal, seed_of
from postgen.training import Reason, TrainingConfig, TrainResult, Weights
from postgen.training.digests import digest
from postgen.training.memory import memory_numbers, memory_plan, memory_table, trained_in
from postgen.training.networks import PolicyTrainer, check_half
from postgen.training.policy import load_policy
from postgen.training.processes import check_same, counted
from postgen.training.run_curves import Curves

from .buckets import Bucket
from .config import SftConfig
from .data import Batch, SftData
from .drawn_samples import DrawnSamples, Wanted
from .held_out import HeldOut
from .noise import NoiseLevels, loss_weight
from .reader import Sources, buckets_of, read_sources


class SftTrainer(PolicyTrainer[SftConfig]):
    """Trainer of a model on images and videos with captions.

    Args:
        args: the configuration.
        model: pipeline, folder or hub id; None for `args.model`, or the embedded model if that is not set.
        train_dataset: source or rows of the clips, in place of `args.train_dataset`.
        eval_dataset: source or rows of the held-out clips, in place of `args.eval_dataset`.
        peft_config: a `peft.LoraConfig`; None uses the one that `args` describes.
        callbacks: `transformers.TrainerCallback`s.

    Raises:
        UserError: there are no clips, clips cannot be used, or the model does not support a setting.
    """

    config_class: ClassVar[type[TrainingConfig]] = SftConfig

    def __init__(
        self,
        args: SftConfig,
        model: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: Any = None,
        callbacks: Iterable[TrainerCallback] = (),
    ) -> None:
        super().__init__(args, callbacks)
        self.source, self._peft_config = args.model if model is None else model, peft_config
        self._given = train_dataset, eval_dataset
        if train_dataset is None and args.train_dataset is None:
            raise UserError("there is nothing to train on: give train_dataset, a folder of clips with captions")
        if eval_dataset is None and not args.held_out and (args.evaluates or args.eval_samples):
            raise UserError(
                "eval_steps, eval_on_start, evaluate_only, merge_metric and eval_samples need held-out clips: give"
                " eval_dataset or eval_share"
            )
        if eval_dataset is not None and args.eval_share:
            raise UserError(f"eval_share is {args.eval_share:g}, it must be 0 with eval_dataset")
        if args.eval_samples and not args.evaluates:
            raise UserError("eval_samples are drawn in evaluations: set eval_steps, eval_on_start or evaluate_only")
        self._micro = 0
        self._curves = Curves(args.folder / "metrics.jsonl", _is_drawn)

    @classmethod
    def from_config(cls, args: SftConfig) -> Self:
        """Return the trainer of a recipe, which has only its configuration."""
        return cls(args)

    # Set-up.

    def train(self) -> TrainResult:
        """Run `Trainer.train`. `dry_run` prints an estimate of the memory instead."""
        return self._dry_run() if self.args.dry_run else super().train()

    def build(self) -> Mapping[str, nn.Module]:
        """Load the model, add adapters, encode clips and captions; return the trained modules."""
        args, sources = self.args, self._read_sources()
        trained = self._load()
        denoiser = self.policy.denoiser
        self._held_out = HeldOut(self.levels, args.eval_noise_levels, args.seed, args.folder / "evaluation")
        usual = self.policy.defaults.guidance_scale
        guidance = usual if args.eval_guidance_scale is None else args.eval_guidance_scale
        self._samples = DrawnSamples(
            args,
            denoiser,
            guidance=1.0 if guidance is None else guidance,
            fps=self.fps,
            batch=args.per_device_train_batch_size,
            device=self.device,
            state=self.callbacks.state,
        )
        self._negative = self._negative_condition()
        self.data = self._encoded(sources)
        self.policy.park_text_encoders()
        vae = getattr(self.policy.pipe, "vae", None)
        if vae is not None and not args.eval_samples:  # nothing is decoded
            vae.to("cpu")
        return trained

    def _read_sources(self) -> Sources:
        """Read and check the data sets, before a large model is loaded."""
        process, (train, evaluation) = self.accelerator, self._given
        return read_sources(
            self.args,
            self.args.folder,
            main=process.is_main_process,
            processes=process.num_processes,
            rank=process.process_index,
            train=train,
            evaluation=evaluation,
        )

    def _load(self) -> dict[str, nn.Module]:
        """Load the model, add adapters, check the settings against it, and return the trained networks."""
        args = self.args
        self.policy = load_policy(self.source, args, args, self.device, self._peft_config, memory=args)
        check_half(self.policy.modules, bf16=args.bf16)
        self.fps = self.policy.rate(args.fps)
        self.levels = NoiseLevels(args, self.policy.denoiser, args.seed)
        bucket = self._largest_bucket()
        shape = self.policy.denoiser.latent_shape(bucket.num_frames, bucket.height, bucket.width)
        self.levels.draw([0], shape)  # a range without levels is an error before clips are encoded
        return self._trained_networks()

    def _largest_bucket(self) -> Bucket:
        buckets: Iterable[Bucket] = buckets_of(self.args, self.policy.pipe, self.policy.denoiser)
        return max(buckets, key=lambda bucket: bucket.pixels)

    def _dry_run(self) -> TrainResult:
        """Load the model, print the estimate of the memory, and return without training."""
        args, modules = self.args, self._load()
        pipe, denoiser = self.policy.pipe, self.policy.denoiser
        others = [name for name in pipe.components if name not in denoiser.transformers]
        most = self._largest_bucket()
        plan = memory_plan(
            pipe,
            denoiser,
            args,
            args,
            size={"num_frames": most.num_frames, "height": most.height, "width": most.width},
            rows=args.per_device_train_batch_size,
            copies=int(args.ema_decay > 0),
            unused=[name for name in others if name != "vae" or not args.eval_samples],
        )
        numbers = {"trained_parameters": float(trained_in(modules.values())), **memory_numbers(plan)}
        if self.accelerator.is_main_process:
            print("\n".join(f"{name:32s}{value:16,.0f}" for name, value in numbers.items()))
            print(memory_table(plan))
        return TrainResult(global_step=0, reason=Reason.DONE, metrics=numbers)

    def _negative_condition(self) -> dict[str, Tensor]:
        """Return the condition entries of the negative prompt, which only samples with guidance need."""
        if not self.args.eval_samples or self._samples.guidance <= 1:
            return {}
        with torch.no_grad():
            both = self.policy.denoiser.encode_prompt([""], [self.args.eval_negative_prompt], guidance=True)
        return {name: value.to(self.device) for name, value in both.items() if name.startswith("negative")}

    def _encoded(self, sources: Sources) -> SftData:
        args, process = self.args, self.accelerator
        data = SftData.build(
            args,
            self.policy.pipe,
            self.policy.denoiser,
            self.device,
            folder=args.folder,
            main=process.is_main_process,
            processes=process.num_processes,
            rank=process.process_index,
            seed=args.seed,
            sources=sources,
        )
        check_same(args, data.inputs())
        return data

    def _trained_networks(self) -> dict[str, nn.Module]:
        """Return the networks that the noise levels of the run train, and freeze the others."""
        modules = self.policy.modules
        if self.args.train_experts == "both" and len(modules) > 1 and self.sharded:
            raise UserError(
                "sharded training of a model with two experts needs one network for all processes: set train_experts"
                " high or low, or train without fully_shard and FSDP"
            )
        names = list(modules)
        wanted = {"both": names, "high": names[:1], "low": names[1:]}[self.args.train_experts]
        for name, module in modules.items():
            if name not in wanted:
                module.requires_grad_(False)
        return {name: modules[name] for name in wanted}

    # Steps.

    def training_step(self) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Noise the next clips at random levels, drop some captions, and return the loss.

        All random values depend on the number of a sample in the whole run and not on the process, so two processes
        use the same values as one process with twice the gradient accumulation.
        """
        args, process = self.args, self.accelerator
        step, micro = divmod(self._micro, args.gradient_accumulation_steps)
        batch = self.data.batch(step, micro, process.process_index)
        first = (self._micro * process.num_processes + process.process_index) * args.per_device_train_batch_size
        places = range(first, first + len(batch.latents))
        self._micro += 1
        shape = batch.latents.shape[1:]
        sigma = self.levels.draw(places, shape).to(self.device)
        noise = normal(shape, [seed_of(args.seed, "forward", place) for place in places], self.device)
        condition = self._without_captions(batch.conditions, self.levels.dropped(places))
        with self._networks(wrapped=True):
            errors, counted = self._errors(batch.latents, noise, sigma, condition)
        levels = self.levels.levels(sigma)
        weight = loss_weight(levels, self.policy.denoiser.prediction_type, args.loss_weighting, args.snr_gamma)
        if weight.dim() == 1:
            weight = weight[:, None]
        plain = (errors.detach() * counted).sum() / counted.sum()
        loss = (errors * counted * weight.to(errors)).sum() / counted.sum()
        return loss, {"unweighted_loss": plain, "noise_level": sigma.mean()}

    def _errors(self, clean: Tensor, noise: Tensor, sigma: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Return the squared error of the prediction, and which errors count.

        Args:
            clean: clean latents, (B, ...).
            noise: noise, (B, ...).
            sigma: noise levels, (B,) or (B, T).
            condition: the condition of each row.

        Returns:
            (B, T) mean squared errors of the latent frames ((B, 1) with one level for each row), and (B, T) ones, with
            zeros for clean frames.
        """
        denoiser, levels = self.policy.denoiser, self.levels.levels(sigma)
        x = noised(clean, noise, levels)
        wanted = wanted_of(clean, noise, levels, denoiser.prediction_type)
        received = sigma.to(torch.float32) if denoiser.prediction_type == "flow" else sigma
        square = (denoiser.predict(x, received, condition).float() - wanted).square()
        if sigma.dim() == 1:
            return square.flatten(1).mean(1, keepdim=True), square.new_ones(len(square), 1)
        axis = denoiser.frame_axis
        assert axis is not None
        return square.movedim(axis, 1).flatten(2).mean(2), (sigma > 0).to(square)

    def _without_captions(self, condition: Condition, dropped: Tensor) -> Condition:
        """Replace the captions of some rows, (B,) bool, by an empty one; conditions of images stay."""
        if not bool(dropped.any()):
            return condition
        found = dict(condition)
        for name in self.data.empty.keys() & found.keys():
            rows = dropped.to(self.device).view(-1, *[1] * (found[name].dim() - 1))
            found[name] = torch.where(rows, self.data.empty[name].to(found[name]), found[name])
        return found

    # Evaluation.

    def evaluate(self) -> dict[str, float]:
        """Return the loss of held-out clips at fixed noise, its change since the first evaluation, and rewards."""
        if not self.data.eval_count:
            return {}
        args, step = self.args, self.global_step
        writes = self.accelerator.is_main_process and not self.on_trial
        with self._networks(wrapped=False):
            batches = self._own_batches(args.eval_clips)
            found = self._held_out.measure(batches, self._held_out_errors, step, writes=writes)
            if args.eval_samples:
                found |= self._samples.run(self._wanted(), args.seed, args.folder / "samples", step, writes=writes)
        return found

    def _own_batches(self, wanted: int) -> Iterator[tuple[Sequence[int], Batch]]:
        """Yield evenly spaced held-out clips of this process, and their numbers among all of them.

        Processes that share a sharded model must call it equally often, so each of them takes all.

        Args:
            wanted: largest number of clips of all processes.
        """
        first, total, process = 0, len(self.data.held_out), self.accelerator
        chosen = {place * total // min(wanted, total) for place in range(min(wanted, total))}
        for number in range(self.data.eval_count):
            size = self.data.eval_size(number)
            rows = [row for row in range(size) if first + row in chosen]
            if rows and (self.sharded or number % process.num_processes == process.process_index):
                yield [first + row for row in rows], self.data.eval_batch(number).rows(rows)
            first += size

    def _held_out_errors(self, clean: Tensor, noise: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return self._errors(clean, noise, sigma, condition)[0][:, 0]

    def _wanted(self) -> list[Wanted]:
        """Return the samples of this process."""
        columns = {clip.key: clip.item.row for clip in self.data.held_out}
        return [
            Wanted(
                number=number,
                prompt=batch.captions[row],
                columns={name: value for name, value in columns[batch.keys[row]].items() if name not in RESERVED},
                bucket=batch.bucket,
                condition={name: value[row : row + 1] for name, value in batch.conditions.items()} | self._negative,
            )
            for numbers, batch in self._own_batches(self.args.eval_samples)
            for row, number in enumerate(numbers)
        ]

    # Checkpoints and export.

    def state_dict(self) -> dict[str, Any]:
        """Return the number of micro-batches so far, what identifies the data, and the first held-out losses."""
        data, held_out = self._digests()
        return {"micro": self._micro, "data": data, "held_out": held_out, "first_losses": self._held_out.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state. With another evaluation, its first losses are measured anew.

        Raises:
            UserError: the run was trained on other clips.
        """
        data, held_out = self._digests()
        if state["data"] != data and not self.args.takes_other_clips:
            raise UserError(
                "the checkpoint was trained on other clips, captions, weights or buckets: give the same data"
                " (train_dataset, eval_share), start a new run from its weights with init_from, or allow other ones"
                " with --allow_changed train_dataset"
            )
        self._micro = int(state["micro"])
        self._held_out.first = state["first_losses"] if state["held_out"] == held_out else {}

    def _digests(self) -> tuple[str, str]:
        """Return what identifies the training clips, and the held-out clips with their noise levels."""
        inputs = self.data.inputs()
        return inputs["train_dataset"], digest([inputs["eval_dataset"], self.args.eval_noise_levels])

    def state_of_others(self, states: Sequence[dict[str, Any]], before: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state for another number of processes, which is possible with equal batches and steps.

        Raises:
            UserError: a micro-batch or a step would have another number of clips.
        """
        args, processes = self.args, self.accelerator.num_processes
        size, parts = before["per_device_train_batch_size"], before["gradient_accumulation_steps"]
        now = args.per_device_train_batch_size, args.gradient_accumulation_steps * processes
        if now != (size, parts * len(states)):
            steps, rest = divmod(parts * len(states), processes)
            way = (
                f"start {counted(len(states))}"
                if rest
                else f"set per_device_train_batch_size {size} and gradient_accumulation_steps {steps}"
            )
            raise UserError(f"its steps have {parts * len(states)} micro-batches of {size} clips: {way}")
        return {**states[0], "micro": states[0]["micro"] * len(states) // processes}

    def export(self, folder: Path, weights: Weights) -> None:
        """Write the LoRA or the trained networks, and a model card, into an export folder."""
        policy, data = self.policy, self.data
        # The expert that is not trained is exported too, so that the folder can be loaded like that of both.
        rest = {name: module.state_dict() for name, module in policy.modules.items() if name not in weights}
        policy.save(folder, {**weights, **rest})
        source = self.args.train_dataset if self._given[0] is None else "rows given in Python"
        clips = f"Clips: {len(data.clips)} of {source}"
        self.write_card(folder, self._curves, [clips, f"Held out: {len(data.held_out) or 'none'}"])


def _is_drawn(name: str) -> bool:
    """Return whether the model card shows the curve of a metric."""
    return name in ("loss", "eval_loss") or (name.startswith("eval_rewards/") and name.endswith("/mean"))
