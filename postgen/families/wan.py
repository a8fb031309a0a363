"""Wan: text-to-video and image-to-video pipelines, one expert (2.1) or two (2.2); SkyReels-V2, built alike."""

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

    The prediction is the flow velocity noise - clean; the timestep is sigma * 1000. With `boundary_ratio` (Wan 2.2)
    each row goes to the expert that the pipeline would use: `transformer` from the boundary up, `transformer_2` below.
    Noise levels per frame are told as one timestep per token, which every Wan network takes.

    Args:
        pipe: the pipeline; its components are used in place.
        max_sequence_length: length to which prompt encodings are padded with zeros. The output depends on it (the
            padding is not masked), so it must be what the pipeline is called with; 512 is the pipelines' default.

    Raises:
        UserError: the scheduler is no flow-matching one, or the pipeline gives image conditions per token (Wan 2.2
            5B image-to-video).
    """

    components = ("transformer", "transformer_2")
    default_length = 512

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None) -> None:
        self.takes_image = hasattr(pipe, "encode_image")
        # Wan 2.2 5B: every token has a timestep of its own, also where all are the same.
        self._per_token = bool(pipe.config.get("expand_timesteps", False))
        if self.takes_image and self._per_token:
            raise UserError(
                "Wan image-to-video with expand_timesteps (Wan2.2 5B) has no denoiser yet: use a 14B model"
            )
        super().__init__(pipe, max_sequence_length=max_sequence_length)

    @property
    def multiples(self) -> tuple[int, int, int]:
        """What height, width and frames - 1 must divide by."""
        space, time = self.pipe.vae_scale_factor_spatial, self.pipe.vae_scale_factor_temporal
        return multiples(space, time, self.model.config.patch_size)

    def shape_of(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of one sample's latents."""
        space, time = self.pipe.vae_scale_factor_spatial, self.pipe.vae_scale_factor_temporal
        return self.pipe.vae.config.z_dim, (num_frames - 1) // time + 1, height // space, width // space

    def encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Encode texts, padded to `max_sequence_length`."""
        positive, _ = self.pipe.encode_prompt(
            prompt=prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.model.device,  # the text encoder may have been left on another
        )
        return (positive,)

    def encode_image(self, images: Tensor, num_frames: int) -> dict[str, Tensor]:
        """Encode first frames as `image_latents` (mask and latents, B, 4 + C, t, h, w) and, for Wan 2.1, `image`.

        Raises:
            UserError: the pipeline takes text only, or the size or frame count does not fit.
        """
        if not self.takes_image:
            return super().encode_image(images, num_frames)
        self.latent_shape(num_frames, *images.shape[2:])
        clips = images.new_full((len(images), num_frames, *images.shape[1:]), 0.5)  # grey is 0 for the autoencoder
        clips[:, 0] = images
        latents = self.encode_video(clips)
        # As many mask channels as frames in a latent, 1 on those of the given frame.
        mask = latents.new_zeros(len(images), self.pipe.vae_scale_factor_temporal, *latents.shape[2:])
        mask[:, :, 0] = 1
        condition = {"image_latents": torch.cat([mask, latents], dim=1)}
        if self.model.config.image_dim is not None:
            pictures = [self.pipe.video_processor.pt_to_numpy(image[None]) for image in images]
            pictures = [self.pipe.video_processor.numpy_to_pil(picture)[0] for picture in pictures]
            condition["image"] = self.pipe.encode_image(pictures, self.model.device).to(self.model.dtype)
        return condition

    def route(self, x: Tensor, timestep: Tensor, condition: Condition, guidance: float) -> Tensor:
        """Send every row to the expert that the pipeline would use at its noise level.

        Raises:
            UserError: frames of one row on both sides of the boundary.
        """
        ratio = self.pipe.config.get("boundary_ratio")
        if ratio is None:
            return super().route(x, timestep, condition, guidance)
        high = (timestep >= float(ratio) * self.timestep_scale).view(len(x), -1)
        if (high != high[:, :1]).any():
            raise UserError(
                f"a row has frames on both sides of the noise level {ratio} at which Wan 2.2 changes its expert: one "
                "network sees a whole clip, give the frames of a row levels on one side"
            )
        parts = [(name, rows) for name, rows in zip(self.components, (high[:, 0], ~high[:, 0]), strict=True)]
        parts = [(name, rows) for name, rows in parts if rows.any()]
        if len(parts) == 1:
            return self.guided(parts[0][0], x, timestep, condition, guidance)
        prediction = torch.zeros_like(x, dtype=torch.float32)
        for name, rows in parts:
            picked = {key: value[rows] for key, value in condition.items()}
            part = self.guided(name, x[rows], timestep[rows], picked, guidance)
            prediction = prediction.index_copy(0, rows.nonzero().squeeze(1), part)
        return prediction

    def told(self, text: str, condition: Condition) -> dict[str, Tensor]:
        """Return the text, and what the network is told of the first frame."""
        image = {name: condition[name] for name in ("image_latents", "image") if name in condition}
        return super().told(text, condition) | image

    def network_timestep(self, timestep: Tensor, x: Tensor) -> Tensor:
        """Return (B,) timesteps, or one for each token."""
        if self._per_token and timestep.dim() == 1:
            timestep = timestep[:, None].expand(-1, x.shape[2])
        return super().network_timestep(timestep, x)

    def forward(self, network: nn.Module, x: Tensor, timestep: Tensor, told: dict[str, Tensor]) -> Tensor:
        """Call an expert."""
        if self.takes_image:
            if "image_latents" not in told:
                raise UserError("an image-to-video model needs condition['image_latents']: call encode_image")
            image = told["image_latents"].to(x.dtype)
            # Channels of further modalities, of a widened network, stand behind the condition.
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
        """Return what else the network's class is told."""
        return {}

    def normalise(self, raw: Tensor) -> Tensor:
        """Turn what the autoencoder gave into what the network sees."""
        mean, std = self._statistics(raw)
        return (raw - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undo `normalise`."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipe.vae.config
        mean, std = like.new_tensor(config.latents_mean), like.new_tensor(config.latents_std)
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


class SkyReelsV2Denoiser(WanDenoiser):
    """`Denoiser` of `SkyReelsV2Pipeline`. Noise levels per frame are its diffusion forcing (arXiv:2504.13074).

    Raises:
        UserError: as `WanDenoiser`, or a network that is told the frame rate.
    """

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None) -> None:
        super().__init__(pipe, max_sequence_length=max_sequence_length)
        if self.model.config.inject_sample_info:
            raise UserError("SkyReels-V2 that is told the frame rate (inject_sample_info) has no denoiser yet")

    def options(self, timestep: Tensor) -> dict[str, Any]:
        """Return whether there is a timestep per frame."""
        return {"enable_diffusion_forcing": timestep.dim() == 2}
