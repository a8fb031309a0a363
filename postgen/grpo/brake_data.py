"""Clips of `data_beta` and `eval_fm_loss`: rendered scenes, videos of the user, or samples of the base model.

The clips of a run are encoded before its first update, each file of latents by one process, and kept in the folder
`data` of the run. Every process then holds all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from postgen.errors import UserError, shown
from postgen.families import Denoiser
from postgen.rewards.world import scenes
from postgen.sampling.conditions import Conditions, Row
from postgen.sampling.forward import noised, wanted_of
from postgen.sampling.sampler import Sample, Sampler
from postgen.sampling.seeds import normal, seed_of
from postgen.training.digests import digest, weights_digest
from postgen.training.latent_files import LatentFiles, wait_until
from postgen.training.prompts import Prompts
from postgen.training.transfer import to_device
from postgen.training.video_rows import read_clip, video_path
from postgen.world import Spec, read, render

from .brakes import MADE

_LEVELS = 4
"""Noise levels at which an evaluation measures each held-out clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRows:
    """The checked rows of clips, before any clip is made."""

    kind: str
    """"world", "samples" or "videos"."""
    rows: list[Row]
    """One row for each clip."""
    specs: list[Spec]
    """The scene of each row; empty unless `kind` is "world"."""
    name: str
    """Name of the source in messages."""
    setting: str
    """Name of the setting that chose the source."""

    @classmethod
    def of(cls, source: str | None, prompts: Prompts, count: int, setting: str) -> ClipRows:
        """Return the rows of a source.

        Args:
            source: a value of `BrakesConfig.data_source`.
            prompts: the prompts of "world" and "samples".
            count: largest number of clips.
            setting: name of the setting in messages.

        Raises:
            UserError: the prompts do not describe scenes, the data set cannot be read, or a row has no video or an
                image.
        """
        if source == "samples":
            rows = [prompts.rows[number % len(prompts)] for number in range(count)]
            return cls(kind="samples", rows=rows, specs=[], name=prompts.name, setting=setting)
        if pictured := [number for number, row in enumerate(prompts.rows, 1) if row.get("image") is not None]:
            raise UserError(
                f"{setting}: row {pictured[0]} of {prompts.name} has an image, and only {setting} samples supports"
                " first frames"
            )
        if source in MADE or source is None:
            rows = prompts.rows[:count]
            specs = [_scene(row, f"row {number} of {prompts.name}", setting) for number, row in enumerate(rows, 1)]
            return cls(kind="world", rows=rows, specs=specs, name=prompts.name, setting=setting)
        rows = Prompts(source, setting, seed=0, shuffle=False).rows[:count]
        for number, row in enumerate(rows, 1):
            video_path(row, f"row {number} of {setting}")
        return cls(kind="videos", rows=rows, specs=[], name=setting, setting=setting)

    def check(self, denoiser: Denoiser, size: dict[str, int]) -> None:
        """Check that the model can encode clips of this size.

        Raises:
            UserError: the denoiser has no encoder, or scenes of the world are not square.
        """
        setting = self.setting
        if self.kind != "samples" and not denoiser.encodes_video:
            raise UserError(f"{setting}: the denoiser of this model cannot encode clips: set {setting} to samples")
        if self.kind == "world" and size["height"] != size["width"]:
            raise UserError(
                f"{setting}: scenes of the world are square, but the clips have {size['height']} x {size['width']}"
                f" pixels: make them square, or set {setting} to samples or to a data set of videos"
            )

    def read(self, numbers: Sequence[int], size: dict[str, int], device: torch.device) -> Tensor:
        """Render scenes, or read videos: n clips (n, F, 3, H, W) in [0, 1].

        Args:
            numbers: the n clips.
            size: `num_frames`, `height` and `width`.
            device: device of the clips.

        Raises:
            UserError: a video cannot be read or is too short.
        """
        count, height, width = size["num_frames"], size["height"], size["width"]
        if self.kind == "world":
            specs = [self.specs[number] for number in numbers]
            return render(specs, num_frames=count, size=height, geometry=False, device=device).rgb_BF3HW
        clips = [
            read_clip(self.rows[number]["video"], count, (height, width), f"row {number + 1} of {self.name}")
            for number in numbers
        ]
        return torch.stack(clips).to(device)


