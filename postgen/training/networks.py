"""Base of the trainers of a policy, whose denoiser calls the prepared networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from postgen.errors import UserError

from .card import Card, write_card
from .config import TrainingConfig
from .policy import Policy
from .processes import average_gradients
from .run_curves import Curves
from .trainer import Trainer

C = TypeVar("C", bound=TrainingConfig)


class PolicyTrainer(Trainer[C]):
    """Base of trainers whose trained modules are the networks of a denoiser."""

    policy: Policy
    """The trained model."""
    source: Any
    """The base model: a folder, a hub id, a pipeline, or None for the embedded model."""

    @property
    def averages(self) -> bool:
        """Whether this trainer averages gradients over processes, and not the prepared models.

        Prepared models need every process to call each of them in every update. Of two experts, however, a process
        calls only those that its samples' noise levels need.
        """
        return not self.sharded and len(self.models) > 1

    def on_gradients(self) -> None:
        """Average the gradients of an update over processes, if the prepared models do not."""
        if self.averages:
            average_gradients(self.trained().values(), self.accelerator)

    def write_card(self, folder: Path, curves: Curves, data: Sequence[str]) -> None:
        """Write the model card and its pictures into an export.

        Args:
            folder: folder of the export.
            curves: metrics of the run.
            data: lines about what the model learned from.
        """
        args, policy = self.args, self.policy
        card = Card(
            source=self.source,
            pipeline=type(policy.pipe).__name__,
            trainer=type(self).__name__,
            method=args.method,
            step=self.global_step,
            lora=policy.adapter is not None,
            modules=policy.modules,
            data=data,
            settings=args.to_dict(),
            merge=self._parts.merge_report,
        )
        write_card(card, curves, args.folder, folder)

    @contextmanager
    def _networks(self, *, wrapped: bool) -> Iterator[None]:
        """Choose which networks the denoiser calls: the prepared models, or the modules without gradient averaging.

        Processes must call prepared (`wrapped`) models equally often.
        """
        table = self.policy.denoiser.transformers
        for name in self.policy.modules.keys() & self.models.keys():  # `models` is empty before they are prepared
            table[name] = self.models[name] if wrapped and not self.averages else self.unaveraged(name)
        # TF32 convolutions round differently for different batch sizes, which would move the ratio away from 1.
        cudnn = torch.backends.cudnn
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic, allow_tf32=False):
            yield


def check_half(modules: Mapping[str, nn.Module], *, bf16: bool) -> None:
    """Check that networks with weights in half precision can be trained beside weights in float32.

    Args:
        modules: the networks.
        bf16: whether forward passes run under bfloat16 autocast.

    Raises:
        UserError: a forward pass would mix the precisions.
    """
    kinds = {weight.dtype for module in modules.values() for weight in module.parameters()}
    if torch.float16 in kinds:
        raise UserError(
            "the model's weights are torch.float16, but trained weights are float32: set dtype: float32, or dtype:"
            " bfloat16 with bf16: true"
        )
    if torch.bfloat16 in kinds and not bf16:
        raise UserError(
            "the model's weights are torch.bfloat16, but trained weights are float32: set bf16: true to train under"
            " autocast, or dtype: float32"
        )
