"""What the embedded model can do, judged on the reloaded folder by the world's checker.

    python -m benchmarks.embedded_model [--quick] [--prompts 256] [--groups one two ...] [--model NEW] [--old BEFORE]

Groups of prompts (`benchmarks.embedded_groups`), clip i from seed first_seed + i, sizes, frames, steps and guidance of
the folder's postgen.json. The model before this one makes clips of one and of two bodies in the same run, by its own
defaults. The autoencoder is measured by `benchmarks.autoencoder`. The result file is written anew after every group,
so a run that is cut leaves what it has; gates of other groups stand there as not measured. Several processes may share
the groups, and a second run may take other prompts and seeds:

    python -m benchmarks.embedded_model --merge a.json b.json
    python -m benchmarks.embedded_model --first_seed 100000 --against embedded_model --output embedded_model_shifted
    python -m benchmarks.embedded_model --guidances a.json b.json --output embedded_model_guidance
    python -m benchmarks.embedded_model --table
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import autoencoder
from benchmarks.embedded_groups import BUILDERS, Group, build
from benchmarks.embedded_measures import Seen, Watcher, judging, summary
from benchmarks.embedded_report import PARTS, agreement, by_guidance, gates, markdown, merged, stored
from benchmarks.embedded_sampling import Defaults, Job, batches, load, seconds_on_two_cores
from benchmarks.embedded_sheets import sheet, verdict, write_clips
from benchmarks.gates import RESULTS, device, write_result
from postgen import world
from postgen.assets import embedded_model

#: Clips of a group that are kept, and groups that are also drawn on a sheet.
SHOWN = 60
DRAWN = ("one", "two", "image_one", "camera", "synonyms")
#: Clips by group of the picture beside the result file.
PICTURED = {"one": 8, "two": 4}
#: Clips of the autoencoder's gates.
RECONSTRUCTED = 64


class Run:
    """Two models, what is measured of them, and where it goes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folders = {False: args.model or embedded_model()}
        if args.old or not self.folders[False].samefile(embedded_model()):
            self.folders[True] = args.old or embedded_model()
        self.groups = [name for name in args.groups if True in self.folders or not name.startswith("old_")]
        if len(self.groups) < len(args.groups):
            print("No model before this one: give --old FOLDER to measure it; the gate of two bodies needs it.")
        self.defaults = {old: Defaults.of(folder) for old, folder in self.folders.items()}
        self.pipes: dict[bool, Any] = {}
        self.count = args.prompts or (16 if args.quick else 256)
        self.watcher = Watcher(args.device, judging(args.workers, args.device))
        self.writer = ThreadPoolExecutor(4, "writer")
        self.written: list[Future[Any]] = []
        self.picture: list[tuple[Tensor, str]] = []
        self.result: dict[str, Any] = {"settings": self.settings(), "groups": {}}

    def settings(self) -> dict[str, Any]:
        """What every part of a run that is shared by several processes must have in common."""
        new, old = self.defaults[False], self.defaults.get(True)
        return {
            "prompts_per_group": self.count,
            "first_seed": self.args.first_seed,
            "steps": new.steps,
            "guidance_scale": self.args.guidance or new.guidance,
            "size": new.size,
            "frames": new.frames,
            "old": None if old is None else dataclasses.asdict(old),
            "autocast": "bfloat16" if self.args.autocast else None,
            "products_of_float32": "TF32 on a GPU",
            "autoencoder_clips": RECONSTRUCTED,
        }

    def pipe(self, old: bool) -> Any:
        """A model, loaded when it is first needed."""
        if old not in self.pipes:
            self.pipes[old] = load(self.folders[old], self.args.device)
        return self.pipes[old]

    def job(self, group: Group) -> Job:
        """A group as a job for its model."""
        defaults = self.defaults[group.old]
        images = None
        if group.image:
            assert group.truth is not None
            frames = world.render(
                group.truth, num_frames=1, size=group.size, geometry=False, device=self.args.device
            ).rgb_BF3HW
            # As bytes, which is what a picture file holds.
            images = (frames[:, 0] * 255).round() / 255
        return Job(
            prompts=group.prompts,
            seeds=group.seeds,
            size=group.size,
            frames=group.frames,
            steps=defaults.steps,
            guidance=defaults.guidance if group.old else self.args.guidance or defaults.guidance,
            images=images,
            autocast=self.args.autocast,
        )

    def begin(self, name: str) -> tuple[Group, list[Future[tuple[Seen, Seen]]], float]:
        """Make the clips of a group; what is seen in them may come later."""
        group = build(name, self.count, self.args.first_seed, self.defaults[False], self.defaults.get(True))
        start, job, looks = time.perf_counter(), self.job(group), []
        for rows, clips in batches(self.pipe(group.old), job, name):
            looks.append(self.watcher.submit(group, rows, clips, job.images, max(0, SHOWN - rows.start)))
        return group, looks, time.perf_counter() - start

    def finish(self, group: Group, looks: list[Future[tuple[Seen, Seen]]], seconds: float) -> None:
        """Sum up a group, write the result, and draw its clips."""
        seen, true = Seen.none(), Seen.none()
        for future in looks:
            for whole, part in zip((seen, true), future.result(), strict=True):
                whole.add(part)
        row = summary(group, seen, true)
        row |= {"seconds": round(seconds, 1), "device": device()}
        self.result["groups"][group.name] = row
        low, high = row["intervals"].get("all_right", (float("nan"),) * 2)
        told = {name: round(value, 3) for name, value in row["shares"].items()}
        print(f"{group.name:22s} [{low:.3f}, {high:.3f}] {seconds:6.1f} s", told, flush=True)
        self.flush()
        self.draw(group, seen)

    def draw(self, group: Group, seen: Seen) -> None:
        """Begin to write the clips and the sheet of a group, where they are wanted."""
        captions = [f"{text} ({verdict(r)})" for text, r in zip(group.prompts, seen.reports, strict=True)]
        self.picture += zip(seen.clips[: PICTURED.get(group.name, 0)], captions, strict=False)
        folder: Path | None = self.args.clips
        if folder is not None:
            kept = (seen.clips, captions[: len(seen.clips)])
            path = folder / f"{group.name}.safetensors"
            self.written.append(self.writer.submit(write_clips, path, *kept))
            if group.name in DRAWN:
                self.written.append(self.writer.submit(sheet, *kept, path.with_suffix(".png")))

    def flush(self) -> None:
        """Write what is there."""
        if not self.args.quick:
            publish(self.result, self.args.output, self.args.against)

    def part(self, name: str) -> None:
        """Measure what is no group of prompts."""
        folder = self.folders[False]
        if name == "seconds_cpu":
            self.result[name] = seconds_on_two_cores(folder)
        else:
            count = 8 if self.args.quick else RECONSTRUCTED
            rows, _ = autoencoder.measure({"model": self.pipe(False).vae}, count, *autoencoder.SETTINGS[0])
            self.result[name] = rows[0]
        self.result.setdefault("devices", {})[name] = device()
        self.flush()

    def __call__(self) -> dict[str, Any]:
        """Measure the chosen groups and parts; judging one group goes on while the next is made."""
        folder = self.folders[False]
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        self.result["folder_mb"] = size / 1e6
        late = None
        for name in self.groups:
            if name in PARTS:
                self.part(name)
                continue
            made = self.begin(name)
            if late is not None:
                self.finish(*late)
            late = made
        if late is not None:
            self.finish(*late)
        self.watcher.close()
        if self.picture and not self.args.quick:
            target = Path(self.args.output)
            path = target.with_suffix(".png") if target.suffix == ".json" else RESULTS / f"{target.name}.png"
            sheet(*zip(*self.picture, strict=True), path)
        for future in self.written:
            future.result()
        return self.result


