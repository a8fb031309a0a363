"""Scaling law of quantisation-aware training of small video networks: runs, fit, and error of held-out runs.

    python -m benchmarks.quant_law --gpus 0 1 --each 5 [--seconds 480]     # 27 quantised runs and 9 exact ones
    python -m benchmarks.quant_law --report                     # results/quant_law.json

Networks of Wan's architecture are trained from scratch by flow matching on latents of clips of the synthetic world,
which the embedded autoencoder encodes: 3 sizes x 3 numbers of training tokens x 3 group sizes, with weights and inputs
of the blocks' linear layers in 4-bit integers, and an exact twin for each size and number of tokens. All runs begin
with the same weights for their size and see the same clips, noise and noise levels in the same order. The loss is
measured on a fixed list of validation clips, noise and noise levels; its difference to the twin's loss is delta.

Finished runs are skipped and an interrupted run continues, so a repeated command continues where it stopped; repeat it
until its exit code is 0 (1: a job failed, 2: invalid input, 3: jobs are left). `--back` and `--unpack` as for
`benchmarks.quant`: they keep the numbers of finished runs, and the data and unfinished runs are made again.

Rules, written before any run: the law of `postgen.quant.law` is fitted to 19 of the 27 runs. The 8 others are held
out: those whose indices of size, budget and group sum to a multiple of 3, except the first; so each size, budget and
group is held out two or three times. The gate `law_heldout_error` is the mean of |predicted / measured - 1| over them;
it is missed if one of them has no delta above 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import ended
from benchmarks.gates import gate, write_result
from benchmarks.job_queue import SAVE_EVERY, SAVE_GRACE, Job, exit_code, lock_of, places_on, run_jobs, wanted
from benchmarks.lit_video_arms import check_settings
from benchmarks.lit_video_files import pack_files
from benchmarks.quant_law_run import GROUPS, SIZES, STEPS, Run, add_options, row_of, runs_of, settings_of
from benchmarks.quant_options import add_run_options, begin, check_small
from postgen.errors import UserError
from postgen.quant.law import LawFit, LawRun, fit_law

TINY = {"batch": 2, "clips": 6, "max_steps": 1}


def jobs_of(out: Path, words: Sequence[str]) -> dict[str, Job]:
    """Return the jobs: the data, then the pairs of size and budget, the longest first."""

    def job(name: str, done: Any, needs: tuple[str, ...]) -> Job:
        command = (sys.executable, "-m", "benchmarks.quant_law_run", name, *words)
        return Job(name=name, command=command, log=out / "logs" / f"{name}.log", check=done, needs=needs)

    def complete(size: int, budget: int) -> bool:
        return all(row_of(out, run).is_file() for run in runs_of(size, budget))

    pairs = [(size, budget) for budget in range(len(STEPS)) for size in range(len(SIZES))][::-1]
    found = {"data": job("data", (out / "data.safetensors").is_file, ())}
    for size, budget in pairs:
        name = f"{size}.{budget}"
        found[name] = job(name, lambda size=size, budget=budget: complete(size, budget), ("data",))
    return found


def rows_in(out: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of the finished runs in a folder by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))}


def read_runs(out: Path) -> list[dict[str, Any]]:
    """Return the quantised runs with their losses above the exact twins.

    Raises:
        UserError: a run is missing, or runs have different settings.
    """
    rows, found = rows_in(out), []
    for row in [*rows.values()][:1]:
        check_settings(out, rows, row["settings"])
    for size in range(len(SIZES)):
        for budget in range(len(STEPS)):
            exact, *quantised = runs_of(size, budget)
            if missing := [run.name for run in (exact, *quantised) if run.name not in rows]:
                raise UserError(f"{out} has no run {missing[0]}: run benchmarks.quant_law without --report first")
            found += [_pair(run, rows[run.name], rows[exact.name]) for run in quantised]
    return found


def _pair(run: Run, row: Mapping[str, Any], exact: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: row[key] for key in ("name", "parameters", "tokens", "group", "steps", "loss", "seconds")}
    return {**kept, "exact_loss": exact["loss"], "delta": row["loss"] - exact["loss"], "held_out": run.held_out} | {
        "device": row["device"], "settings": row["settings"]
    }  # fmt: skip


def law_runs(rows: Sequence[Mapping[str, Any]]) -> list[LawRun]:
    """Return runs as the law needs them."""
    fields = [field.name for field in dataclasses.fields(LawRun)]
    return [LawRun(**{name: row[name] for name in fields}) for row in rows]


def heldout_error(fit: LawFit, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean relative error of the held-out runs; None if one of them has no delta above 0."""
    held = law_runs([row for row in rows if row["held_out"]])
    return None if any(run.delta <= 0 for run in held) else fit.error(held)


def payload_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of the result.

    Raises:
        UserError: too few runs have a delta above 0.
    """
    fit = fit_law(law_runs([row for row in rows if not row["held_out"]]))
    print(fit, flush=True)
    error = heldout_error(fit, rows)
    runs = []
    for row in rows:
        predicted = fit.law.delta(row["parameters"], row["tokens"], row["group"])
        runs.append({**{key: value for key, value in row.items() if key not in ("device", "settings")}} | {
            "predicted": predicted
        })  # fmt: skip
    return {
        "measured_on": rows[0]["device"],
        "settings": {"sizes": SIZES, "steps": STEPS, "groups": GROUPS, "format": "int4", **rows[0]["settings"]},
        "runs": runs,
        "exponents": {name: dataclasses.asdict(each) for name, each in fit.intervals.items()},
        "unidentified": dict(fit.unidentified),
        "fitted_runs": len(fit.runs),
        "left_out": len(fit.left_out),
        "fit_error": fit.fit_error,
        "leave_one_out": fit.leave_one_out,
        "heldout_error": error,
        "warnings": list(fit.warnings),
        "gates": [gate("law_heldout_error", error, "<=", 0.1)],
    }


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(made)
    add_run_options(made, each=9, output="quant_law")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Train the runs, or write the result."""
    options = parser().parse_args(argv)
    return ended("benchmarks.quant_law", lambda: _work(options))


def _work(options: argparse.Namespace) -> int:
    begin(options, TINY)
    if options.report:
        rows = read_runs(options.out)
        if (steps := rows[0]["settings"]["max_steps"]) is not None:
            check_small(f"--max_steps {steps}", options.output)
        print(write_result(options.output, payload_of(rows)))
        return 0
    words = ["--out", str(options.out), "--device", options.device, "--batch", str(options.batch)]
    words += ["--clips", str(options.clips)]
    words += [] if options.max_steps is None else ["--max_steps", str(options.max_steps)]
    return run(options, words)


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Run the jobs that are left, and return the exit code.

    Raises:
        UserError: invalid options, another command that works in the folder, or runs with other settings there.
    """
    jobs, out = jobs_of(options.out, words), options.out
    places = places_on(options.gpus, options.each)

    def keep() -> None:
        files = [*sorted(out.glob("*.json")), *sorted(out.glob("logs/*.log"))]
        if options.back is not None and files:
            pack_files(files, out, options.back)

    with lock_of(out):
        check_settings(out, rows_in(out), settings_of(options))
        todo = wanted(jobs, [name for name in jobs if name != "data"])
        left = run_jobs(todo, places, seconds=options.seconds, tick=keep, every=SAVE_EVERY, grace=SAVE_GRACE)
    return exit_code(left)


if __name__ == "__main__":
    sys.exit(main())
