"""Clips of a model and their measures, clip by clip, for `python -m benchmarks.dancegrpo`.

All models draw the same prompts from the same noise, so each clip of a tuned model has its pair from the base model.
The groups of clips are

    test     the 256 held-out prompts of the recipes, guidance of the training
    valid    128 other prompts of two bodies, on which checkpoints are chosen
    many     some of the test prompts with several noises each, for the diversity within a prompt
    guided   the test prompts with the guidance scale and steps with which users run the model
    best     for the base model: of several clips of each test prompt, the one that the exact judge prefers
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.dancegrpo_arms import ROOT
from benchmarks.embedded_measures import floors
from benchmarks.embedded_sampling import Defaults, load
from postgen import world
from postgen.assets import embedded_model
from postgen.families import denoiser_for
from postgen.grpo.quality import clip_statistics
from postgen.metrics.video_measures import motion
from postgen.rewards import RewardRunner
from postgen.sampling.conditions import Embeddings
from postgen.sampling.sampler import Sample
from postgen.sampling.seeds import seed_of
from postgen.tensor_files import read_tensors
from postgen.training.samples import evaluation_sampler
from postgen.world.check import check_batch
from postgen.world.spec import BACKGROUNDS

JUDGES = {
    "judge": "world_judge",
    "visual": "world_judge_visual",
    "moves": "world_judge_motion",
    "clip": "world_clip",
    "quality": "brisque(least=32)",
}
"""Measure -> reward. `judge` and `clip` are held out, except in arms that train on them."""
MEASURES = ("right", "world", *JUDGES, "motion", "speed", "sharp", "bright", "floor")
"""`right`: everything of the prompt is shown (0 or 1). `world`: score of the exact judge. `motion`: mean absolute
difference of neighbouring frames. `speed`: pixels per frame of blocks. `sharp`: rms of the Laplacian. `bright`: mean
value. `floor`: number of the floor colour."""
GROUPS = ("test", "valid", "many", "guided")
SEED = 28_000
"""Seed of the noise of all clips; the validation clips and the exact clips have the next two."""
FIRST_VALID = 700_000
"""Seed of the first scene of the validation prompts; it is below the seeds of all trainings."""
LEVELS = (0.15, 0.35, 0.55, 0.75, 0.95)
"""Noise levels at which the flow-matching loss is measured."""
_JUDGED = 64
_BATCH = {"cpu": 8, "cuda": 256}
Rows = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes of the measurement, which must be equal for all files of a report."""

    size: int = 96
    frames: int = 17
    steps: int = 20
    test: int = 256
    valid: int = 128
    many: int = 32
    copies: int = 8
    clean: int = 64
    """Number of exact clips for the flow-matching loss."""
    guidance: float = 1.0
    guided: float = 3.0
    guided_steps: int = 20

    @classmethod
    def of(cls, *, tiny: bool) -> Sizes:
        """Return the sizes of the experiment, or those of `--tiny`."""
        default = Defaults.of(embedded_model())
        more = {"guided": default.guidance, "guided_steps": default.steps}
        if tiny:
            return cls(
                size=32, frames=5, steps=2, test=3, valid=2, many=2, copies=2, clean=2, guided=3, guided_steps=2
            )
        return cls(**more)  # type: ignore[arg-type]


