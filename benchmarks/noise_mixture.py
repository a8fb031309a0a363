r"""The cost of mixed noise levels in training for text-to-video, compared with a control at equal cost.

    python -m benchmarks.noise_mixture train FOLDER --seed 0 [--steps 4000] [--set key=value ...]
    python -m benchmarks.noise_mixture measure FOLDER --seed 0 [--prompts 256]
    python -m benchmarks.noise_mixture report FOLDER

`train` runs recipes/tiny-wan.yaml twice at the same time on one GPU, from random weights: once with the noise_shares
of the recipe, and once with one noise level per clip in all batches. Both runs (arms) use the same clips, seeds and
steps. `measure` generates clips of one and of two bodies with both models, with the same prompts and seeds, and judges
them. It also measures the flow-matching error on unseen clips at fixed noise levels. `report` writes
benchmarks/results/noise_mixture.json with the differences paired by prompt, over the seeds. The committed result uses
smaller clips and fewer steps; its three seeds take half an hour on one GPU:

    ... train FOLDER --seed 0 --steps 2500 --set size=96 sizes=96 lengths=17 length_weights=1 even_cost=false \
        pool_clips=8192
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.embedded_groups import build
from benchmarks.embedded_sampling import Defaults, Job, generate, load
from benchmarks.gates import device, write_result
from postgen import world
from postgen.families.wan import WanDenoiser
from postgen.metrics.bootstrap import bootstrap
from postgen.world.check import check_batch

ROOT = Path(__file__).resolve().parents[1]
ARMS = {"mixed": [], "one level": ["--noise_shares", "1", "0", "0"]}
GROUPS = ("one", "two")
LEVELS = (0.2, 0.5, 0.8, 0.95)
#: First seed of the scenes for the flow-matching error. It is below the training seeds.
FIRST = 700_000


def place(folder: Path, arm: str, seed: int) -> Path:
    """Return the folder of a run."""
    return folder / f"{arm.replace(' ', '-')}-{seed}"


def train(folder: Path, seed: int, steps: int, changes: Sequence[str]) -> None:
    """Train both arms of a seed at the same time, so that both share the GPU in the same way.

    Raises:
        RuntimeError: if one of the two runs fails.
    """
    pairs = (change.partition("=") for change in changes)
    words = [word for key, _, value in pairs for word in (f"--{key}", *value.split(","))]
    words += ["--max_steps", str(steps), "--seed", str(seed), "--eval_prompts", "0", "--save_seconds", "0"]
    runs = []
    for arm, own in ARMS.items():
        where = place(folder, arm, seed)
        where.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "postgen.train", "recipes/tiny-wan.yaml", "--output_dir", str(where)]
        with (where / "log.txt").open("w") as log:
            runs.append(subprocess.Popen([*command, *words, *own], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
    codes = [run.wait() for run in runs]
    if any(codes):
        raise RuntimeError(f"a run of seed {seed} failed: read log.txt in the subfolders of {folder}")


def flow_errors(pipe: Any, clips: int, how: Defaults) -> dict[str, list[float]]:
    """Return the mean squared error of the predicted velocity for each of `clips` unseen clips, by noise level."""
    denoiser = WanDenoiser(pipe)
    specs = [world.sample(FIRST + k, num_bodies=1 + k % 2, num_frames=how.frames) for k in range(clips)]
    found: dict[str, list[float]] = {f"{level}": [] for level in LEVELS}
    for low in range(0, clips, 32):
        part = specs[low : low + 32]
        frames = world.render(part, size=how.size, geometry=False, device=pipe.device).rgb_BF3HW
        generator = torch.Generator(pipe.device).manual_seed(low)
        with torch.no_grad():
            x0 = denoiser.encode_video(frames).float()
            condition = denoiser.encode_prompt([world.simple_caption(spec) for spec in part])
            noise = torch.randn(x0.shape, generator=generator, device=x0.device)
            for level in LEVELS:
                sigma = x0.new_full((len(part),), level)
                error = denoiser.predict((1 - level) * x0 + level * noise, sigma, condition) - (noise - x0)
                found[f"{level}"] += error.square().flatten(1).mean(1).tolist()
    return found


def measure(folder: Path, seed: int, prompts: int, on: str) -> None:
    """Judge both arms of a seed, and write the measures of every clip to seed-SEED.json in the folder."""
    if on == "cuda":
        torch.set_float32_matmul_precision("high")
    found: dict[str, Any] = {"device": device()}
    for arm in ARMS:
        export = place(folder, arm, seed) / "export"
        pipe, how = load(export, on), Defaults.of(export)
        rows: dict[str, Any] = {}
        for name in GROUPS:
            group = build(name, prompts, 0, how)
            job = Job(prompts=group.prompts, seeds=group.seeds, **dataclasses.asdict(how))
            reports = check_batch(generate(pipe, job, f"{arm}, {name}"), group.asked, workers=8 if on == "cuda" else 0)
            rows[name] = [float(report.all_right) for report in reports]
            rows[f"{name} score"] = [report.score for report in reports]
        found[arm] = {"judged": rows, "flow_error": flow_errors(pipe, prompts, how), "form": [how.frames, how.size]}
        lines = (place(folder, arm, seed) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found[arm]["steps"] = max(json.loads(line).get("step", 0) for line in lines)
    (folder / f"seed-{seed}.json").write_text(json.dumps(found), encoding="utf-8")


def compared(seeds: dict[str, dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """Return the means of both arms and their difference (mixed minus one level), with its interval over prompts.

    The result also has the difference of each seed.
    """
    values = {arm: torch.tensor([seed[arm][kind][name] for seed in seeds.values()]).double() for arm in ARMS}
    apart: Tensor = values["mixed"] - values["one level"]
    return {
        **{arm: float(rows.mean()) for arm, rows in values.items()},
        "difference": dataclasses.asdict(bootstrap(apart.mean(0))),
        "difference_by_seed": apart.mean(1).tolist(),
    }


def report(folder: Path, output: str) -> None:
    """Write and print the result of all measured seeds."""
    seeds = {
        path.stem.removeprefix("seed-"): json.loads(path.read_text()) for path in sorted(folder.glob("seed-*.json"))
    }
    if not seeds:
        sys.exit(f"{folder} has no measured seed: run the commands train and measure first")
    first = next(iter(seeds.values()))["mixed"]
    payload = {
        "settings": {
            "seeds": list(seeds),
            "steps": {name: {arm: seed[arm]["steps"] for arm in ARMS} for name, seed in seeds.items()},
            "prompts": len(first["judged"][GROUPS[0]]),
            "frames_and_px": first["form"],
            "trained_on": sorted({seed["device"] for seed in seeds.values()}),
        },
        "judged": {name: compared(seeds, "judged", name) for name in first["judged"]},
        "flow_error": {level: compared(seeds, "flow_error", level) for level in first["flow_error"]},
        "gates": [],
    }
    write_result(output, payload)
    for kind in ("judged", "flow_error"):
        for name, row in payload[kind].items():  # type: ignore[attr-defined]
            interval = row["difference"]
            print(
                f"{kind:10s} {name:10s} mixed {row['mixed']:.4f}  one level {row['one level']:.4f}"
                f"  difference {interval['value']:+.4f} [{interval['low']:+.4f}, {interval['high']:+.4f}]"
            )


def main() -> None:
    """Read the command line and run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["train", "measure", "report"], help="what to do, described above")
    parser.add_argument("folder", type=Path, help="folder of the runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of both runs (default: 0)")
    parser.add_argument("--steps", type=int, default=4000, help="training steps of each run (default: 4000)")
    parser.add_argument("--prompts", type=int, default=256, help="prompts per number of bodies (default: 256)")
    parser.add_argument(
        "--set", dest="changes", nargs="*", default=[], metavar="key=value", help="recipe settings; write lists as a,b"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", default="noise_mixture", help="name or path of the result file")
    args = parser.parse_args()
    if args.command == "train":
        train(args.folder, args.seed, args.steps, args.changes)
    elif args.command == "measure":
        measure(args.folder, args.seed, args.prompts, args.device)
    else:
        report(args.folder, args.output)


if __name__ == "__main__":
    main()
