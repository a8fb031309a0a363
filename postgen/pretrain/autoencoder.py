"""Method `autoencoder`: trains an `AutoencoderKLWan` on clips of the synthetic world, whole clips at a time."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from postgen.training import Trainer, TrainingConfig
from postgen.video import contact_sheet

from .measure import masked_psnr
from .pool import FIRST_TRAINING_SEED, Clips, dilated, render_clips, specs_of, to_model
from .whole_clip import WholeClip


@dataclass(kw_only=True)
class AutoencoderConfig(TrainingConfig):
    """Settings of the method; the batch size counts 17-frame clips; shorter clips come in larger batches.

    Raises:
        UserError: a value outside its range.
    """

    size: int = 96
    """Height and width of the clips in pixels, a multiple of 8."""

    base_dim: int = 32
    """Channels of the first level."""

    dim_mult: list[int] = field(default_factory=lambda: [1, 2, 2])
    """Channels of each level in units of base_dim; three levels."""

    z_dim: int = 16
    """Latent channels."""

    pool_clips: int = 4096
    """17-frame clips that are rendered once and kept on the device; an eighth as many of 33 frames come on top."""

    image_until: float = 0.1
    """Share of the run that trains on single frames."""

    short_until: float = 0.45
    """Share of the run after which 9-frame crops give way to clips of 17 and 33 frames."""

    object_weight: float = 4.0
    """Weight of pixels on and around bodies, on top of 1."""

    gradient_weight: float = 0.5
    """Weight of the error of spatial and temporal differences."""

    kl_weight: float = 3e-6
    """Weight of the mean KL divergence of a latent value from a standard normal."""

    folded: bool = False
    """Compute 3-D convolutions as 2-D ones over stacked frames."""

    compile: bool = False
    """Fuse norm and activation with torch.compile."""

    eval_clips: int = 32
    """Clips that evaluation reconstructs, half of them of held-out combinations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.size % 8 == 0 and self.size >= 16, "size", "a multiple of 8, at least 16")
        self.require(len(self.dim_mult) == 3, "dim_mult", "three multipliers")
        self.require(self.pool_clips >= 8, "pool_clips", "at least 8")
        self.require(
            0 <= self.image_until <= self.short_until <= 1, "image_until", "in [0, short_until], both within [0,1]"
        )
        self.require(self.eval_clips >= 2, "eval_clips", "at least 2")


