"""Measures of generated clips: shares of the judge with intervals, motion, floor colours, places of bodies.

The judge runs in its own thread and on its own CUDA stream, so that the device generates the next clips at the same
time.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.embedded_groups import Group
from benchmarks.embedded_sheets import bytes_of
from postgen import world
from postgen.metrics.bootstrap import bootstrap, ratio_of_means
from postgen.metrics.video_measures import motion
from postgen.world import Reading, Spec
from postgen.world.check import Report, check_batch
from postgen.world.check.segment import colour_share, smooth
from postgen.world.spec import BACKGROUNDS

MEASURES = ("count", "colour", "shape", "direction", "event", "camera", "steady", "all_right", "score")
_AT_ONCE = 32


def judging(workers: int | None, device: str) -> int:
    """Return the number of judge processes: `workers` if it is given, otherwise up to 8 on a GPU and 0 on a CPU."""
    if workers is not None:
        return workers
    return min(8, os.cpu_count() or 1) if device == "cuda" else 0


def shares(reports: Sequence[Report]) -> dict[str, float]:
    """Return the share of right clips for each attribute, among the clips to which it applies, and the mean score."""
    result = {}
    for name in MEASURES:
        values = [float(value) for report in reports if (value := getattr(report, name)) is not None]
        if values:
            result[name] = sum(values) / len(values)
    return result


def ground(clips: Tensor) -> Tensor:
    """Return a mask bool (B,F,H,W) of the pixels of clips (B,F,3,H,W) that are at least 4 px from body colours."""
    share, _, _ = colour_share(smooth(clips.flatten(0, 1)))
    body = functional.max_pool2d((share > 0.25).float()[:, None], 9, 1, 4)[:, 0]
    return (body == 0).unflatten(0, clips.shape[:2])


def floors(clips: Tensor) -> list[str]:
    """Return the floor name of each clip (B,F,3,H,W): the floor nearest in hue to the lower half of the last frame."""
    last = clips[:, -1:]
    half = last.shape[-2] // 2
    free = ground(last)[:, 0, half:]
    lower = last[:, 0, :, half:]
    # A body may cover the whole lower half. Then use all of its pixels.
    free = torch.where(free.any(dim=(1, 2), keepdim=True), free, torch.ones_like(free))[:, None]
    mean = (lower * free).sum(dim=(2, 3)) / free.sum(dim=(2, 3))
    known = mean.new_tensor(list(BACKGROUNDS.values()))
    mean, known = (x / x.sum(dim=1, keepdim=True) for x in (mean, known))
    names = list(BACKGROUNDS)
    return [names[index] for index in torch.cdist(mean, known).argmin(dim=1).tolist()]


def entropy(names: Iterable[str]) -> float:
    """Return the entropy of a sample of names in nats."""
    counts = Counter(names)
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values()) + 0.0


@dataclass(kw_only=True, slots=True)
class Seen:
    """Measures of some clips. Each list has one item per clip, or is empty if the measure was not taken.

    `clips` holds only the clips that are kept as bytes.
    """

    reports: list[Report]
    motion: list[float]
    floors: list[str]
    psnr_first: list[float]
    clips: list[Tensor]

    @classmethod
    def none(cls) -> Seen:
        """Return the measures of no clips: all lists are empty."""
        return cls(reports=[], motion=[], floors=[], psnr_first=[], clips=[])

    def add(self, other: Seen) -> None:
        """Append the measures of further clips."""
        for name in self.__slots__:
            getattr(self, name).extend(getattr(other, name))


def look(
    clips: Tensor,
    asked: Sequence[Spec | Reading],
    workers: int,
    *,
    moves: bool,
    images: Tensor | None = None,
    keep: int = 0,
) -> Seen:
    """Judge and measure clips.

    Args:
        clips: clips (B,F,3,H,W) in [0,1].
        asked: what the judge expects in each clip.
        workers: number of judge processes.
        moves: whether to measure the motion.
        images: first frames (B,3,H,W) that the model received; the PSNR of the generated first frames is measured.
        keep: number of clips, from the first, to keep as bytes.
    """
    clips = clips.clamp(0, 1)
    first = []
    if images is not None:
        error = (clips[:, 0] - images.to(clips.device)).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
        first = (-10 * error.log10()).tolist()
    return Seen(
        reports=check_batch(clips, asked, workers=workers),
        motion=[value for part in clips.split(_AT_ONCE) for value in motion(part).tolist()] if moves else [],
        floors=floors(clips),
        psnr_first=first,
        clips=list(bytes_of(clips[:keep])),
    )


class Watcher:
    """Measures clips in a thread while the caller generates the next ones. `workers` processes run the judge."""

    def __init__(self, device: str, workers: int) -> None:
        self.device, self.workers = device, workers
        self._thread = ThreadPoolExecutor(1, "watcher")
        self._stream = torch.cuda.Stream() if device == "cuda" else None

    def submit(
        self, group: Group, rows: slice, clips: Tensor, images: Tensor | None, keep: int
    ) -> Future[tuple[Seen, Seen]]:
        """Start to measure the clips of some rows of a group.

        Returns:
            A future of two results: the measures of the generated clips, and those of the true clips.
        """
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record()
            clips.record_stream(self._stream)
        return self._thread.submit(self._both, ready, group, rows, clips, images, keep)

    def _both(self, ready: Any, *what: Any) -> tuple[Seen, Seen]:
        if self._stream is None:
            return self._look(*what)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            return self._look(*what)

    @torch.no_grad()
    def _look(self, group: Group, rows: slice, clips: Tensor, images: Tensor | None, keep: int) -> tuple[Seen, Seen]:
        asked, truth = group.part(rows)
        moves = group.truth is not None
        given = None if images is None else images[rows]
        seen = look(clips, asked, self.workers, moves=moves, images=given, keep=keep)
        if truth is None:
            return seen, Seen.none()
        true = world.render(
            truth, num_frames=group.frames, size=group.size, geometry=False, device=self.device
        ).rgb_BF3HW
        return seen, look(true, truth, self.workers, moves=moves)

    def close(self) -> None:
        """Wait until all submitted clips are measured, and stop the thread."""
        self._thread.shutdown()


def summary(group: Group, seen: Seen, true: Seen) -> dict[str, Any]:
    """Return the row of a group for the result file."""
    right = [report.all_right for report in seen.reports]
    row: dict[str, Any] = {
        "size": group.size,
        "frames": group.frames,
        "prompts": len(right),
        "shares": shares(seen.reports),
        "intervals": _intervals(seen.reports),
        # The verdict of every clip, so that another run can be compared clip by clip.
        "right": "".join("01"[ok] for ok in right),
    }
    if true.reports:
        row["true_clips"] = shares(true.reports)
    if true.motion:
        found = bootstrap(torch.tensor([seen.motion, true.motion]).T, ratio_of_means)
        ratio = [found.value, found.low, found.high]
        # With few clips, a bootstrap draw may contain no moving clip, and the ratio is not finite.
        row["motion_ratio"] = ratio if all(map(math.isfinite, ratio)) else None
    if seen.psnr_first:
        row["psnr_of_first_frame"] = sum(seen.psnr_first) / len(seen.psnr_first)
    if group.name == "seeds":
        row["diversity"] = diversity(group, seen, true)
    elif group.labels:
        row["by_word"] = by_label(group, seen.reports)
    return row


def _intervals(reports: Sequence[Report]) -> dict[str, list[float]]:
    """Return the 95 % bootstrap interval over clips for each measure."""
    result = {}
    for name in MEASURES:
        values = [float(value) for report in reports if (value := getattr(report, name)) is not None]
        if len(values) > 1:
            found = bootstrap(torch.tensor(values))
            result[name] = [found.low, found.high]
    return result


def by_label(group: Group, reports: Sequence[Report]) -> dict[str, dict[str, float]]:
    """Return for each label the number of clips, of fully right clips, and of clips with the right camera move."""
    table: dict[str, dict[str, float]] = defaultdict(lambda: {"clips": 0, "right": 0})
    for labels, report in zip(group.labels, reports, strict=True):
        for label in labels:
            row = table[label]
            row["clips"] += 1
            row["right"] += report.all_right
            if report.camera is not None:
                row["camera"] = row.get("camera", 0) + report.camera
    return dict(sorted(table.items()))


def diversity(group: Group, seen: Seen, true: Seen) -> dict[str, float | None]:
    """Return the diversity over the seeds of a prompt, also relative to true scenes of the same prompts.

    The measures are the entropy of the floors in nats and the spread of the first place of the body.
    """
    rows: dict[str, list[int]] = defaultdict(list)
    for number, (prompt,) in enumerate(group.labels):
        rows[prompt].append(number)
    made, real = ([entropy(s.floors[i] for i in part) for part in rows.values()] for s in (seen, true))
    spread, usual = (_spread(s.reports, list(rows.values())) for s in (seen, true))
    return {
        "floor_entropy": sum(made) / len(made),
        "floor_entropy_of_data": sum(real) / len(real),
        "floors": sum(made) / sum(real) if sum(real) else None,
        "place_spread": spread,
        "place_spread_of_data": usual,
        "places": spread / usual if spread is not None and usual else None,
    }


def _spread(reports: Sequence[Report], prompts: Sequence[Sequence[int]]) -> float | None:
    """Return the RMS distance of the first body's first place from its mean over the seeds, in picture sizes."""
    squares = []
    for rows in prompts:
        tracks = [reports[i].bodies[0].track for i in rows if reports[i].bodies]
        places = [next((spot[:2] for spot in track if spot is not None), None) for track in tracks]
        found = torch.tensor([place for place in places if place is not None], dtype=torch.float64)
        if len(found) > 1:
            squares.append(float(found.var(dim=0).sum()))
    return math.sqrt(sum(squares) / len(squares)) if squares else None
