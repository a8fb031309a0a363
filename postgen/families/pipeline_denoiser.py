"""Base class of all denoisers: guidance in two forward passes, sizes and noise levels."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families.autoencoding import Autoencoding
from postgen.families.denoiser import Condition, PredictionType
from postgen.families.registry import layout_of, pipelines_per_frame
from postgen.families.wan_sizes import check_size


class PipelineDenoiser(Autoencoding, ABC):
    """Base class of `Denoiser`s.

    The subclass of a family defines the encoding of prompts, the call of the network and the scaling of its latents.
    Latents stay unpacked even if the network takes packed ones, so their shape contains the size: (B, C, T, H, W) for
    clips, (B, C, H, W) for pictures.

    Args:
        pipe: the pipeline; its components are used in place.
        max_sequence_length: tokens of a prompt's encoding; None is the pipeline's default.

    Raises:
        UserError: the model cannot use the pipeline's scheduler, or the pipeline was loaded without its network.
    """

    prediction_type: PredictionType = "flow"
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    components: ClassVar[tuple[str, ...]] = ("transformer",)
    default_length: ClassVar[int] = 256
    per_row: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that `encode` returns after the encoding: suffixes of condition entries (`prompt_mask`)."""

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None) -> None:
        self.pipe = pipe
        self.max_sequence_length = max_sequence_length or self.default_length
        parts = {name: getattr(pipe, name, None) for name in self.components}
        self.transformers: dict[str, nn.Module] = {name: part for name, part in parts.items() if part is not None}
        if not self.transformers:
            raise UserError(f"this {type(pipe).__name__} has no {' or '.join(parts)}: load it with its network")
        self._first = next(iter(self.transformers))
        self.check_scheduler()

    # Each family defines these.

    @abstractmethod
    def encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Encode prompts: the encoding, then one tensor per name in `per_row`; the batch is the first axis."""

    @abstractmethod
    def forward(self, network: nn.Module, x: Tensor, timestep: Tensor, told: dict[str, Tensor]) -> Tensor:
        """Run a network on unpacked latents in its own dtype and return its prediction, unpacked.

        Args:
            network: one of `transformers`.
            x: latents, in the dtype of the network.
            timestep: sigma * timestep_scale: (B,), or one per frame in the shape that `frame_timesteps` names.
            told: condition entries `prompt` and those of `per_row`, of the prompt or of the negative prompt.
        """

    @abstractmethod
    def shape_of(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the latents of one sample. The caller has checked the size against `multiples`."""

    @property
    @abstractmethod
    def multiples(self) -> tuple[int, int, int]:
        """Numbers of which height, width and frames - 1 must be multiples; the last is 0 if there is one frame."""

    # Derived from the pipeline's configuration.

    @property
    def timestep_scale(self) -> float:
        """Factor from the noise level (sigma) to the timestep of the network."""
        return float(self.pipe.scheduler.config.num_train_timesteps)

    @property
    def model(self) -> Any:
        """The first network of the pipeline, without wrappers: source of config, dtype and device."""
        return getattr(self.pipe, self._first)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Size of a patch in the config: latent frames, rows, columns. It is one token, except for FLUX (2 x 2)."""
        config = self.model.config
        size = config.get("patch_size", 1)
        frames, rows, columns = (config.get("patch_size_t") or 1, size, size) if isinstance(size, int) else size
        return frames, rows, columns

    @property
    def frame_timesteps(self) -> Literal["BT", "BL"] | None:
        """Shape in which the network takes one timestep per latent frame: (B, T), or (B, L) with L tokens.

        None if the network takes only one timestep per row.
        """
        if self.frame_axis is None:
            return None
        try:
            shapes = layout_of(self.model).timestep_shapes
        except UserError:  # an unknown network gets one timestep per row
            return None
        return "BT" if "BT" in shapes else "BL" if "BL" in shapes else None

    @property
    def per_frame(self) -> bool:
        """Whether `predict` also takes one noise level per latent frame, `sigma` of shape (B, T) and not only (B,)."""
        return self.frame_timesteps is not None

    def check_scheduler(self) -> None:
        """Refuse a scheduler that the model cannot use.

        Raises:
            UserError: it is not a flow-matching scheduler.
        """
        config = self.pipe.scheduler.config
        if not (type(self.pipe.scheduler).__name__.startswith("FlowMatch") or config.get("use_flow_sigmas", False)):
            raise UserError(
                f"{type(self.pipe.scheduler).__name__} is not a flow-matching scheduler: {type(self.pipe).__name__} "
                "needs FlowMatchEulerDiscreteScheduler, or one with use_flow_sigmas"
            )

    def encode_prompt(
        self, prompts: list[str], negative_prompts: list[str] | None = None, *, guidance: bool = True
    ) -> dict[str, Tensor]:
        """Encode B prompts as the pipeline's default call does. See `Denoiser`.

        Raises:
            UserError: the number of negative prompts is not B.
        """
        condition = self._named("prompt", self.encode(prompts))
        if guidance:
            negatives = negative_prompts if negative_prompts is not None else [""] * len(prompts)
            if len(negatives) != len(prompts):
                raise UserError(f"{len(prompts)} prompts with {len(negatives)} negative prompts: give one for each")
            condition |= self._named("negative", self.encode(negatives))
        return condition

    def encode_image(self, images: Tensor, num_frames: int) -> dict[str, Tensor]:
        """Refuse first frames; denoisers of image-to-video pipelines override this method.

        Raises:
            UserError: always.
        """
        raise UserError(f"{type(self.pipe).__name__} takes text only: use an image-to-video model")

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the latents of one sample. See `Denoiser`."""
        rows, columns, time = self.multiples
        if not time and num_frames != 1:
            raise UserError(f"{type(self.pipe).__name__} makes pictures: num_frames must be 1, got {num_frames}")
        check_size(num_frames, height, width, rows, columns, time or 1)
        return self.shape_of(num_frames, height, width)

    def initial_latents(
        self,
        batch: int,
        *,
        num_frames: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Draw float32 noise, equal to that of the pipeline for the same generator. See `Denoiser`."""
        from diffusers.utils.torch_utils import randn_tensor

        shape = (batch, *self.latent_shape(num_frames, height, width))
        noise: Tensor = randn_tensor(shape, generator=generator, device=self.model.device, dtype=torch.float32)
        return noise

    # Noise levels.

    def tokens(self, shape: Sequence[int]) -> int:
        """Return the number of tokens for latents of a shape; schedules with dynamic shifting depend on it."""
        frames, rows, columns = self.patch
        count = int(shape[-1]) // columns * (int(shape[-2]) // rows)
        return count * (int(shape[-3]) // frames) if len(shape) == 4 else count

    def start_sigmas(self, num_steps: int) -> Tensor | None:
        """Return the noise levels that the pipeline passes to its scheduler, before shifting.

        None if the scheduler computes them.
        """
        return None

    def sigmas(self, num_steps: int, shape: Sequence[int] | None = None) -> Tensor:
        """Return the (num_steps + 1,) noise levels of the pipeline's schedule, float32, the last one 0.

        Raises:
            UserError: the schedule depends on the size and `shape` is missing.
        """
        sigmas: Tensor = self._scheduled(num_steps, shape).sigmas
        return sigmas.to(self.model.device, torch.float32)

    def network_sigmas(self, num_steps: int, shape: Sequence[int] | None = None) -> Tensor | None:
        """Return the noise levels that the network receives at the steps of `sigmas`. See `RoundingDenoiser`.

        Raises:
            UserError: the schedule depends on the size and `shape` is missing.
        """
        scheduler = self._scheduled(num_steps, shape)
        timesteps = scheduler.timesteps.to(self.model.device)
        if len(timesteps) + 1 != len(scheduler.sigmas):  # a solver with several passes per step
            return None
        if torch.equal(timesteps.float(), self.timestep(scheduler.sigmas[:-1].to(self.model.device))):
            return None
        # float64: multiplied by the scale again and rounded to float32, these levels give the very same timesteps.
        return torch.cat([timesteps.double() / self.timestep_scale, timesteps.new_zeros(1, dtype=torch.float64)])

    def _scheduled(self, num_steps: int, shape: Sequence[int] | None) -> Any:
        """Return a copy of the pipeline's scheduler with the timesteps of a call of the pipeline."""
        scheduler = copy.deepcopy(self.pipe.scheduler)  # set_timesteps changes it, and a rollout may be using it
        extra: dict[str, Any] = {}
        if scheduler.config.get("use_dynamic_shifting", False):
            if shape is None:
                raise UserError(
                    f"the noise levels of {type(self.pipe).__name__} depend on the size: give shape= of the latents"
                )
            extra["mu"] = self._mu(self.tokens(shape))
        start = self.start_sigmas(num_steps)
        if start is None:
            scheduler.set_timesteps(num_steps, device=self.model.device, **extra)
        else:
            scheduler.set_timesteps(sigmas=start.numpy(), device=self.model.device, **extra)
        return scheduler

    def alpha_bar(self, sigma: Tensor) -> Tensor:
        """Refuse: flow models have no alpha-bar. `AlphaBarDenoiser` overrides this method.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{type(self.pipe).__name__} is a flow model and has no alpha-bar: its noisy latents are "
            "(1 - sigma) * clean + sigma * noise"
        )

    def timestep(self, sigma: Tensor) -> Tensor:
        """Return the network's timesteps for noise levels of any shape."""
        levels = sigma if sigma.dtype == torch.float64 else sigma.to(torch.float32)
        return (levels * self.timestep_scale).to(torch.float32)

    # The network.

    def predict(self, x: Tensor, sigma: Tensor, condition: Condition, guidance: float = 1.0) -> Tensor:
        """Return the network's prediction for every row, float32. See `Denoiser`."""
        self.check_call(x, sigma, condition, guidance)
        return self.route(x, self.timestep(sigma.to(x.device)), condition, guidance)

    def check_call(self, x: Tensor, sigma: Tensor, condition: Condition, guidance: float) -> None:
        """Check the arguments of `predict`.

        Raises:
            UserError: `predict` does not accept the arguments; see `Denoiser.predict`.
        """
        self._check_sigma(x, sigma)
        if guidance > 1 and "negative" not in condition:
            raise UserError("guidance above 1 needs condition['negative']: call encode_prompt with guidance=True")

    def route(self, x: Tensor, timestep: Tensor, condition: Condition, guidance: float) -> Tensor:
        """Return the prediction for every row, each from its own network; here all rows go to the first network.

        Args:
            x: latents.
            timestep: (B,) or (B, T).
            condition: condition entries of all rows.
            guidance: guidance scale.
        """
        return self.guided(self.components[0], x, timestep, condition, guidance)

    def guided(self, name: str, x: Tensor, timestep: Tensor, condition: Condition, guidance: float) -> Tensor:
        """Return the prediction of one network; with guidance it combines two forward passes in float32."""
        return self.combined(*self.passes(name, x, timestep, condition, guidance), guidance)

    def passes(
        self, name: str, x: Tensor, timestep: Tensor, condition: Condition, guidance: float
    ) -> tuple[Tensor, Tensor | None]:
        """Return one network's predictions for the prompt and for the negative prompt, float32.

        The second is None if the guidance scale is at most 1.

        Raises:
            UserError: the pipeline lacks the network.
        """
        if name not in self.transformers:
            raise UserError(f"the pipeline has no {name}, which this noise level needs: load it with all its networks")
        network = self.transformers[name]
        x, timestep = x.to(self.model.dtype), self.network_timestep(timestep, x)
        with_text = self.forward(network, x, timestep, self.told("prompt", condition)).float()
        if guidance <= 1:
            return with_text, None
        return with_text, self.forward(network, x, timestep, self.told("negative", condition)).float()

    def combined(self, with_text: Tensor, without: Tensor | None, guidance: float) -> Tensor:
        """Apply classifier-free guidance to two predictions; return `with_text` if `without` is None."""
        return with_text if without is None else without + guidance * (with_text - without)

    def told(self, text: str, condition: Condition) -> dict[str, Tensor]:
        """Return the argument `told` of `forward`; `text` is `prompt` or `negative`."""
        return {"prompt": condition[text], **{name: condition[f"{text}_{name}"] for name in self.per_row}}

    def network_timestep(self, timestep: Tensor, x: Tensor) -> Tensor:
        """Convert timesteps (B,) or (B, T) to the shape that the network takes.

        Raises:
            UserError: latent frames of one token (of a patch in time) have different noise levels.
        """
        if timestep.dim() == 1:
            return timestep
        frames, rows, columns = self.patch
        if frames > 1:
            patches = timestep.unflatten(1, (-1, frames))
            if (patches != patches[..., :1]).any():
                raise UserError(f"every {frames} latent frames are one token in time: give them the same noise level")
            timestep = patches[..., 0]
        if self.frame_timesteps == "BT":
            return timestep
        return timestep.repeat_interleave(x.shape[-2] // rows * (x.shape[-1] // columns), dim=1)

    def _check_sigma(self, x: Tensor, sigma: Tensor) -> None:
        given: tuple[int, ...] = tuple(sigma.shape)
        allowed: list[tuple[int, ...]] = [(len(x),)]
        if given in allowed:
            return
        if self.frame_axis is not None and self.per_frame:
            allowed.append((len(x), x.shape[self.frame_axis]))
        elif len(given) == 2:
            raise UserError(
                f"{type(self.model).__name__} takes one noise level per row, sigma of shape ({len(x)},), got {given}: "
                f"for noise levels per frame use one of {', '.join(pipelines_per_frame())}"
            )
        if given not in allowed:
            raise UserError(f"sigma must have the shape {' or '.join(map(str, allowed))}, got {given}")

    def _named(self, text: str, parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
        dtype = self.model.dtype
        names = (text, *(f"{text}_{name}" for name in self.per_row))
        return {n: p.to(dtype) if p.is_floating_point() else p for n, p in zip(names, parts, strict=True)}

    def _mu(self, tokens: int) -> float:
        config = self.pipe.scheduler.config
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return float(low + (tokens - few) * (high - low) / (many - few))
