"""The autoencoder of a denoiser: clips to latents and back, and the distribution that an autoencoder gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from postgen.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Autoencoding:
    """Encoding and decoding of clips, a base class of `PipelineDenoiser`."""

    frame_axis: int | None = 2
    encodes_video: bool = True
    pipe: Any

    if TYPE_CHECKING:

        @property
        def model(self) -> Any:
            """The first network of the pipeline."""

        def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
            """Return the shape of the latents of one sample."""

    def encode_video(self, clips: Tensor, *, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Encode clips (B, F, 3, H, W) in [0, 1] as float32 latents; a picture is a clip of one frame. See `Denoiser`.

        Raises:
            UserError: `encodes_video` is False, the clips have another shape, or the model cannot make their size.
        """
        encoded = self._encoded(clips)
        distribution = getattr(encoded, "latent_dist", None)
        if distribution is None:
            raw = _alone(encoded)
        else:
            raw = (distribution.sample(generator) if sample else distribution.mode()).float()
        return self.from_raw(raw).to(self.model.device)

    def posterior(self, clips: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the distribution of the autoencoder's latents for clips (B, F, 3, H, W) in [0, 1].

        `from_raw(mean + std * noise)` are the latents that `encode_video` samples with this noise, and
        `from_raw(mean)` are those of its mode.

        Returns:
            Mean and standard deviation of the raw latents, (B, ...) float32. The second is None if the autoencoder
            gives latents without a distribution, or a standard deviation of 0.

        Raises:
            UserError: as for `encode_video`.
        """
        encoded = self._encoded(clips)
        distribution = getattr(encoded, "latent_dist", None)
        if distribution is None:
            return _alone(encoded), None
        mean, std = distribution.mode().float(), distribution.std.float()
        return mean, std if bool(std.any()) else None

    def from_raw(self, raw: Tensor) -> Tensor:
        """Convert raw latents of the autoencoder, (B, ...), to latents of the network, as `encode_video` does."""
        return self.normalise(raw)

    def _encoded(self, clips: Tensor) -> Any:
        if not self.encodes_video:
            raise UserError(f"the denoiser of {type(self.pipe).__name__} cannot encode clips: use another model")
        if clips.dim() != 5 or clips.shape[2] != 3:
            raise UserError(f"clips must have the shape (B, F, 3, H, W), got {tuple(clips.shape)}")
        self.latent_shape(clips.shape[1], *clips.shape[3:])
        vae = self.pipe.vae
        frames = clips[:, 0] if self.frame_axis is None else clips.transpose(1, 2)
        return vae.encode(frames.to(vae.device, vae.dtype) * 2 - 1)

    def normalise(self, raw: Tensor) -> Tensor:
        """Convert latents from the autoencoder to the normalised latents of the network."""
        scale, shift = self._scale_and_shift()
        return (raw if shift is None else raw - shift) * scale

    def denormalise(self, latents: Tensor) -> Tensor:
        """Convert normalised latents to those that the autoencoder decodes: the inverse of `normalise`."""
        scale, shift = self._scale_and_shift()
        return latents / scale if shift is None else latents / scale + shift

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents into clips (B, F, 3, H, W), float32 in [0, 1]; a picture is a clip of one frame."""
        vae = self.pipe.vae
        raw = self.denormalise(latents.to(vae.device, vae.dtype))
        return self.to_clips(vae.decode(raw, return_dict=False)[0])

    def to_clips(self, decoded: Tensor) -> Tensor:
        """Convert the autoencoder's output to clips (B, F, 3, H, W), float32 in [0, 1].

        Args:
            decoded: clips (B, 3, F, H, W) or pictures (B, 3, H, W), in [-1, 1].
        """
        clips = (decoded.float() * 0.5 + 0.5).clamp(0, 1)
        return clips[:, None] if self.frame_axis is None else clips.transpose(1, 2)

    def _scale_and_shift(self) -> tuple[float, float | None]:
        config = self.pipe.vae.config
        return config.scaling_factor, config.get("shift_factor")


def _alone(encoded: Any) -> Tensor:
    """Return the latents of an autoencoder that gives no distribution, such as `AutoencoderTiny`."""
    raw: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    return raw.float()
