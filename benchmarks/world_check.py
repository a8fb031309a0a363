"""Accuracy of the judge of the synthetic world on true clips, corrupted clips, fake clips and clips judged by people.

    python -m benchmarks.world_check [--quick] [--device cuda] [--clips 630] [--generated FOLDER]
        [--generated-fresh FOLDER] [--generated-third FOLDER] [--generated-fourth FOLDER]
        [--generated-fifth FOLDER]

The command prints the tables and writes benchmarks/results/world_check.json. With --quick it only prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import world_corruptions as spoil
from benchmarks import world_eye
from benchmarks.gates import gate, write_result
from postgen import world
from postgen.assets import embedded_model
from postgen.world.check import Report, check_batch
from postgen.world.spec import CAMERAS, EVENTS, Spec

ATTRIBUTES = ("count", "colour", "shape", "direction", "event")
FRAMES = 17
#: First seed. The judge's thresholds were chosen on scenes with seeds below 10 000, never on these scenes.
FRESH = 100_000
#: By corruption: the attributes that must become wrong, those that must stay right, and the events it cannot change.
CORRUPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "shuffled": (("direction", "event"), ("count", "colour", "shape"), ("stays",)),
    "reversed": (("direction", "event"), ("count", "colour", "shape"), ("stays", "bounces", "passes behind")),
    "colour swapped": (("colour",), ("count", "shape", "direction", "event"), ()),
    "shape swapped": (("shape",), ("count", "colour", "direction", "event"), ()),
    "removed half-way": (("count",), ("colour", "shape"), ("passes behind",)),
    "duplicated": (("count",), ("colour", "shape", "direction", "event"), ("collides", "passes behind")),
    "frozen": (("direction", "event"), ("count", "colour", "shape"), ("stays",)),
    "teleported": (("event",), ("count", "colour", "shape"), ("collides", "passes behind")),
    "blurred to nothing": (("shape", "score"), (), ()),
}


class Maker:
    """Renderer of scenes in batches on one device."""

    def __init__(self, device: str, size: int = 96, supersample: int = 2) -> None:
        self.device, self.size, self.supersample = device, size, supersample

    def __call__(self, specs: Sequence[Spec], frames: int = FRAMES) -> Tensor:
        """Render the scenes as clips (B,F,3,H,W)."""
        pieces = [
            world.render(
                specs[low : low + 32],
                num_frames=frames,
                size=self.size,
                supersample=self.supersample,
                geometry=False,
                device=self.device,
            ).rgb_BF3HW
            for low in range(0, len(specs), 32)
        ]
        return torch.cat(pieces)


def scenes(per_event: int, frames: int = FRAMES, offset: int = 0) -> list[Spec]:
    """Return `per_event` scenes for each event that fits into `frames`, with colours and shapes of all splits."""
    events = world.eligible_events(frames, 2)
    return [
        world.sample(offset + 1000 * index + k, num_frames=frames, event=event, camera="static", split="all")
        for index, event in enumerate(e for e in EVENTS if e in events)
        for k in range(per_event)
    ]


def shares(reports: Sequence[Report]) -> dict[str, float | None]:
    """Return the share of right clips per attribute, among the clips where it is judged, and the mean score."""
    result: dict[str, float | None] = {}
    for name in (*ATTRIBUTES, "all_right"):
        values = [float(v) for r in reports if (v := getattr(r, name)) is not None]
        result[name] = sum(values) / len(values) if values else None
        result[f"n_{name}"] = len(values)
    result["score"] = sum(r.score for r in reports) / len(reports)
    return result


def corrupted(kind: str, specs: Sequence[Spec], clips: Tensor, make: Maker) -> tuple[list[Spec], Tensor]:
    """Return the scenes to which a corruption applies, and their corrupted clips."""
    left = CORRUPTIONS[kind][2]
    rows = [i for i, s in enumerate(specs) if s.bodies[0].event not in left]
    changed = dict(zip(rows, _changed(kind, [specs[i] for i in rows], clips.shape[1]), strict=True))
    rows = [i for i in rows if changed[i] is not None]
    kept, true = [specs[i] for i in rows], clips[rows]
    if kind == "shuffled":
        return kept, torch.stack([spoil.shuffled(c, i) for i, c in enumerate(true)])
    if kind == "reversed":
        return kept, true.flip(1)
    if kind == "frozen":
        return kept, torch.stack([spoil.frozen(c) for c in true])
    if kind == "blurred to nothing":
        return kept, torch.stack([spoil.blurred(c, 6.0) for c in true])
    new = make([s for i in rows if (s := changed[i]) is not None], clips.shape[1])
    if kind in ("removed half-way", "teleported"):
        return kept, torch.stack([spoil.spliced(a, b) for a, b in zip(true, new, strict=True)])
    return kept, new


def _changed(kind: str, specs: list[Spec], frames: int) -> Sequence[Spec | None]:
    if kind == "colour swapped":
        return [spoil.other_colour(s) for s in specs]
    if kind == "shape swapped":
        return [spoil.other_shape(s) for s in specs]
    if kind == "removed half-way":
        return [spoil.without_first(s) for s in specs]
    if kind == "duplicated":
        return spoil.doubled(specs, frames)
    return spoil.moved_first(specs, frames) if kind == "teleported" else specs


def wrong_ones(reports: Sequence[Report], specs: Sequence[Spec], per_event: int) -> list[dict[str, Any]]:
    """List the true clips that the judge does not call right.

    Each item has the event, the number of the scene within this event, and the wrong attributes.
    """
    return [
        {
            "event": spec.bodies[0].event,
            "number": i % per_event,
            "wrong": [name for name in ATTRIBUTES if getattr(report, name) is False],
        }
        for i, (report, spec) in enumerate(zip(reports, specs, strict=True))
        if not report.all_right
    ]


def true_rows(make: Maker, clips: int, quick: bool) -> tuple[dict[str, Any], list[Spec], Tensor]:
    """Measure the judge on true clips: plain, softened, and with other sizes, lengths and cameras.

    Returns:
        The rows of shares by name, the scenes of the plain clips, and the plain clips (B,F,3,H,W).
    """
    specs = scenes(-(-clips // len(EVENTS)), offset=FRESH)
    plain = make(specs)
    soft = torch.stack([spoil.softened(clip, k) for k, clip in enumerate(plain)])
    reports = check_batch(plain, specs)
    rows = {
        "true": {**shares(reports), "wrong": wrong_ones(reports, specs, -(-clips // len(EVENTS)))},
        "softened": shares(check_batch(soft, specs)),
    }
    few = specs[::6]
    for size in (64, 128):
        other = Maker(make.device, size, make.supersample)(few)
        rows[f"{size} px"] = shares(check_batch(other, few))
    for frames in (9, 33):
        longer = scenes(4 if quick else 12, frames, FRESH)
        rows[f"{frames} frames"] = shares(check_batch(make(longer, frames), longer))
    filmed = [world.sample(FRESH + k, camera=CAMERAS[1 + k % 7], split="all") for k in range(7 if quick else 63)]
    rows["moving camera"] = shares(check_batch(make(filmed), filmed))
    return rows, specs, plain


def gaming_rows(specs: Sequence[Spec], clips: Tensor, make: Maker) -> dict[str, float]:
    """Return the largest score of each kind of fake clips, each judged against many scenes."""
    wanted = list(specs)[:: max(1, len(specs) // 32)][:32]
    rows = {}
    for kind, fakes in spoil.pretenders(FRAMES, make.size, len(wanted)).items():
        rows[kind] = max(r.score for r in check_batch(fakes.to(make.device), wanted))
    several = [i for i, s in enumerate(specs) if len(s.bodies) > 1][:48]
    single = [i for i, s in enumerate(specs) if len(s.bodies) == 1][:48]
    fewer = make([spoil.without_first(specs[i]) for i in several])
    pairs = zip(single, spoil.doubled([specs[i] for i in single], FRAMES), strict=True)
    more = [(specs[i], d) for i, d in pairs if d is not None]
    rows["a body too few"] = max(r.score for r in check_batch(fewer, [specs[i] for i in several]))
    rows["a body too many"] = max(r.score for r in check_batch(make([d for _, d in more]), [s for s, _ in more]))
    swapped = [specs[(i + len(specs) // 2) % len(specs)] for i in range(len(specs))]
    rows["mean score against another scene"] = shares(check_batch(clips, swapped))["score"] or 0.0
    return rows


def show(title: str, rows: dict[str, Any]) -> None:
    """Print rows of shares."""
    table = Table(title=title)
    for heading in ("clips", "n", *ATTRIBUTES, "score"):
        table.add_column(heading)
    for name, row in rows.items():
        cells = ["-" if row[a] is None else f"{row[a]:.3f}" for a in (*ATTRIBUTES, "score")]
        table.add_row(name, str(row["n_count"]), *cells)
    Console(width=120).print(table)


def gates(true: dict[str, Any], spoilt: dict[str, Any], gaming: dict[str, float]) -> list[dict[str, Any]]:
    """Return the gates of the tables."""
    result = [gate(name, true["true"][name], ">=", 0.98) for name in ATTRIBUTES]
    result += [gate(f"clips_{name}", true["true"][f"n_{name}"], ">=", 300) for name in ATTRIBUTES]
    for kind, (wrong, stay, _) in CORRUPTIONS.items():
        slug = kind.replace(" ", "_").replace("-", "_")
        result += [gate(f"{slug}_{name}_caught", spoilt[kind][name], "<=", 0.2) for name in wrong]
        result += [gate(f"{slug}_{name}_stays", spoilt[kind][name], ">=", 0.9) for name in stay]
    fakes = [value for name, value in gaming.items() if not name.startswith("mean")]
    result.append(gate("gaming_score", max(fakes), "<=", 0.2))
    return result


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="use few clips and write no result file")
    parser.add_argument("--clips", type=int, default=720, help="number of true clips (default: 720)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--supersample", type=int, default=2, help="rays per pixel and axis (default: 2)")
    for name, (_, first) in world_eye.SETS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=Path,
            help=f"folder of the embedded model's clips with seeds from {first}; missing clips are generated",
        )
    parser.add_argument(
        "--model", type=Path, default=embedded_model(), help="folder of the model whose clips people judged"
    )
    parser.add_argument("--output", default="world_check", help="name or path of the result file")
    return parser.parse_args()


def main() -> None:
    """Measure the judge and print the tables; write the result file, except with --quick."""
    args = options()
    kept = {name: getattr(args, name) for name in world_eye.SETS}
    if not args.quick:
        world_eye.check_model(kept, args.model)
    make = Maker(args.device, supersample=args.supersample)
    # True, corrupted and fake clips.
    true, specs, clips = true_rows(make, 36 if args.quick else args.clips, args.quick)
    show("true clips: share that the judge calls right", true)
    part = slice(None, None, 1 if args.quick else 3)
    spoilt = {k: shares(check_batch(*reversed(corrupted(k, specs[part], clips[part], make)))) for k in CORRUPTIONS}
    show("corrupted clips, only events that the corruption can change: share that the judge calls right", spoilt)
    gaming = gaming_rows(specs, clips, make)
    for name, value in gaming.items():
        print(f"{name:36s} {value:.3f}")
    print("true clips that the judge does not call right:", *true["true"]["wrong"], sep="\n  ")
    # Changes that must not change the verdict, and agreement with people.
    rows = gates(true, spoilt, gaming)
    same = world_eye.invariance(specs[::4], clips[::4], make)
    print("share with the same verdict after a change:", {name: round(value, 4) for name, value in same.items()})
    eye = None if args.quick else world_eye.measure(args.device, kept, args.model)
    if eye is not None:
        rows += world_eye.gates(eye, same, true["true"]["all_right"])
        print(*eye["apart"], *(row for name in world_eye.SETS for row in eye[name]["apart"]), sep="\n  ")
        print("share that agrees with people:", {name: round(eye[name]["agree"], 4) for name in world_eye.SETS})
    print(f"{sum(r['ok'] for r in rows)} of {len(rows)} gates met:", *[r["name"] for r in rows if not r["ok"]])
    if not args.quick:
        settings = {
            "clips": len(specs),
            "frames": FRAMES,
            "size": make.size,
            "first_seed": FRESH,
            "supersample": make.supersample,
        }
        tables = {"true": true, "spoilt": spoilt, "gaming": gaming, "invariance": same}
        tables |= eye or {}
        write_result(args.output, {"settings": {**settings, "device": args.device}, **tables, "gates": rows})


if __name__ == "__main__":
    main()