def _scene(row: Row, where: str, setting: str) -> Spec:
    """Return the scene of a row: its column `spec`, or all that its prompt says."""
    if row.get("spec") is not None:
        spec = scenes([row["prompt"]], [row["spec"]])[0]
        assert spec is not None
        return spec
    reading = read(row["prompt"])
    unread = [clause.why for clause in reading.clauses if clause.why] if reading is not None else ["no body"]
    if reading is None or unread:
        raise UserError(
            f"{setting}: {where} is {shown(row['prompt'])}, which does not describe a scene of the synthetic world"
            f" ({unread[0]}): set {setting} to samples, or to a data set of videos"
        )
    return reading.scene


@dataclass(frozen=True, kw_only=True, slots=True)
class Makers:
    """What makes latents from rows."""

    denoiser: Denoiser
    """Encodes clips."""
    size: dict[str, int]
    """`num_frames`, `height` and `width`."""
    sampler: Sampler
    """Draws samples of the model before training, deterministically."""
    batch: int
    """Number of clips in a file, which are made together."""
    encode_batch: int
    """Number of clips that are encoded together."""
    seed: int
    """Seed of the run."""
    device: torch.device
    """Device of the computations."""

    def said(self, clips: ClipRows, models: dict[str, Any], init_from: str | None) -> dict[str, Any]:
        """Return JSON values that identify everything that determines the latents.

        Args:
            clips: the rows.
            models: the trained modules, with the weights that `build` gave them.
            init_from: folder of other initial weights.
        """
        said: dict[str, Any] = {"kind": clips.kind, "clips": len(clips.rows), "batch": self.batch, "size": self.size}
        if clips.kind == "samples":
            told = [[row["prompt"], row.get("negative_prompt"), str(row.get("image"))] for row in clips.rows]
            weights = [weights_digest(model) for model in models.values()]
            said |= {"model": weights, "init_from": init_from, "texts": digest(told), "seed": self.seed}
            return said | {"guidance": self.sampler.how.guidance, "sigmas": self.sampler.schedule.sigmas.tolist()}
        pipe: Any = getattr(self.denoiser, "pipe", None)
        encoder = getattr(pipe, "vae", None)
        shown_in = [spec.to_dict() for spec in clips.specs]
        files = [[row["prompt"], row["video"]] for row in clips.rows if not shown_in]
        return said | {
            "encoder": None if encoder is None else weights_digest(encoder),
            "rows": digest([shown_in, files]),
        }

    def make(self, clips: ClipRows, numbers: Sequence[int], conditions: Conditions, stream: int) -> Tensor:
        """Return the latents (n, ...) of n clips.

        Args:
            clips: the rows.
            numbers: the n clips.
            conditions: clip numbers -> conditions of their rows.
            stream: number of the source, so that two sources draw other samples for the same prompt.

        Raises:
            UserError: a video cannot be read, or latents are not finite.
        """
        if clips.kind == "samples":
            samples = [
                Sample(
                    index=number,
                    prompt=number,
                    initial=seed_of(self.seed, "data", 2, stream, number),
                    step_seed=int,
                    start=0,
                )
                for number in numbers
            ]
            latents = self.sampler.draw(samples, conditions, self.batch).clean
        else:
            parts = [numbers[low : low + self.encode_batch] for low in range(0, len(numbers), self.encode_batch)]
            latents = torch.cat(
                [self.denoiser.encode_video(clips.read(part, self.size, self.device)) for part in parts]
            )
        for number, row in zip(numbers, latents, strict=True):
            if not bool(row.isfinite().all()):
                raise UserError(f"the latents of clip {number + 1} of {clips.name} ({clips.kind}) are not finite")
        return latents


