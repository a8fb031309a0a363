"""Method `class_to_image`: trains a DiT (arXiv:2212.09748) on still pictures of the world, in pixel space.

The model predicts noise, with the linear betas of DiT. The loss is L_simple plus the bound of a learned variance
(arXiv:2102.09672).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families import Condition
from postgen.families.dit import DiTDenoiser
from postgen.sampling.sampler import Sample, Sampler, Sampling
from postgen.sampling.schedule import schedule_of
from postgen.sampling.seeds import seed_of
from postgen.training import Trainer, TrainingConfig, Weights
from postgen.training.sharding import uncut
from postgen.video import contact_sheet
from postgen.world.check import check_batch

from .fast_step import GraphedCall
from .pixels import pixel_autoencoder
from .stills import FRAMES, labels, pool_of
from .variance import variance_bound

TIMESTEPS = 1000
"""Number of noise levels, as in the paper."""
CLASSES = 1000
"""Number of class embeddings. diffusers' pipeline uses class 1000 for "no class". The first 48 or 576 are used."""


@dataclass(kw_only=True)
class ClassToImageConfig(TrainingConfig):
    """Settings of the method.

    Raises:
        UserError: a value outside its range.
    """

    may_change: ClassVar[tuple[str, ...]] = ("pool_dir", "cuda_graphs")
    """Settings that a resumed run may change: the stills do not depend on their folder, nor the draws; CUDA graphs
    change results by rounding only."""

    size: int = 64
    """Height and width of the pictures in pixels, a multiple of `patch`, at least 32."""

    patch: int = 4
    """Side of a token in pixels."""

    num_layers: int = 6
    """Number of transformer blocks."""

    num_heads: int = 8
    """Number of attention heads."""

    head_dim: int = 32
    """Width of an attention head."""

    bodies: int = 2
    """Number of bodies of a still: 1 (48 classes: shape, colour, side) or 2 (576 classes, one body on each side)."""

    pool_pictures: int = 36864
    """Number of stills for training; the default has 64 of each class of two bodies, 768 of each class of one."""

    pool_dir: str | None = None
    """Folder of the stills; the first run writes it, further runs read it. It has `latents.safetensors` and
    `prompts.jsonl`, which method `lit` accepts as `latents` and `train_dataset`. None renders them in every run."""

    class_dropout: float = 0.1
    """Share of samples without their class, for classifier-free guidance."""

    variance_weight: float = 1.0
    """Weight of the variational bound that trains the variance, averaged in nats per latent value. 1 equals .001
    times the sum over 1000 timesteps, as in the paper. 0 trains no variance."""

    cuda_graphs: bool = False
    """Replay forward and backward passes as CUDA graphs; needs one GPU and gradient_accumulation_steps 1."""

    eval_pictures: int = 64
    """Number of stills that the evaluation samples and checks; 0 is possible without evaluation."""

    eval_num_inference_steps: int = 50
    """Sampling steps of the evaluation, and default of the exported model; 2 to 1000."""

    eval_guidance_scale: float = 1.0
    """Guidance scale of the evaluation, and default of the exported model; up to 1 is no guidance, more needs
    `class_dropout`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.patch >= 1, "patch", "at least 1")
        self.require(self.bodies in (1, 2), "bodies", "1 or 2")
        fits = self.size >= 32 and self.size % self.patch == 0
        self.require(fits, "size", "at least 32, a multiple of patch")
        for name in ("num_layers", "num_heads", "pool_pictures"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        fits = self.head_dim >= 4 and self.num_heads * self.head_dim % 4 == 0
        self.require(fits, "head_dim", "at least 4, and a multiple of 4 with num_heads")
        self.require(0 <= self.class_dropout < 1, "class_dropout", "in [0,1)")
        self.require(self.variance_weight >= 0, "variance_weight", "at least 0")
        self.require(self.eval_pictures >= 0, "eval_pictures", "at least 0")
        self.require(not self.evaluates or self.eval_pictures > 0, "eval_pictures", "at least 1 to evaluate")
        self.require_in((2, TIMESTEPS), "eval_num_inference_steps")
        guided = self.eval_guidance_scale > 1
        self.require(not guided or self.class_dropout > 0, "class_dropout", "above 0 with eval_guidance_scale above 1")
        self.require(self.pool_dir != "", "pool_dir", "the name of a folder, or left out")
        if self.cuda_graphs:
            alone = self.gradient_accumulation_steps == 1
            self.require(alone, "gradient_accumulation_steps", "1 with cuda_graphs, whose gradients cannot add up")
            self.require(not self.fully_shard, "fully_shard", "false with cuda_graphs")


class ClassToImageTrainer(Trainer[ClassToImageConfig]):
    """Trains a DiT and exports a plain `DiTPipeline` folder."""

    config_class: ClassVar[type[TrainingConfig]] = ClassToImageConfig

    def build(self) -> Mapping[str, nn.Module]:
        """Build a DiT with random weights; also render the stills, or read them."""
        args = self.args
        if args.cuda_graphs and (self.device.type != "cuda" or self.accelerator.num_processes > 1):
            raise UserError("cuda_graphs needs one GPU and one process here. Leave it out.")
        self.transformer = new_dit(args)
        self.pipe = make_pipeline(self.transformer, args.bodies)
        self.pipe.vae.to(self.device)
        self.denoiser = DiTDenoiser(self.pipe)
        self.bars = self.pipe.scheduler.alphas_cumprod.to(self.device)
        folder = None if args.pool_dir is None else Path(args.pool_dir).expanduser()
        self.latents, self.classes = pool_of(folder, args.pool_pictures, args.size, self.device, args.bodies)
        self.predict: Callable[..., Tensor] = self._predict
        if args.cuda_graphs:
            self.predict = GraphedCall(self._predict, {"transformer": self.transformer})
        return {"transformer": self.transformer}

    def training_step(self) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return the loss of one batch; metrics: `noise_loss`, `variance_loss`, and noise loss by noise level."""
        args, batch, place = self.args, self.args.per_device_train_batch_size, self.device
        rows = torch.randint(len(self.latents), (batch,), generator=self.generator, device=place)
        x0, classes = self.latents[rows].float(), self.classes[rows]
        dropped = torch.rand(batch, generator=self.generator, device=place) < args.class_dropout
        classes = torch.where(dropped, CLASSES, classes)
        timestep = torch.randint(len(self.bars), (batch,), generator=self.generator, device=place)
        noise = torch.randn(x0.shape, generator=self.generator, device=place)
        x = self.pipe.scheduler.add_noise(x0, noise, timestep)
        said = self.predict(x, timestep, classes).float()
        error = (said[:, :3] - noise).square().mean(dim=(1, 2, 3))
        late = (timestep >= len(self.bars) // 2).float()
        metrics: dict[str, float | Tensor] = {
            "noise_loss": error.detach().mean(),
            "loss_noisy": (error.detach() * late).sum() / late.sum().clamp_min(1),
            "loss_clean": (error.detach() * (1 - late)).sum() / (1 - late).sum().clamp_min(1),
        }
        loss = error.mean()
        if args.variance_weight:
            bound = variance_bound(noise, said[:, :3], said[:, 3:], timestep, self.bars, x).mean()
            metrics["variance_loss"] = bound.detach()
            loss = loss + args.variance_weight * bound
        return loss, metrics

    def _predict(self, x: Tensor, timestep: Tensor, classes: Tensor) -> Tensor:
        return self.denoiser.forward(self.models["transformer"], x, timestep, {"prompt": classes})

    def evaluate(self) -> dict[str, float]:
        """Sample stills of evenly chosen classes; return the shares that the checker accepts; write a sheet."""
        args, count = self.args, self.args.eval_pictures
        if not count:
            return {}
        names = labels(args.bodies)
        prompts = [names[index * len(names) // count % len(names)] for index in range(count)]
        seeds = [seed_of(0, "eval", index) for index in range(count)]
        steps, guidance = args.eval_num_inference_steps, args.eval_guidance_scale
        with torch.compiler.set_stance("force_eager"), self.accelerator.autocast():
            pictures = sample_pictures(self.denoiser, prompts, seeds, steps=steps, guidance=guidance)
        if self.accelerator.is_main_process:
            contact_sheet(pictures[:36].float().cpu(), args.folder / "samples.png", columns=12)
        return judged(pictures, prompts)

    def export(self, folder: Path, weights: Weights) -> None:
        """Write the trained network as a pipeline folder, with its default settings in `postgen.json`."""
        pipe = make_pipeline(uncut(self.transformer, weights["transformer"]), self.args.bodies)
        pipe.save_pretrained(folder)
        args = self.args
        defaults = {
            "width": args.size,
            "height": args.size,
            "num_inference_steps": args.eval_num_inference_steps,
            "guidance_scale": args.eval_guidance_scale,
            "dtype": "float32",
        }
        (folder / "postgen.json").write_text(json.dumps(defaults, indent=2) + "\n", encoding="utf-8")


def new_dit(args: ClassToImageConfig) -> Any:
    """Return a DiT with random weights; modulation and last layer are zero (arXiv:2212.09748, section 3.2)."""
    from diffusers import DiTTransformer2DModel

    model: Any = DiTTransformer2DModel(
        num_attention_heads=args.num_heads,
        attention_head_dim=args.head_dim,
        in_channels=3,
        out_channels=6 if args.variance_weight else 3,
        num_layers=args.num_layers,
        sample_size=args.size,
        patch_size=args.patch,
        num_embeds_ada_norm=CLASSES,
    )
    for layer in (*(block.norm1.linear for block in model.transformer_blocks), model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def make_pipeline(transformer: Any, bodies: int = 2) -> Any:
    """Return a `DiTPipeline` in pixel space with DiT's betas; its labels are the classes of stills with `bodies`."""
    from diffusers import DDIMScheduler, DiTPipeline

    names = dict(enumerate(labels(bodies)))
    scheduler = DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    pipe: Any = DiTPipeline(transformer, pixel_autoencoder(), scheduler, names)
    pipe.register_to_config(id2label={str(number): name for number, name in names.items()})  # to save them
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def sample_pictures(
    denoiser: Any, prompts: list[str], seeds: list[int], *, steps: int, guidance: float = 1.0, batch: int = 256
) -> Tensor:
    """Sample pictures (N, 3, H, W) in [0, 1] with deterministic DDIM.

    Args:
        denoiser: denoiser of an image pipeline.
        prompts: one prompt per picture.
        seeds: one seed of the initial noise per picture.
        steps: number of sampling steps.
        guidance: scale of classifier-free guidance; up to 1 is no guidance.
        batch: number of pictures sampled together.
    """
    side = denoiser.model.config.sample_size * denoiser.space
    size = {"num_frames": 1, "height": side, "width": side}
    schedule = schedule_of(denoiser, steps, denoiser.latent_shape(**size))
    sampler = Sampler(denoiser, schedule, Sampling(guidance=guidance, size=size), device=denoiser.model.device)

    def told(numbers: Sequence[int]) -> Condition:
        found: Condition = denoiser.encode_prompt([prompts[number] for number in numbers], guidance=guidance > 1)
        return found

    samples = [Sample(index=n, prompt=n, initial=seed, step_seed=int, start=0) for n, seed in enumerate(seeds)]
    parts = [sampler.draw(samples[low : low + batch], told, batch).clean for low in range(0, len(samples), batch)]
    return torch.cat([denoiser.decode(part)[:, 0] for part in parts])


def judged(pictures_N3HW: Tensor, prompts: list[str]) -> dict[str, float]:
    """Return the shares of stills, repeated as clips, that the checker accepts, by attribute, and the mean score."""
    reports = check_batch(pictures_N3HW.float()[:, None].expand(-1, FRAMES, -1, -1, -1), prompts)
    names = ("count", "colour", "shape", "event", "all_right", "score")
    return {name: sum(float(getattr(each, name)) for each in reports) / len(reports) for name in names}