def test_prompts(count: int) -> list[str]:
    """Return the first held-out prompts of the recipes."""
    lines = (ROOT / "recipes" / "prompts" / "two-bodies-held-out.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines[:count]]


def valid_prompts(count: int) -> list[str]:
    """Return prompts of two bodies that are neither training prompts nor held-out prompts of the recipes."""
    used: set[str] = set()
    for name in ("two-bodies", "two-bodies-held-out"):
        lines = (ROOT / "recipes" / "prompts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        used |= {json.loads(line)["prompt"] for line in lines}
    found: list[str] = []
    seed = FIRST_VALID
    while len(found) < count:
        prompt = world.simple_caption(world.sample(seed, num_bodies=2, num_frames=17, camera="static"))
        seed += 1
        if prompt not in used and world.read(prompt) is not None:
            used.add(prompt)
            found.append(prompt)
    return found


class Bench:
    """The embedded model, whose weights can be replaced, with the judges.

    Args:
        sizes: sizes of the measurement.
        device: device of all networks.
        workers: processes of the exact judge.
    """

    def __init__(self, sizes: Sizes, device: str, workers: int = 3) -> None:
        self.sizes, self.device = sizes, torch.device(device)
        self.workers = workers if device == "cuda" else 0
        self.pipe = load(embedded_model(), device)
        self.denoiser = denoiser_for(self.pipe)
        self.base = {name: value.clone() for name, value in self._weights().items()}
        self.clip_size = {"num_frames": sizes.frames, "height": sizes.size, "width": sizes.size}
        self.embeddings = Embeddings(
            self.denoiser,
            size=self.clip_size,
            guidance=True,
            negative_prompt="",
            keep_all=True,
            device=self.device,
        )
        self.judges = RewardRunner(list(JUDGES.values()), device=device)
        self.prompts = {"test": test_prompts(sizes.test), "valid": valid_prompts(sizes.valid)}
        self.prompts["many"] = self.prompts["test"][: sizes.many]
        self.prompts["guided"] = self.prompts["test"]

    def _weights(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": parameter
            for name, model in self.denoiser.transformers.items()
            for key, parameter in model.named_parameters()
        }

    @torch.no_grad()
    def use(self, snapshot: Path | None, share: float = 1.0) -> None:
        """Set the weights to base + share * (snapshot - base); None is the base model."""
        tuned = {} if snapshot is None else read_tensors(snapshot)
        for name, value in self._weights().items():
            base = self.base[name]
            value.copy_(base if snapshot is None else base.lerp(tuned[name].to(base), share))

    @torch.no_grad()
    def draw(self, group: str, first: int = 0) -> tuple[Tensor, list[str]]:
        """Draw the clean latents of a group; return them with the prompt of each. `first` is the first noise."""
        sizes, guided = self.sizes, group == "guided"
        prompts, copies = self.prompts[group], sizes.copies if group == "many" else 1
        sampler = evaluation_sampler(
            self.denoiser,
            sizes.guided_steps if guided else sizes.steps,
            sizes.guided if guided else sizes.guidance,
            self.clip_size,
            self.device,
        )
        # The guided clips have the noise of the test clips.
        seed = SEED + (group == "valid")
        samples = [
            Sample(
                index=number * copies + copy - first,
                prompt=number,
                initial=seed_of(seed, "eval", number, copy),
                step_seed=lambda step: step,
                start=0,
            )
            for number in range(len(prompts))
            for copy in range(first, first + copies)
        ]
        table = self.embeddings.table(lambda number: {"prompt": prompts[number]})
        with self._autocast():
            latents = sampler.draw(samples, table, _BATCH[self.device.type]).clean
        return latents, [prompts[sample.prompt] for sample in samples]

    def best(self) -> Rows:
        """Return, for each test prompt, the verdict on the best of `copies` clips by the score of the exact judge."""
        prompts, found = self.prompts["test"], []
        for copy in range(self.sizes.copies):
            clips = self.decode(self.draw("test", copy)[0])
            asked = [reading for prompt in prompts if (reading := world.read(prompt)) is not None]
            found.append(check_batch(clips, asked, workers=self.workers))
        best = [max(reports, key=lambda report: float(report.score)) for reports in zip(*found, strict=True)]
        right = "".join("01"[report.all_right] for report in best)
        return {"right": right, "world": rounded([float(report.score) for report in best])}

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents into clips (B,F,3,H,W) in [0,1]."""
        parts = [torch.stack(list(self.denoiser.decode(part))) for part in latents.split(_JUDGED)]
        return torch.cat(parts).clamp(0, 1)

    def group(self, name: str) -> tuple[Rows, Tensor]:
        """Draw and measure a group; return the measures and the first clips as they are."""
        latents, prompts = self.draw(name)
        clips = self.decode(latents)
        if name == "many":
            rows = within(latents, self.sizes.copies)
            return {**rows, "floor": floor_numbers(clips)}, clips[:0]
        return self.measured(clips, prompts), clips

    def measured(self, clips: Tensor, prompts: Sequence[str]) -> Rows:
        """Return the measures of clips, each rounded for its file."""
        asked = [reading for prompt in prompts if (reading := world.read(prompt)) is not None]
        assert len(asked) == len(prompts)
        rows: Rows = {name: [] for name in MEASURES}
        reports = check_batch(clips, asked, workers=self.workers)
        rows["right"] = "".join("01"[report.all_right] for report in reports)
        rows["world"] = [float(report.score) for report in reports]
        for low in range(0, len(clips), _JUDGED):
            part = clips[low : low + _JUDGED]
            scores = self.judges(prompts=list(prompts[low : low + _JUDGED]), completions=list(part)).values
            for name, column in zip(JUDGES, scores.T.tolist(), strict=True):
                rows[name] += column
            rows["speed"] += (motion(part) if part.shape[1] > 4 else torch.zeros(len(part))).tolist()
        for clip in clips:
            found = clip_statistics(clip)
            rows["motion"].append(found["motion"])
            rows["sharp"].append(found["sharpness"])
            rows["bright"].append(found["brightness"])
        rows["floor"] = floor_numbers(clips)
        return {name: values if name in ("right", "floor") else rounded(values) for name, values in rows.items()}

    def exact(self, group: str) -> Rows:
        """Return the measures of the exact renders of the scenes that a group's prompts name."""
        prompts = self.prompts[group]
        return self.measured(self.rendered(prompts), prompts)

    def rendered(self, prompts: Sequence[str]) -> Tensor:
        """Return the exact render of the scene that each prompt names, (B,F,3,H,W)."""
        specs = [spec for prompt in prompts if (spec := world.parse(prompt)) is not None]
        sizes = self.sizes
        parts = [
            world.render(
                specs[low : low + _JUDGED],
                num_frames=sizes.frames,
                size=sizes.size,
                geometry=False,
                device=self.device,
            ).rgb_BF3HW
            for low in range(0, len(specs), _JUDGED)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def flow_matching(self) -> Rows:
        """Return, for exact clips of validation prompts, the flow-matching loss and the rms of the prediction."""
        prompts = self.prompts["valid"][: self.sizes.clean]
        clean = self.denoiser.encode_video(self.rendered(prompts))
        seeds = [seed_of(SEED + 2, "eval", number, 0) for number in range(len(prompts))]
        noise = torch.stack(
            [torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        ).to(clean)
        condition = self.embeddings.table(lambda number: {"prompt": prompts[number]})(range(len(prompts)))
        loss, norm = torch.zeros(len(prompts)), torch.zeros(len(prompts))
        for level in LEVELS:
            sigma = torch.full((len(prompts),), level, device=self.device)
            with self._autocast():
                found = self.denoiser.predict((1 - level) * clean + level * noise, sigma, condition, 1.0)
            error = (found.float() - (noise - clean)).square().flatten(1).mean(1)
            loss += error.cpu() / len(LEVELS)
            norm += found.float().square().flatten(1).mean(1).sqrt().cpu() / len(LEVELS)
        return {"loss": rounded(loss.tolist()), "norm": rounded(norm.tolist())}


def within(latents: Tensor, copies: int) -> Rows:
    """Return, for each prompt, the mean rms distance between the latents of two of its samples."""
    groups = latents.flatten(1).float().unflatten(0, (-1, copies))
    total = torch.cdist(groups, groups).sum((1, 2)) / groups.shape[-1] ** 0.5
    return {"diversity": rounded((total / (copies * (copies - 1))).tolist())}


def floor_numbers(clips: Tensor) -> str:
    """Return the number of the floor colour of each clip, as a text of digits."""
    names = list(BACKGROUNDS)
    return "".join(str(names.index(name)) for part in clips.split(_JUDGED) for name in floors(part))


def rounded(values: Sequence[float]) -> list[float | None]:
    """Return numbers with four significant digits, which keeps files small; None for NaN and infinity."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values]
