"""Method `world_judge`: trains `postgen.rewards.world_judge` on pairs of a clip and a more spoilt version of it.

Bradley-Terry loss, as in arXiv:2501.13918: -log sigmoid(better - worse), of the head that a kind of spoiling is for
and of the mean of both; the other head is held to give both the same. Reconstructions and samples of a model are
spoilt as a whole as renders are, and a reconstruction also counts as worse to look at than its render.
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
        UserError: a value outside its range, or samples without a pipeline.
    """

    size: int = 96
    """Height and width of the clips in pixels."""

    pool_clips: int = 3072
    """Scenes that are rendered, each in seven versions (3.6 MB of 17 frames at 96 px), and kept on the device."""

    course_clips: int = 512
    """Most of them that each of `postgen.judges.spoil.COURSES` but leaps is rendered for, at four strengths."""

    kinds_per_step: int = 4
    """Kinds that the pairs of a step are of."""

    hard_share: float = 0.5
    """Part of the draws in which a kind's chance follows the share of its pairs that were ranked wrongly of late."""

    pipeline: str | None = None
    """Folder of a diffusers text-to-video pipeline of the world, or `embedded`, for reconstructions and samples; none
    takes none."""

    reconstructions: int = 1024
    """Clips that the pipeline's autoencoder reconstructs."""

    samples: int = 256
    """Clips that the pipeline makes from captions."""

    sampling_steps: int = 20
    """Denoising steps of these."""

    width: int = 96
    """Width of the transformer, a multiple of 32."""

    layers: int = 3
    """Layers of the transformer."""

    other_head_weight: float = 0.3
    """Weight of the squared difference that the head which a corruption is not for makes between both clips."""

    eval_clips: int = 128
    """Unseen scenes, half of them with held-out combinations, for the accuracy on pairs."""

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
    """Trains the judge; exports the folder that the reward reads."""

    config_class: ClassVar[type[TrainingConfig]] = WorldJudgeConfig

    def build(self) -> Mapping[str, nn.Module]:
        """A judge with random weights; also renders the scenes, and makes the pipeline's clips."""
        args = self.args
        first = FIRST_TRAINING_SEED + self.accelerator.process_index * 10_000_000
        # More collisions than the world draws by itself: three kinds are seen on them alone.
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
            torch.cuda.empty_cache()  # what rendering took for a while, other processes on the device can have
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
        """Samples of the pipeline, and reconstructions of the pool's first clips; uint8 as the renders."""
        args = self.args
        if args.pipeline is None:
            return None, None
        from diffusers import DiffusionPipeline

        # Guided as the folder says, not as its pipeline does by default; its size and length are those of the judge.
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
        """Bradley-Terry loss of one batch of pairs of some kinds; metric: share of pairs in the right order."""
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
        # The mean of both heads must rank the pair as well: it is what a policy is trained on.
        loss = -functional.logsigmoid(own).mean() - functional.logsigmoid(gap.mean(1)).mean()
        loss = loss + args.other_head_weight * other.square().mean()
        # Only differences count above; this keeps the scores near zero.
        loss = loss + 1e-3 * scores.square().mean()
        # Wrong as the evaluation counts it: by the mean of both heads, ties included.
        for kind, wrong in zip(kinds, (gap.detach().mean(1) <= 0).float().cpu().split(shares), strict=True):
            self.chances.note(kind, float(wrong.mean()))
        return loss, {"right": (own > 0).float().mean()}

    def state_dict(self) -> dict[str, Any]:
        """Return how often the kinds' pairs were ranked wrongly, which the next kinds are drawn by."""
        return {"errors": dict(self.chances.errors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.chances.load(state["errors"])

    def _pair(self, kind: str, count: int) -> tuple[Tensor, Tensor]:
        """The same clips at two levels of a kind."""
        picked = self._draw(kind, count)
        low = torch.randint(4, (count,), generator=self.generator, device=self.device)
        more = torch.randint(1, 5, (count,), generator=self.generator, device=self.device)
        high = (low + more).clamp_max(4)
        seed = random.getrandbits(60)
        generators = [torch.Generator(self.device).manual_seed(seed) for _ in range(2)]
        return corrupt(kind, low, picked, generators[0]), corrupt(kind, high, picked, generators[1])

    def _draw(self, kind: str, batch: int) -> Picked:
        """Scenes that show a kind; every third time clips of the pipeline, where there are some and the kind can."""
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
        """Accuracy on pairs of unseen clips, clean against the second level, by the mean of both heads."""
        accuracy = pair_accuracy(lambda clips: self._scores(clips).mean(1), self.unseen, level=2)
        named = {f"pairs_{kind.replace(' ', '_')}": value for kind, value in accuracy.items()}
        return {**named, "pairs_min": min(value for value in accuracy.values() if not math.isnan(value))}

    def _scores(self, clips: Tensor) -> Tensor:
        judge: Any = self.unwrap("judge")
        return torch.cat([judge(part) for part in clips.split(32)])

    def export(self, folder: Path, weights: Weights) -> None:
        """Half-precision weights and configuration with the mean and spread of the scores of clean clips."""
        judge: Any = self.unwrap("judge")
        scores = torch.cat([self._scores(part.float() / 255) for part in self.unseen.clean.split(64)])
        # One unit for both heads, so that their mean ranks clips as it did in training.
        spread = float(scores.var(0, correction=0).mean().sqrt().clamp_min(1e-3))
        known = {"size": self.args.size, "mean": scores.mean(0).tolist(), "std": spread}
        save_net(judge, {**self.config, **known}, folder)


def _reconstructed(vae: Any, clips_BT3HW: Tensor) -> Tensor:
    """Clips through an autoencoder and back, uint8."""
    x = (clips_BT3HW.float() / 127.5 - 1).transpose(1, 2).to(vae.dtype)
    with torch.no_grad():
        y: Tensor = vae.decode(vae.encode(x).latent_dist.mode()).sample
    return ((y.transpose(1, 2).float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def pair_accuracy(score: Any, takes: Takes, level: int, seed: int = 0) -> dict[str, float]:
    """Share of clean clips that score higher than their spoilt version, by kind.

    Args:
        score: clips (B,T,3,H,W) in [0,1] -> (B,).
        takes: from `render_takes`.
        level: 1 to 4.
        seed: of what is random in the corruptions.
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
