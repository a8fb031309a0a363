"""Wan: text-to-video and image-to-video pipelines, one expert (2.1) or two (2.2)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families.denoiser import Condition, PredictionType
from postgen.families.wan_sizes import check_size, multiples


class WanDenoiser:
    """`Denoiser` of `WanPipeline`, `WanImageToVideoPipeline` and `SkyReelsV2Pipeline`, which is built alike.

    The prediction is the flow velocity noise - clean; the timestep is sigma * 1000. With `boundary_ratio` (Wan 2.2)
    each row goes to the expert that the pipeline would use: `transformer` from the boundary up, `transformer_2` below.

    Args:
        pipe: the pipeline; its components are used in place.
        max_sequence_length: length to which prompt encodings are padded with zeros. The output depends on it (the
            padding is not masked), so it must be what the pipeline is called with; 512 is the pipelines' default.

    Raises:
        UserError: the scheduler is no flow-matching one, or the pipeline gives image conditions per token (Wan 2.2
            5B image-to-video).
    """

    prediction_type: PredictionType = "flow"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipe: Any, *, max_sequence_length: int = 512) -> None:
        self.pipe = pipe
        self.max_sequence_length = max_sequence_length
        self.takes_image = hasattr(pipe, "encode_image")
        if self.takes_image and self._per_token:
            raise UserError(
                "Wan image-to-video with expand_timesteps (Wan2.2 5B) has no denoiser yet: use a 14B model"
            )
        _check_flow(pipe.scheduler)
        self.transformers: dict[str, nn.Module] = {
            name: module
            for name in ("transformer", "transformer_2")
            if (module := getattr(pipe, name, None)) is not None
        }

    @property
    def timestep_scale(self) -> float:
        """The network's timestep is sigma times this."""
        return float(self.pipe.scheduler.config.num_train_timesteps)

    @property
    def _model(self) -> Any:
        """A transformer as diffusers made it, for its config, dtype and device."""
        return self.pipe.transformer if self.pipe.transformer is not None else self.pipe.transformer_2

    @property
    def _per_token(self) -> bool:
        """Whether every token has a timestep of its own (Wan 2.2 5B)."""
        return bool(self.pipe.config.get("expand_timesteps", False))

    @property
    def _boundary(self) -> float | None:
        ratio = self.pipe.config.get("boundary_ratio")
        return None if ratio is None else float(ratio) * self.timestep_scale

    def encode_prompt(
        self, prompts: list[str], negative_prompts: list[str] | None = None, *, guidance: bool = True
    ) -> dict[str, Tensor]:
        """Encode B prompts as `prompt` (and `negative`), each (B, max_sequence_length, C). See `Denoiser`."""
        positive, negative = self.pipe.encode_prompt(
            prompt=prompts,
            negative_prompt=negative_prompts if negative_prompts is not None else [""] * len(prompts),
            do_classifier_free_guidance=guidance,
            max_sequence_length=self.max_sequence_length,
            device=self._model.device,  # the text encoder may have been left on another
        )
        dtype = self._model.dtype
        condition = {"prompt": positive.to(dtype)}
        if guidance:
            condition["negative"] = negative.to(dtype)
        return condition

    def encode_image(self, images: Tensor, num_frames: int) -> dict[str, Tensor]:
        """Encode first frames as `image_latents` (mask and latents, B, 4 + C, t, h, w) and, for Wan 2.1, `image`.

        Raises:
            UserError: the pipeline takes text only, or the size or frame count does not fit.
        """
        if not self.takes_image:
            raise UserError(f"{type(self.pipe).__name__} takes text only: use an image-to-video model")
        batch, _, height, width = images.shape
        self._check_size(num_frames, height, width)
        clips = images.new_full((batch, num_frames, *images.shape[1:]), 0.5)  # grey is 0 for the autoencoder
        clips[:, 0] = images
        latents = self.encode_video(clips)
        # As many mask channels as frames in a latent, 1 on those of the given frame.
        mask = latents.new_zeros(batch, self.pipe.vae_scale_factor_temporal, *latents.shape[2:])
        mask[:, :, 0] = 1
        condition = {"image_latents": torch.cat([mask, latents], dim=1)}
        if self._model.config.image_dim is not None:
            pictures = [self.pipe.video_processor.pt_to_numpy(image[None]) for image in images]
            pictures = [self.pipe.video_processor.numpy_to_pil(picture)[0] for picture in pictures]
            condition["image"] = self.pipe.encode_image(pictures, self._model.device).to(self._model.dtype)
        return condition

    def encode_video(self, clips: Tensor, *, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Turn clips (B, F, 3, H, W) in [0, 1] into normalised latents (B, C, t, h, w), float32. See `Denoiser`."""
        vae = self.pipe.vae
        if clips.dim() != 5 or clips.shape[2] != 3:
            raise UserError(f"clips must have the shape (B, F, 3, H, W), got {tuple(clips.shape)}")
        self._check_size(clips.shape[1], *clips.shape[3:])
        video = clips.transpose(1, 2).to(vae.device, vae.dtype) * 2 - 1
        distribution = vae.encode(video).latent_dist
        latents: Tensor = (distribution.sample(generator) if sample else distribution.mode()).float()
        mean, std = self._statistics(latents)
        return ((latents - mean) / std).to(self._model.device)

    def initial_latents(
        self,
        batch: int,
        *,
        num_frames: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Draw float32 noise (batch, C, t, h, w), the pipeline's own for the same generator. See `Denoiser`."""
        from diffusers.utils.torch_utils import randn_tensor

        self._check_size(num_frames, height, width)
        time, space = self.pipe.vae_scale_factor_temporal, self.pipe.vae_scale_factor_spatial
        shape = (batch, self.pipe.vae.config.z_dim, (num_frames - 1) // time + 1, height // space, width // space)
        noise: Tensor = randn_tensor(shape, generator=generator, device=self._model.device, dtype=torch.float32)
        return noise

    def sigmas(self, num_steps: int, shape: Sequence[int] | None = None) -> Tensor:
        """Return the (num_steps + 1,) noise levels of the pipeline's schedule, float32, the last one 0."""
        scheduler = copy.deepcopy(self.pipe.scheduler)  # set_timesteps changes it, and a rollout may be under way
        scheduler.set_timesteps(num_steps, device=self._model.device)
        sigmas: Tensor = scheduler.sigmas
        return sigmas.to(self._model.device, torch.float32)

    def predict(self, x: Tensor, sigma: Tensor, condition: Condition, guidance: float = 1.0) -> Tensor:
        """Return the velocity noise - clean of every row, float32. See `Denoiser`.

        Raises:
            ValueError: `sigma` is not (B,), guidance without `negative`, or image latents missing.
        """
        if sigma.shape != x.shape[:1]:
            raise ValueError(f"sigma must have the shape ({x.shape[0]},), got {tuple(sigma.shape)}")
        if guidance > 1 and "negative" not in condition:
            raise ValueError("guidance above 1 needs condition['negative']: call encode_prompt with guidance=True")
        timestep = sigma.to(x.device, torch.float32) * self.timestep_scale
        if self._boundary is None:
            return self._guided("transformer", x, timestep, condition, guidance)
        high = timestep >= self._boundary
        parts = [(name, rows) for name, rows in (("transformer", high), ("transformer_2", ~high)) if rows.any()]
        if len(parts) == 1:
            return self._guided(parts[0][0], x, timestep, condition, guidance)
        prediction = torch.zeros_like(x, dtype=torch.float32)
        for name, rows in parts:
            picked = {key: value[rows] for key, value in condition.items()}
            index = rows.nonzero().squeeze(1)
            part = self._guided(name, x[rows], timestep[rows], picked, guidance)
            prediction = prediction.index_copy(0, index, part)
        return prediction

    def _guided(self, name: str, x: Tensor, timestep: Tensor, condition: Condition, guidance: float) -> Tensor:
        with_text = self._forward(name, x, timestep, condition, "prompt")
        if guidance <= 1:
            return with_text.float()
        without = self._forward(name, x, timestep, condition, "negative")
        # In the network's own dtype, as the pipeline does, so that a bf16 rollout equals a bf16 pipeline call.
        return (without + guidance * (with_text - without)).float()

    def _forward(self, name: str, x: Tensor, timestep: Tensor, condition: Condition, text: str) -> Tensor:
        if name not in self.transformers:
            raise ValueError(f"the pipeline has no {name}, which this noise level needs")
        if self.takes_image:
            if "image_latents" not in condition:
                raise ValueError("an image-to-video model needs condition['image_latents']: call encode_image")
            x = torch.cat([x, condition["image_latents"]], dim=1)
        if self._per_token:
            _, height, width = self._model.config.patch_size
            tokens = x.shape[2] * (x.shape[3] // height) * (x.shape[4] // width)
            timestep = timestep[:, None].expand(-1, tokens)
        output: Tensor = self.transformers[name](
            hidden_states=x.to(self._model.dtype),
            timestep=timestep,
            encoder_hidden_states=condition[text],
            encoder_hidden_states_image=condition.get("image"),
            return_dict=False,
        )[0]
        return output

    def decode(self, latents: Tensor) -> Tensor:
        """Turn normalised latents (B, C, t, h, w) into clips (B, F, 3, H, W), float32 in [0, 1]."""
        vae = self.pipe.vae
        latents = latents.to(vae.device, vae.dtype)
        mean, std = self._statistics(latents)
        video: Tensor = vae.decode(latents * std + mean, return_dict=False)[0]
        return (video.float() * 0.5 + 0.5).clamp(0, 1).transpose(1, 2)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipe.vae.config
        mean, std = like.new_tensor(config.latents_mean), like.new_tensor(config.latents_std)
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    def _check_size(self, num_frames: int, height: int, width: int) -> None:
        space, time = self.pipe.vae_scale_factor_spatial, self.pipe.vae_scale_factor_temporal
        check_size(num_frames, height, width, *multiples(space, time, self._model.config.patch_size))


def _check_flow(scheduler: Any) -> None:
    config = scheduler.config
    flow = type(scheduler).__name__.startswith("FlowMatch") or config.get("use_flow_sigmas", False)
    if not flow:
        raise UserError(
            f"{type(scheduler).__name__} is not a flow-matching scheduler: Wan needs FlowMatchEulerDiscreteScheduler,"
            " or one with use_flow_sigmas"
        )
