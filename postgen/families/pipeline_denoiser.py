"""What denoisers of flow models have in common: guidance in two passes, sizes, noise levels, decoding of pictures."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families.denoiser import Condition, PredictionType
from postgen.families.wan_sizes import check_size


class PipelineDenoiser(ABC):
    """Base of `Denoiser`s: a family says how it encodes, what its network is told, and how it decodes.

    Latents are kept unpacked, (B, C, T, H, W) for clips and (B, C, H, W) for pictures, whatever the network wants:
    so they carry their size with them.

    Args:
        pipe: the pipeline; its components are used in place.
        max_sequence_length: tokens of a prompt; None is the pipeline's default.

    Raises:
        UserError: the scheduler is not of the family's kind.
    """

    prediction_type: PredictionType = "flow"
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    component: ClassVar[str] = "transformer"
    default_length: ClassVar[int] = 256
    per_row: ClassVar[tuple[str, ...]] = ()
    """What `encode` gives besides the encoding: suffixes of condition entries, as in `prompt_mask`."""

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None) -> None:
        self.pipe = pipe
        self.max_sequence_length = max_sequence_length or self.default_length
        self.transformers: dict[str, nn.Module] = {self.component: getattr(pipe, self.component)}
        self.check_scheduler()

    # What a family says.

    @abstractmethod
    def encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Encode texts: the encoding, then what `per_row` names; batch first."""

    @abstractmethod
    def forward(self, x: Tensor, timestep: Tensor, texts: dict[str, Tensor]) -> Tensor:
        """Call the network on unpacked latents in its own dtype.

        Args:
            x: latents.
            timestep: (B,) sigma * timestep_scale.
            texts: `prompt` and `per_row` entries, of the prompt or of the negative one.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents into clips (B, F, 3, H, W), float32 in [0, 1]; a picture is a clip of one frame."""

    @abstractmethod
    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of one sample's latents."""

    @property
    @abstractmethod
    def multiples(self) -> tuple[int, int, int]:
        """What height, width and frames - 1 must divide by; 0 for the last where there is only one frame."""

    # What follows.

    @property
    def timestep_scale(self) -> float:
        """The network's timestep is sigma times this."""
        return float(self.pipe.scheduler.config.num_train_timesteps)

    @property
    def model(self) -> Any:
        """The network as diffusers made it, for its config, dtype and device."""
        return getattr(self.pipe, self.component)

    def check_scheduler(self) -> None:
        """Refuse a scheduler that does not go with the model."""
        config = self.pipe.scheduler.config
        if not (type(self.pipe.scheduler).__name__.startswith("FlowMatch") or config.get("use_flow_sigmas", False)):
            raise UserError(
                f"{type(self.pipe.scheduler).__name__} is not a flow-matching scheduler: {type(self.pipe).__name__} "
                "needs FlowMatchEulerDiscreteScheduler, or one with use_flow_sigmas"
            )

    def encode_prompt(
        self, prompts: list[str], negative_prompts: list[str] | None = None, *, guidance: bool = True
    ) -> dict[str, Tensor]:
        """Encode B prompts as the pipeline's default call does. See `Denoiser`."""
        condition = self._named("prompt", self.encode(prompts))
        if guidance:
            negatives = negative_prompts if negative_prompts is not None else [""] * len(prompts)
            condition |= self._named("negative", self.encode(negatives))
        return condition

    def encode_image(self, images: Tensor, num_frames: int) -> dict[str, Tensor]:
        """Refuse first frames.

        Raises:
            UserError: always; a family that takes images writes its own.
        """
        raise UserError(f"{type(self.pipe).__name__} takes text only: use an image-to-video model")

    def encode_video(self, clips: Tensor, *, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Refuse clips.

        Raises:
            UserError: always; a family that is trained on clips writes its own.
        """
        raise UserError(f"clips are not encoded for {type(self.pipe).__name__} yet")

    def initial_latents(
        self,
        batch: int,
        *,
        num_frames: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Draw float32 noise, the pipeline's own for the same generator. See `Denoiser`."""
        from diffusers.utils.torch_utils import randn_tensor

        rows, columns, time = self.multiples
        if not time and num_frames != 1:
            raise UserError(f"{type(self.pipe).__name__} makes pictures: num_frames must be 1, got {num_frames}")
        check_size(num_frames, height, width, rows, columns, time or 1)
        shape = (batch, *self.latent_shape(num_frames, height, width))
        noise: Tensor = randn_tensor(shape, generator=generator, device=self.model.device, dtype=torch.float32)
        return noise

    def tokens(self, shape: Sequence[int]) -> int:
        """Return the tokens of latents of a shape, which schedules with dynamic shifting depend on."""
        patch = self.model.config.get("patch_size", 1)
        patch = patch if isinstance(patch, int) else patch[-1]
        count = int(shape[-1]) // patch * (int(shape[-2]) // patch)
        return count * int(shape[-3]) if len(shape) == 4 else count

    def start_sigmas(self, num_steps: int) -> Tensor | None:
        """Return the noise levels that the pipeline hands to its scheduler before shifting; None leaves them to it."""
        return None

    def sigmas(self, num_steps: int, shape: Sequence[int] | None = None) -> Tensor:
        """Return the (num_steps + 1,) noise levels of the pipeline's schedule, float32, the last one 0.

        Raises:
            UserError: the schedule depends on the size, and `shape` is not given.
        """
        scheduler = copy.deepcopy(self.pipe.scheduler)
        extra: dict[str, Any] = {}
        if scheduler.config.get("use_dynamic_shifting", False):
            if shape is None:
                raise UserError(f"the noise levels of {type(self.pipe).__name__} depend on the size: give a shape")
            extra["mu"] = self._mu(self.tokens(shape))
        start = self.start_sigmas(num_steps)
        if start is None:
            scheduler.set_timesteps(num_steps, device=self.model.device, **extra)
        else:
            scheduler.set_timesteps(sigmas=start.numpy(), device=self.model.device, **extra)
        sigmas: Tensor = scheduler.sigmas
        return sigmas.to(self.model.device, torch.float32)

    def predict(self, x: Tensor, sigma: Tensor, condition: Condition, guidance: float = 1.0) -> Tensor:
        """Return the prediction of every row, float32. See `Denoiser`.

        Raises:
            ValueError: `sigma` is not (B,), or guidance without `negative`.
        """
        if sigma.shape != x.shape[:1]:
            raise ValueError(f"sigma must have the shape ({x.shape[0]},), got {tuple(sigma.shape)}")
        if guidance > 1 and "negative" not in condition:
            raise ValueError("guidance above 1 needs condition['negative']: call encode_prompt with guidance=True")
        x, timestep = x.to(self.model.dtype), self.timestep(sigma.to(x.device))
        with_text = self.forward(x, timestep, self._texts("prompt", condition)).float()
        if guidance <= 1:
            return with_text
        without = self.forward(x, timestep, self._texts("negative", condition)).float()
        return without + guidance * (with_text - without)

    def timestep(self, sigma: Tensor) -> Tensor:
        """Return the network's timesteps for noise levels (B,)."""
        return sigma.to(torch.float32) * self.timestep_scale

    def to_pictures(self, decoded: Tensor) -> Tensor:
        """Turn what an autoencoder of pictures gave, (B, 3, H, W) in [-1, 1], into clips of one frame."""
        return (decoded.float() * 0.5 + 0.5).clamp(0, 1)[:, None]

    def to_clips(self, decoded: Tensor) -> Tensor:
        """Turn what an autoencoder of clips gave, (B, 3, F, H, W) in [-1, 1], into clips."""
        return (decoded.float() * 0.5 + 0.5).clamp(0, 1).transpose(1, 2)

    def _named(self, text: str, parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
        dtype = self.model.dtype
        names = (text, *(f"{text}_{name}" for name in self.per_row))
        return {n: p.to(dtype) if p.is_floating_point() else p for n, p in zip(names, parts, strict=True)}

    def _texts(self, text: str, condition: Condition) -> dict[str, Tensor]:
        return {"prompt": condition[text], **{name: condition[f"{text}_{name}"] for name in self.per_row}}

    def _mu(self, tokens: int) -> float:
        config = self.pipe.scheduler.config
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return float(low + (tokens - few) * (high - low) / (many - few))
