"""Write the results of long rollouts: `results/worldweaver.json`, tables of the documentation, pictures over time.

    python -m benchmarks.worldweaver --report OUT --long OUT_LONG --cpu OUT/cpu/cpu.json --docs

OUT has the files of `benchmarks.worldweaver`, OUT_LONG those of 1,000 frames. The file of `--cpu` is from
`benchmarks.worldweaver_cpu`. Speed is read from `results/worldweaver_speed.json`. A missing file makes its gates fail.
The rows of the committed result are in `benchmarks/data/worldweaver_rows.tar.xz`; unpack it into OUT to add arms. Its
folder `long` is OUT_LONG.
The file of `--cpu` that was used is `benchmarks/data/worldweaver_cpu.json`.
Our arm is e (three groups in flight, depth in memory). This was fixed before any measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gates import RESULTS, Gate, gate, write_result
from benchmarks.worldweaver_pictures import EVERY, PLOTS, plots, sheet
from benchmarks.worldweaver_stats import Runs, bands, compared, interval, pooled, read_runs
from benchmarks.worldweaver_tables import COMPARED, OURS, PAGE, PARTS, filled
from postgen.errors import UserError
from postgen.files import replacing
from postgen.world.spec import FPS

CHUNK_AR = "a"
BASES = (CHUNK_AR, "sliding", "sliding_pixels", "d")
"""Arms with which other arms are compared."""
NUMBERS = (
    *("score", "contrast.sharpness.excess_size", "contrast.saturation.excess_size", "colour.delta_e.last"),
    *("permanence.after_absence", "permanence.always", "permanence.last", "background.psnr.first"),
    *("background.psnr.last", "revisit.all.psnr", "revisit.memory.gap_db", "motion.total", "motion.least"),
    *("motion.most", "seam", "depth.abs_rel.last", "depth.abs_rel.slope", "object_depth.last"),
    *("latent.rgb.slope", "latent.rgb.last", "latent.depth.slope", "latent.depth.last"),
)
"""Numbers that are reported for every arm."""
SHOWN = ("truth", CHUNK_AR, "d", OURS, f"{OURS}.depth", "j", "sliding", "sliding_pixels")
"""Rows of the contact sheet, if they exist; of several seeds the first."""
PLOTTED = (OURS, CHUNK_AR, "d", "j", "sliding", "sliding_pixels")
MOMENTS = 12
"""Number of pictures of a clip with 1,000 frames, about."""
THESIS = (("c", "c"), ("d", "d"), (OURS, OURS), ("d", CHUNK_AR), (OURS, CHUNK_AR))
"""Pairs of (arm whose depth is used, arm whose RGB is used)."""


def arms_of(found: Mapping[str, Runs]) -> dict[str, Any]:
    """Return the settings of each arm, and its numbers with intervals."""
    rows: dict[str, Any] = {}
    for name, runs in found.items():
        numbers = {number: row for number in NUMBERS if (row := pooled(runs, number)) is not None}
        told = runs.first["told"]
        sizes = [file["adapter_mb"] for file in runs.files.values()]
        rows[name] = {
            "seeds": list(runs.files),
            "worlds": len(runs.first["rows"]),
            "modalities": runs.first["modalities"],
            "guidance": runs.first["guidance"],
            "told": {key: value for key, value in told.items() if key not in ("height", "width")},
            "adapter_mb": None if None in sizes else round(max(sizes), 3),
            "numbers": numbers,
        }
    return rows


def against(found: Mapping[str, Runs]) -> dict[str, Any]:
    """Return the comparisons of arms: base -> arm -> number.

    Every arm is compared with chunk-by-chunk generation, the main arms with each of `BASES`, and the arms of `PARTS`
    with the arm from which they differ in one part.
    """
    pairs = [(CHUNK_AR, name) for name in found]
    pairs += [(base, name) for base in BASES for name in found if name in COMPARED]
    pairs += [(base, name) for base, names in PARTS.items() for name in names]
    rows: dict[str, Any] = {}
    for base, name in dict.fromkeys(pairs):
        if base in found and name in found and name != base:
            numbers = {number: compared(found[name], found[base], number) for number in NUMBERS}
            rows.setdefault(base, {})[name] = {number: row for number, row in numbers.items() if row is not None}
    return rows


def thesis(found: Mapping[str, Runs]) -> list[dict[str, Any]]:
    """Return whether latents of depth drift less than latents of RGB.

    For each pair of `THESIS`: the slope (per 100 latent frames) and the end of the squared error divided by the true
    variance, and the difference of depth and RGB, paired by scene.
    """
    rows = []
    for depth, rgb in THESIS:
        if depth not in found or rgb not in found:
            continue
        row: dict[str, Any] = {"depth_of": depth, "rgb_of": rgb}
        for what in ("slope", "last"):
            a, b = found[depth].values(f"latent.depth.{what}"), found[rgb].values(f"latent.rgb.{what}")
            row[what] = {"depth": interval(a), "rgb": interval(b), "difference": interval(a, b)}
        rows.append(row)
    return rows


def _number(found: Mapping[str, Any], *path: str) -> float | None:
    """Return a number from nested dictionaries; None: a key is missing."""
    value: Any = found
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def unexplained(low: float, high: float) -> float:
    """Return the distance of a slope's interval from 0: the part of the slope that noise does not explain.

    >>> unexplained(-1.0, 2.0), unexplained(0.5, 2.0)
    (0.0, 0.5)
    """
    return max(low, -high, 0.0)


def slopes(speed: Mapping[str, Any], cpu: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the unexplained slope of seconds and of bytes per chunk, the larger one of a GPU and a CPU.

    The GPU values are for Wan 1.3B at 480p with latent output, from `worldweaver_speed.json`, with the peak of the
    allocator. The CPU values are for the embedded model, with the memory of the process. None: one of them is missing.
    """
    chosen = {"model": "1.3b", "system": "worldweaver", "output": "latent"}
    # Rows without the key `output` are of runs that knew only latent output.
    rows = ({"output": "latent", **row} for row in speed.get("rows", ()))
    own: Mapping[str, Any] = next((row for row in rows if chosen.items() <= row.items()), {})
    found: dict[str, float | None] = {}
    for name in ("time_slope", "memory_slope"):
        both = [own.get(name), cpu.get(name)]
        found[name] = None if None in both else max(unexplained(each[0], each[2]) for each in both if each)
    return found


