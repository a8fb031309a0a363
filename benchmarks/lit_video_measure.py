"""Generate, judge and compare the clips of a teacher and its students, for `python -m benchmarks.lit_video`.

Clip i has prompt i and seed `FIRST_SEED` + i for teacher and student. The teacher's clips are stored as bytes for the
comparison with students.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.embedded_groups import Group, build
from benchmarks.embedded_measures import judging
from benchmarks.embedded_sampling import Defaults, Job, generate
from benchmarks.embedded_sheets import bytes_of, sheet, verdict
from benchmarks.lowp_judge import psnr
from postgen.files import replacing
from postgen.metrics.bootstrap import bootstrap, ratio_of_means
from postgen.metrics.video_measures import motion
from postgen.training.digests import digest, weights_digest
from postgen.world.check import Report, check_batch

AT_ONCE = 32
"""Clips that are generated and judged together; small, because several processes share a GPU."""
FIRST_SEED = 30_000
"""Number of the first scene, and seed of its noise. It is below the seeds of the training, and other benchmarks of the
embedded model do not use these seeds."""
PICTURED, FRAMES_SHOWN = 3, 9
"""Number of clips on a sheet, and of frames per clip."""
MEASURES = ("right", "score", "motion", "psnr")


@dataclasses.dataclass(kw_only=True, slots=True)
class Measured:
    """Measurements of a model, one value per clip."""

    right: list[bool] = dataclasses.field(default_factory=list)
    """Whether the judge finds the clip fully right."""
    score: list[float] = dataclasses.field(default_factory=list)
    """Score of the judge."""
    motion: list[float] = dataclasses.field(default_factory=list)
    """Motion in pixels per frame."""
    psnr: list[float] = dataclasses.field(default_factory=list)
    """PSNR to the teacher's clip in decibels; empty for the teacher."""

    def add(self, clips: Tensor, reports: Sequence[Report], teacher: Tensor | None) -> None:
        """Measure clips, (B,F,3,H,W), and append the values."""
        self.right += [report.all_right for report in reports]
        self.score += [float(report.score) for report in reports]
        self.motion += motion(clips).tolist()
        if teacher is not None:
            self.psnr += psnr(clips, teacher).tolist()

    def join(self, other: Measured) -> None:
        """Append the values of other clips."""
        for name in MEASURES:
            getattr(self, name).extend(getattr(other, name))

    def as_json(self) -> dict[str, Any]:
        """Return the measurements as values for JSON."""
        return {
            "right": "".join("01"[value] for value in self.right),
            **{name: [round(value, 5) for value in getattr(self, name)] for name in MEASURES[1:]},
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Measured:
        """Create measurements from the values that `as_json` returned."""
        right = [letter == "1" for letter in row["right"]]
        return cls(right=right, **{name: list(row[name]) for name in MEASURES[1:]})


def group_of(name: str, count: int, how: Defaults) -> Group:
    """Return a group of `count` prompts; `name` is `one` or `two`, the number of bodies."""
    return build(name, count, FIRST_SEED, how)


class Kept:
    """Measurements of the batches of a group in a folder, so that an interrupted job continues with the next batch.

    Args:
        folder: the folder; a file for each batch.
        pipe: the measured pipeline.
        group: prompts and seeds.
        how: size, length, steps and guidance of the clips.
        autocast: as in `made`.
    """

    def __init__(self, folder: Path, pipe: Any, group: Group, how: Defaults, autocast: bool | None) -> None:
        said = [weights_digest(pipe.transformer), group.prompts, group.seeds, dataclasses.asdict(how), autocast]
        self.folder, self.said = folder, digest(said)
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, rows: slice) -> Measured | None:
        """Return the measurements of a batch, or None if there are none of this pipeline, prompts and settings."""
        path = self._file(rows)
        if not path.is_file():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        return Measured.from_json(found["measured"]) if found["said"] == self.said else None

    def write(self, rows: slice, measured: Measured) -> Measured:
        """Keep the measurements of a batch, and return them as `read` does, with rounded values."""
        row = measured.as_json()
        with replacing(self._file(rows)) as part:
            part.write_text(json.dumps({"said": self.said, "measured": row}), encoding="utf-8")
        return Measured.from_json(row)

    def _file(self, rows: slice) -> Path:
        return self.folder / f"{rows.start:05}.json"


def batches_of(group: Group) -> list[slice]:
    """Return the rows of each batch of a group."""
    return [slice(low, low + AT_ONCE) for low in range(0, len(group.prompts), AT_ONCE)]


def made(pipe: Any, group: Group, rows: slice, how: Defaults, *, autocast: bool | None = None) -> Tensor:
    """Generate some clips of a group, (B,F,3,H,W) in [0,1].

    Args:
        pipe: the pipeline.
        group: prompts and seeds.
        rows: the rows of the clips in the group.
        how: size, length, steps and guidance of the clips.
        autocast: whether to compute in bfloat16; None: on a GPU.
    """
    job = Job(
        prompts=group.prompts[rows],
        seeds=group.seeds[rows],
        autocast=pipe.device.type == "cuda" if autocast is None else autocast,
        **dataclasses.asdict(how),
    )
    return generate(pipe, job).clamp(0, 1)


