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

from postgen.errors import UserError
from postgen.training import Trainer, TrainingConfig, Weights
from postgen.video import contact_sheet
from postgen.world.scenes import FIRST_TRAINING_SEED, specs_of

from .clip_pass import ClipPass
from .measure import masked_psnr
from .pool import Clips, dilated, render_clips, to_model


@dataclass(kw_only=True)
class AutoencoderConfig(TrainingConfig):
    """Settings of the method. The batch size counts clips of the first length; other batches have about equal cost.

    Raises:
        UserError: a value outside its range.
    """

    size: int = 96
    """Height and width of the clips in pixels, a multiple of 8."""

    base_dim: int = 32
    """Channels of the encoder at its full resolution, multiplied by `dim_mult` at each level."""

    decoder_base_dim: int | None = None
    """The same for the decoder; None uses the value of the encoder."""

    dim_mult: list[int] = field(default_factory=lambda: [1, 2, 2])
    """Multiplier of `base_dim` for each of the three levels."""

    z_dim: int = 16
    """Number of latent channels."""

    lengths: list[int] = field(default_factory=lambda: [17, 33])
    """Clip lengths for training, each 4n+1 and at least 9; the first length is evaluated."""

    sizes: list[int] = field(default_factory=list)
    """Height and width of the clips of each length, multiples of 8, the first one `size`; empty: `size` for all."""

    length_weights: list[float] = field(default_factory=lambda: [0.85, 0.15])
    """Relative frequency of each length in the last part of the run."""

    pool_clips: int = 4096
    """Number of clips of the first length that are rendered once and kept on the device of each process."""

    pool_shares: list[float] = field(default_factory=lambda: [1.0, 0.125])
    """Number of clips of each length that are kept, relative to `pool_clips`; in (0, 1], the first 1."""

    image_until: float = 0.1
    """Share of the run, from its start, that trains on single frames."""

    short_until: float = 0.45
    """Share of the run after which whole clips of all lengths replace 9-frame crops of the first length."""

    image_share: float = 0.0
    """Share of single-frame steps after `image_until`, in [0,1)."""

    object_weight: float = 4.0
    """Additional weight of pixels on and around bodies; all pixels have weight 1."""

    edge_weight: float = 0.0
    """Additional weight of edges on and around bodies: outlines, edges of cubes, contacts."""

    first_frame_weight: float = 1.0
    """Factor for the first frame of a clip, above 0. It is encoded alone, but is one frame of many in the loss."""

    mse_weight: float = 2.0
    """Weight of the squared error; the absolute error has weight 1."""

    gradient_weight: float = 0.5
    """Weight of the error of spatial and temporal differences."""

    gradient_scales: int = 1
    """Number of scales of these differences, 1 to 4; each further scale halves height and width."""

    kl_weight: float = 3e-6
    """Weight of the KL divergence from a standard normal distribution, averaged over latent values."""

    folded: bool = False
    """Compute 3-D convolutions as 2-D convolutions over stacked frames."""

    compile: bool = False
    """Fuse norm and activation with torch.compile instead of the kernel of `postgen.kernels.norm_silu`."""

    cuda_graphs: bool = False
    """Replay forward and backward passes as CUDA graphs, on GPUs; needs gradient_accumulation_steps 1, no compile."""

    eval_clips: int = 32
    """Number of clips that the evaluation reconstructs, half of them with held-out combinations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sizes = self.sizes or [self.size] * len(self.lengths)
        self.require(self.size % 8 == 0 and self.size >= 16, "size", "a multiple of 8, at least 16")
        self.require(len(self.dim_mult) == 3, "dim_mult", "three multipliers")
        base = self.decoder_base_dim
        self.require(base is None or base >= 1, "decoder_base_dim", "none or at least 1")
        self.require(
            bool(self.lengths) and all(n >= 9 and n % 4 == 1 for n in self.lengths), "lengths", "4n+1, at least 9"
        )
        for name in ("sizes", "length_weights", "pool_shares"):
            self.require(len(getattr(self, name)) == len(self.lengths), name, "as many numbers as lengths")
        self.require(
            self.sizes[0] == self.size and all(n % 8 == 0 and n >= 16 for n in self.sizes),
            "sizes",
            "multiples of 8, at least 16, the first one size",
        )
        weights = self.length_weights
        self.require(min(weights) >= 0 < sum(weights), "length_weights", "at least 0, not all 0")
        shares = self.pool_shares
        self.require(shares[0] == 1 and all(0 < x <= 1 for x in shares), "pool_shares", "in (0, 1], the first 1")
        self.require(self.pool_clips >= 8, "pool_clips", "at least 8")
        self.require(
            0 <= self.image_until <= self.short_until <= 1, "image_until", "in [0, short_until], both within [0,1]"
        )
        self.require(0 <= self.image_share < 1, "image_share", "in [0,1)")
        for name in ("object_weight", "edge_weight", "mse_weight", "gradient_weight", "kl_weight"):
            self.require(getattr(self, name) >= 0, name, "at least 0")
        self.require(self.first_frame_weight > 0, "first_frame_weight", "above 0")
        self.require(1 <= self.gradient_scales <= 4, "gradient_scales", "from 1 to 4")
        self.require(self.eval_clips >= 2, "eval_clips", "at least 2")
        self.require(not self.torch_compile, "torch_compile", "false: the setting of this method is compile")
        if self.cuda_graphs:
            alone = self.gradient_accumulation_steps == 1
            self.require(alone, "gradient_accumulation_steps", "1 with cuda_graphs, whose gradients cannot add up")
            self.require(not self.compile, "compile", "false with cuda_graphs")


def new_autoencoder(base_dim: int, dim_mult: list[int], z_dim: int, decoder_base_dim: int | None = None) -> Any:
    """Return an `AutoencoderKLWan` with random weights: 8x smaller in space (with 2x2 patches), 4x in time."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=base_dim,
        decoder_base_dim=decoder_base_dim,
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
    """Trains the autoencoder of the embedded model, and measures mean and deviation of the latents for the export."""

    config_class: ClassVar[type[TrainingConfig]] = AutoencoderConfig

    def build(self) -> Mapping[str, nn.Module]:
        """Build a new autoencoder for whole clips; also render the clips for training and evaluation."""
        args = self.args
        self.vae = new_autoencoder(args.base_dim, args.dim_mult, args.z_dim, args.decoder_base_dim)
        several = self.accelerator.num_processes > 1
        if args.cuda_graphs and self.device.type != "cuda":
            raise UserError(f"cuda_graphs needs a GPU, not {self.device.type}. Leave it out.")
        whole = ClipPass(
            self.vae,
            args,
            every_gradient=args.cuda_graphs or several,
            graphs=args.cuda_graphs,
            folded=args.folded,
            compiled=args.compile,
            align=32 if self.device.type == "cuda" else 1,
        )
        first = FIRST_TRAINING_SEED + self.accelerator.process_index * 10_000_000
        self.pools: list[Clips] = []
        for frames, size, share in zip(args.lengths, args.sizes, args.pool_shares, strict=True):
            count = max(1, int(args.pool_clips * share))
            self.pools.append(render_clips(specs_of(first, count, frames), size, self.device))
            first += count
        half, frames = args.eval_clips // 2, args.lengths[0]
        held = [*specs_of(0, half, frames), *specs_of(half, args.eval_clips - half, frames, "held_out")]
        self.held_out = render_clips(held, args.size, self.device)
        if args.cuda_graphs:
            whole.to(self.device).train()
            with self.accelerator.autocast():
                for kind, batch, frames in self._kinds():
                    whole.record(batch, frames, args.sizes[kind], self.device)
        return {"autoencoder": whole}

    def _kinds(self) -> list[tuple[int, int, int]]:
        """Return the kinds of batches (pool, clips, frames) of about equal cost: single frames, crops, whole clips."""
        args, batch, longest = self.args, self.args.per_device_train_batch_size, self.args.lengths[0]
        full = longest * args.size**2
        whole = [
            (kind, max(1, batch * full // (frames * size**2)), frames)
            for kind, (frames, size) in enumerate(zip(args.lengths, args.sizes, strict=True))
        ]
        return [(0, batch * round(0.7 * longest), 1), (0, batch * round(longest / 9), 9), *whole]

    def training_step(self) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return the loss of one batch; metrics: KL, and squared error everywhere, on bodies, and in first frames."""
        rgb, mask = self._draw()
        batch, frames, _, height, width = rgb.shape
        shape = (batch, self.args.z_dim, 1 + (frames - 1) // 4, height // 8, width // 8)
        noise = torch.randn(shape, generator=self.generator, device=self.device)
        with self.accelerator.autocast():
            found = self.models["autoencoder"](rgb, mask, noise)
        return found[0], dict(zip(ClipPass.MEASURES, found[1:].detach(), strict=True))

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Draw bytes (B,T,3,H,W) and mask (B,T,H,W) of random clips; their length depends on the run's progress."""
        args, done = self.args, self.progress()
        # All processes draw the same kind of batch, so that none waits for another.
        chance = random.Random(f"kind-{args.seed}-{self.global_step}")
        single, short, *whole = self._kinds()
        if done < args.image_until or (args.image_share and chance.random() < args.image_share):
            return self._pick(*single)
        return self._pick(*(short if done < args.short_until else chance.choices(whole, args.length_weights)[0]))

    def _pick(self, kind: int, batch: int, frames: int) -> tuple[Tensor, Tensor]:
        clips = self.pools[kind]
        total = clips.rgb_NT3HW.shape[1]
        index = torch.randint(len(clips.specs), (batch, 1), generator=self.generator, device=self.device)
        start = torch.randint(total - frames + 1, (batch, 1), generator=self.generator, device=self.device)
        time = start + torch.arange(frames, device=self.device)
        return clips.rgb_NT3HW[index, time], clips.mask_NTHW[index, time]

    def evaluate(self) -> dict[str, float]:
        """Return the PSNR in dB on unseen scenes, everywhere and on bodies: all frames, first, others, last.

        Also write a contact sheet of four clips, each above its reconstruction.
        """
        x = to_model(self.held_out.rgb_NT3HW)
        y = torch.cat([self._reconstruct(part) for part in x.split(8)])
        mask = dilated(self.held_out.mask_NTHW)[:, None]
        if self.accelerator.is_main_process:
            pairs = torch.stack((x[:4, :, ::4], y[:4, :, ::4]), 1).flatten(0, 1).transpose(1, 2)
            sheet = ((pairs.flatten(0, 1) + 1) / 2).float().cpu()
            contact_sheet(sheet, self.args.folder / "reconstructions.png", columns=pairs.shape[1], limit=len(sheet))
        first, rest = (masked_psnr(x[:, :, p], y[:, :, p], mask[:, :, p]) for p in (slice(1), slice(1, None)))
        return {
            "psnr": masked_psnr(x, y, torch.ones_like(mask)),
            "psnr_objects": masked_psnr(x, y, mask),
            "psnr_objects_first": first,
            "psnr_objects_rest": rest,
            "first_frame_gap_db": rest - first,
            "psnr_objects_last": masked_psnr(x[:, :, -1:], y[:, :, -1:], mask[:, :, -1:]),
        }

    def _reconstruct(self, x: Tensor) -> Tensor:
        whole: Any = self.unwrap("autoencoder")
        with self.accelerator.autocast():
            mean, _ = whole.encode(x)
            return whole.decode(mean).clamp(-1, 1)  # type: ignore[no-any-return]

    def export(self, folder: Path, weights: Weights) -> None:
        """Write a diffusers autoencoder in float16, with the measured mean and standard deviation of the latents."""
        mean, std = self._latent_statistics()
        vae = copy.deepcopy(self.vae).to(device="cpu", dtype=torch.float16)
        vae.register_to_config(latents_mean=mean, latents_std=std)
        vae.save_pretrained(folder)

    def _latent_statistics(self) -> tuple[list[float], list[float]]:
        whole: Any = self.unwrap("autoencoder")
        parts = []
        for rgb in self.pools[0].rgb_NT3HW[:256].split(8):
            with self.accelerator.autocast():
                parts.append(whole.encode(to_model(rgb))[0])
        z = torch.cat(parts).transpose(0, 1).flatten(1).double()
        return z.mean(1).tolist(), z.std(1).tolist()
