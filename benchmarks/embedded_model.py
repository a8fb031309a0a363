"""Quality of the embedded model: the world's checker judges clips of the reloaded folder.

    python -m benchmarks.embedded_model [--quick] [--prompts 256] [--groups one two ...] [--model NEW] [--old BEFORE]

The prompts come in groups (`benchmarks.embedded_groups`). Clip i of a group uses seed first_seed + i. The size,
frames, steps and guidance scale are those of the folder's postgen.json. In the same run the previous model generates
clips of one and of two bodies with its own defaults. `benchmarks.autoencoder` measures the autoencoder. The result
file is written after every group, so an interrupted run keeps the results of its finished groups; the gates of the
other groups are marked as not measured. Several processes may share the groups, and a second run may use other prompts
and seeds:

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

#: Number of clips per group that --clips keeps, and the groups that are also drawn on a sheet.
SHOWN = 60
DRAWN = ("one", "two", "image_one", "camera", "synonyms")
#: Number of clips per group in the picture next to the result file.
PICTURED = {"one": 8, "two": 4}
#: Number of clips for the autoencoder's gates.
RECONSTRUCTED = 64


class Run:
    """One run of the benchmark: the measured and the previous model, the groups to measure, and the result.

    The keys of `folders`, `defaults` and `pipes` are False for the measured model and True for the previous one.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folders = {False: args.model or embedded_model()}
        if args.old or not self.folders[False].samefile(embedded_model()):
            self.folders[True] = args.old or embedded_model()
        self.groups = [name for name in args.groups if True in self.folders or not name.startswith("old_")]
        if len(self.groups) < len(args.groups):
            print("No previous model is measured; the gate two_bodies needs one: give its folder with --old FOLDER.")
        self.defaults = {old: Defaults.of(folder) for old, folder in self.folders.items()}
        self.pipes: dict[bool, Any] = {}
        self.count = args.prompts or (16 if args.quick else 256)
        self.watcher = Watcher(args.device, judging(args.workers, args.device))
        self.writer = ThreadPoolExecutor(4, "writer")
        self.written: list[Future[Any]] = []
        self.picture: list[tuple[Tensor, str]] = []
        self.result: dict[str, Any] = {"settings": self.settings(), "groups": {}}

    def settings(self) -> dict[str, Any]:
        """Return the settings. Processes that share the groups of one run must have equal settings."""
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
        """Return the pipeline of the measured model, or of the previous model if `old`. Load it at the first call."""
        if old not in self.pipes:
            self.pipes[old] = load(self.folders[old], self.args.device)
        return self.pipes[old]

    def job(self, group: Group) -> Job:
        """Return the job that generates the clips of a group with its model."""
        defaults = self.defaults[group.old]
        images = None
        if group.image:
            assert group.truth is not None
            frames = world.render(
                group.truth, num_frames=1, size=group.size, geometry=False, device=self.args.device
            ).rgb_BF3HW
            # Round to bytes, because a picture file holds bytes.
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
        """Generate the clips of a group.

        Returns:
            The group, the futures of its measures, which may not be ready yet, and the seconds of the generation.
        """
        group = build(name, self.count, self.args.first_seed, self.defaults[False], self.defaults.get(True))
        start, job, looks = time.perf_counter(), self.job(group), []
        for rows, clips in batches(self.pipe(group.old), job, name):
            looks.append(self.watcher.submit(group, rows, clips, job.images, max(0, SHOWN - rows.start)))
        return group, looks, time.perf_counter() - start

    def finish(self, group: Group, looks: list[Future[tuple[Seen, Seen]]], seconds: float) -> None:
        """Wait for the measures of a group, add its row to the result, write the result, and draw its clips."""
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
        """Start to write the clips and the sheet of a group if --clips is given. Keep clips for the picture."""
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
        """Write the result file with the groups measured so far, except with --quick."""
        if not self.args.quick:
            publish(self.result, self.args.output, self.args.against)

    def part(self, name: str) -> None:
        """Measure the part `name` of the result that is not a group of prompts."""
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
        """Measure the chosen groups and parts. The judge of one group still runs while the next is generated."""
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
    """Write a result file with its gates, and return the gates.

    If `against` names the result of a first run, the file also has a comparison of the two runs.
    """
    result = dict(result)
    if against is not None and result["groups"]:
        result["against"] = agreement(stored(against), result)
    result["gates"] = gates(result)
    write_result(output, result)
    return list(result["gates"])


def show(rows: list[dict[str, Any]]) -> None:
    """Print the gates."""
    for row in rows:
        value = "not measured" if row["value"] is None else f"{row['value']:.3f}"
        state = "ok" if row["ok"] else "MISSED" if row["value"] is not None else ""
        print(f"{row['name']:28s} {value:>12s} {row['op']} {row['target']:g}  {state}")


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompts", type=int, help="number of prompts per group, at least 2 (default: 256, with --quick 16)")
    add("--first_seed", type=int, default=0, help="seed of the first scene and of its noise (default: 0)")
    add("--groups", nargs="+", default=[*BUILDERS, *PARTS], choices=[*BUILDERS, *PARTS], metavar="GROUP",
        help=f"what to measure (default: all): {', '.join([*BUILDERS, *PARTS])}")  # fmt: skip
    add("--quick", action="store_true", help="16 prompts per group, 8 reconstructions; write no result file")
    add("--model", type=Path, help="folder of the measured model (default: the embedded model)")
    add("--old", type=Path, help="folder of the previous model (default: the embedded model, if --model is another)")
    add("--guidance", type=float, help="guidance scale of the measured model (default: that of its folder)")
    add("--autocast", action="store_true", help="bfloat16 autocast (default: float32, TF32 on a GPU)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--workers", type=int, help="number of judge processes (default: up to 8 on a GPU, 0 on a CPU)")
    add("--clips", type=Path, metavar="FOLDER", help="folder for kept clips and sheets of each group")
    add("--output", default="embedded_model", help="name or path of the result file")
    add("--against", help="result of a first run with other seeds, for a comparison")
    add("--merge", nargs="+", metavar="FILE", help="join result files with different groups; measure nothing")
    add("--guidances", nargs="+", metavar="FILE", help="join results of several guidance scales; measure nothing")
    add("--table", action="store_true", help="print the table for the documentation; measure nothing")
    args = parser.parse_args()
    if args.prompts is not None and args.prompts < 2:
        parser.error(f"--prompts must be at least 2 for the intervals, got {args.prompts}")
    return args


def main() -> None:
    """Run the benchmark, or join or print results that were written before."""
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
