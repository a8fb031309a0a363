"""What the denoisers of pictures whose latents the network takes as they are have in common."""

from __future__ import annotations

from postgen.families.pipeline_denoiser import PipelineDenoiser


class PictureDenoiser(PipelineDenoiser):
    """Parent of such a denoiser: sizes by autoencoder and patches, one frame."""

    frame_axis = None

    @property
    def space(self) -> int:
        """Pixels a side in a latent."""
        return int(self.pipe.vae_scale_factor)

    @property
    def multiples(self) -> tuple[int, int, int]:
        """What height and width must divide by; one frame."""
        side = self.space * self.model.config.patch_size
        return side, side, 0

    def shape_of(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of one sample's latents."""
        return self.model.config.in_channels, height // self.space, width // self.space
