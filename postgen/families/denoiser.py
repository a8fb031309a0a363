"""What training and rollouts need of a pipeline class."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Condition = Mapping[str, "Tensor"]
"""What the transformer is told besides the noisy latents. Every tensor has the batch as its first axis, so rows can be
picked, stacked and cached without knowing the family. `prompt` is always there, `negative` only for guidance."""

PredictionType = Literal["flow", "epsilon", "v_prediction", "sample"]
"""`flow`: the prediction is noise - clean, and x = (1 - sigma) * clean + sigma * noise."""


@runtime_checkable
class Denoiser(Protocol):
    """One pipeline class seen as: encode, noise, predict, decode.

    Latents are float32 and normalised, as the transformer sees them. Nothing switches gradients off: wrap calls in
    `torch.no_grad()` where none are wanted. The scheduler of the pipeline is read, never stepped.
    """

    transformers: MutableMapping[str, nn.Module]
    """The networks that `predict` calls, by component name. A trainer puts its wrapped (DDP, compiled) ones here."""

    max_sequence_length: int
    """Tokens of a prompt's encoding. May be set before prompts are encoded; where the model fixes it, another number
    is refused with a `UserError`."""

    @property
    def prediction_type(self) -> PredictionType:
        """Meaning of what `predict` returns."""

    @property
    def timestep_scale(self) -> float:
        """The network's timestep is sigma times this."""

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Names of the layers that LoRA adapts by default, as peft's `target_modules`."""

    @property
    def frame_axis(self) -> int | None:
        """Axis of the latents that is time: 2 for (B, C, T, H, W), 1 for (B, T, C, H, W), None for pictures."""

    @property
    def per_frame(self) -> bool:
        """Whether `predict` takes a noise level per latent frame, `sigma` of shape (B, T)."""

    @property
    def encodes_video(self) -> bool:
        """Whether `encode_video` exists; where it is False, a call of it is refused."""

    def encode_prompt(
        self, prompts: list[str], negative_prompts: list[str] | None = None, *, guidance: bool = True
    ) -> dict[str, Tensor]:
        """Encode B prompts exactly as the pipeline's default call does.

        Args:
            prompts: B texts.
            negative_prompts: B texts; None is the empty text.
            guidance: whether `negative` is wanted at all.
        """

    def encode_image(self, images: Tensor, num_frames: int) -> dict[str, Tensor]:
        """Encode first frames (B, 3, H, W) in [0, 1] as further condition entries for clips of `num_frames`.

        Raises:
            UserError: the pipeline takes text only.
        """

    def encode_video(self, clips: Tensor, *, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Turn clips (B, F, 3, H, W) in [0, 1] into latents.

        Args:
            clips: the clips.
            sample: draw from the autoencoder's distribution instead of taking its mode.
            generator: source of that draw.

        Raises:
            UserError: `encodes_video` is False, or clips of a shape or size that the model cannot make.
        """

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of one sample's latents, without the batch: frames and pixels in.

        Raises:
            UserError: a size or frame count that the model cannot make.
        """

    def initial_latents(
        self,
        batch: int,
        *,
        num_frames: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Draw the noise that the pipeline would start from: pixels and frames in, (batch, ...) latents out.

        Raises:
            UserError: a size or frame count that the model cannot make.
        """

    def sigmas(self, num_steps: int, shape: Sequence[int] | None = None) -> Tensor:
        """Return the (num_steps + 1,) noise levels of the pipeline's schedule, from high to 0.

        Args:
            num_steps: how many steps.
            shape: of one sample's latents, for schedules that depend on the size.
        """

    def alpha_bar(self, sigma: Tensor) -> Tensor:
        """Return alpha-bar, float64, of noise levels of any shape, for a model that is no flow.

        Raises:
            UserError: the `prediction_type` is `flow`, where x is (1 - sigma) * clean + sigma * noise.
        """

    def predict(self, x: Tensor, sigma: Tensor, condition: Condition, guidance: float = 1.0) -> Tensor:
        """Run the network: one function for sampling and for training.

        Args:
            x: noisy latents, batch first.
            sigma: (B,) noise level of each row; rows may differ. Where `per_frame` is True also (B, T), one of each of
                the T latent frames; equal ones in a row mean the same as one for the row.
            condition: from `encode_prompt`, plus `encode_image` where the pipeline takes an image.
            guidance: scale of classifier-free guidance; up to 1 is one pass, above 1 two passes, gradients in both.

        Returns:
            The prediction, float32, shaped like `x`. Guidance is combined in float32.

        Raises:
            UserError: `sigma` of another shape, or per frame where `per_frame` is False; guidance without `negative`.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents into clips (B, F, 3, H, W), float32 in [0, 1]."""


@runtime_checkable
class VarianceDenoiser(Denoiser, Protocol):
    """A denoiser whose network may predict the variance of a reverse step too (arXiv:2102.09672, eq. 15).

    `isinstance(denoiser, VarianceDenoiser) and denoiser.predicts_variance` says whether this one does.
    """

    @property
    def predicts_variance(self) -> bool:
        """Whether this network does."""

    def predict_with_variance(
        self, x: Tensor, sigma: Tensor, condition: Condition, guidance: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Run the network as `predict` does, and keep its second output.

        Returns:
            The prediction of `predict`, bit by bit, and v, as the network gives it for the prompt (guidance leaves it
            alone); both float32, shaped like `x`.

        Raises:
            UserError: as `predict`, or `predicts_variance` is False.
        """
