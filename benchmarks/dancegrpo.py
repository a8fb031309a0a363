"""DanceGRPO on the embedded model: the improvement by rewards, and the savings of the cheap presets.

    python -m benchmarks.dancegrpo train dancegrpo-tiny [--seconds 500] [--set key=value ...]
    python -m benchmarks.dancegrpo train fast-tiny [--seconds 300]
    python -m benchmarks.dancegrpo train nft-tiny [--seconds 300]
    python -m benchmarks.dancegrpo exact         # resume and two processes, on the CPU
    python -m benchmarks.dancegrpo report
    python -m benchmarks.dancegrpo learns        # for runs of any length: does the held-out reward rise?

The prompts have two bodies, and the world's checker is the reward. Every evaluation generates clips of 256 held-out
prompts with fixed seeds, with the averaged weights, 20 deterministic steps and the guidance scale of the preset's
training. `wholly_right` is the share of clips that show everything in their prompt. The runs are in
runs/benchmark-dancegrpo. `train` continues a stopped run, and writes a checkpoint and an export every minute. `exact`
tests that a resumed run and a run on two processes equal a plain one, on the CPU. `report` writes
benchmarks/results/dancegrpo.json, curves and contact sheets from the existing runs, and lists what is missing.

The gate `world_gain` is the share of fully right clips after training, divided by the share before. The gate
`world_final` is the share after training. A model with a high share before training cannot gain 50 %, so it misses
`world_gain`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from benchmarks.gates import device, gate, write_result
from postgen.grpo.curves import draw_plots, read_metrics
from postgen.training import load_recipe

ROOT = Path(__file__).resolve().parents[1]
FAITHFUL = "dancegrpo-tiny"
PRESETS = (FAITHFUL, "fast-tiny", "nft-tiny")
RIGHT = "eval_gold/wholly_right/mean"
PLACES = ("output_dir", "resume_from_checkpoint")
"""Settings that are left out of a run's summary, because they do not affect its result."""
MARGIN = 0.03
"""Smallest rise of the mean reward of 256 clips that is not chance.

Two standard errors are 0.04, and less with equal seeds.
"""
COSTS = {
    "forward_equivalents": "eval_cost/forward_equivalents",
    "transformer_seconds": "eval_cost/transformer_seconds",
}


def wholly_right(prompts: Sequence[str], completions: Sequence[Tensor], **columns: Any) -> list[float]:
    """Return 1 for each clip that shows everything in its prompt, else 0. This reward is only for evaluation."""
    import torch

    from postgen.world import parse
    from postgen.world.check import check_batch

    specs = [spec for prompt in prompts if (spec := parse(prompt)) is not None]
    return [float(report.all_right) for report in check_batch(torch.stack(list(completions)), specs)]


def train(name: str, folder: Path, seconds: float, overrides: Sequence[str]) -> None:
    """Train a preset, or continue its stopped run, for at most `seconds` (0 means no limit)."""
    pairs = (pair.partition("=") for pair in overrides)
    words = [word for key, _, value in pairs for word in (f"--{key}", *value.split(","))]
    words += ["--output_dir", str(folder / name), "--resume_from_checkpoint", "auto", "--max_seconds", str(seconds)]
    kind, config = load_recipe(ROOT / "recipes" / f"{name}.yaml", words)
    _note_device(folder / name)
    settings: Any = config
    trainer: Any = kind
    result = trainer(
        settings.model,
        settings.reward_funcs,
        settings,
        settings.train_dataset,
        settings.eval_dataset,
        eval_reward_funcs=[wholly_right],
    ).train()
    print(f"{name}: {result.reason} after {result.global_step} steps")


def _note_device(run: Path) -> None:
    """Record the name of this device in the run's folder, because the report may be written on another machine."""
    run.mkdir(parents=True, exist_ok=True)
    known = _devices(run)
    (run / "devices.json").write_text(json.dumps([*known, *({device()} - set(known))]))


def _devices(run: Path) -> list[str]:
    path = run / "devices.json"
    names: list[str] = json.loads(path.read_text()) if path.is_file() else []
    return names


