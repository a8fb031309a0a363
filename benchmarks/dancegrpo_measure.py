"""Measure the checkpoints of one run, or the base model, in its own process, for `python -m benchmarks.dancegrpo`.

OUT/measured/ARM.SEED.json has the measures of every clip at every kept checkpoint (`benchmarks.dancegrpo_clips`), the
means of the training log in eighths of the run, and the chosen checkpoint. An interrupted command continues. The rule
that chooses was fixed before the runs: among the checkpoints whose motion on the validation prompts is 0.9 to 1.1
times that of the base model (the base model is one of them), the one with the highest mean score of the exact judge on
these prompts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.arm_runs import run_job, use_fast_matmul
from benchmarks.dancegrpo_arms import ARMS, OUT, Run
from benchmarks.dancegrpo_clips import Bench, Rows, Sizes
from benchmarks.dancegrpo_job import RAW, head_of
from benchmarks.embedded_sheets import bytes_of, sheet
from benchmarks.gates import device
from postgen.assets import embedded_model
from postgen.errors import UserError
from postgen.files import replacing
from postgen.info import versions
from postgen.training.run_curves import read_metrics

PROTOCOL = 2
"""Number of this way of measuring. Results of another number cannot be compared."""
BAND = (0.9, 1.1)
"""Motion ratios of the checkpoints that may be chosen."""
BASE = "base"
SHARES = (0.25, 0.5, 0.75)
"""Shares of the way from the base model to the tuned model, for arms that are parted."""
LEAST_MOTION = 1e-4
"""Smallest motion of a clip in a logarithm."""
SHOWN, FRAMES_SHOWN = 6, 9
"""Prompts of a contact sheet, and frames of a clip."""
PARTS = 8
"""Number of parts of a run whose means of the training log are kept."""


def settings_of(sizes: Sizes) -> dict[str, Any]:
    """Return the settings that must be equal for all files of a report: protocol, sizes, model and judges."""
    places = [
        embedded_model() / "transformer",
        *(embedded_model().parent / f"world-{name}" for name in ("judge", "clip")),
    ]
    digests = {place.name: _digest(sorted(place.glob("*.safetensors"))) for place in places}
    return {"protocol": PROTOCOL, "sizes": asdict(sizes), "weights": digests}


def _digest(files: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def read_file(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file of measurements, or a new one if it does not exist.

    Raises:
        UserError: the file is damaged, or has other settings.
    """
    if not path.is_file():
        return {"complete": False, "settings": dict(settings), "points": {}}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: delete it and measure again") from error
    if found["settings"] != settings:
        raise UserError(f"{path} was measured with other settings ({found['settings']}): give another --out")
    return found