def gates_of(
    arms: Mapping[str, Any], bases: Mapping[str, Any], speed: Mapping[str, Any], cpu: Mapping[str, Any]
) -> list[Gate]:
    """Return the gates. The value of a gate that was not measured is None."""
    own, other = arms.get(OURS, {}), bases.get(CHUNK_AR, {}).get(OURS, {})
    numbers, back = own.get("numbers", {}), "permanence.after_absence"
    motion, flat = _number(numbers, "motion.total", "value"), slopes(speed, cpu)
    timed = [each["value"] for each in speed.get("gates", ()) if each["name"] == "time_per_latent_vs_skyreels"]
    return [
        gate("drift_vs_chunk_ar", _number(other, "score", "ratio", "high"), "<=", 0.8),
        gate("permanence_gain", _number(other, back, "difference", "value"), ">=", 0.1),
        # The target is "above 0", but gates have no operator ">".
        gate("permanence_gain_lower_end", _number(other, back, "difference", "low"), ">=", 1e-6),
        gate("motion_ratio", motion, ">=", 0.8),
        gate("motion_ratio", motion, "<=", 1.2),
        gate("revisit_gap_db", _number(numbers, "revisit.memory.gap_db", "value"), "<=", 3.0),
        gate("seam_ratio", _number(numbers, "seam", "value"), "<=", 1.1),
        gate("memory_slope", flat["memory_slope"], "==", 0),
        gate("time_slope", flat["time_slope"], "==", 0),
        gate("resume_identical", _number(cpu, "resume_identical"), "==", 1),
        gate("time_per_latent_vs_skyreels", timed[0] if timed else None, "<=", 1.1),
        gate("seconds_per_20s_cpu", _number(cpu, "seconds_per_20s"), "<=", 90.0),
        gate("adapter_mb", _number(own, "adapter_mb"), "<=", 6.0),
    ]


