"""Training data of fine-tuning: reads, checks and encodes the clips, and gives their batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from postgen.families import Condition, Denoiser
from postgen.sampling.seeds import seed_of
from postgen.training.digests import digest
from postgen.training.logging import say

from .batches import Batches
from .buckets import Bucket
from .cache_note import changed_settings, note_settings
from .clips import Clip
from .data_config import SftDataConfig
from .encoding import Encoder
from .faults import Fault, write_faults
from .reader import Sources, batches_of, buckets_of, cache_folder, read_sources

_SIZES = ("height", "width", "num_frames", "frame_buckets", "aspects", "buckets", "frame_selection", "target_fps")
SKIPPED = "skipped.jsonl"
"""File of the run with the files that are left out."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Clips of one bucket."""

    latents: Tensor
    """(B, C, T, h, w) normalised latents, float32, on the device; in the layout of the denoiser: (B, T, C, h, w) for
    CogVideoX, (B, C, h, w) for image models."""
    conditions: Condition
    """Condition entries of the captions, and of the first frames for image-to-video models, (B, ...)."""
    keys: list[str]
    """Keys of the clips."""
    captions: list[str]
    """Captions of the clips."""
    bucket: Bucket

    def rows(self, rows: Sequence[int]) -> Batch:
        """Return some clips of the batch."""
        return Batch(
            latents=self.latents[list(rows)],
            conditions={name: value[list(rows)] for name, value in self.conditions.items()},
            keys=[self.keys[row] for row in rows],
            captions=[self.captions[row] for row in rows],
            bucket=self.bucket,
        )


class SftData:
    """Encoded clips and the order of their batches. `build` makes one.

    Args:
        config: settings.
        encoder: the encoder with the cache, in which all clips are.
        clips: the training clips.
        held_out: the clips of the evaluation.
        batches: the order of the training batches.
        device: device of the batches.
        rank: number of this process.
    """

    def __init__(
        self,
        config: SftDataConfig,
        encoder: Encoder,
        clips: Sequence[Clip],
        held_out: Sequence[Clip],
        batches: Batches,
        device: torch.device,
        rank: int = 0,
    ) -> None:
        self.config, self.clips, self.held_out, self.batches = config, list(clips), list(held_out), batches
        self._encoder, self._device, self._rank = encoder, device, rank
        self.empty: Condition = encoder.caption("", device)
        """Condition entries of the empty caption, batch size 1, for the dropout of captions."""
        groups: dict[Bucket, list[Clip]] = {}
        for clip in self.held_out:
            groups.setdefault(clip.bucket, []).append(clip)
        size = batches.batch_size
        self._evaluation = [
            group[start : start + size] for _, group in sorted(groups.items()) for start in range(0, len(group), size)
        ]

    @classmethod
    def build(
        cls,
        config: SftDataConfig,
        pipe: Any,
        denoiser: Denoiser,
        device: torch.device,
        *,
        folder: Path,
        main: bool = True,
        processes: int = 1,
        rank: int = 0,
        seed: int = 0,
        skip: bool | None = None,
        batch_size: int | None = None,
        accumulation: int | None = None,
        train: Any = None,
        evaluation: Any = None,
        weights: Tensor | None = None,
        sources: Sources | None = None,
    ) -> Self:
        """Read, check and encode the clips. All processes call this; they share the work through the cache.

        Args:
            config: settings.
            pipe: the pipeline, with its autoencoder and text encoders.
            denoiser: its denoiser.
            device: device of the batches.
            folder: folder of the run: `skipped.jsonl`, and by default the cache.
            main: whether this process shows progress and writes `skipped.jsonl`.
            processes: number of processes of the run.
            rank: number of this process.
            seed: seed of the order and of sampled latents.
            skip: replaces `config.skip_bad`.
            batch_size: clips of a batch; None: `config.per_device_train_batch_size`, or 1.
            accumulation: micro-batches of a step; None: `config.gradient_accumulation_steps`, or 1.
            train: a source or rows instead of `config.train_dataset`.
            evaluation: a source or rows instead of `config.eval_dataset`.
            weights: (N,) sampling weight of each row of the training data, for data without faults; None:
                `config.weight_column`.
            sources: data sets that `read_sources` has read already, instead of the last arguments.

        Raises:
            UserError: files cannot be used (one message about all of them), the model cannot make a bucket, a weight
                is wrong, or the cache cannot be written.
        """
        buckets = buckets_of(config, pipe, denoiser)
        if sources is None:
            words: dict[str, Any] = {"skip": skip, "train": train, "evaluation": evaluation, "weights": weights}
            sources = read_sources(config, folder, main=main, processes=processes, rank=rank, **words)
        if main:
            write_faults(folder / SKIPPED, sources.faults)
        clips, held_out = sources.clips(buckets)
        cache = cache_folder(config, folder)
        encoder = Encoder(pipe, denoiser, cache, config.cache_dtype)
        batches = batches_of(
            clips,
            config,
            batch_size=_setting(config, "per_device_train_batch_size", batch_size),
            seed=seed,
            processes=processes,
            accumulation=_setting(config, "gradient_accumulation_steps", accumulation),
        )
        _encode(encoder, [*clips, *held_out], config, cache, rank, processes, main=main)
        if main:
            _tell(clips, held_out, sources.faults)
        return cls(config, encoder, clips, held_out, batches, device, rank)

    def batch(self, step: int, micro: int = 0, rank: int | None = None) -> Batch:
        """Return a training batch. It depends on the seed and its position alone.

        Args:
            step: number of the optimiser step, from 0.
            micro: number of the micro-batch in the step.
            rank: number of the process; None: this process.
        """
        place = step, micro, self._rank if rank is None else rank
        clips = [self.clips[number] for number in self.batches.at(*place)]
        position = self.batches.position(*place)
        seeds = [seed_of(self.batches.seed, "data", 5, position, row) for row in range(len(clips))]
        return self._batch(clips, seeds if self.config.sample_latents else None)

    @property
    def eval_count(self) -> int:
        """Number of evaluation batches; 0 without held-out clips."""
        return len(self._evaluation)

    def eval_size(self, number: int) -> int:
        """Return the number of clips of an evaluation batch."""
        return len(self._evaluation[number])

    def eval_batch(self, number: int) -> Batch:
        """Return an evaluation batch, the same in every evaluation and run: latents are modes of the autoencoder."""
        return self._batch(self._evaluation[number], None)

    def inputs(self) -> Mapping[str, Any]:
        """Return JSON values that all processes must share, for `Trainer.inputs`: digests of the clips."""
        parts = {"train_dataset": self.clips, "eval_dataset": self.held_out}
        # Weights choose the clips of a step.
        return {
            name: digest([[clip.key, self._encoder.clip_key(clip), clip.item.caption, clip.weight] for clip in clips])
            for name, clips in parts.items()
        }

    def _batch(self, clips: Sequence[Clip], seeds: Sequence[int] | None) -> Batch:
        return Batch(
            latents=self._encoder.latents(clips, seeds, self._device),
            conditions=self._encoder.conditions(clips, self._device),
            keys=[clip.key for clip in clips],
            captions=[clip.item.caption for clip in clips],
            bucket=clips[0].bucket,
        )


