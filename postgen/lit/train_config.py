"""Settings of the training method `lit`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from postgen.errors import UserError, shown
from postgen.lit.config import LitConfig
from postgen.reconstruct import ReconstructConfig, RecordsConfig
from postgen.reconstruct.loss import Loss
from postgen.training.distil_trainer import DistillationConfig
from postgen.training.lora import AdapterConfig

VARIANCE_WEIGHT = 0.05
"""Default of `variance_weight` for models that predict a variance, as published."""


@dataclass(kw_only=True)
class LitTrainingConfig(DistillationConfig, AdapterConfig, RecordsConfig):
    """Settings of `LitTrainer`.

    The settings from `num_frames` to `negative_prompt` determine how the teacher samples the latents, and `batch_size`
    is the number of prompts that it samples together. `held_out_prompts` is the number of prompts of the attention
    transfer that only measure errors. `learning_rate` applies to inherited weights, which the teacher has too, and to
    their LoRA adapters.

    Raises:
        UserError: a value is outside its range, or two settings exclude each other.
    """

    conversion: dict[str, Any] = field(default_factory=dict)
    """Settings of the conversion (`postgen.lit.LitConfig`), such as `{layers: "1-6:window_delta", window: {radius:
    1}}`. For the guidelines of LiT: `lit: {conv_space: 5}` is the convolution, `lit: {merge_heads: 4}` are few heads,
    `inherit: output` is the inheritance."""

    student: str | None = None
    """Folder of a converted transformer to continue from, written by `postgen.lit.save` or by this method. It replaces
    `conversion`."""

    train: Literal["new", "attention", "all"] = "attention"
    """Trained weights. new: the new layers; attention: also the converted attention modules; all: every weight."""

    use_peft: bool = False
    """Train LoRA adapters on the attention of all blocks, in addition to the new layers; needs `train: new`."""

    learning_rate_new: float | None = None
    """Peak learning rate of new weights, which the teacher does not have; None uses `learning_rate`."""

    variance_weight: float | None = None
    """Weight of the difference between the predicted variances, lambda 2 of LiT. None: .05 for models that predict a
    variance, 0 for models that do not (flow models)."""

    hidden_weight: float = 0.0
    """Weight of the difference between the block outputs, relative to the teacher's."""

    transfer_steps: int = 0
    """Steps of attention transfer for each converted block before the end-to-end training; a tenth of them is warm-up.
    0 skips the attention transfer."""

    transfer_prompts: int = 64
    """Number of prompts of the attention transfer, from the start of the dataset, including `held_out_prompts`."""

    transfer_learning_rate: float = 1e-3
    """Peak learning rate of new layers in the attention transfer."""

    transfer_inherited: bool = False
    """Also train the base model's projections of queries, keys and values and their norms in the attention transfer,
    at `transfer_learning_rate` / 10."""

    transfer_loss: Loss = "centred_l2"
    """Loss of the attention transfer, see `postgen.reconstruct.loss`."""

    transfer_blocks: int | None = None
    """Number of blocks to record and transfer at a time; None: all blocks at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.conversion, dict):
            raise UserError(f"conversion must be a mapping of LitConfig settings, got {shown(self.conversion)}")
        LitConfig.from_json(self.conversion)
        self.require(not (self.student and self.conversion), "conversion", "left out with student, which has its own")
        for name in ("hidden_weight", "transfer_steps"):
            self.require(getattr(self, name) >= 0, name, "at least 0")
        for name in ("learning_rate_new", "transfer_learning_rate"):
            self.require(getattr(self, name) is None or getattr(self, name) > 0, name, "above 0")
        self.require(self.variance_weight is None or self.variance_weight >= 0, "variance_weight", "at least 0")
        weights = (self.task_weight, self.output_weight, self.hidden_weight)
        asked = any(weights) or self.variance_weight != 0
        self.require(asked, "task_weight", "above 0, or another weight")
        self.require(not self.use_peft or self.train == "new", "train", "new with use_peft, which adapts the rest")
        self.require(self.lora_path is None, "lora_path", "left out: merge it into the model before it is converted")
        self.require(not self.init_from, "init_from", "left out: name a converted transformer as student")
        self.require(not (self.student and self.transfer_steps), "transfer_steps", "0 with student")
        most = self.transfer_prompts > self.held_out_prompts or not self.transfer_steps
        self.require(most, "transfer_prompts", "more than held_out_prompts")
        self.require(self.transfer_blocks is None or self.transfer_blocks >= 1, "transfer_blocks", "at least 1")

    @property
    def lit(self) -> LitConfig:
        """The settings of the conversion."""
        return LitConfig.from_json(self.conversion)

    def records(self) -> RecordsConfig:
        """Return the settings of the recording for the attention transfer."""
        names = [item.name for item in dataclasses.fields(RecordsConfig)]
        return RecordsConfig(**{name: getattr(self, name) for name in names})

    def transfer(self) -> ReconstructConfig:
        """Return the training settings of the attention transfer. It always resumes earlier work of this run."""
        shared = ("bf16", "device", "seed", "disable_tqdm", "logging_steps", "save_steps", "weight_decay")
        return ReconstructConfig(
            output_dir=str(self.folder / "transfer"),
            resume=True,
            max_steps=self.transfer_steps,
            warmup_steps=self.transfer_steps // 10,
            learning_rate=self.transfer_learning_rate / 10,
            learning_rate_new=self.transfer_learning_rate,
            loss=self.transfer_loss,
            **{name: getattr(self, name) for name in shared},
        )
