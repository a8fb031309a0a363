"""Method `world_judge`: trains `postgen.rewards.world_judge` on pairs of a clip and a more corrupted version of it.

The loss is the Bradley-Terry loss of arXiv:2501.13918, -log sigmoid(better - worse), for the head to which a
corruption kind belongs and for the mean of both heads. The other head is trained to give both clips the same score.
Reconstructions and samples of a model are corrupted as a whole, like renders. In addition, a reconstruction counts as
visually worse than its render.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from postgen import world
from postgen.assets import EMBEDDED, model_folder
from postgen.families.loading import inspect_model
from postgen.rewards.world_judge import HEADS, WorldJudgeNet
from postgen.rewards.world_net import save_net
from postgen.training import Trainer, TrainingConfig, Weights
from postgen.world.scenes import FIRST_TRAINING_SEED, draw_scenes, specs_of

from .chances import KindChances
from .spoil import HEAD, LEVELS, ON_ANY_CLIP, Picked, Takes, corrupt, render_takes

_FRAMES = 17


@dataclass(kw_only=True)
class WorldJudgeConfig(TrainingConfig):
    """Settings of the method.

    Raises:
        UserError: a value outside its range, or `pipeline` is not a folder.
    """

    size: int = 96
    """Height and width of the clips in pixels."""

    pool_clips: int = 3072
    """Number of rendered scenes, each in seven versions (3.6 MB of 17 frames at 96 px), kept on the device."""

    course_clips: int = 512
    """Largest number of scenes rendered at four strengths for each kind of `postgen.judges.spoil.COURSES` but
    `teleport`."""

    kinds_per_step: int = 4
    """Number of corruption kinds among the pairs of a step."""

    hard_share: float = 0.5
    """Part of the draws in which the probability of a kind follows the share of its recent pairs ranked wrongly."""

    pipeline: str | None = None
    """Folder of a diffusers text-to-video pipeline of the world, or `embedded`, for reconstructions and samples; None
    uses renders only."""

    reconstructions: int = 1024
    """Number of clips that the autoencoder of the pipeline reconstructs."""

    samples: int = 256
    """Number of clips that the pipeline generates from captions."""

    sampling_steps: int = 20
    """Denoising steps of these clips."""

    width: int = 96
    """Width of the transformer, a multiple of 32."""

    layers: int = 3
    """Layers of the transformer."""

    other_head_weight: float = 0.3
    """Weight of the squared score difference between both clips in the head to which the kind does not belong."""

    eval_clips: int = 128
    """Number of unseen scenes for the pair accuracy, half of them with held-out combinations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.size >= 32, "size", "at least 32")
        self.require(self.width >= 32 and self.width % 32 == 0, "width", "a multiple of 32")
        for name in ("pool_clips", "eval_clips"):
            self.require(getattr(self, name) >= 2, name, "at least 2")
        self.require(self.course_clips >= 1, "course_clips", "at least 1")
        batch = self.per_device_train_batch_size
        self.require(
            1 <= self.kinds_per_step <= batch, "kinds_per_step", f"in 1..per_device_train_batch_size ({batch})"
        )
        self.require(0 <= self.hard_share <= 1, "hard_share", "in 0..1")
        for name in ("reconstructions", "samples"):
            self.require(getattr(self, name) >= 0, name, "at least 0")
        self.require(self.sampling_steps >= 1, "sampling_steps", "at least 1")
        self.require(self.other_head_weight >= 0, "other_head_weight", "at least 0")
        if self.pipeline is not None:
            self.require(model_folder(self.pipeline).is_dir(), "pipeline", f"a folder, or {EMBEDDED}")