def write_file(path: Path, found: Mapping[str, Any]) -> None:
    """Write a file of measurements; it is never incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps(found, separators=(", ", ": "), allow_nan=False) + "\n", encoding="utf-8")


def motion_ratio(rows: Sequence[float | None], base: Sequence[float | None]) -> float:
    """Return the geometric mean of the ratios of motion of paired clips."""
    logs = [
        math.log(max(a, LEAST_MOTION) / max(b, LEAST_MOTION))
        for a, b in zip(rows, base, strict=True)
        if a is not None and b is not None
    ]
    return math.exp(statistics.fmean(logs))


def chosen(points: Mapping[str, Mapping[str, Any]], base: Mapping[str, Any]) -> str:
    """Return the name of the chosen checkpoint; `base` if no checkpoint in the band scores higher than the base model.

    Args:
        points: name of a checkpoint -> its measures.
        base: measures of the base model.
    """
    found = {BASE: statistics.fmean(base["valid"]["world"])}
    for name, point in points.items():
        if name.isdigit() and BAND[0] <= motion_ratio(point["valid"]["motion"], base["valid"]["motion"]) <= BAND[1]:
            found[name] = statistics.fmean(point["valid"]["world"])
    return max(found, key=lambda name: found[name])


def log_means(rows: Sequence[Mapping[str, Any]], parts: int = PARTS) -> dict[str, Any]:
    """Return the means of each number of a training log in equal parts of the run, and the largest ratio error."""
    last = max((row["step"] for row in rows), default=0)
    sums: dict[str, list[list[float]]] = {}
    errors: list[float | None] = []
    for row in rows:
        part = min(parts - 1, (max(row["step"], 1) - 1) * parts // max(last, 1))
        if "logp_diff/max" in row:
            errors.append(row["logp_diff/max"])
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                sums.setdefault(name, [[] for _ in range(parts)])[part].append(float(value))
    means = {
        name: [float(f"{statistics.fmean(part):.4g}") if part else None for part in lists]
        for name, lists in sums.items()
    }
    # The log has null for a number that JSON cannot represent (NaN or infinity).
    worst = None if not errors or None in errors else max(error for error in errors if error is not None)
    return {"steps": last, "means": means, "onpolicy_ratio_error": worst}


def measure_base(bench: Bench, out: Path, settings: Mapping[str, Any]) -> None:
    """Measure the base model and the exact clips, and keep the first clips for the contact sheets.

    The file is written after each part, and an interrupted call continues.
    """
    place = out / "measured" / f"{BASE}.json"
    found = read_file(place, settings)
    point: Rows = found["points"].setdefault(BASE, {})
    bench.use(None)
    for name in ("test", "valid", "many", "guided"):
        if name not in point:
            point[name], clips = bench.group(name)
            if name == "test":
                place.parent.mkdir(parents=True, exist_ok=True)
                with replacing(out / "measured" / "base-clips.safetensors") as part:
                    save_file({"clips": bytes_of(clips[:SHOWN])}, part)
            print(f"base model, {name}: {_said(point[name])}", flush=True)
            write_file(place, found)
    if "clean" not in point:
        point["clean"] = bench.flow_matching()
    if "best" not in point:
        point["best"] = bench.best()
        write_file(place, found)
    exact = {name: bench.exact(name) for name in ("test", "valid")}
    print(f"exact clips: {_said(exact['test'])}", flush=True)
    found |= {"complete": True, "exact": exact, "device": device(), "versions": versions()}
    write_file(place, found)


def _said(rows: Rows) -> str:
    if "right" not in rows:
        return f"diversity {statistics.fmean(rows['diversity']):.3f}"
    right = rows["right"]
    return f"{right.count('1')} of {len(right)} right, motion {statistics.fmean(rows['motion']):.4f}"


class Measuring:
    """Measurement of the checkpoints of a run.

    Args:
        bench: the model with its judges.
        run: the run.
        settings: settings of the measurement.

    Raises:
        UserError: the base model is not measured yet, or files have other settings.
    """

    def __init__(self, bench: Bench, run: Run, settings: Mapping[str, Any]) -> None:
        self.bench, self.run = bench, run
        base = read_file(run.out / "measured" / f"{BASE}.json", settings)
        if not base["complete"]:
            raise UserError(f"{run.out} has no measurement of the base model: measure base first")
        self.base = base["points"][BASE]
        self.found = read_file(run.measured, settings)
        self.found |= {"arm": run.arm, "seed": run.seed}

    def __call__(self) -> None:
        """Measure what is not measured yet, and write the file after each checkpoint."""
        files = sorted((self.run.folder / "snapshots").glob("[0-9]*.safetensors"))
        if not files or not self.run.done.is_file():
            raise UserError(f"{self.run.name} is not trained yet: train it first")
        for file in files:
            if file.stem not in self.found["points"]:
                self.point(file.stem, file, ("test", "valid", "many"))
        last = files[-1]
        if ARMS[self.run.arm].parted:
            self.extra(RAW, last.with_name(f"{RAW}.safetensors"))
            for share in SHARES:
                self.extra(f"mix{share:g}", last, share)
        self.found["chosen"] = chosen(self.found["points"], self.base)
        self.found["last"] = last.stem
        if (name := self.found["chosen"]) != BASE and "guided" not in self.found["points"][name]:
            self.bench.use(last.with_name(f"{name}.safetensors"))
            self.found["points"][name]["guided"], _ = self.bench.group("guided")
        self.found["log"] = log_means(read_metrics(self.run.folder / "metrics.jsonl"))
        self.found["training"] = json.loads(self.run.done.read_text(encoding="utf-8"))
        self.found |= {"complete": True, "device": device(), "versions": versions()}
        write_file(self.run.measured, self.found)

    def extra(self, name: str, file: Path, share: float = 1.0) -> None:
        """Measure further weights, which cannot be chosen."""
        if name not in self.found["points"]:
            self.point(name, file, ("test", "many"), share)

    def point(self, name: str, file: Path, groups: Sequence[str], share: float = 1.0) -> None:
        """Measure one set of weights."""
        self.bench.use(file, share)
        point: Rows = head_of(file)
        for group in groups:
            point[group], clips = self.bench.group(group)
            if group == "test":
                print(f"{self.run.name}, {name}: {_said(point[group])}", flush=True)
                self._sheet(name, clips)
        point["clean"] = self.bench.flow_matching()
        self.found["points"][name] = point
        write_file(self.run.measured, self.found)

    def _sheet(self, name: str, clips: Tensor) -> None:
        """Draw the first clips of base and tuned model, same prompts and noise; the last call counts."""
        theirs = load_file(self.run.out / "measured" / "base-clips.safetensors")["clips"]
        pairs, said = [], []
        for row, prompt in enumerate(self.bench.prompts["test"][: min(SHOWN, len(clips))]):
            pairs += [theirs[row], bytes_of(clips[row : row + 1])[0]]
            said += [f"base: {prompt}", self.run.name]
        place = self.run.out / "measured" / f"{self.run.name}.{name}.png"
        sheet(pairs, said, place, columns=1, shown=min(FRAMES_SHOWN, clips.shape[1]))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line names."""

    def work(options: argparse.Namespace) -> None:
        use_fast_matmul()
        sizes = Sizes.of(tiny=options.tiny)
        settings = settings_of(sizes)
        bench = Bench(sizes, options.device)
        if options.name == BASE:
            measure_base(bench, options.out, settings)
        else:
            Measuring(bench, Run.named(options.name, options.out, tiny=options.tiny), settings)()

    return run_job("benchmarks.dancegrpo_measure", __doc__, "name of the run, ARM.SEED, or base", OUT, work, argv)


if __name__ == "__main__":
    sys.exit(main())
