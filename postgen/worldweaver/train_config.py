"""Settings of method `worldweaver`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from postgen.training import TrainingConfig
from postgen.training.lora import AdapterConfig
from postgen.training.policy import ModelConfig

from .clips import ClipsConfig
from .latent_scale import checked_scale
from .window_config import WindowConfig


@dataclass(kw_only=True)
class WorldWeaverConfig(TrainingConfig, WindowConfig, ClipsConfig, AdapterConfig, ModelConfig):
    """Settings of `WorldWeaverTrainer`. `learning_rate` is that of the LoRA, or of the base's weights without it.

    Raises:
        UserError: a value outside its range, or two that do not go together.
    """

    may_change: ClassVar[tuple[str, ...]] = ("pool_dir", "export_dtype", "guidance_scale")

    learning_rate_new: float | None = None
    """Peak rate of the two widened layers, of the level embedder and of what refines; none is `learning_rate`."""

    refine: int = 0
    """Width of the convolutions that bring together what the network says of depth and flow and what their noisy
    latents hold (`postgen.worldweaver.refine`); 0 is none. Without depth and flow there is nothing to refine."""

    export_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number type of the adapter that is written."""

    latent_scale: list[float] | None = None
    """What latents of RGB, depth and flow are multiplied by for the network, RGB by 1; none is measured from the
    clips, so that all have the size of RGB's."""

    guidance_scale: float | None = None
    """Classifier-free guidance that rollouts with the adapter take where nothing else is asked for; none is that of
    the base. With memory less of it is enough: the text says little that the frames before do not show."""

    own_from: float = 0.8
    """Share of the steps after which memory is partly the model's own."""

    own_share: float = 0.5
    """Share of micro-batches, from then on, whose newest memory the model has made itself, in one shift without
    gradients; 0 leaves it out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rate = self.learning_rate_new
        self.require(rate is None or rate > 0, "learning_rate_new", "above 0")
        self.require(0 <= self.refine <= 1024, "refine", "from 0 to 1024")
        if self.latent_scale is not None:
            checked_scale(self.latent_scale, len(self.modalities))
        guidance = self.guidance_scale
        self.require(guidance is None or 0 <= guidance <= 1000, "guidance_scale", "from 0 to 1000")
        for name in ("own_from", "own_share"):
            self.require(0 <= getattr(self, name) <= 1, name, "from 0 to 1")
        self.require(not self.fully_shard, "fully_shard", "false: the adapter is written of whole weights")
        self.require(not self.init_from, "init_from", "left out: an adapter is trained from its base")
        self.require(self.lora_path is None, "lora_path", "left out: merge it into the model before it is widened")
        evaluates = self.eval_steps or self.eval_on_start or self.evaluate_only
        self.require("flow" not in self.aux or self.num_frames > 1, "num_frames", "at least 2 with flow in aux")
        self.require(bool(self.aux) or self.depth_model is None, "depth_model", "left out with aux: []")
        if self.train_dataset is None:
            self.require(not evaluates or self.eval_clips > 0, "eval_clips", "at least 1 to evaluate")
            self.require(self.eval_dataset is None, "eval_dataset", "left out without train_dataset: give eval_clips")
        else:
            self.require(not evaluates or bool(self.eval_dataset), "eval_dataset", "given to evaluate")
            self.require(self.eval_clips == 0, "eval_clips", "0 with train_dataset: give eval_dataset")
            self.require(self.memory_policy != "camera", "memory_policy", "another one than camera: videos have none")
            self.require("flow" not in self.aux, "aux", "without flow: videos have none")
            self.require(not self.placed_memory, "placed_memory", "false: videos have no cameras")
