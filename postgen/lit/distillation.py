"""End-to-end distillation: train a converted transformer to reproduce the predictions of the stock one.

The loss is guideline 5 of LiT (arXiv:2501.12976) plus a term on the outputs of the blocks, as in CLEAR
(arXiv:2412.16112) and later hybrids:

    L = w_task |y_S - y|^2 + l1 |y_T - y_S|^2 + l2 |Sigma_T - Sigma_S|^2 + w_h mean_b d(h_T,b, h_S,b)

T is the teacher (stock), S the student (converted). y is the target of the task, y_T and y_S are predictions
(velocity, noise, ...). All squares are averaged. Sigma are the variance channels, which some noise-prediction models
have; flow models have none. h_b is the output of block b for the video tokens. d is their distance relative to the
teacher's output minus its mean over the tokens, so that blocks with small and large outputs count equally.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families import Block, Condition, Denoiser, blocks_of
from postgen.reconstruct.loss import distance
from postgen.training import distillation
from postgen.training.distillation import square


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms(distillation.Terms):
    """Weights of the loss terms; at least one is above 0. `output` is l1."""

    variance: float
    """l2, the weight of the difference of the variance channels; 0 for a model without variance channels."""
    hidden: float
    """w_h, the weight of the difference of the block outputs."""

    @property
    def teacher(self) -> bool:
        """Whether the loss needs a forward pass of the teacher."""
        return self.output > 0 or self.variance > 0 or self.hidden > 0


@dataclass(slots=True)
class Said(distillation.Said):
    """The outputs of one forward pass of a network."""

    raw: Tensor | None = None
    """All output channels of the network, including variance channels."""
    hidden: list[Tensor] = field(default_factory=list)
    """The output of each block for the video tokens."""


class Distillation(distillation.Distillation):
    """A converted student and its stock teacher; `forward` returns the loss and its terms.

    Args:
        student: the converted transformer.
        teacher: the stock transformer; its parameters are frozen.
        denoiser: the denoiser of the teacher's pipeline.
        name: name of the transformer in the denoiser.
        terms: weights of the loss terms.
    """

    terms: Terms

    def __init__(self, student: nn.Module, teacher: nn.Module, denoiser: Denoiser, name: str, terms: Terms) -> None:
        super().__init__(student, teacher, denoiser, name, terms)
        self._blocks = {"student": blocks_of(student), "teacher": blocks_of(teacher)}

    def _said(self, who: str, x: Tensor, sigma: Tensor, condition: Condition) -> Said:
        said = Said()
        with _listening(getattr(self, who), self._blocks[who] if self.terms.hidden else (), said):
            said.prediction = super()._said(who, x, sigma, condition).prediction
        return said

    def _compared(self, student: Any, teacher: Any, x: Tensor) -> dict[str, Tensor]:
        found = super()._compared(student, teacher, x)
        if self.terms.variance:
            found["variance"] = square(variance_of(student.raw, x), variance_of(teacher.raw, x))
        if self.terms.hidden:
            found["hidden"] = distance("centred_l2", student.hidden, teacher.hidden)
        return found


def variance_of(raw: Tensor | None, x: Tensor) -> Tensor:
    """Return the variance channels of a network's output, which follow the channels of the prediction.

    Args:
        raw: output of the network, (B, 2 C, H, W).
        x: the latents, (B, C, H, W).

    Raises:
        UserError: the model predicts no variance.
    """
    assert raw is not None
    if raw.dim() != x.dim() or raw.shape[1] != 2 * x.shape[1]:
        raise UserError(
            f"variance_weight needs a model that predicts a variance, but this model returns {tuple(raw.shape)} for"
            f" latents of {tuple(x.shape)}: leave variance_weight out"
        )
    return raw[:, x.shape[1] :]


def predicts_variance(network: Any) -> bool:
    """Whether a network predicts a variance: image models that do so have twice as many output as input channels."""
    config = network.config
    return config.get("out_channels") is not None and config["out_channels"] == 2 * config["in_channels"]


@contextmanager
def _listening(network: nn.Module, blocks: tuple[Block, ...] | Any, said: Said) -> Iterator[None]:
    """Record the outputs of a network and its blocks during one forward pass; the hooks are removed afterwards."""

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


def check_terms(terms: Mapping[str, float]) -> None:
    """Check that the loss has at least one term.

    Args:
        terms: the name of each weight in the settings -> its value.

    Raises:
        UserError: every weight is 0.
    """
    if not any(terms.values()):
        raise UserError(f"{', '.join(terms)} are all 0, so the loss is empty: set at least one of them above 0")