def _setting(config: SftDataConfig, name: str, given: int | None) -> int:
    """Return a given value, or else that of the configuration of a training run, or else 1."""
    return int(getattr(config, name, 1)) if given is None else given


def _encode(
    encoder: Encoder,
    clips: Sequence[Clip],
    config: SftDataConfig,
    cache: Path,
    rank: int,
    processes: int,
    *,
    main: bool,
) -> None:
    """Encode the clips, and say why, if the cache was filled with other settings."""
    settings = {name: getattr(config, name) for name in _SIZES} | encoder.settings()
    changed = changed_settings(cache, settings) if main else []
    new = {
        what: count for what, count in encoder.encode(clips, part=rank, parts=processes, shown=main).items() if count
    }
    if main and new:
        if changed:
            told = ", ".join(f"{count} {what}" for what, count in new.items())
            say(f"the cache {cache} was filled with other settings ({', '.join(changed)}): {told} encoded anew")
        note_settings(cache, settings)


def _tell(clips: Sequence[Clip], held_out: Sequence[Clip], faults: Sequence[Fault]) -> None:
    counts = sorted(Counter(clip.bucket for clip in clips).items(), reverse=True)
    told = ", ".join(f"{bucket}: {count}" for bucket, count in counts)
    more = f"; {len(held_out)} held out" if held_out else ""
    bad = f"; {len(faults)} left out, see {SKIPPED}" if faults else ""
    say(f"{len(clips)} clips ({told}){more}{bad}")
    both = {clip.content for clip in clips} & {clip.content for clip in held_out}
    if both:
        names = [clip.key for clip in held_out if clip.content in both]
        say(
            f"postgen: warning: {len(names)} clips of eval_dataset are also in train_dataset ({names[0]}, ...): the"
            " evaluation does not show what is learned from other clips"
        )