class WorldJudgeTrainer(Trainer[WorldJudgeConfig]):
    """Trains the judge and exports the folder that the reward loads."""

    config_class: ClassVar[type[TrainingConfig]] = WorldJudgeConfig

    def build(self) -> Mapping[str, nn.Module]:
        """Build a judge with random weights; also render the scenes and generate the clips of the pipeline."""
        args = self.args
        first = FIRST_TRAINING_SEED + self.accelerator.process_index * 10_000_000
        # More collisions than the world's default, because three kinds need a collision.
        pool = draw_scenes(first, args.pool_clips, _FRAMES, bodies=(0.5, 0.4, 0.1), pair_share=0.3)
        self.takes = render_takes([scene.spec for scene in pool], args.size, self.device, args.course_clips)
        shown = {kind: self.takes.rows(kind) for kind in LEVELS}
        self.rows_of = {kind: rows for kind, rows in shown.items() if len(rows)}
        half = args.eval_clips // 2
        held = [*specs_of(0, half, _FRAMES), *specs_of(half, args.eval_clips - half, _FRAMES, "held_out")]
        self.unseen = render_takes(held, args.size, self.device)
        self.made, self.remade = self._of_pipeline()
        known = [*self.rows_of, *(["remade"] if self.remade is not None else [])]
        self.chances = KindChances(known, args.hard_share)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # rendering has ended: free its memory for other processes
        self.config: dict[str, Any] = {
            "video": {
                "channels": [32, 48, 64, 96],
                "width": args.width,
                "layers": args.layers,
                "grid": 6,
                "frames": _FRAMES,
            }
        }
        return {"judge": WorldJudgeNet(**self.config)}

    def _of_pipeline(self) -> tuple[Tensor | None, Tensor | None]:
        """Return samples of the pipeline, and reconstructions of the pool's first clips; uint8 like the renders."""
        args = self.args
        if args.pipeline is None:
            return None, None
        from diffusers import DiffusionPipeline

        # The guidance scale is the folder's default, not that of the pipeline class; size and length are the judge's.
        folder = model_folder(args.pipeline)
        self.guidance = inspect_model(folder).default("guidance_scale")
        pipe = DiffusionPipeline.from_pretrained(folder).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        prompts = [world.simple_caption(spec) for spec in self.takes.specs[: args.samples]]
        parts = [self._sampled(pipe, prompts[k : k + 16], k) for k in range(0, len(prompts), 16)]
        made = torch.cat(parts) if parts else None
        clean = self.takes.clean[: args.reconstructions]
        remade = [_reconstructed(pipe.vae, part) for part in clean.split(16)]
        return made, torch.cat(remade) if remade else None

    def _sampled(self, pipe: Any, prompts: list[str], first: int) -> Tensor:
        seeds = [torch.Generator().manual_seed(first + k) for k in range(len(prompts))]
        frames = pipe(
            prompts,
            height=self.args.size,
            width=self.args.size,
            num_frames=_FRAMES,
            num_inference_steps=self.args.sampling_steps,
            guidance_scale=self.guidance,
            generator=seeds,
            output_type="pt",
        ).frames
        clips: Tensor = (torch.as_tensor(frames).float() * 255).round().to(self.device, torch.uint8)
        return clips

    def training_step(self) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return the Bradley-Terry loss of a batch of pairs of several kinds; metric: share of correct pairs."""
        args = self.args
        kinds = self.chances.draw(args.kinds_per_step)
        shares = [len(part) for part in torch.arange(args.per_device_train_batch_size).tensor_split(len(kinds))]
        pairs = [
            self._remade_pair(count) if kind == "remade" else self._pair(kind, count)
            for kind, count in zip(kinds, shares, strict=True)
        ]
        heads = [HEADS.index(HEAD.get(kind, "visual")) for kind in kinds]
        head = torch.tensor(heads).repeat_interleave(torch.tensor(shares)).to(self.device)
        better, worse = (torch.cat(side) for side in zip(*pairs, strict=True))
        with self.accelerator.autocast():
            scores = self.models["judge"](torch.cat((better, worse)))
        gap = scores[: len(better)] - scores[len(better) :]
        own, other = (gap.gather(1, column[:, None])[:, 0] for column in (head, 1 - head))
        # The mean of both heads must rank the pair too, because a policy is trained on the mean.
        loss = -functional.logsigmoid(own).mean() - functional.logsigmoid(gap.mean(1)).mean()
        loss = loss + args.other_head_weight * other.square().mean()
        # The terms above depend on differences only; this term keeps the scores near zero.
        loss = loss + 1e-3 * scores.square().mean()
        # "Wrong" is defined as in the evaluation: by the mean of both heads, ties included.
        for kind, wrong in zip(kinds, (gap.detach().mean(1) <= 0).float().cpu().split(shares), strict=True):
            self.chances.note(kind, float(wrong.mean()))
        return loss, {"right": (own > 0).float().mean()}

    def state_dict(self) -> dict[str, Any]:
        """Return how often the pairs of each kind were ranked wrongly; the next kinds are drawn with these errors."""
        return {"errors": dict(self.chances.errors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the errors of the kinds."""
        self.chances.load(state["errors"])

    def _pair(self, kind: str, count: int) -> tuple[Tensor, Tensor]:
        """Return the same clips at two levels of a kind."""
        picked = self._draw(kind, count)
        low = torch.randint(4, (count,), generator=self.generator, device=self.device)
        more = torch.randint(1, 5, (count,), generator=self.generator, device=self.device)
        high = (low + more).clamp_max(4)
        seed = random.getrandbits(60)
        generators = [torch.Generator(self.device).manual_seed(seed) for _ in range(2)]
        return corrupt(kind, low, picked, generators[0]), corrupt(kind, high, picked, generators[1])

    def _draw(self, kind: str, batch: int) -> Picked:
        """Draw scenes that show a kind, or (one time in three, if possible) clips of the pipeline."""
        extra = [clips for clips in (self.made, self.remade) if clips is not None]
        if extra and kind in ON_ANY_CLIP and random.random() < 1 / 3:
            clips = random.choice(extra)
            rows = torch.randint(len(clips), (batch,), generator=self.generator, device=self.device)
            return Picked.of(clips[rows].float() / 255)
        choice = self.rows_of[kind]
        rows = choice[torch.randint(len(choice), (batch,), generator=self.generator, device=self.device)]
        return self.takes.pick(rows)

    def _remade_pair(self, count: int) -> tuple[Tensor, Tensor]:
        assert self.remade is not None
        rows = torch.randint(len(self.remade), (count,), generator=self.generator, device=self.device)
        return self.takes.clean[rows].float() / 255, self.remade[rows].float() / 255

    def evaluate(self) -> dict[str, float]:
        """Return the accuracy on pairs of unseen clips, clean against level 2, by the mean of both heads."""
        accuracy = pair_accuracy(lambda clips: self._scores(clips).mean(1), self.unseen, level=2)
        named = {f"pairs_{kind.replace(' ', '_')}": value for kind, value in accuracy.items()}
        return {**named, "pairs_min": min(value for value in accuracy.values() if not math.isnan(value))}

    def _scores(self, clips: Tensor) -> Tensor:
        judge: Any = self.unwrap("judge")
        return torch.cat([judge(part) for part in clips.split(32)])

    def export(self, folder: Path, weights: Weights) -> None:
        """Write float16 weights, and the configuration with mean and deviation of the scores of clean clips."""
        judge: Any = self.unwrap("judge")
        scores = torch.cat([self._scores(part.float() / 255) for part in self.unseen.clean.split(64)])
        # One deviation for both heads, so that their mean ranks clips as in training.
        spread = float(scores.var(0, correction=0).mean().sqrt().clamp_min(1e-3))
        known = {"size": self.args.size, "mean": scores.mean(0).tolist(), "std": spread}
        save_net(judge, {**self.config, **known}, folder)


