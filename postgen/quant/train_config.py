"""Settings of the training method `quant`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from postgen.quant.spec import QuantSpec
from postgen.quant.trained_scales import check_trainable
from postgen.settings import Part
from postgen.training.distil_trainer import DistillationConfig

_MOST = 4096


@dataclass(kw_only=True)
class QuantizationConfig(Part):
    """Settings of the quantisation of the student, as in `postgen.quant.QuantSpec`.

    Raises:
        UserError: a value has the wrong type or is out of range.
    """

    part: ClassVar[str] = "quantization"

    weight: str | None = None
    """Format of the weights, such as int4:g64; None keeps them exact."""

    act: str | None = None
    """Format of the inputs of the layers, such as fp8:token; None keeps them exact."""

    rotate: int = 0
    """Size of the Hadamard blocks that rotate the channels of inputs and weights, a power of two; 0: no rotation."""

    rank: int = 0
    """Rank of an exact low-rank branch that takes the largest part of each weight; 0: none."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Exceptions: a regular expression for the full name of a layer -> other values of the four keys above."""

    modulation: str | None = None
    """Format of the weights of the layers that compute scales, shifts and gates, such as int8; None keeps them
    exact."""

    solver: Literal["rtn", "ls"] = "rtn"
    """How the codes are computed from the exact weights, without data. rtn: round to nearest; ls: least squares."""

    @property
    def spec(self) -> QuantSpec:
        """How the student is quantised.

        Raises:
            UserError: a value that `QuantSpec` refuses.
        """
        return QuantSpec(**{each.name: getattr(self, each.name) for each in fields(QuantSpec)})


@dataclass(kw_only=True)
class QuantTrainingConfig(DistillationConfig, QuantizationConfig):
    """Settings of `QuantTrainer`.

    The settings from `num_frames` to `negative_prompt` determine how the teacher samples the latents, and `batch_size`
    is the number of prompts that it samples together. `learning_rate` applies to the scales.

    Raises:
        UserError: a value is outside its range, or two settings exclude each other.
    """

    student: str | None = None
    """Folder of a quantised model or transformer to train, such as the output of `postgen convert quant`. It replaces
    `weight` and the other settings of the part `quantization`."""

    task_weight: float = 0.0
    """Weight of the task loss, the model's own training loss on noised latents."""

    output_weight: float = 1.0
    """Weight of the difference between the predictions of student and teacher."""

    learning_rate: float = 2e-5
    """Peak learning rate of the scales, above 0. EfficientQAT uses 2e-5 for 2 bits and 1e-5 for 3 and 4 bits of large
    language models; small models have larger weights and scales, and need a larger rate."""

    max_grad_norm: float = 0.3
    """Gradients are clipped to this global norm; 0 disables clipping."""

    branch_rank: int = 0
    """Rank of an auxiliary low-rank branch of each quantised layer (QVGen), which is trained with the scales; 0: no
    branch. It begins as the largest part of what rounding has lost, and with `student` as 0."""

    branch_decay_steps: int = 0
    """Number of steps in which the rank of the branches falls to 0, so that the result has none. 0: the rank stays,
    and the result has exact low-rank branches."""

    branch_learning_rate: float | None = None
    """Peak learning rate of the branches, above 0; None uses `learning_rate`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student:
            for name in (each.name for each in fields(QuantSpec)):
                self.require(not getattr(self, name), name, "left out with student, which is quantised already")
            self.require(self.solver == "rtn", "solver", "left out with student, which has its codes")
        else:
            self._check_spec()
        self.require(self.task_weight > 0 or self.output_weight > 0, "output_weight", "above 0, or task_weight")
        self.require(0 <= self.branch_rank <= _MOST, "branch_rank", f"from 0 to {_MOST}")
        self.require(self.branch_decay_steps >= 0, "branch_decay_steps", "at least 0")
        self.require(self.branch_decay_steps <= self.max_steps, "branch_decay_steps", "at most max_steps")
        self.require(bool(self.branch_rank) or not self.branch_decay_steps, "branch_decay_steps", "0 without a branch")
        rate = self.branch_learning_rate
        fits = rate is None or (rate > 0 and self.branch_rank > 0)
        self.require(fits, "branch_learning_rate", "above 0, with a branch_rank")
        self.require(not self.init_from, "init_from", "left out: name a quantised model as student")

    def _check_spec(self) -> None:
        self.require(
            self.weight is not None, "weight", "a format such as int4:g64, or name a quantised model as student"
        )
        spec = self.spec
        for name in ("", *spec.overrides):
            check_trainable(spec.layer(name).weight, f"overrides[{name!r}]" if name else "the student")
        check_trainable(spec.modulation_layer("").weight, "modulation")
        self.require(not (self.branch_rank and spec.rank), "branch_rank", "0 with a rank, which is a branch already")
