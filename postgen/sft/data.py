"""Training data of fine-tuning: reads, checks and encodes the clips, and gives their batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from .buckets import Bucket

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from postgen.families import Condition, Denoiser

    from .data_config import SftDataConfig


@dataclass(frozen=True, slots=True)
class Batch:
    """Clips of one bucket."""

    latents: Tensor
    """(B, C, T, h, w) normalised latents in the denoiser's layout, float32, on the device; for image models
    (B, C, h, w)."""
    conditions: Condition
    """Condition entries of the captions, and of the first frames for image-to-video models, (B, ...)."""
    keys: list[str]
    """Keys of the items."""
    bucket: Bucket


class SftData:
    """Encoded clips and the order of their batches."""

    empty: Condition
    """Condition of the empty caption, batch size 1, for the dropout of captions."""

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
    ) -> Self:
        """Read, check and encode the clips.

        Args:
            config: settings.
            pipe: the pipeline, with its autoencoder and text encoders on their devices.
            denoiser: its denoiser.
            device: device of the batches.
            folder: folder of the run: `skipped.jsonl`, and the cache by default.
            main: whether this process shows progress and writes `skipped.jsonl`.
            processes: number of processes of the run.
            rank: number of this process.
            seed: seed of the order and of sampled latents.
            skip: replaces `config.skip_bad`.
            batch_size: clips of a batch; None: `config.per_device_train_batch_size`, or 1.
            accumulation: micro-batches of a step; None: `config.gradient_accumulation_steps`, or 1.
            train: a source or rows instead of `config.train_dataset`.
            evaluation: a source or rows instead of `config.eval_dataset`.
            weights: sampling weight of each training item, in their order; None: `config.weight_column`.
        """
        raise NotImplementedError

    def batch(self, step: int, micro: int = 0, rank: int | None = None) -> Batch:
        """Return the batch of a step, counted from 0, a micro-batch and a process; None: this process."""
        raise NotImplementedError

    @property
    def eval_count(self) -> int:
        """Number of evaluation batches; 0 without held-out items."""
        raise NotImplementedError

    def eval_batch(self, number: int) -> Batch:
        """Return an evaluation batch; it is the same in every evaluation and run."""
        raise NotImplementedError

    def inputs(self) -> Mapping[str, Any]:
        """Return JSON values that all processes must share, for `Trainer.inputs`."""
        raise NotImplementedError
