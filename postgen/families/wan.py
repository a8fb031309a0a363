"""Denoisers of Wan (text-to-video, image-to-video; one expert in 2.1, two in 2.2) and of SkyReels-V2."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families.by_frame import modulated_by_frame
from postgen.families.denoiser import Condition
from postgen.families.pipeline_denoiser import PipelineDenoiser
from postgen.families.wan_sizes import multiples


class WanDenoiser(PipelineDenoiser):
    """`Denoiser` of `WanPipeline` and `WanImageToVideoPipeline`.

    The prediction is the flow velocity noise - clean; the timestep is sigma * 1000. With `boundary_ratio` (Wan 2.2),
    each row uses the expert that the pipeline would use: `transformer` at and above the boundary, `transformer_2`
    below. For noise levels per frame, the network receives one timestep per token, which every Wan network accepts.

    Args:
        pipe: the pipeline; its components are used in place.
        max_sequence_length: length to which prompt encodings are padded with zeros. The padding is not masked, so the
            output depends on this length: use the same value as in calls of the pipeline, whose default is 512.

    Raises:
        UserError: the scheduler is not a flow-matching scheduler, or the pipeline gives image conditions per token
            (Wan 2.2 5B image-to-video).
    """

    components = ("transformer", "transformer_2")
    default_length = 512

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None) -> None:
        self.takes_image = hasattr(pipe, "encode_image")
        # Wan 2.2 5B takes one timestep per token, even if all are equal.
        self._per_token = bool(pipe.config.get("expand_timesteps", False))
        if self.takes_image and self._per_token:
            raise UserError(
                "Wan image-to-video with expand_timesteps (Wan2.2 5B) has no denoiser yet: use a 14B model"
            )
        super().__init__(pipe, max_sequence_length=max_sequence_length)

    @property
    def expert_boundary(self) -> float | None:
        """Noise level from which on `transformer` predicts, below it `transformer_2`; None for Wan 2.1."""
        ratio = self.pipe.config.get("boundary_ratio")
        return None if ratio is None else float(ratio)

    @property
    def multiples(self) -> tuple[int, int, int]:
        """Numbers of which height, width and frames - 1 must be multiples."""
        space, time = self.pipe.vae_scale_factor_spatial, self.pipe.vae_scale_factor_temporal
        return multiples(space, time, self.model.config.patch_size)

    def shape_of(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the latents of one sample."""
        space, time = self.pipe.vae_scale_factor_spatial, self.pipe.vae_scale_factor_temporal
        return self.pipe.vae.config.z_dim, (num_frames - 1) // time + 1, height // space, width // space

    def encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Encode prompts, padded with zeros to `max_sequence_length`."""
        positive, _ = self.pipe.encode_prompt(
            prompt=prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.model.device,  # the text encoder may be on another device
        )
        return (positive,)

    def encode_image(self, images: Tensor, num_frames: int) -> dict[str, Tensor]:
        """Encode first frames (B, 3, H, W) in [0, 1].

        Returns:
            `image_latents`: mask and latents, (B, 4 + C, t, h, w). For Wan 2.1 also `image`, from the image encoder.

        Raises:
            UserError: the pipeline takes text only, or the model cannot make this size or frame count.
        """
        if not self.takes_image:
            return super().encode_image(images, num_frames)
        self.latent_shape(num_frames, *images.shape[2:])
        clips = images.new_full((len(images), num_frames, *images.shape[1:]), 0.5)  # 0.5 (grey) is 0 in [-1, 1]
        clips[:, 0] = images
        latents = self.encode_video(clips)
        # The mask has one channel per frame of a latent frame; it is 1 for the given frame.
        mask = latents.new_zeros(len(images), self.pipe.vae_scale_factor_temporal, *latents.shape[2:])
        mask[:, :, 0] = 1
        condition = {"image_latents": torch.cat([mask, latents], dim=1)}
        if self.model.config.image_dim is not None:
            pictures = [self.pipe.video_processor.pt_to_numpy(image[None]) for image in images]
            pictures = [self.pipe.video_processor.numpy_to_pil(picture)[0] for picture in pictures]
            condition["image"] = self.pipe.encode_image(pictures, self.model.device).to(self.model.dtype)
        return condition

    def route(self, x: Tensor, timestep: Tensor, condition: Condition, guidance: float) -> Tensor:
        """Return the prediction for every row, from the expert that the pipeline would use at its noise level.

        Raises:
            UserError: frames of one row are on both sides of the boundary.
        """
        ratio = self.expert_boundary
        if ratio is None:
            return super().route(x, timestep, condition, guidance)
        high = (timestep >= ratio * self.timestep_scale).view(len(x), -1)
        if (high != high[:, :1]).any():
            raise UserError(
                f"a row has frames on both sides of the noise level {ratio} at which Wan 2.2 changes its expert: one "
                "expert takes a whole clip, so give all frames of a row noise levels on one side"
            )
        parts = [(name, rows) for name, rows in zip(self.components, (high[:, 0], ~high[:, 0]), strict=True)]
        parts = [(name, rows) for name, rows in parts if rows.any()]
        # Experts without rows are not called, and a single expert needs no selection of rows.
        if len(parts) == 1:
            return self.guided(parts[0][0], x, timestep, condition, guidance)
        prediction = torch.zeros_like(x, dtype=torch.float32)
        for name, rows in parts:
            picked = {key: value[rows] for key, value in condition.items()}
            part = self.guided(name, x[rows], timestep[rows], picked, guidance)
            prediction = prediction.index_copy(0, rows.nonzero().squeeze(1), part)
        return prediction

    def told(self, text: str, condition: Condition) -> dict[str, Tensor]:
        """Return the text and the conditions from the first frame."""
        image = {name: condition[name] for name in ("image_latents", "image") if name in condition}
        return super().told(text, condition) | image

    def network_timestep(self, timestep: Tensor, x: Tensor) -> Tensor:
        """Return timesteps (B,), or one per token."""
        if self._per_token and timestep.dim() == 1:
            timestep = timestep[:, None].expand(-1, x.shape[2])
        return super().network_timestep(timestep, x)

    def forward(self, network: nn.Module, x: Tensor, timestep: Tensor, told: dict[str, Tensor]) -> Tensor:
        """Call an expert; see `PipelineDenoiser.forward`."""
        if self.takes_image:
            if "image_latents" not in told:
                raise UserError("an image-to-video model needs condition['image_latents']: call encode_image")
            image = told["image_latents"].to(x.dtype)
            # In a widened network, channels of further modalities follow those of the condition.
            latents, more = x.tensor_split([image.shape[1] - self.pipe.vae_scale_factor_temporal], dim=1)
            x = torch.cat([latents, image, more], dim=1)
        per_frame = timestep.dim() == 2
        with modulated_by_frame(network, x.shape[2] // self.patch[0]) if per_frame else nullcontext():
            output: Tensor = network(
                hidden_states=x,
                timestep=timestep,
                encoder_hidden_states=told["prompt"],
                encoder_hidden_states_image=told.get("image"),
                return_dict=False,
                **self.options(timestep),
            )[0]
        return output

    def options(self, timestep: Tensor) -> dict[str, Any]:
        """Return further keyword arguments of the network's class."""
        return {}

    def normalise(self, raw: Tensor) -> Tensor:
        """Convert latents from the autoencoder to the normalised latents of the network."""
        mean, std = self._statistics(raw)
        return (raw - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """Convert normalised latents to those that the autoencoder decodes: the inverse of `normalise`."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipe.vae.config
        mean, std = like.new_tensor(config.latents_mean), like.new_tensor(config.latents_std)
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


class SkyReelsV2Denoiser(WanDenoiser):
    """`Denoiser` of `SkyReelsV2Pipeline`. Noise levels per frame use its diffusion forcing (arXiv:2504.13074).

    Raises:
        UserError: see `WanDenoiser`; or the network takes the frame rate as input.
    """

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None) -> None:
        super().__init__(pipe, max_sequence_length=max_sequence_length)
        if self.model.config.inject_sample_info:
            raise UserError(
                "a SkyReels-V2 network that takes the frame rate as input (inject_sample_info) has no denoiser yet:"
                " use a model without it"
            )

    def options(self, timestep: Tensor) -> dict[str, Any]:
        """Return the switch for timesteps per frame."""
        return {"enable_diffusion_forcing": timestep.dim() == 2}