def _reconstructed(vae: Any, clips_BT3HW: Tensor) -> Tensor:
    """Encode and decode clips with an autoencoder; return uint8."""
    x = (clips_BT3HW.float() / 127.5 - 1).transpose(1, 2).to(vae.dtype)
    with torch.no_grad():
        y: Tensor = vae.decode(vae.encode(x).latent_dist.mode()).sample
    return ((y.transpose(1, 2).float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def pair_accuracy(score: Any, takes: Takes, level: int, seed: int = 0) -> dict[str, float]:
    """Return the share of clean clips that score higher than their corrupted version, for each kind.

    Args:
        score: function from clips (B,T,3,H,W) in [0,1] to scores (B,).
        takes: output of `render_takes`.
        level: level of the corruption, 1 to 4.
        seed: seed of the random parts of the corruptions.
    """
    result = {}
    device = takes.clean.device
    clean = torch.cat([score(part.float() / 255) for part in takes.clean.split(32)])
    for kind in LEVELS:
        rows = takes.rows(kind)
        wins = []
        for part in rows.split(32) if len(rows) else ():
            picked = takes.pick(part)
            generator = torch.Generator(device).manual_seed(seed + int(part[0]))
            levels = torch.full((len(part),), level, device=device)
            spoilt = score(corrupt(kind, levels, picked, generator))
            wins.append(clean[part.to(clean.device)] > spoilt)
        result[kind] = float(torch.cat(wins).float().mean()) if wins else float("nan")
    return result
