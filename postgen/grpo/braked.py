"""The part of the reward trainers that applies the brakes: reference policy, clips, their losses and costs."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.sampling.conditions import Embeddings, Row
from postgen.sampling.meter import Meter
from postgen.sampling.sampler import Sampler, Sampling
from postgen.sampling.seeds import seed_of
from postgen.training.digests import digest
from postgen.training.logging import say
from postgen.training.modes import evaluating
from postgen.training.policy import Policy
from postgen.training.prompts import Prompts
from postgen.training.sharding import drop_gathered

from .brake_data import ClipPool, ClipRows, Makers, kept_latents
from .brakes import Guards
from .cost import Work
from .evaluation import Evaluator
from .state import G, KeptState

_SOURCES = {
    "world": "renders of the prompts",
    "samples": "samples of the model before training",
    "videos": "videos of the data set",
}
"""Kind of clips -> its name in messages."""


class Braked(KeptState[G]):
    """Base of the reward trainers: the clips of `data_beta` and `eval_fm_loss`, and the guards."""

    source: Any
    """The model, as the trainer received it."""
    prompts: Prompts
    """Training prompts."""
    eval_prompts: Prompts | None
    """Held-out prompts."""
    policy: Policy
    """The trained pipeline."""
    size: dict[str, int]
    """`num_frames`, `height` and `width` of a clip."""
    embeddings: Embeddings
    """Encoded prompts."""
    sampler: Sampler
    """Draws rollouts."""
    evaluator: Evaluator
    """Draws samples of held-out prompts."""
    guards: Guards
    """The guards."""
    _clip_rows: dict[str, ClipRows]
    _clip_files: dict[str, tuple[Makers, dict[str, Any]]]
    _clips: dict[str, ClipPool]

    @property
    def needs_reference(self) -> bool:
        """Whether the loss needs the reference policy, the model before training."""
        return self.args.guarded

    def check_brakes(self) -> None:
        """Read and check the rows of clips, before a model is loaded.

        Raises:
            UserError: there are no held-out prompts for `eval_fm_clips`, or `ClipRows.of` refuses the rows.
        """
        args, self._clip_rows, self._clips = self.args, {}, {}
        if args.data_beta and not args.evaluate_only:
            self._clip_rows["train"] = ClipRows.of(args.data_source, self.prompts, args.data_clips, "data_source")
        if args.eval_fm_clips:
            if self.eval_prompts is None:
                raise UserError("eval_fm_clips needs held-out prompts: give eval_dataset")
            setting = "data_source" if args.eval_data_source is None else "eval_data_source"
            source = getattr(args, setting)
            self._clip_rows["eval"] = ClipRows.of(source, self.eval_prompts, args.eval_fm_clips, setting)

    def rows_of_clips(self) -> list[Row]:
        """Return the rows of all clips, whose prompts must be encoded."""
        return [row for clips in self._clip_rows.values() for row in clips.rows]

    def make_brakes(self) -> None:
        """Set up the guards, and check the clips against the model, once it is loaded.

        Raises:
            UserError: the model cannot encode the clips, or has no frames for `temporal_guard`.
        """
        args, denoiser = self.args, self.policy.denoiser
        axis = denoiser.frame_axis
        frames = 1 if axis is None else denoiser.latent_shape(**self.size)[axis - 1]
        self.guards = Guards(args, axis, frames)
        self._clip_files = {}
        for name, rows in self._clip_rows.items():
            rows.check(denoiser, self.size)
            # The reported cost of training leaves out evaluations.
            meter, drawer = self.meter if name == "train" else Meter(self.device), self.evaluator.sampler
            makers = Makers(
                denoiser=denoiser,
                size=self.size,
                sampler=Sampler(denoiser, drawer.schedule, drawer.how, meter, self.device),
                batch=args.rollout_batch,
                encode_batch=args.decode_batch_size or args.rollout_batch,
                seed=args.seed,
                device=self.device,
            )
            # Sharded weights have no digest, so it is computed here.
            self._clip_files[name] = makers, makers.said(rows, self.policy.modules, args.init_from)

    def on_models_ready(self) -> None:
        """Make the clips, or read them from the folder of the run, while the model has its weights before training."""
        super().on_models_ready()
        process = self.accelerator
        for name, rows in self._clip_rows.items():
            # The same in every run, so that a run without data_beta measures the same held-out samples.
            stream = 0 if name == "train" else 1
            conditions = self.embeddings.table(rows.rows.__getitem__)
            makers, said = self._clip_files[name]
            if process.is_main_process:
                setting = "data_beta" if name == "train" else "eval_fm_clips"
                say(f"{setting}: {len(rows.rows)} clips, {_SOURCES[rows.kind]}")
            with torch.no_grad(), self._networks(wrapped=False), evaluating(self.policy.modules.values()):
                latents = kept_latents(
                    # Settings of evaluations may change when a run is resumed; other clips get another folder.
                    self.args.folder / "data" / f"{name}-{digest(said)}",
                    len(rows.rows),
                    said,
                    makers.batch,
                    lambda numbers: makers.make(rows, numbers, conditions, stream),  # noqa: B023
                    rank=process.process_index,
                    processes=process.num_processes,
                    equal_calls=self.sharded,
                )
            # Sharded weights stay gathered after a pass, and the optimiser needs the shards.
            drop_gathered(self.policy.modules.values())
            levels = self.sampler.schedule if name == "train" else self.evaluator.sampler.schedule
            plain = Sampler(self.policy.denoiser, levels, Sampling(size=self.size), makers.sampler.meter, self.device)
            self._clips[name] = ClipPool(rows.rows, latents, plain, conditions)

    def data_step(self, rows: Tensor) -> dict[str, float | Tensor]:
        """Run the backward pass of `data_beta` for a micro-batch, one random clip for each of its samples.

        Clip, noise and noise level depend on the numbers of update and sample, so two processes draw the same as one.

        Args:
            rows: (B,) rows of the buffer.

        Returns:
            Metrics.
        """
        if "train" not in self._clips:
            return {}
        assert self.buffer is not None
        args, samples, update = self.args, self.buffer.samples, self.micro // self.batches.accumulation
        seeds = [seed_of(args.seed, "data", 0, update, samples[row]) for row in rows.tolist()]
        with self.no_sync():  # the forward pass decides whether gradients are averaged
            with self.meter.training(len(seeds)):
                loss = self._clips["train"].drawn(seeds).mean()
            self.backward(args.data_beta * loss)
        return {"data_loss": loss.detach()}

    def fm_loss(self) -> dict[str, float]:
        """Return the flow-matching loss on held-out clips, an empty dict without them; every process must call it."""
        if "eval" not in self._clips:
            return {}
        process, batch = self.accelerator, self.args.rollout_batch
        with self._networks(wrapped=False):
            loss = self._clips["eval"].mean_error(self.args.seed, batch, process.process_index, process.num_processes)
        return {"fm_loss": loss}

    def with_clips(self, work: Work) -> Work:
        """Return the work of a method with that of the clips, for the estimate of a dry run."""
        rows = self._clip_rows.get("train")
        if rows is None:
            return work
        sampler = self.evaluator.sampler
        drawn = len(rows.rows) * sampler.passes * sampler.schedule.steps if rows.kind == "samples" else 0
        return dataclasses.replace(work, data=1.0, once=float(drawn))
