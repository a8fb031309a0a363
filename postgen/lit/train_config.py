"""Settings of method `lit`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from postgen.errors import UserError, shown
from postgen.lit.config import LiTConfig
from postgen.reconstruct import ReconstructConfig, RecordsConfig
from postgen.reconstruct.loss import Loss
from postgen.training import TrainingConfig
from postgen.training.lora import AdapterConfig
from postgen.training.policy import ModelConfig
from postgen.training.prompts import PromptsConfig

VARIANCE_WEIGHT = 0.05
"""Of a model that predicts a variance, as published."""


@dataclass(kw_only=True)
class LitTrainingConfig(TrainingConfig, PromptsConfig, AdapterConfig, ModelConfig, RecordsConfig):
    """Settings of `LitTrainer`.

    `num_frames` to `negative_prompt` say how the teacher draws the latents, `batch_size` how many prompts it draws
    together, `held_out_prompts` how many of those of the transfer only measure errors. `learning_rate` is that of
    what the teacher has too, weights and their adapters.

    Raises:
        UserError: a value outside its range, or two that do not go together.
    """

    files: ClassVar[tuple[str, ...]] = ("latents",)

    conversion: dict[str, Any] = field(default_factory=dict)
    """Settings of `postgen.lit.LiTConfig`, as `{layers: "1-6:window_delta", window: {radius: 1}}`. Of the paper's
    guidelines the convolution is `lit: {conv_space: 5}`, few heads `lit: {merge_heads: 4}`, inheritance
    `inherit: output`."""

    student: str | None = None
    """Folder of a converted transformer to go on from, as `postgen.lit.save` and this method write it; instead of
    `conversion`."""

    train: Literal["new", "attention", "all"] = "attention"
    """What is trained: the new layers, the converted attention modules too, or everything."""

    use_peft: bool = False
    """Train LoRA adapters on the attention of all blocks, and the new layers beside them; with `train: new` only."""

    latents: str | None = None
    """Safetensors file with finished latents of your own as `latents`, (N, ...), one for each prompt of
    `train_dataset` in its order, as the denoiser takes them (`encode_video`); none lets the teacher draw them. Kept
    in memory."""

    learning_rate_new: float | None = None
    """Peak rate of what the teacher does not have; none is `learning_rate`."""

    task_weight: float = 1.0
    """Weight of the model's own loss, of noised latents that the teacher has drawn."""

    output_weight: float = 0.5
    """Weight of the difference of predictions, lambda 1 of LiT."""

    variance_weight: float | None = None
    """Weight of the difference of variances, lambda 2 of LiT; none is .05 where the model predicts one and 0 where it
    does not (models of flows)."""

    hidden_weight: float = 0.0
    """Weight of the difference of what blocks give, relative to the teacher's."""

    states: Literal["noised", "trajectory"] = "noised"
    """Latents that the networks are shown: finished ones with fresh noise, or those on the teacher's way to them, with
    which `task_weight` must be 0."""

    caption_dropout: float = 0.1
    """Share of rows whose text is empty, for the student and the teacher alike."""

    transfer_steps: int = 0
    """Steps of attention transfer of each converted block before the training end to end, a tenth of them warm-up; 0
    is none."""

    transfer_prompts: int = 64
    """Prompts of the transfer, the first ones, `held_out_prompts` among them."""

    transfer_learning_rate: float = 1e-3
    """Peak rate of new layers in the transfer."""

    transfer_inherited: bool = False
    """Train the base's queries, keys and values in the transfer too, at `transfer_learning_rate` / 10."""

    transfer_loss: Loss = "centred_l2"
    """Loss of the transfer, see `postgen.reconstruct.loss`."""

    transfer_blocks: int | None = None
    """Blocks that are recorded and transferred at a time; none is all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.conversion, dict):
            raise UserError(f"conversion is {shown(self.conversion)}, it must be a mapping of settings of LiTConfig.")
        LiTConfig.from_json(self.conversion)
        self.require(not (self.student and self.conversion), "conversion", "left out with student, which has its own")
        weights = ("task_weight", "output_weight", "hidden_weight")
        for name in (*weights, "transfer_steps"):
            self.require(getattr(self, name) >= 0, name, "at least 0")
        for name in ("learning_rate_new", "transfer_learning_rate"):
            self.require(getattr(self, name) is None or getattr(self, name) > 0, name, "above 0")
        self.require(self.variance_weight is None or self.variance_weight >= 0, "variance_weight", "at least 0")
        asked = any(getattr(self, name) for name in weights) or self.variance_weight != 0
        self.require(asked, "task_weight", "above 0, or another weight")
        self.require(0 <= self.caption_dropout <= 1, "caption_dropout", "from 0 to 1")
        self.require(self.states == "noised" or not self.task_weight, "task_weight", "0 with states: trajectory")
        self.require(self.states == "noised" or not self.latents, "states", "noised with latents, which are finished")
        self.require(not self.use_peft or self.train == "new", "train", "new with use_peft, which adapts the rest")
        self.require(self.lora_path is None, "lora_path", "left out: merge it into the model before it is converted")
        self.require(not self.init_from, "init_from", "left out: name a converted transformer as student")
        self.require(not (self.student and self.transfer_steps), "transfer_steps", "0 with student")
        most = self.transfer_prompts > self.held_out_prompts or not self.transfer_steps
        self.require(most, "transfer_prompts", "more than held_out_prompts")
        self.require(self.transfer_blocks is None or self.transfer_blocks >= 1, "transfer_blocks", "at least 1")

    @property
    def lit(self) -> LiTConfig:
        """The conversion."""
        return LiTConfig.from_json(self.conversion)

    def records(self) -> RecordsConfig:
        """Return what the transfer records."""
        names = [item.name for item in dataclasses.fields(RecordsConfig)]
        return RecordsConfig(**{name: getattr(self, name) for name in names})

    def transfer(self) -> ReconstructConfig:
        """Return how blocks are transferred. What the run has done before is gone on with."""
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
