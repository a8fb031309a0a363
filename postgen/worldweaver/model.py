"""The one place where the network is called: a denoiser, its widened transformer, and what tells it the levels."""

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
    """Joint latents of several modalities and their noise levels in, predictions out.

    Latents are (B, M * C, T, h, w) in every family: modalities one after the other on the channels, RGB first. The
    network's timestep is the level of RGB, of each frame where the network takes that; the level embedder tells all of
    them. Prompts, noise levels of a schedule and the autoencoder are the denoiser's.

    Args:
        denoiser: of a pipeline with one transformer, widened or not.
        embedder: `LevelEmbedder.for_transformer`, or the trained one.
        mean_level: for a network that takes one timestep for the whole clip (CogVideoX, HunyuanVideo): tell it the
            mean level of RGB in the frames that are being made. The levels of single frames then come from the level
            embedder alone, so such a model must be trained with it before it can tell them apart.
        latent_scale: of each modality, see `latent_scale`; None is that of the transformer, as it was trained.

    Raises:
        UserError: two experts; a model of pictures; an embedder for another width or number of modalities; a network
            that takes one timestep, and `mean_level` was not asked for, or one that takes more, and it was; a scale
            that is none; an embedder with `skip` for a model that is no flow, or with `refine` for other latents.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        embedder: LevelEmbedder,
        *,
        mean_level: bool = False,
        latent_scale: Sequence[float] | None = None,
    ) -> None:
        pipe: Any = getattr(denoiser, "pipe", None)
        if pipe is not None and hasattr(pipe, "components"):
            transformer_of(pipe)  # refuses two experts, also where one of them is not loaded
        if len(denoiser.transformers) != 1:
            raise UserError(f"a denoiser of one network is needed, this has {', '.join(denoiser.transformers)}")
        if denoiser.frame_axis is None:
            raise UserError("a model of pictures has no frames: give a video model")
        self.denoiser, self.embedder, self.mean_level = denoiser, embedder, mean_level
        self.embedder_called: nn.Module = embedder
        """A trainer puts its wrapped (DDP) one here, as it does with the denoiser's `transformers`. It is called for
        the vectors alone: with `refine` wrap what calls the whole model, as `WindowLoss` is."""
        self._name = next(iter(denoiser.transformers))
        self._check_levels()
        count = embedder.config["modalities"]
        wide = widened(self.transformer, MODALITIES[:count])
        self.modalities: tuple[Modality, ...] = wide.modalities
        self.channels = wide.channels
        """Of one modality."""
        self.shown = wide.shown
        """Channels of placed memory, M * C + 1, or 0."""
        width = self.transformer.get_submodule(wide.widths.first).weight.shape[0]
        if embedder.config["width"] != width:
            raise UserError(
                f"the level embedder gives {embedder.config['width']} numbers, the tokens have {width}: it belongs to"
                " another model"
            )
        self._wide = wide
        wide.driven_by(embedder)
        if embedder.config["skip"] and denoiser.prediction_type != "flow":
            raise UserError(f"this level embedder is of a flow, the model predicts {denoiser.prediction_type}")
        if embedder.refiner is not None and embedder.config["channels"] != wide.channels:
            raise UserError(
                f"the level embedder refines latents of {embedder.config['channels']} channels, the model's have"
                f" {wide.channels}: it belongs to another model"
            )
        if latent_scale is not None:
            self.latent_scale = tuple(latent_scale)
        wide.told = (
            "the mean of the frames that are made, as one timestep for the clip; each frame's by the level embedder"
            if mean_level
            else "each frame's of RGB as its timesteps, all by the level embedder"
        )

    @property
    def latent_scale(self) -> Scale:
        """What the latents of each modality are multiplied by for the network, RGB (1) first.

        It belongs to the trained network: `load_adapter` sets it, and all models of one transformer have the same.
        """
        return self._wide.scale

    @latent_scale.setter
    def latent_scale(self, scale: Sequence[float]) -> None:
        self._wide.latent_scale = checked_scale(scale, len(self.modalities))

    @property
    def transformer(self) -> Any:
        """The network without what is wrapped around it."""
        return next(iter(transformers_of(self.denoiser.transformers[self._name]).values()))

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (M * C, T, h, w) of a clip: frames and pixels in.

        Raises:
            UserError: a size or frame count that the model cannot make.
        """
        shape = self.denoiser.latent_shape(num_frames, height, width)
        frames = shape[0] if self.denoiser.frame_axis == 1 else shape[1]
        return self.channels * len(self.modalities), frames, shape[2], shape[3]

    def split(self, z: Tensor) -> dict[Modality, Tensor]:
        """Return the latents (B, C, T, h, w) of each modality, views of (B, M * C, T, h, w)."""
        return dict(zip(self.modalities, z.unflatten(1, (len(self.modalities), -1)).unbind(1), strict=True))

    def encode(self, clips: Tensor, modality: Modality = "rgb") -> Tensor:
        """Turn clips (B, F, 3, H, W) in [0, 1] of one modality into its latents (B, C, T, h, w), scaled."""
        latents, scale = self._turned(self.denoiser.encode_video(clips)), self._scale_of(modality)
        return latents if scale == 1 else latents * scale

    def decode(self, latents: Tensor, modality: Modality = "rgb") -> Tensor:
        """Turn the latents (B, C, T, h, w) of one modality into clips (B, F, 3, H, W), float32 in [0, 1]."""
        return self.denoiser.decode(self._turned(self.unscaled(latents, modality)))

    def unscaled(self, latents: Tensor, modality: Modality) -> Tensor:
        """Return the latents (B, C, T, h, w) of one modality as the autoencoder knows them."""
        scale = self._scale_of(modality)
        return latents if scale == 1 else latents / scale

    def scaled(self, z: Tensor) -> Tensor:
        """Return latents (B, M * C, T, h, w), which are as the autoencoder gave them, as the network sees them."""
        parts = zip(self.split(z).values(), self.latent_scale, strict=True)
        return torch.cat([part if scale == 1 else part * scale for part, scale in parts], 1)

    def predict(self, z: Tensor, levels: FrameLevels, condition: Condition, guidance: float = 1.0) -> Tensor:
        """Run the network: the one call for rollouts, training and the pipeline.

        Args:
            z: (B, M * C, T, h, w) noisy latents.
            levels: of the T frames in the M modalities.
            condition: of the B rows, from `Denoiser.encode_prompt`, plus `encode_image` where the pipeline takes one.
                Of a model with placed memory also `placed`, (B, M * C + 1, t, h, w) of the last t frames: latents that
                are known there, and last the mask of where. Frames before them, and all without it, know nothing.
            guidance: scale of classifier-free guidance; up to 1 is one pass, above 1 two, with the same levels.

        Returns:
            The prediction of every modality, float32, shaped like `z`.

        Raises:
            UserError: latents or levels of other shapes, and as `Denoiser.predict`.
        """
        self._check(z, levels)
        seen, told = self._turned(self._seen(z, condition.get("placed"))), self._told(levels).to(z.device)

        def run(condition: Condition, guidance: float) -> Tensor:
            out = self.denoiser.predict(seen, told, condition, guidance)
            return self._skipped(self._turned(out), z, levels)

        with self.embedder.on(self.transformer, levels, self.embedder_called):
            if guidance <= 1 or self.embedder.refiner is None or "negative" not in condition:
                return run(condition, guidance)
            # What refines was trained on the outputs of one pass, and is not linear: guidance comes after it.
            with_text, without = run(condition, 1.0), run(_without_text(condition), 1.0)
            return without + guidance * (with_text - without)

    def _skipped(self, out: Tensor, z: Tensor, levels: FrameLevels) -> Tensor:
        """Refine what is not RGB and add its linear guess, which may come after guidance since that mixes linearly."""
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
            raise UserError(f"this model has {', '.join(self.modalities)}, and no {modality}")
        return self.latent_scale[self.modalities.index(modality)]

    def _seen(self, z: Tensor, placed: Tensor | None) -> Tensor:
        """Put placed memory behind the latents; zeros where nothing is known."""
        if placed is None and not self.shown:
            return z
        frames = 0 if placed is None else placed.shape[2]
        if placed is not None and (
            not self.shown or frames > z.shape[2] or placed[:, :, :0].shape != (len(z), self.shown, 0, *z.shape[3:])
        ):
            allowed = f"({len(z)}, {self.shown}, at most {z.shape[2]}, {z.shape[3]}, {z.shape[4]})"
            reason = f"give {allowed}" if self.shown else "the model has no inputs for it: widen it with placed=True"
            raise UserError(f"placed memory of shape {tuple(placed.shape)}: {reason}")
        memory = z.new_zeros(len(z), self.shown, z.shape[2], *z.shape[3:])
        if placed is not None:
            memory[:, :, z.shape[2] - frames :] = placed.to(z)
        return torch.cat([z, memory], dim=1)

    def _told(self, levels: FrameLevels) -> Tensor:
        """Noise levels as the network's own timestep says them, (B, T) or (B,)."""
        if not self.mean_level:
            return levels.rgb
        made = levels.rgb[:, levels.predicted] if levels.predicted.any() else levels.rgb
        # In float64: of equal numbers it is that number.
        return made.double().mean(dim=1).to(levels.rgb.dtype)

    def _turned(self, latents: Tensor) -> Tensor:
        """Swap between the axes of this class and those of a family that has frames before channels."""
        return latents.transpose(1, 2) if self.denoiser.frame_axis == 1 else latents

    def _check(self, z: Tensor, levels: FrameLevels) -> None:
        count, channels = len(self.modalities), self.channels * len(self.modalities)
        if z.dim() != 5 or z.shape[1] != channels:
            raise UserError(
                f"latents of shape {tuple(z.shape)}: give (batch, {channels}, latent frames, height, width),"
                f" {self.channels} channels for each of {', '.join(self.modalities)}"
            )
        if tuple(levels.sigma.shape) != (len(z), z.shape[2], count):
            raise UserError(
                f"levels of shape {tuple(levels.sigma.shape)} for latents of shape {tuple(z.shape)}: give"
                f" ({len(z)}, {z.shape[2]}, {count})"
            )

    def _check_levels(self) -> None:
        kind = type(self.transformer).__name__
        if not self.denoiser.per_frame and not self.mean_level:
            raise UserError(
                f"{kind} takes one noise level for a whole clip, and frames of a window have their own: use one of"
                f" {', '.join(pipelines_per_frame())}, or mean_level=True, which tells it their mean and leaves the"
                " rest to a trained level embedder"
            )
        if self.denoiser.per_frame and self.mean_level:
            raise UserError(f"{kind} takes a noise level for each frame: leave mean_level out")


def _without_text(condition: Condition) -> Condition:
    """Return the condition of a pass with the negative prompt as its prompt."""
    return {**condition, **{f"prompt{name[8:]}": each for name, each in condition.items() if name[:8] == "negative"}}