def kept_latents(
    folder: Path,
    count: int,
    said: dict[str, Any],
    batch: int,
    make: Callable[[Sequence[int]], Tensor],
    *,
    rank: int,
    processes: int,
    equal_calls: bool,
) -> Tensor:
    """Make the missing latents of a folder together with the other processes, and return all, (count, ...).

    Args:
        folder: the folder.
        count: number of clips.
        said: see `LatentFiles`.
        batch: number of clips in a file.
        make: clip numbers -> latents.
        rank: rank of this process.
        processes: number of processes.
        equal_calls: whether all processes must call `make` equally often, because the network is sharded.

    Raises:
        UserError: the folder holds latents of another run, or a file is damaged.
    """
    files = LatentFiles(folder, count, batch, said)
    files.check()
    missing: list[int] = gather_object([files.missing()])[0]
    own = missing[rank::processes]
    for chunk in own:
        files.write(chunk, make(files.items(chunk)))
    if equal_calls and len(own) < -(-len(missing) // processes):
        make(files.items(missing[-1]))
    wait_until(lambda: not files.missing())
    return files.read()


class ClipPool:
    """Clips as latents, with the flow-matching loss of a denoiser on them.

    Args:
        rows: N rows.
        latents: (N, ...) clean latents on the CPU.
        sampler: predicts without guidance, at the noise levels of its schedule.
        conditions: clip numbers -> conditions of their rows.
    """

    def __init__(self, rows: Sequence[Row], latents: Tensor, sampler: Sampler, conditions: Conditions) -> None:
        self.rows, self.latents, self.sampler, self.conditions = rows, latents, sampler, conditions

    def __len__(self) -> int:
        return len(self.rows)

    def drawn(self, seeds: Sequence[int]) -> Tensor:
        """Return the (B,) losses of random clips at random noise levels; each depends on its own seed only."""
        clips = [seed % len(self) for seed in seeds]
        steps = [seed // len(self) % self.sampler.schedule.steps for seed in seeds]
        return self.errors(clips, steps, seeds)

    def errors(self, clips: Sequence[int], steps: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """Return the (B,) mean square errors of the prediction, without guidance, for noised clips.

        Args:
            clips: B clip numbers.
            steps: B step indices into the schedule, whose noise levels are used.
            seeds: B seeds of the noise.
        """
        sampler, schedule = self.sampler, self.sampler.schedule
        clean = to_device(self.latents[list(clips)], sampler.device)
        noise = normal(clean.shape[1:], seeds, sampler.device)
        index = torch.tensor(steps, device=sampler.device)
        levels = schedule.levels(index, index + 1)
        prediction = sampler.predict(noised(clean, noise, levels), index, self.conditions(clips))
        wanted = wanted_of(clean, noise, levels, schedule.prediction_type)
        return (prediction - wanted).square().flatten(1).mean(1)

    def mean_error(self, seed: int, batch: int, rank: int, processes: int) -> float:
        """Return the mean loss of all clips, each at some noise levels, which are the same in every call.

        Every process must call this; all make the same number of passes.

        Args:
            seed: seed of the run.
            batch: number of rows in a pass.
            rank: rank of this process.
            processes: number of processes.
        """
        total, steps = len(self) * _LEVELS, self.sampler.schedule.steps
        each = -(-total // processes)
        own = [(rank * each + place) % total for place in range(each)]
        found: dict[int, float] = {}
        for low in range(0, each, batch):
            places = own[low : low + batch]
            seeds = [seed_of(seed, "data", 1, place) for place in places]
            # One level from each of `_LEVELS` equal parts of the schedule.
            pairs = zip(places, seeds, strict=True)
            levels = [(place % _LEVELS * steps + chance % steps) // _LEVELS for place, chance in pairs]
            errors = self.errors([place // _LEVELS for place in places], levels, seeds)
            found |= zip(places, errors.tolist(), strict=True)
        for part in gather_object([found]):
            found |= part
        return float(torch.tensor([found[place] for place in range(total)], dtype=torch.float64).mean())