def evaluations(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows of the evaluations of a run."""
    return [row for row in read_metrics(folder / name / "metrics.jsonl") if RIGHT in row]


def cost_to(rows: Sequence[dict[str, Any]], score: float, cost: str) -> float | None:
    """Return the cost of a run until its held-out score first reaches `score`, or None if it never does.

    Between two evaluations the cost is interpolated linearly.
    """
    before: tuple[float, float] | None = None
    for row in rows:
        here = row[cost], row["eval_reward"]
        if here[1] >= score:
            if before is None or here[1] == before[1]:
                return float(here[0])
            return float(before[0] + (here[0] - before[0]) * (score - before[1]) / (here[1] - before[1]))
        before = here
    return None


def compare(folder: Path) -> dict[str, Any]:
    """Compare the costs of each cheap preset with those of the faithful run.

    The costs are those until the best held-out score that both runs reach.
    """
    found: dict[str, Any] = {}
    faithful = evaluations(folder, FAITHFUL)
    for name in PRESETS[1:]:
        rows = evaluations(folder, name)
        if not (rows and faithful):
            continue
        score = min(max(row["eval_reward"] for row in part) for part in (faithful, rows))
        # A score that is not clearly above the first evaluations of both runs is reached by chance, at no cost.
        if score <= max(rows[0]["eval_reward"], faithful[0]["eval_reward"]) + MARGIN:
            continue
        costs = {
            key: (cost_to(rows, score, column), cost_to(faithful, score, column)) for key, column in COSTS.items()
        }
        found[name] = {"score": score, "reaches_faithful_best": score >= max(row["eval_reward"] for row in faithful)}
        for key, (mine, theirs) in costs.items():
            found[name] |= {key: mine, f"{key}_faithful": theirs, f"{key}_ratio": _ratio(mine, theirs)}
    return found


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def spent(folder: Path, name: str) -> dict[str, float]:
    """Return the seconds of a run by part (rollout, decode, reward), from the log of each rollout, and the total."""
    rows = read_metrics(folder / name / "metrics.jsonl")
    parts = {part: sum(row.get(f"timing/{part}") or 0.0 for row in rows) for part in ("rollout", "decode", "reward")}
    return {**parts, "total": max((row.get("seconds") or 0.0 for row in rows), default=0.0)}


def summary(folder: Path, name: str) -> dict[str, Any]:
    """Return the results, the costs and the settings of a run."""
    rows = evaluations(folder, name)
    everything = read_metrics(folder / name / "metrics.jsonl")
    first, last = rows[0], rows[-1]
    config = yaml.safe_load((folder / name / "config.yaml").read_text())
    errors = [row["logp_diff/max"] for row in everything if "logp_diff/max" in row]
    return {
        "devices": _devices(folder / name),
        "steps": last["step"],
        "wholly_right": [first[RIGHT], last[RIGHT]],
        "reward": [first["eval_reward"], last["eval_reward"]],
        "motion_ratio": _ratio(last["eval_motion"], first["eval_motion"]),
        # The log has null for a number that JSON cannot represent (NaN or infinity).
        "onpolicy_ratio_error": None if not errors or None in errors else max(errors),
        "cost": {key: last[column] for key, column in COSTS.items()},
        "seconds": spent(folder, name),
        "evaluations": [
            {"step": row["step"], "wholly_right": row[RIGHT], "reward": row["eval_reward"]}
            | {key: row[column] for key, column in COSTS.items()}
            for row in rows
        ],
        "settings": {key: value for key, value in config.items() if key not in PLACES},
    }


def missing(folder: Path, runs: Mapping[str, Any], costs: Mapping[str, Any]) -> list[str]:
    """List what is missing for a complete report, with the command that produces it."""
    command = "python -m benchmarks.dancegrpo"
    lacks = [f"the run {name}: {command} train {name}" for name in PRESETS if name not in runs]
    for name, run in runs.items():
        if len(run["evaluations"]) < 2:
            lacks.append(f"a second evaluation of {name}: {command} train {name}")
        elif name != FAITHFUL and name not in costs:
            lacks.append(f"the costs of {name}: both runs reach no common score clearly above their first evaluations")
    if not (folder / "exact.json").is_file():
        lacks.append(f"resume and two processes: {command} exact")
    return lacks


def report(folder: Path, output: str) -> None:
    """Write the result file, the curves and the contact sheets; print the gates and what is missing."""
    runs = {name: summary(folder, name) for name in PRESETS if evaluations(folder, name)}
    if FAITHFUL not in runs:
        sys.exit(f"{folder} has no evaluation of {FAITHFUL}: run 'train {FAITHFUL}' first")
    costs = compare(folder)
    exact_file = folder / "exact.json"
    exact = json.loads(exact_file.read_text()) if exact_file.is_file() else {}
    # The untrained model is evaluated at the guidance scale of every preset. The best of these shares counts.
    base = max(run["wholly_right"][0] for run in runs.values())
    faithful = runs[FAITHFUL]
    gain, final = _ratio(faithful["wholly_right"][1], base), faithful["wholly_right"][1]
    # The gates of the cost use the cheap preset with the smallest cost.
    cheapest: dict[str, Any] = min(
        (row for row in costs.values() if row["forward_equivalents_ratio"] is not None),
        key=lambda row: row["forward_equivalents_ratio"],
        default={},
    )
    errors = [run["onpolicy_ratio_error"] for name, run in runs.items() if "nft" not in name]
    gates = [
        gate("onpolicy_ratio_error", None if None in errors else max(errors), "<=", 1e-5),
        gate("world_gain", gain, ">=", 1.5),
        gate("world_final", final, ">=", 0.85),
        gate("motion_ratio_low", faithful["motion_ratio"], ">=", 0.8),
        gate("motion_ratio_high", faithful["motion_ratio"], "<=", 1.2),
        gate("forward_equivalents_ratio", cheapest.get("forward_equivalents_ratio"), "<=", 0.34),
        gate("transformer_seconds_ratio", cheapest.get("transformer_seconds_ratio"), "<=", 0.5),
        gate("resume_identical", exact.get("resume_identical"), "==", 1),
        gate("ranks_max_abs", exact.get("ranks_max_abs"), "<=", 1e-6),
    ]
    lacks = missing(folder, runs, costs)
    payload = {"base_wholly_right": base, "final_wholly_right": final, "gain": gain, "runs": runs, "costs": costs}
    where = write_result(output, {**payload, "missing": lacks, "gates": gates})
    pictures(folder, runs, where)
    for line in lacks:
        print(f"missing: {line}")
    for row in gates:
        value = "not measured" if row["value"] is None else f"{row['value']:.4g}"
        print(f"{row['name']:28s} {value:>12s} {row['op']} {row['target']:g}  {'ok' if row['ok'] else 'MISSED'}")


def learns(folder: Path, output: str) -> None:
    """Write a result for runs of any length: the rise of the held-out reward since the first evaluation."""
    runs = {name: summary(folder, name) for name in PRESETS if len(evaluations(folder, name)) > 1}
    if not runs:
        sys.exit(f"{folder} has no run with two evaluations: train a preset until its second evaluation first")
    rises = {name: run["reward"][1] - run["reward"][0] for name, run in runs.items()}
    gates = [gate(f"rise_{name.replace('-', '_')}", rise, ">=", MARGIN) for name, rise in rises.items()]
    pictures(folder, runs, write_result(output, {"runs": runs, "gates": gates}))
    for name, run in runs.items():
        print(f"{name}: {run['steps']} steps, reward {run['reward']}, fully right {run['wholly_right']}")


def pictures(folder: Path, runs: dict[str, Any], where: Path) -> None:
    """Draw the curves, and copy each run's contact sheets of the first and last evaluation to the result's folder."""
    plots: dict[str, Any] = {}
    for title, key, across in (
        ("held-out reward", "reward", "forward_equivalents"),
        ("held-out reward ", "reward", "transformer_seconds"),
        ("wholly right", "wholly_right", "forward_equivalents"),
        ("wholly right ", "wholly_right", "step"),
    ):
        lines = {name: [(row[across], row[key]) for row in run["evaluations"]] for name, run in runs.items()}
        plots[title] = across, {name: points for name, points in lines.items() if len(points) > 1}
    plots = {title: plot for title, plot in plots.items() if plot[1]}
    if plots:
        draw_plots(plots, where.with_suffix(".png"))
    for name in runs:
        sheets = sorted((folder / name / "samples").glob("step-*.png"))
        for moment, sheet in (("before", sheets[:1]), ("after", sheets[1:][-1:])):
            for path in sheet:
                shutil.copyfile(path, where.with_name(f"{where.stem}_{name}_{moment}.png"))


# Exactness of resumed runs and of two processes, on the CPU.

SMALL = {
    **{"device": "cpu", "num_generations": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
    **{"steps_per_generation": 2, "num_inference_steps": 3, "num_frames": 5, "guidance_scale": 1.0, "max_steps": 3},
    **{"rollout_batch_size": 2, "eval_steps": 0, "eval_on_start": False, "save_steps": 1, "save_seconds": 0.0},
    **{"report_to": "none", "disable_tqdm": True, "save_total_limit": 9, "height": 32, "width": 32},
    # With so few pixels, samples that share the initial noise have equal scores, and nothing is learned.
    **{"bf16": False, "share_initial_noise": False},
}


def small_run(place: Path, *, processes: int = 1, **changes: Any) -> dict[str, Tensor]:
    """Run three small updates of the embedded model in one or two new processes; return the weights."""
    from safetensors.torch import load_file

    place.mkdir(parents=True, exist_ok=True)
    values = yaml.safe_load((ROOT / "recipes" / f"{FAITHFUL}.yaml").read_text())
    values |= {**SMALL, "output_dir": str(place / "run"), **changes}
    (place / "recipe.yaml").write_text(yaml.safe_dump(values))
    launch = ["-m", "postgen.train"]
    if processes > 1:
        config = ROOT / "recipes" / "accelerate" / "ddp_cpu.yaml"
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), *launch]
    words = [sys.executable, *launch, str(place / "recipe.yaml"), "--resume", "auto"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run(words, check=True, cwd=ROOT, env=environment)
    return load_file(place / "run" / "checkpoint-3" / "weights.safetensors")


def exact(folder: Path) -> None:
    """Compare a straight run with a resumed one bit by bit, and two processes with one process.

    The one process has twice the gradient accumulation of the two.
    """
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        straight = small_run(place / "straight")
        (place / "resumed" / "run").mkdir(parents=True)
        # Resume from checkpoint 1, which lies between the two updates of one rollout.
        shutil.copytree(place / "straight" / "run" / "checkpoint-1", place / "resumed" / "run" / "checkpoint-1")
        resumed = small_run(place / "resumed")
        two = small_run(place / "two", processes=2)
        one = small_run(place / "one", gradient_accumulation_steps=2, steps_per_generation=4)
        for name in ("straight", "one", "two"):
            rows = read_metrics(place / name / "run" / "metrics.jsonl")
            # If all advantages are zero, nothing is learned, and the weights of all runs are equal anyway.
            if not any(row.get("advantage/abs_mean") for row in rows):
                sys.exit(f"the run {name!r} learned nothing, so the comparison proves nothing: change SMALL")
    result = {
        "resume_identical": int(all(bool((straight[key] == resumed[key]).all()) for key in straight)),
        "ranks_max_abs": max(float((two[key] - one[key]).abs().max()) for key in two),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "exact.json").write_text(json.dumps(result))
    print(result)


def main() -> None:
    """Read the command line and run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "benchmark-dancegrpo", help="folder of runs")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("preset", choices=PRESETS, help="preset to train")
    training.add_argument("--seconds", type=float, default=math.inf, help="stop after this time (default: no limit)")
    training.add_argument(
        "--set", dest="changes", nargs="*", default=[], metavar="key=value", help="recipe settings; write lists as a,b"
    )
    commands.add_parser("exact")
    commands.add_parser("learns").add_argument("--output", default="rl_learns", help="name or path of the result")
    commands.add_parser("report").add_argument("--output", default="dancegrpo", help="name or path of the result")
    args = parser.parse_args()
    if args.command == "train":
        train(args.preset, args.folder, 0.0 if args.seconds == math.inf else args.seconds, args.changes)
    elif args.command == "exact":
        exact(args.folder)
    elif args.command == "learns":
        learns(args.folder, args.output)
    else:
        report(args.folder, args.output)


if __name__ == "__main__":
    main()