def publish(result: dict[str, Any], output: str, against: str | None) -> list[dict[str, Any]]:
    """Write a result file with its gates, beside a first run where one is named; the gates."""
    result = dict(result)
    if against is not None and result["groups"]:
        result["against"] = agreement(stored(against), result)
    result["gates"] = gates(result)
    write_result(output, result)
    return list(result["gates"])


def show(rows: list[dict[str, Any]]) -> None:
    """Print gates."""
    for row in rows:
        value = "not measured" if row["value"] is None else f"{row['value']:.3f}"
        state = "ok" if row["ok"] else "MISSED" if row["value"] is not None else ""
        print(f"{row['name']:28s} {value:>12s} {row['op']} {row['target']:g}  {state}")


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompts", type=int, help="prompts of each group, at least 2 (default: 256, with --quick 16)")
    add("--first_seed", type=int, default=0, help="number of the first scene, and seed of its noise (default: 0)")
    add("--groups", nargs="+", default=[*BUILDERS, *PARTS], choices=[*BUILDERS, *PARTS], metavar="GROUP",
        help=f"what to measure (default: all): {', '.join([*BUILDERS, *PARTS])}")  # fmt: skip
    add("--quick", action="store_true", help="16 prompts a group, 8 reconstructions; prints only")
    add("--model", type=Path, help="another folder than the embedded model's")
    add("--old", type=Path, help="folder of the model before it (default: the embedded model's)")
    add("--guidance", type=float, help="guidance scale of the measured model (default: the folder's)")
    add("--autocast", action="store_true", help="bfloat16 autocast (default: float32, TF32 on a GPU)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--workers", type=int, help="processes that judge beside this one (default: 8 on a GPU, none on a CPU)")
    add("--clips", type=Path, metavar="FOLDER", help="keep clips of each group and draw sheets here")
    add("--output", default="embedded_model", help="name or path of the result file")
    add("--against", help="result of a first run with other seeds, to be compared with")
    add("--merge", nargs="+", metavar="FILE", help="join result files of other groups; nothing is measured")
    add("--guidances", nargs="+", metavar="FILE", help="put results of several guidance scales into one file")
    add("--table", action="store_true", help="print the table of the documentation; nothing is measured")
    args = parser.parse_args()
    if args.prompts is not None and args.prompts < 2:
        parser.error(f"--prompts {args.prompts}: intervals need at least 2")
    return args


def main() -> None:
    """Measure, print, write."""
    args = options()
    if args.table:
        shifted = RESULTS / "embedded_model_shifted.json"
        print(markdown(stored(args.output), stored(shifted) if shifted.is_file() else None))
        return
    if args.merge:
        show(publish(merged([stored(name) for name in args.merge]), args.output, args.against))
        return
    if args.guidances:
        write_result(args.output, by_guidance([stored(name) for name in args.guidances]))
        return
    if args.clips is not None:
        args.clips.mkdir(parents=True, exist_ok=True)
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    result = Run(args)()
    show(gates(result) if args.quick else publish(result, args.output, args.against))


if __name__ == "__main__":
    main()
