"""Method `world_clip`: trains the two encoders of `postgen.rewards.world_clip` on rendered scenes and their captions.

The loss is the contrastive loss of arXiv:2103.00020 (both directions, learned temperature). Scenes of a small world
repeat, so all captions of a batch with the meaning of a clip share its target. Every clip also has captions of edited
scenes, which differ from its own scene in one word.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from postgen import world
from postgen.rewards.frames import uniform_frames
from postgen.rewards.world_clip import WorldClipNet, save_world_clip
from postgen.training import Trainer, TrainingConfig, Weights
from postgen.training.tokenizers import tokenize, train_tokenizer
from postgen.world.scenes import FIRST_TRAINING_SEED, Scene, draw_scenes, render_in_batches
from postgen.world.spec import COLOURS, PAIR_EVENTS, SHAPES, Spec

GROUP = 32
"""Number of captions among which each evaluated clip must find its own."""
_FRAMES = 17
_SINGLE = ("moves left", "moves right", "moves closer", "moves away", "stays", "bounces", "falls")


@dataclass(kw_only=True)
class WorldClipConfig(TrainingConfig):
    """Settings of the method.

    Raises:
        UserError: a value outside its range.
    """

    size: int = 96
    """Height and width of the clips in pixels."""

    frames: int = 9
    """Frames of each clip of 17 frames that the video encoder receives."""

    pool_clips: int = 16384
    """Number of clips that are rendered once and kept on the device."""

    captions_per_clip: int = 4
    """Number of differently worded captions per clip."""

    edits_per_clip: int = 2
    """Number of captions per clip that describe a scene with one word changed."""

    width: int = 128
    """Width of both transformers, a multiple of 32."""

    video_layers: int = 4
    """Layers of the video transformer, which attends to the tokens of all frames."""

    text_layers: int = 3
    """Layers of the text encoder."""

    vocabulary: int = 640
    """Largest number of tokens in the tokenizer's vocabulary."""

    text_length: int = 48
    """Largest number of tokens of a caption."""

    eval_groups: int = 8
    """Number of groups of 32 clips in the retrieval evaluation; half of them show held-out combinations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.size >= 32, "size", "at least 32")
        self.require(1 <= self.frames <= _FRAMES, "frames", f"in 1..{_FRAMES}")
        self.require(self.width >= 32 and self.width % 32 == 0, "width", "a multiple of 32")
        self.require(self.pool_clips >= self.per_device_train_batch_size, "pool_clips", "at least one batch")
        self.require(self.captions_per_clip >= 1, "captions_per_clip", "at least 1")
        self.require(self.edits_per_clip >= 0, "edits_per_clip", "at least 0")
        self.require(self.vocabulary >= 300, "vocabulary", "at least 300")
        self.require(self.eval_groups >= 1, "eval_groups", "at least 1")


class WorldClipTrainer(Trainer[WorldClipConfig]):
    """Trains both encoders and exports the folder that the reward loads."""

    config_class: ClassVar[type[TrainingConfig]] = WorldClipConfig

    def build(self) -> Mapping[str, nn.Module]:
        """Build both encoders with random weights; also render the clips for training and evaluation."""
        args = self.args
        # The tokenizer is independent of the pool and sees as many captions as that of the embedded model.
        words = [text for seed in range(2000) for text in _wordings(world.sample(seed, split="all"), 4, seed)]
        self.tokenizer = train_tokenizer(words, args.vocabulary)
        first = FIRST_TRAINING_SEED + self.accelerator.process_index * 10_000_000
        scenes = draw_scenes(first, args.pool_clips, _FRAMES, captions=args.captions_per_clip)
        self.clips = self._pictures([scene.spec for scene in scenes])
        self.ids, self.meaning = self._texts(scenes)
        self.groups = evaluation_groups(args.eval_groups)
        self.group_clips = [self._pictures(group) for group in self.groups]
        self.config: dict[str, Any] = {
            "video": {
                "channels": [32, 64, 96, 128],
                "width": args.width,
                "layers": args.video_layers,
                "grid": 6,
                "frames": args.frames,
            },
            "text": {
                "vocabulary": len(self.tokenizer),
                "width": args.width,
                "layers": args.text_layers,
                "length": args.text_length,
            },
            "embedding": args.width,
        }
        return {"towers": WorldClipNet(**self.config)}

    def _pictures(self, specs: list[Spec]) -> Tensor:
        """Render clips (N,T,3,H,W) uint8 with the number of frames of the video encoder."""
        args = self.args
        parts = [
            torch.stack([uniform_frames(clip, args.frames) for clip in (rgb * 255).round().to(torch.uint8)])
            for rgb, _ in render_in_batches(specs, args.size, self.device, mask=False)
        ]
        return torch.cat(parts)

    def _texts(self, scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
        """Return token ids (N, captions + edits, L), and the index of each meaning (N, 1 + edits), own scene first."""
        args = self.args
        numbers: dict[str, int] = {}
        rows: list[str] = []
        meaning: list[list[int]] = []
        for scene in scenes:
            rng = random.Random(f"postgen-edit-{scene.captions[0]}-{len(rows)}")
            edits = [edited(scene.spec, rng) for _ in range(args.edits_per_clip)]
            texts = [*scene.captions, *(world.caption(edit, rng.randrange(10**6)) for edit in edits)]
            rows += texts
            meaning.append([numbers.setdefault(sense(spec), len(numbers)) for spec in (scene.spec, *edits)])
        ids = tokenize(self.tokenizer, rows, args.text_length).unflatten(0, (len(scenes), -1))
        return ids.to(self.device), torch.tensor(meaning, device=self.device)

    def training_step(self) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return the contrastive loss of one batch; metric: share of clips that rank their own meaning first."""
        args, batch = self.args, self.args.per_device_train_batch_size
        rows = torch.randint(len(self.clips), (batch,), generator=self.generator, device=self.device)
        which = torch.randint(args.captions_per_clip, (batch,), generator=self.generator, device=self.device)
        own = self.ids[rows, which]
        edits = self.ids[rows, args.captions_per_clip :].flatten(0, 1)
        texts = torch.cat((own, edits)).long()
        texts = texts[:, : int((texts != 0).sum(1).max())]
        with self.accelerator.autocast():
            videos, sentences, scale = self.models["towers"](self._augmented(self.clips[rows]), texts)
        meaning = self.meaning[rows]
        asked = torch.cat((meaning[:, 0], meaning[:, 1:].flatten()))
        same = meaning[:, :1] == asked
        logits = scale * videos @ sentences.T
        loss = _shared_target(logits, same) + _shared_target(logits[:, :batch].T, same[:, :batch].T)
        hit = same.gather(1, logits.argmax(1, keepdim=True)).float().mean()
        return 0.5 * loss, {"hit": hit, "scale": scale.detach()}

    def _augmented(self, clips_BT3HW: Tensor) -> Tensor:
        """Convert clips to floats in [0,1], with random brightness and a little noise, as in generated clips."""
        batch = len(clips_BT3HW)
        x = clips_BT3HW.float() / 255
        amount = torch.rand(2, batch, 1, 1, 1, 1, generator=self.generator, device=self.device)
        noise = torch.randn(x.shape, generator=self.generator, device=self.device)
        return (x * (0.9 + 0.2 * amount[0]) + 0.04 * amount[1] * noise).clamp(0, 1)

    def evaluate(self) -> dict[str, float]:
        """Return the share of unseen clips that find their caption among 32, for trained and held-out combinations."""
        net: Any = self.unwrap("towers")
        hits: dict[str, list[float]] = {}
        for group, clips in zip(self.groups, self.group_clips, strict=True):
            texts = tokenize(self.tokenizer, [world.simple_caption(spec) for spec in group], self.args.text_length)
            scores = net.embed_video(clips.float() / 255) @ net.embed_text(texts.long().to(self.device)).T
            right = scores.argmax(1) == torch.arange(len(group), device=self.device)
            name = "retrieval_held_out" if group[0].held_out else "retrieval"
            hits.setdefault(name, []).append(float(right.float().mean()))
        return {name: sum(values) / len(values) for name, values in hits.items()}

    def export(self, folder: Path, weights: Weights) -> None:
        """Write float16 weights, tokenizer and configuration."""
        towers: Any = self.unwrap("towers")
        save_world_clip(towers, self.tokenizer, {**self.config, "size": self.args.size}, folder)