def new_autoencoder(base_dim: int, dim_mult: list[int], z_dim: int) -> Any:
    """An `AutoencoderKLWan` with random weights: 8x smaller in space, 4x in time, pixels in 2x2 cells."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=base_dim,
        z_dim=z_dim,
        dim_mult=dim_mult,
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=[0.0] * z_dim,
        latents_std=[1.0] * z_dim,
    )


class AutoencoderTrainer(Trainer[AutoencoderConfig]):
    """Trains the autoencoder of the embedded model and measures the latents' mean and spread at the end."""

    config_class: ClassVar[type[TrainingConfig]] = AutoencoderConfig

    def build(self) -> Mapping[str, nn.Module]:
        """A new autoencoder run on whole clips; also renders the clips to train on and to evaluate."""
        args = self.args
        self.vae = new_autoencoder(args.base_dim, args.dim_mult, args.z_dim)
        whole = WholeClip(self.vae, folded=args.folded, compiled=args.compile)
        rank = self.accelerator.process_index
        first = FIRST_TRAINING_SEED + rank * 10_000_000
        self.clips = render_clips(specs_of(first, args.pool_clips, 17), args.size, self.device)
        long = specs_of(first + args.pool_clips, max(1, args.pool_clips // 8), 33)
        self.long_clips = render_clips(long, args.size, self.device)
        half = args.eval_clips // 2
        held = [*specs_of(0, half, 17), *specs_of(half, args.eval_clips - half, 17, "held_out")]
        self.held_out = render_clips(held, args.size, self.device)
        return {"autoencoder": whole}

    def training_step(self) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Loss of one batch of random clips; metrics: KL, squared error everywhere and on the bodies."""
        rgb, mask = self._draw()
        x = to_model(rgb)
        with self.accelerator.autocast():
            y, mean, logvar = self.models["autoencoder"](x)
        loss, error = self._loss(x, y, mask)
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        weight = mask[:, None]
        objects = (error.square() * weight).sum() / (weight.sum() * 3).clamp_min(1)
        metrics: dict[str, float | Tensor] = {
            "kl": kl.detach(),
            "mse_objects": objects.detach(),
            "mse": error.square().mean(),
        }
        return loss + self.args.kl_weight * kl, metrics

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Bytes (B,T,3,H,W) and dilated mask (B,T,H,W) of random clips; their length follows the run's progress."""
        args, batch = self.args, self.args.per_device_train_batch_size
        done = self.progress()
        if done < args.image_until:
            return self._pick(self.clips, batch * 12, 1)
        if done < args.short_until:
            return self._pick(self.clips, batch * 2, 9)
        if random.random() < 0.15:
            return self._pick(self.long_clips, max(1, batch // 2), 33)
        return self._pick(self.clips, batch, 17)

    def _pick(self, clips: Clips, batch: int, frames: int) -> tuple[Tensor, Tensor]:
        total = clips.rgb_NT3HW.shape[1]
        index = torch.randint(len(clips.specs), (batch, 1), generator=self.generator, device=self.device)
        start = torch.randint(total - frames + 1, (batch, 1), generator=self.generator, device=self.device)
        time = start + torch.arange(frames, device=self.device)
        return clips.rgb_NT3HW[index, time], dilated(clips.mask_NTHW[index, time])

    def _loss(self, x: Tensor, y: Tensor, mask_BTHW: Tensor) -> tuple[Tensor, Tensor]:
        """L1 + 2 MSE + differences, weighted towards the bodies; also the error tensor, detached."""
        error = y - x
        weight = 1.0 + self.args.object_weight * mask_BTHW[:, None]
        weight = weight / weight.mean()
        loss = (weight * (error.abs() + 2.0 * error.square())).mean()
        steps = [error.diff(dim=dim).abs() * weight.narrow(dim, 1, weight.shape[dim] - 1) for dim in (2, 3, 4)]
        loss = loss + self.args.gradient_weight * sum((s.mean() for s in steps if s.numel()), start=loss.new_zeros(()))
        return loss, error.detach()

    def evaluate(self) -> dict[str, float]:
        """PSNR in dB on unseen scenes (everywhere, on the bodies, there in the last frame); writes a contact sheet."""
        x = to_model(self.held_out.rgb_NT3HW)
        y = torch.cat([self._reconstruct(part) for part in x.split(8)])
        mask = dilated(self.held_out.mask_NTHW)[:, None]
        if self.accelerator.is_main_process:
            rows = torch.cat((x[:4, :, ::4], y[:4, :, ::4]), 0).transpose(1, 2)
            sheet = ((rows.flatten(0, 1) + 1) / 2).float().cpu()
            contact_sheet(
                sheet, self.args.folder / "reconstructions.png", columns=x[:, :, ::4].shape[2], limit=len(sheet)
            )
        return {
            "psnr": masked_psnr(x, y, torch.ones_like(mask)),
            "psnr_objects": masked_psnr(x, y, mask),
            "psnr_objects_last": masked_psnr(x[:, :, -1:], y[:, :, -1:], mask[:, :, -1:]),
        }

    def _reconstruct(self, x: Tensor) -> Tensor:
        whole: Any = self.unwrap("autoencoder")
        with self.accelerator.autocast():
            mean, _ = whole.encode(x)
            return whole.decode(mean).clamp(-1, 1)  # type: ignore[no-any-return]

    def export(self, folder: Path) -> None:
        """A diffusers autoencoder folder in half precision, with the latents' measured mean and standard deviation."""
        mean, std = self._latent_statistics()
        vae = copy.deepcopy(self.vae).to(device="cpu", dtype=torch.float16)
        vae.register_to_config(latents_mean=mean, latents_std=std)
        vae.save_pretrained(folder)

    def _latent_statistics(self) -> tuple[list[float], list[float]]:
        whole: Any = self.unwrap("autoencoder")
        parts = []
        for rgb in self.clips.rgb_NT3HW[:256].split(8):
            with self.accelerator.autocast():
                parts.append(whole.encode(to_model(rgb))[0])
        z = torch.cat(parts).transpose(0, 1).flatten(1).double()
        return z.mean(1).tolist(), z.std(1).tolist()
