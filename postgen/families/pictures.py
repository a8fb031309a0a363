"""Base class of denoisers for pictures whose networks take unpacked latents."""

from __future__ import annotations

from postgen.families.pipeline_denoiser import PipelineDenoiser


class PictureDenoiser(PipelineDenoiser):
    """Base class that derives sizes from the autoencoder and the patch size; one frame."""

    frame_axis = None

    @property
    def space(self) -> int:
        """Pixels per latent, along each side."""
        return int(self.pipe.vae_scale_factor)

    @property
    def multiples(self) -> tuple[int, int, int]:
        """Numbers of which height and width must be multiples; 0, because a picture has one frame."""
        side = self.space * self.model.config.patch_size
        return side, side, 0

    def shape_of(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the latents of one sample."""
        return self.model.config.in_channels, height // self.space, width // self.space