def _shared_target(logits: Tensor, same: Tensor) -> Tensor:
    """Return the cross-entropy with a target that is uniform over all columns with the meaning of the row."""
    target = same.float() / same.sum(1, keepdim=True).clamp_min(1)
    return -(target * functional.log_softmax(logits.float(), dim=1)).sum(1).mean()


def _wordings(spec: Spec, count: int, seed: int) -> list[str]:
    return [world.simple_caption(spec), *(world.caption(spec, 1000 * seed + k) for k in range(1, count))]


def sense(spec: Spec) -> str:
    """Describe a scene independently of the order of bodies and the wording; equal texts share one target."""
    partners = {body.partner for body in spec.bodies if body.partner is not None}
    parts = []
    for index, body in enumerate(spec.bodies):
        if index not in partners:
            other = spec.bodies[body.partner] if body.partner is not None else None
            with_ = f" {other.colour} {other.shape}" if other is not None else ""
            parts.append(f"{body.colour} {body.shape} {body.event}{with_}")
    return f"{'; '.join(sorted(parts))}; {spec.camera}"


def edited(spec: Spec, rng: random.Random) -> Spec:
    """Change colour, shape or event of one body of a scene; the result is for captions only, not for rendering."""
    index = rng.randrange(len(spec.bodies))
    body = spec.bodies[index]
    partner = any(other.partner == index for other in spec.bodies)
    free = body.event not in PAIR_EVENTS and not partner and spec.camera == "static"
    what = rng.choice(("colour", "shape", "event") if free else ("colour", "shape"))
    known = {"colour": tuple(COLOURS), "shape": SHAPES, "event": _SINGLE}[what]
    value: Any = rng.choice([name for name in known if name != getattr(body, what)])
    changed = replace(body, **{what: value})
    return replace(spec, bodies=(*spec.bodies[:index], changed, *spec.bodies[index + 1 :]))


def evaluation_groups(count: int) -> list[list[Spec]]:
    """Return groups of 32 scenes of different meaning that training never sees; every second group is held out."""
    groups: list[list[Spec]] = []
    seed = 0
    for number in range(count):
        chosen: dict[str, Spec] = {}
        while len(chosen) < GROUP:
            spec = world.sample(seed, split="held_out" if number % 2 else "train")
            chosen.setdefault(sense(spec), spec)
            seed += 1
        groups.append(list(chosen.values()))
    return groups