def result(
    found: Mapping[str, Runs], longer: Mapping[str, Runs], speed: Mapping[str, Any], cpu: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of the result file."""
    arms, bases, first = arms_of(found), against(found), next(iter(found.values())).first
    payload = {
        "ours": OURS,
        "settings": first["settings"],
        "measured_on": {"device": first["device"], "versions": first["versions"]},
        "arms": arms,
        "against": bases,
        "thesis": thesis(found),
        "gates": gates_of(arms, bases, speed, cpu),
    }
    if longer:
        settings = next(iter(longer.values())).first["settings"]
        payload["long"] = {"settings": settings, "arms": arms_of(longer), "against": against(longer)}
    return payload | ({"cpu": dict(cpu)} if cpu else {})


def long_picture(longer: Mapping[str, Runs], out: Path, target: Path) -> Path:
    """Draw the contact sheet of the clips with 1,000 frames, and return its path."""
    kept = out / "sheets"
    names = [
        name if (kept / f"{name}.png").is_file() else f"{name}.{next(iter(longer[name].files))}" for name in longer
    ]
    place = target / "worldweaver_long.webp"
    frames = next(iter(longer.values())).first["settings"]["frames"]
    sheet(out, names, place, frames, step=max(1, len(range(0, frames, EVERY)) // MOMENTS))
    return place


def pictures(found: Mapping[str, Runs], out: Path, target: Path) -> Iterator[Path]:
    """Draw the contact sheet and the plots over time, and yield their paths."""
    first = {
        name: name if list(runs.files) == ["0"] else f"{name}.{next(iter(runs.files))}" for name, runs in found.items()
    }
    shown = [f"{first.get(name.split('.')[0], name)}{name[len(name.split('.')[0]) :]}" for name in SHOWN]
    settings = next(iter(found.values())).first["settings"]
    place = target / "worldweaver_sheet.webp"
    sheet(out, shown[1:], place, settings["frames"])
    yield place
    lines = {name: {arm: bands(found[arm], name) for arm in PLOTTED if arm in found} for name in PLOTS}
    kept = {name: {arm: line for arm, line in each.items() if line} for name, each in lines.items()}
    latents = max(len(line) for each in kept.values() for line in each.values())
    place = target / "worldweaver_along.png"
    plots(kept, (settings["frames"] - 1) / max(1, latents - 1) / FPS, place)
    yield place


def _read(place: Path | None) -> dict[str, Any]:
    """Read a JSON file; return an empty dictionary if there is no file."""
    if place is None or not place.is_file():
        return {}
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Write the result file, and optionally tables and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("out/worldweaver"), help="folder of the arms")
    parser.add_argument("--long", type=Path, help="folder of the arms with 1,000 frames")
    parser.add_argument("--cpu", type=Path, help="file of benchmarks.worldweaver_cpu, OUT/cpu.json")
    parser.add_argument("--speed", type=Path, default=RESULTS / "worldweaver_speed.json", help="file of speeds")
    parser.add_argument("-o", "--output", default="worldweaver", help="name or path of the result file")
    parser.add_argument("--docs", action="store_true", help=f"write the tables into {PAGE.name}")
    parser.add_argument("--images", type=Path, help="folder for the pictures, for example docs/images")
    options = parser.parse_args(argv)
    try:
        found, longer = read_runs(options.out), read_runs(options.long) if options.long else {}
        payload = result(found, longer, _read(options.speed), _read(options.cpu))
        print(write_result(options.output, payload))
        if options.docs:
            text = filled(PAGE.read_text(encoding="utf-8"), payload)
            with replacing(PAGE) as part:
                part.write_text(text, encoding="utf-8")
        for place in pictures(found, options.out, options.images) if options.images and found else ():
            print(place)
        if options.images and longer:
            print(long_picture(longer, options.long, options.images))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for row in payload["gates"]:
        print(f"{'ok  ' if row['ok'] else 'MISS'} {row['name']}: {row['value']} {row['op']} {row['target']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
