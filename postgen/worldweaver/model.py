"""The WorldWeaver model: a denoiser with its widened transformer and level embedder. All forward passes run here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families import Condition, Denoiser
from postgen.families.installed import transformers_of
from postgen.families.registry import pipelines_per_frame
from postgen.worldweaver.embedding import LevelEmbedder
from postgen.worldweaver.latent_scale import Scale, checked_scale
from postgen.worldweaver.levels import MODALITIES, FrameLevels, Modality
from postgen.worldweaver.skip import with_skip
from postgen.worldweaver.widen import transformer_of, widened


class WorldWeaverModel:
    """Predicts noisy latents of several modalities, given a noise level for each frame and modality.

    Latents are (B, M * C, T, h, w) in every family: the channels of the modalities are concatenated, RGB first. The
    timestep of the network is the noise level of RGB, one per frame if the network supports that. The level embedder
    provides the levels of all modalities. Prompts, the noise levels of a schedule and the autoencoder come from the
    denoiser.

    Args:
        denoiser: of a pipeline with one transformer, widened or not.
        embedder: from `LevelEmbedder.for_transformer`, or from a trained adapter.
        mean_level: for networks that take one timestep for the whole clip (CogVideoX, HunyuanVideo): use the mean RGB
            noise level of the frames in flight as that timestep. The levels of single frames then reach the network
            only through the level embedder, so such a model needs training before it can distinguish them.
        latent_scale: scale factor of each modality, see the property `latent_scale`; None: the scale with which the
            transformer was trained.

    Raises:
        UserError: two experts; an image model; an embedder for another width or number of modalities; a network with
            one timestep and no `mean_level`, or a network with a timestep per frame and `mean_level`; a wrong scale;
            an embedder with `skip` for a model that is not a flow model, or with `refine` for other latents.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        embedder: LevelEmbedder,
        *,
        mean_level: bool = False,
        latent_scale: Sequence[float] | None = None,
    ) -> None:
        _check_denoiser(denoiser)
        self.denoiser, self.embedder, self.mean_level = denoiser, embedder, mean_level
        self.embedder_called: nn.Module = embedder
        """The module to call for the vectors. A trainer replaces it by a DDP wrapper, as it replaces
        `denoiser.transformers`. Only the vectors come from it: with `refine` wrap a module that calls the whole model,
        such as `WindowLoss`."""
        self._name = next(iter(denoiser.transformers))
        self._check_levels()
        count = embedder.config["modalities"]
        wide = widened(self.transformer, MODALITIES[:count])
        self.modalities: tuple[Modality, ...] = wide.modalities
        self.channels = wide.channels
        """Number of latent channels of one modality."""
        self.shown = wide.shown
        """Number of channels of placed memory: M * C + 1, or 0 without placed memory."""
        width = self.transformer.get_submodule(wide.widths.first).weight.shape[0]
        if embedder.config["width"] != width:
            raise UserError(
                f"the level embedder has width {embedder.config['width']}, the tokens have width {width}: the embedder"
                " belongs to another model"
            )
        self._wide = wide
        wide.driven_by(embedder)
        if embedder.config["skip"] and denoiser.prediction_type != "flow":
            raise UserError(
                "this level embedder has skip=True, which needs a flow model: the model predicts"
                f" {denoiser.prediction_type}"
            )
        if embedder.refiner is not None and embedder.config["channels"] != wide.channels:
            raise UserError(
                f"the level embedder refines latents of {embedder.config['channels']} channels, the model has latents"
                f" of {wide.channels}: the embedder belongs to another model"
            )
        if latent_scale is not None:
            self.latent_scale = tuple(latent_scale)
        wide.told = (
            "mean RGB level of the frames in flight as one timestep, level of each frame through the level embedder"
            if mean_level
            else "RGB level of each frame as its timestep, all levels through the level embedder"
        )

    @property
    def latent_scale(self) -> Scale:
        """Factor by which the latents of each modality are multiplied for the network, RGB (1) first.

        The scale belongs to the trained network: `load_adapter` sets it, and all models with the same transformer
        share it.
        """
        return self._wide.scale

    @latent_scale.setter
    def latent_scale(self, scale: Sequence[float]) -> None:
        self._wide.latent_scale = checked_scale(scale, len(self.modalities))

    @property
    def transformer(self) -> Any:
        """The transformer itself, without wrappers such as DDP."""
        return next(iter(transformers_of(self.denoiser.transformers[self._name]).values()))

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the latent shape (M * C, T, h, w) of a clip of the given frames and pixels.

        Raises:
            UserError: a size or number of frames that the model does not support.
        """
        shape = self.denoiser.latent_shape(num_frames, height, width)
        frames = shape[0] if self.denoiser.frame_axis == 1 else shape[1]
        return self.channels * len(self.modalities), frames, shape[2], shape[3]

    def split(self, z: Tensor) -> dict[Modality, Tensor]:
        """Return the latents (B, C, T, h, w) of each modality as views of z (B, M * C, T, h, w)."""
        return dict(zip(self.modalities, z.unflatten(1, (len(self.modalities), -1)).unbind(1), strict=True))

    def encode(self, clips: Tensor, modality: Modality = "rgb") -> Tensor:
        """Encode clips (B, F, 3, H, W) in [0, 1] of one modality to scaled latents (B, C, T, h, w)."""
        latents, scale = self._turned(self.denoiser.encode_video(clips)), self._scale_of(modality)
        return latents if scale == 1 else latents * scale

    def decode(self, latents: Tensor, modality: Modality = "rgb") -> Tensor:
        """Decode scaled latents (B, C, T, h, w) of one modality to clips (B, F, 3, H, W), float32 in [0, 1]."""
        return self.denoiser.decode(self._turned(self.unscaled(latents, modality)))

    def unscaled(self, latents: Tensor, modality: Modality) -> Tensor:
        """Return latents (B, C, T, h, w) of one modality without the scale, as the autoencoder expects them."""
        scale = self._scale_of(modality)
        return latents if scale == 1 else latents / scale

    def scaled(self, z: Tensor) -> Tensor:
        """Multiply latents (B, M * C, T, h, w) from the autoencoder by the scale, as the network expects them."""
        parts = zip(self.split(z).values(), self.latent_scale, strict=True)
        return torch.cat([part if scale == 1 else part * scale for part, scale in parts], 1)

    def predict(self, z: Tensor, levels: FrameLevels, condition: Condition, guidance: float = 1.0) -> Tensor:
        """Run a forward pass. Rollouts, training and the pipeline all use this method.

        Args:
            z: (B, M * C, T, h, w) noisy latents.
            levels: noise levels and roles of the T frames in the M modalities.
            condition: of the B rows, from `Denoiser.encode_prompt`, plus `encode_image` where the pipeline takes an
                image. A model with placed memory also takes `placed`, (B, M * C + 1, t, h, w) for the last t frames:
                the known latents, and as last channel the mask of the cells where they are known. Nothing is known
                for earlier frames, and for all frames without `placed`.
            guidance: scale of classifier-free guidance. Up to 1 there is one pass; above 1 there are two passes with
                the same noise levels.

        Returns:
            The prediction for every modality, float32, of the same shape as `z`.

        Raises:
            UserError: latents or levels of wrong shapes, or an error of `Denoiser.predict`.
        """
        self._check(z, levels)
        seen, told = self._turned(self._seen(z, condition.get("placed"))), self._told(levels).to(z.device)

        def run(condition: Condition, guidance: float) -> Tensor:
            out = self.denoiser.predict(seen, told, condition, guidance)
            return self._skipped(self._turned(out), z, levels)

        with self.embedder.on(self.transformer, levels, self.embedder_called):
            if guidance <= 1 or self.embedder.refiner is None or "negative" not in condition:
                return run(condition, guidance)
            # The refiner is not linear and was trained on outputs of single passes: refine before guidance.
            with_text, without = run(condition, 1.0), run(_without_text(condition), 1.0)
            return without + guidance * (with_text - without)

    def _skipped(self, out: Tensor, z: Tensor, levels: FrameLevels) -> Tensor:
        """Refine the outputs other than RGB and add their linear guess.

        The linear guess may be added after guidance, because guidance mixes predictions linearly.
        """
        if not self.embedder.config["skip"] or len(self.modalities) == 1:
            return out
        if self.embedder.refiner is not None:
            rgb, others = out.tensor_split([self.channels], 1)
            out = torch.cat([rgb, others + self.embedder.refiner(out, z, levels)], 1)
        found, given = (list(self.split(each).values()) for each in (out, z))
        guessed = [with_skip(found[m], given[m], levels.sigma[:, :, m]) for m in range(1, len(found))]
        return torch.cat([found[0], *guessed], 1)

    def _scale_of(self, modality: Modality) -> float:
        if modality not in self.modalities:
            raise UserError(f"this model has no modality {modality}: choose from {', '.join(self.modalities)}")
        return self.latent_scale[self.modalities.index(modality)]

    def _seen(self, z: Tensor, placed: Tensor | None) -> Tensor:
        """Append the channels of placed memory to the latents; unknown cells are zeros."""
        if placed is None and not self.shown:
            return z
        frames = 0 if placed is None else placed.shape[2]
        if placed is not None and (
            not self.shown or frames > z.shape[2] or placed[:, :, :0].shape != (len(z), self.shown, 0, *z.shape[3:])
        ):
            allowed = f"({len(z)}, {self.shown}, at most {z.shape[2]}, {z.shape[3]}, {z.shape[4]})"
            reason = f"give {allowed}" if self.shown else "the model has no inputs for it: widen it with placed=True"
            raise UserError(f"placed memory has shape {tuple(placed.shape)}: {reason}")
        memory = z.new_zeros(len(z), self.shown, z.shape[2], *z.shape[3:])
        if placed is not None:
            memory[:, :, z.shape[2] - frames :] = placed.to(z)
        return torch.cat([z, memory], dim=1)

    def _told(self, levels: FrameLevels) -> Tensor:
        """Return the noise levels for the network's own timestep, (B, T), or (B,) with `mean_level`."""
        if not self.mean_level:
            return levels.rgb
        made = levels.rgb[:, levels.predicted] if levels.predicted.any() else levels.rgb
        # In float64, so that the mean of equal numbers is exactly that number.
        return made.double().mean(dim=1).to(levels.rgb.dtype)

    def _turned(self, latents: Tensor) -> Tensor:
        """Swap the channel and frame axes for families that have frames before channels."""
        return latents.transpose(1, 2) if self.denoiser.frame_axis == 1 else latents

    def _check(self, z: Tensor, levels: FrameLevels) -> None:
        count, channels = len(self.modalities), self.channels * len(self.modalities)
        if z.dim() != 5 or z.shape[1] != channels:
            raise UserError(
                f"latents have shape {tuple(z.shape)}: give (batch, {channels}, latent frames, height, width),"
                f" {self.channels} channels for each of {', '.join(self.modalities)}"
            )
        if tuple(levels.sigma.shape) != (len(z), z.shape[2], count):
            raise UserError(
                f"levels have shape {tuple(levels.sigma.shape)} for latents of shape {tuple(z.shape)}: give"
                f" ({len(z)}, {z.shape[2]}, {count})"
            )

    def _check_levels(self) -> None:
        kind = type(self.transformer).__name__
        if not self.denoiser.per_frame and not self.mean_level:
            raise UserError(
                f"{kind} takes one noise level for a whole clip, but frames of a window have different levels: use one"
                f" of {', '.join(pipelines_per_frame())}, or mean_level=True, which uses the mean level and leaves the"
                " level of each frame to a trained level embedder"
            )
        if self.denoiser.per_frame and self.mean_level:
            raise UserError(f"{kind} takes a noise level for each frame: omit mean_level")


def _check_denoiser(denoiser: Denoiser) -> None:
    """Check that a denoiser is of a video model with a single network."""
    pipe: Any = getattr(denoiser, "pipe", None)
    if pipe is not None and hasattr(pipe, "components"):
        transformer_of(pipe)  # raises for two experts, also if one of them is not loaded
    if len(denoiser.transformers) != 1:
        raise UserError(
            f"the denoiser has the networks {', '.join(denoiser.transformers)}: give a denoiser with one network"
        )
    if denoiser.frame_axis is None:
        raise UserError("an image model has no frames: give a video model")


def _without_text(condition: Condition) -> Condition:
    """Return the condition with the negative prompt as its prompt."""
    return {**condition, **{f"prompt{name[8:]}": each for name, each in condition.items() if name[:8] == "negative"}}
