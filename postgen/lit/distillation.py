"""Distillation end to end: what a converted transformer predicts is held to what the stock one predicts.

LiT, guideline 5 (arXiv:2501.12976), with the hidden outputs of CLEAR (arXiv:2412.16112) and of later hybrids:

    L = w_task |y_S - y|^2 + l1 |y_T - y_S|^2 + l2 |Sigma_T - Sigma_S|^2 + w_h mean_b d(h_T,b, h_S,b)

y is what the model predicts (velocity, noise, ...), all squares are means. Sigma are the channels of the variance,
which some noise models predict beside y; models of flows have none. h_b is what block b gives for the video, d its
distance relative to what is left of the teacher's without the mean over tokens, so that blocks of all sizes count.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families import Block, Condition, Denoiser, PredictionType, blocks_of
from postgen.reconstruct.loss import distance
from postgen.sampling.schedule import Levels
from postgen.sampling.transition import wide


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """Weights of the terms; one of them is above 0."""

    task: float
    """Of the model's own loss."""
    output: float
    """Of the difference of the predictions, l1."""
    variance: float
    """Of the difference of the variances, l2; 0 for a model that predicts none."""
    hidden: float
    """Of the hidden outputs."""

    @property
    def teacher(self) -> bool:
        """Whether the teacher is asked at all."""
        return self.output > 0 or self.variance > 0 or self.hidden > 0


@dataclass(slots=True)
class Said:
    """What a network says of noisy latents."""

    prediction: Tensor | None = None
    """Shaped like the latents."""
    raw: Tensor | None = None
    """All channels that the network gives."""
    hidden: list[Tensor] = field(default_factory=list)
    """Of each block."""


class Distillation(nn.Module):
    """A student and its teacher; `forward` returns the loss and its terms. Both are always in evaluation mode: what
    dropout would drop, captions too, must be the same for both.

    Args:
        student: converted.
        teacher: frozen.
        denoiser: of the teacher's pipeline.
        name: of the network in it.
        terms: of the loss.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, denoiser: Denoiser, name: str, terms: Terms) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.terms = terms
        self._denoisers = {"student": with_network(denoiser, name, student), "teacher": denoiser}
        self._blocks = {"student": blocks_of(student), "teacher": blocks_of(teacher)}
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(
        self, x: Tensor, sigma: Tensor, condition: Condition, wanted: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss and its terms, unweighted.

        Args:
            x: (B, ...) noisy latents.
            sigma: (B,) their noise levels.
            condition: of the rows, the same for both.
            wanted: (B, ...) what the task wants to be predicted.
        """
        terms = self.terms
        student = self._said("student", x, sigma, condition)
        found: dict[str, Tensor] = {}
        if terms.teacher:
            with torch.no_grad():
                teacher = self._said("teacher", x, sigma, condition)
            found["output"] = _square(student.prediction, teacher.prediction)
        if terms.variance:
            found["variance"] = _square(variance_of(student.raw, x), variance_of(teacher.raw, x))
        if terms.hidden:
            found["hidden"] = distance("centred_l2", student.hidden, teacher.hidden)
        if wanted is not None:
            found["task"] = _square(student.prediction, wanted)
        loss = torch.stack([getattr(terms, name) * value for name, value in found.items()]).sum()
        return loss, {name: value.detach() for name, value in found.items()}

    def _said(self, who: str, x: Tensor, sigma: Tensor, condition: Condition) -> Said:
        said = Said()
        with _listening(getattr(self, who), self._blocks[who] if self.terms.hidden else (), said):
            said.prediction = self._denoisers[who].predict(x, sigma, condition)
        return said


def with_network(denoiser: Denoiser, name: str, network: nn.Module) -> Denoiser:
    """Return a denoiser that calls another network in the place of one of its own."""
    other = copy.copy(denoiser)
    other.transformers = {**denoiser.transformers, name: network}
    return other


def variance_of(raw: Tensor | None, x: Tensor) -> Tensor:
    """Return the channels of the variance among those that a network gives, behind those of the prediction.

    Args:
        raw: (B, 2 C, H, W).
        x: (B, C, H, W), the latents.

    Raises:
        UserError: the model predicts none.
    """
    assert raw is not None
    if raw.dim() != x.dim() or raw.shape[1] != 2 * x.shape[1]:
        raise UserError(
            f"variance_weight: this model predicts no variance, it gives {tuple(raw.shape)} for latents"
            f" {tuple(x.shape)}: leave it out"
        )
    return raw[:, x.shape[1] :]


def predicts_variance(network: Any) -> bool:
    """Whether a network gives twice the channels that it takes, which is how models of images predict a variance."""
    config = network.config
    return config.get("out_channels") is not None and config["out_channels"] == 2 * config["in_channels"]


def wanted_of(clean: Tensor, noise: Tensor, levels: Levels, kind: PredictionType) -> Tensor:
    """Return what a model should predict of noised latents.

    Args:
        clean: (B, ...).
        noise: (B, ...).
        levels: of the noise, (B,).
        kind: meaning of its predictions.
    """
    if kind == "flow":
        return noise - clean
    if kind == "v_prediction":
        (a, b), _ = levels.mix()
        return wide(a, noise) * noise - wide(b, clean) * clean
    return noise if kind == "epsilon" else clean


@contextmanager
def _listening(network: nn.Module, blocks: tuple[Block, ...] | Any, said: Said) -> Iterator[None]:
    """Keep what a network and its blocks give in one call; nothing is left on them for the backward pass."""

    def of_network(module: nn.Module, args: Any, output: Any) -> None:
        said.raw = output[0] if isinstance(output, tuple) else output.sample

    def of_block(block: Block, output: Any) -> None:
        said.hidden.append(block.outputs(output)[0])

    with ExitStack() as stack:
        stack.callback(network.register_forward_hook(of_network).remove)
        for block in blocks:
            hook = block.module.register_forward_hook(
                lambda module, args, output, block=block: of_block(block, output)
            )
            stack.callback(hook.remove)
        yield


def _square(a: Tensor | None, b: Tensor | None) -> Tensor:
    assert a is not None
    assert b is not None
    return (a.float() - b.float()).square().mean()


def noised(clean: Tensor, noise: Tensor, levels: Levels) -> Tensor:
    """Return latents with noise of a level, (B, ...)."""
    (a, b), _ = levels.mix()
    return wide(a, clean) * clean + wide(b, noise) * noise


def check_terms(terms: Mapping[str, float]) -> None:
    """Refuse a loss that is nothing.

    Raises:
        UserError: no weight is above 0.
    """
    if not any(terms.values()):
        raise UserError(f"all of {', '.join(terms)} are 0: give one of them a weight")
