"""A student and its teacher: the module that compares their predictions on the same inputs.

    L = w_task |y_S - y|^2 + w_output |y_S - y_T|^2

T is the teacher, S the student, y the target of the task, y_T and y_S are predictions (velocity, noise, ...). All
squares are averaged. A method adds further terms in a subclass.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from postgen.families import Condition, Denoiser


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """Weights of the loss terms; at least one is above 0."""

    task: float
    """w_task, the weight of the task loss (the model's own training loss)."""
    output: float
    """w_output, the weight of the difference of the predictions."""

    @property
    def teacher(self) -> bool:
        """Whether the loss needs a forward pass of the teacher."""
        return self.output > 0


@dataclass(slots=True)
class Said:
    """What a network says about some latents."""

    prediction: Tensor | None = None
    """The prediction, in the shape of the latents."""


class Distillation(nn.Module):
    """A student and its teacher; `forward` returns the loss and its terms.

    Both networks are always in evaluation mode, because dropout (of captions too) would drop different values in the
    two networks.

    Args:
        student: the trained network.
        teacher: the exact network; its parameters are frozen.
        denoiser: the denoiser of the teacher's pipeline.
        name: name of the network in the denoiser.
        terms: weights of the loss terms.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, denoiser: Denoiser, name: str, terms: Terms) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.terms = terms
        self._denoisers = {"student": with_network(denoiser, name, student), "teacher": denoiser}
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Keep evaluation mode, whatever `mode` is."""
        return super().train(False)

    def forward(
        self, x: Tensor, sigma: Tensor, condition: Condition, wanted: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss, and the unweighted loss terms by name.

        Args:
            x: noisy latents, (B, ...).
            sigma: noise levels of the latents, (B,).
            condition: the condition of each row, for both networks.
            wanted: the target of the task, (B, ...); None leaves the task loss out.
        """
        student = self._said("student", x, sigma, condition)
        found: dict[str, Tensor] = {}
        if self.terms.teacher:
            with torch.no_grad():
                teacher = self._said("teacher", x, sigma, condition)
            found |= self._compared(student, teacher, x)
        if wanted is not None:
            found["task"] = square(student.prediction, wanted)
        loss = torch.stack([getattr(self.terms, name) * value for name, value in found.items()]).sum()
        return loss, {name: value.detach() for name, value in found.items()}

    def _said(self, who: str, x: Tensor, sigma: Tensor, condition: Condition) -> Said:
        """Run a network ("student" or "teacher")."""
        return Said(self._denoisers[who].predict(x, sigma, condition))

    def _compared(self, student: Said, teacher: Said, x: Tensor) -> dict[str, Tensor]:
        """Return the unweighted terms that compare the networks, by name."""
        return {"output": square(student.prediction, teacher.prediction)}


def with_network(denoiser: Denoiser, name: str, network: nn.Module) -> Denoiser:
    """Return a copy of a denoiser that uses another network in place of the one with this name."""
    other = copy.copy(denoiser)
    other.transformers = {**denoiser.transformers, name: network}
    return other


def square(a: Tensor | None, b: Tensor | None) -> Tensor:
    """Return the mean squared difference of two outputs, in float32."""
    assert a is not None
    assert b is not None
    return (a.float() - b.float()).square().mean()