def measure_teacher(pipe: Any, group: Group, how: Defaults, folder: Path, *, autocast: bool | None = None) -> Measured:
    """Measure a teacher and store its clips in a folder, as bytes; `autocast` as in `made`.

    Batches that an interrupted call has measured are not generated again.
    """
    found, workers = Measured(), judging(2, pipe.device.type)
    kept = Kept(folder, pipe, group, how, autocast)
    for rows in batches_of(group):
        part = kept.read(rows) if _file(folder, rows).is_file() else None
        if part is None:
            part, clips = Measured(), made(pipe, group, rows, how, autocast=autocast)
            reports = check_batch(clips, group.asked[rows], workers=workers if pipe.device.type == "cuda" else 0)
            part.add(clips, reports, None)
            with replacing(_file(folder, rows)) as file:
                save_file({"clips": bytes_of(clips)}, file, metadata={"said": json.dumps([*map(verdict, reports)])})
            part = kept.write(rows, part)
        found.join(part)
    return found


def measure_student(
    pipe: Any,
    group: Group,
    how: Defaults,
    folder: Path,
    picture: Path | None = None,
    name: str = "student",
    *,
    work: Path,
    autocast: bool | None = None,
) -> Measured:
    """Measure a student against the teacher's clips in a folder; draw the first clips of both as a sheet.

    Args:
        pipe: the pipeline with the student.
        group: prompts and seeds.
        how: size, length, steps and guidance of the clips.
        folder: folder with the teacher's clips.
        picture: file of the sheet; None draws none.
        name: name of the student on the sheet.
        work: folder for the measurements of finished batches, which an interrupted call need not repeat.
        autocast: as in `made`.
    """
    found, kept = Measured(), Kept(work, pipe, group, how, autocast)
    for rows in batches_of(group):
        drawn = None if rows.start else picture
        part = kept.read(rows) if drawn is None or drawn.is_file() else None
        if part is None:
            clips = made(pipe, group, rows, how, autocast=autocast)
            part = kept.write(rows, _against(clips, group, rows, load_file(_file(folder, rows))["clips"], drawn, name))
        found.join(part)
    return found


def _against(clips: Tensor, group: Group, rows: slice, theirs: Tensor, picture: Path | None, name: str) -> Measured:
    """Measure clips of a student against the teacher's, which are bytes, and draw the first ones on a sheet."""
    found, place = Measured(), clips.device
    reports = check_batch(clips, group.asked[rows], workers=judging(2, place.type) if place.type == "cuda" else 0)
    # PSNR of bytes on both sides, because the teacher's clips are stored as bytes.
    ours = bytes_of(clips)
    found.add(clips, reports, None)
    found.psnr += psnr(ours.to(place).float() / 255, theirs.to(place).float() / 255).tolist()
    if picture is not None:
        pairs, said = [], []
        for row in range(min(PICTURED, len(ours))):
            pairs += [theirs[row], ours[row]]
            said += [f"teacher: {group.prompts[row]}", f"{name} ({verdict(reports[row])})"]
        sheet(pairs, said, picture, columns=1, shown=FRAMES_SHOWN)
    return found


def compared(students: Sequence[Measured], teachers: Sequence[Measured]) -> dict[str, Any]:
    """Return the numbers of an arm against the teacher, paired by prompt; training seeds are averaged per prompt
    first.

    Args:
        students: measurements of the students, one for each training seed.
        teachers: measurements of the teacher, one for each student.
    """
    pairs = list(zip(students, teachers, strict=True))
    mine = torch.stack([_tensor(student.right) for student, _ in pairs]).mean(0)
    theirs = torch.stack([_tensor(teacher.right) for _, teacher in pairs]).mean(0)
    scores = torch.stack([_tensor(teacher.score) - _tensor(student.score) for student, teacher in pairs]).mean(0)
    moved = torch.stack([torch.stack([_tensor(s.motion), _tensor(t.motion)], 1) for s, t in pairs]).mean(0)
    ratio = dataclasses.asdict(bootstrap(moved, ratio_of_means))
    decibels = torch.stack([_tensor(student.psnr) for student, _ in pairs]).mean(0)
    return {
        "prompts": len(mine),
        "seeds": len(pairs),
        "teacher_right": float(theirs.mean()),
        "student_right": float(mine.mean()),
        "by_seed": [float(_tensor(student.right).mean()) for student, _ in pairs],
        "drop": dataclasses.asdict(bootstrap(theirs - mine)),
        "score_drop": dataclasses.asdict(bootstrap(scores)),
        # The ratio is not finite if the teacher's clips do not move.
        "motion_ratio": ratio if all(map(math.isfinite, ratio.values())) else None,
        "psnr": dataclasses.asdict(bootstrap(decibels)),
    }


def _tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def _file(folder: Path, rows: slice) -> Path:
    return folder / f"{rows.start:05}.safetensors"
