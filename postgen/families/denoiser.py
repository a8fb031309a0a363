"""The interface of a pipeline class for training and rollouts."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Condition = Mapping[str, "Tensor"]
"""Inputs of the transformer besides the noisy latents and the timestep, by name. The first axis of every tensor is
the batch, so callers can select, stack and cache rows of any family. `prompt` is always present; `negative` is present
only for classifier-free guidance."""

PredictionType = Literal["flow", "epsilon", "v_prediction", "sample"]
"""`flow`: the prediction is noise - clean, and x = (1 - sigma) * clean + sigma * noise."""


@runtime_checkable
class Denoiser(Protocol):
    """A pipeline class as four operations: encode, draw noise, predict, decode.

    Latents are float32 and normalised, as the transformer takes them. The methods do not disable gradients: wrap calls
    in `torch.no_grad()` if you need none. The denoiser reads the scheduler of the pipeline and never steps it.
    """

    transformers: MutableMapping[str, nn.Module]
    """The networks that `predict` calls, by component name. A trainer puts its wrapped (DDP, compiled) ones here."""

    max_sequence_length: int
    """Number of tokens of an encoded prompt. It may be set before prompts are encoded. A model with a fixed length
    raises a `UserError` for another number."""

    @property
    def prediction_type(self) -> PredictionType:
        """Meaning of the prediction that `predict` returns."""

    @property
    def timestep_scale(self) -> float:
        """Factor from the noise level to the timestep of the network: timestep = sigma * timestep_scale."""

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Names of the layers that LoRA adapts by default, in the format of `target_modules` of PEFT."""

    @property
    def frame_axis(self) -> int | None:
        """Time axis of the latents: 2 for (B, C, T, H, W), 1 for (B, T, C, H, W), None for pictures."""

    @property
    def per_frame(self) -> bool:
        """Whether `predict` also takes one noise level per latent frame, `sigma` of shape (B, T) and not only (B,)."""

    @property
    def encodes_video(self) -> bool:
        """Whether `encode_video` is supported; if False, a call raises a `UserError`."""

    def encode_prompt(
        self, prompts: list[str], negative_prompts: list[str] | None = None, *, guidance: bool = True
    ) -> dict[str, Tensor]:
        """Encode B prompts exactly as the pipeline's default call does.

        Args:
            prompts: B prompts.
            negative_prompts: B negative prompts; None uses empty ones.
            guidance: whether the result has a `negative` entry.

        Returns:
            The condition for `predict`, with the batch as the first axis of every tensor.
        """

    def encode_image(self, images: Tensor, num_frames: int) -> dict[str, Tensor]:
        """Encode first frames (B, 3, H, W) in [0, 1] as more condition entries for clips of `num_frames` frames.

        Raises:
            UserError: the pipeline takes only text.
        """

    def encode_video(self, clips: Tensor, *, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Encode clips (B, F, 3, H, W) in [0, 1] as latents.

        Args:
            clips: the clips.
            sample: sample from the distribution of the autoencoder; otherwise its mode is used.
            generator: random generator for `sample`.

        Raises:
            UserError: `encodes_video` is False, or the model does not support the shape or size of the clips.
        """

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the latents of one sample, without the batch axis.

        Args:
            num_frames: number of frames of the clip.
            height: height in pixels.
            width: width in pixels.

        Raises:
            UserError: the model does not support this size or number of frames.
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
        """Draw the initial noise that the pipeline draws for the same generator.

        Args:
            batch: number of samples.
            num_frames: number of frames of a clip.
            height: height in pixels.
            width: width in pixels.
            generator: random generator, or one generator per sample.

        Returns:
            Latents (batch, ...).

        Raises:
            UserError: the model does not support this size or number of frames.
        """

    def sigmas(self, num_steps: int, shape: Sequence[int] | None = None) -> Tensor:
        """Return the (num_steps + 1,) noise levels of the pipeline's schedule, from high to 0.

        Args:
            num_steps: number of steps.
            shape: shape of the latents of one sample, for schedules that depend on the size.
        """

    def alpha_bar(self, sigma: Tensor) -> Tensor:
        """Return alpha-bar (float64) for noise levels of any shape, for a model whose prediction type is not `flow`.

        Raises:
            UserError: the `prediction_type` is `flow`; then x = (1 - sigma) * clean + sigma * noise.
        """

    def predict(self, x: Tensor, sigma: Tensor, condition: Condition, guidance: float = 1.0) -> Tensor:
        """Return the prediction of the network for noisy latents, in sampling and in training.

        Args:
            x: noisy latents, batch first.
            sigma: (B,) noise level of each row, float32 or float64; rows may differ. If `per_frame` is True, also
                (B, T), one noise level for each of the T latent frames. Equal levels in a row mean the same as one
                level for the row.
            condition: the entries of `encode_prompt`, and those of `encode_image` if the pipeline takes an image.
            guidance: guidance scale. Up to 1, the network runs once. Above 1, it runs twice, with gradients in both
                passes.

        Returns:
            The prediction, float32, with the shape of `x`. Both passes are combined in float32.

        Raises:
            UserError: `sigma` has another shape, or has levels per frame although `per_frame` is False; or `guidance`
                is above 1 and `condition` has no `negative`.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents into clips (B, F, 3, H, W), float32 in [0, 1]."""


@runtime_checkable
class RoundingDenoiser(Denoiser, Protocol):
    """A denoiser whose pipeline may round the timesteps of the network, as with the scheduler UniPC."""

    def network_sigmas(self, num_steps: int, shape: Sequence[int] | None = None) -> Tensor | None:
        """Return the noise levels that the pipeline's network receives at the steps of `sigmas`.

        Args:
            num_steps: number of steps.
            shape: shape of the latents of one sample, for schedules that depend on the size.

        Returns:
            (num_steps + 1,) float64 noise levels, timestep / timestep_scale. `predict` gives the network exactly
            these timesteps if it gets the levels in float64. None: the network receives the levels of `sigmas`.
        """


@runtime_checkable
class ExpertDenoiser(Denoiser, Protocol):
    """A denoiser whose pipeline may have two networks, each for a range of noise levels (Wan 2.2)."""

    @property
    def expert_boundary(self) -> float | None:
        """Noise level from which on the first network predicts, below it the second; None with one network."""


@runtime_checkable
class VarianceDenoiser(Denoiser, Protocol):
    """A denoiser whose network may also predict the variance of a reverse step (arXiv:2102.09672, eq. 15).

    To test a denoiser: `isinstance(denoiser, VarianceDenoiser) and denoiser.predicts_variance`.
    """

    @property
    def predicts_variance(self) -> bool:
        """Whether the network of this denoiser predicts the variance."""

    def predict_with_variance(
        self, x: Tensor, sigma: Tensor, condition: Condition, guidance: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return the prediction of `predict` and the variance output v of the network.

        Returns:
            The prediction, with the same bits as from `predict`, and v for the prompt, to which guidance is not
            applied. Both are float32 and have the shape of `x`.

        Raises:
            UserError: `predict` refuses the arguments, or `predicts_variance` is False.
        """
