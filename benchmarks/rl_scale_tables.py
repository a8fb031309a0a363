"""What `benchmarks.rl_scale` computes from its runs: speed-ups, the bound for separate GPUs, and tables for pages.

`python -m benchmarks.rl_scale_tables` writes the tables of docs/several_gpus.md from benchmarks/results/rl_scale.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import docs_tables
from benchmarks.gates import RESULTS, read_result
from benchmarks.rl_scale_rows import METHODS

NVLINK = 3e11
"""Assumed bytes per second between two GPUs, about two thirds of NVLink 4's 450 GB/s in one direction."""
Rows = Sequence[Mapping[str, Any]]


def speedups(rows: Rows) -> list[dict[str, Any]]:
    """Return the speed-up of each run of several GPUs over the run of one GPU with the same updates."""
    return [
        {
            "run": row["run"],
            "gpus": row["gpus"],
            "speedup": one["seconds"] / row["seconds"],
            "efficiency": one["seconds"] / row["seconds"] / row["gpus"],
        }
        for one, row in _pairs(rows)
    ]


def separate(rows: Rows) -> list[dict[str, Any]]:
    """Return, for each run with averaged gradients, the best time if some of its GPUs only drew rollouts.

    With R seconds of rollout, decoding and rewards and T seconds of training on one GPU, n GPUs of which k draw the
    next rollout take at least max(R / k, T / (n - k)) seconds per update, plus the transfer of the trained weights
    (float32). This assumes that neither part loses anything by its distribution, so it is a bound. As max(R / k,
    T / (n - k)) >= (R + T) / n, separate GPUs cannot be faster than data parallel training without losses: `gain`, the
    measured time divided by the bound, is at most 1 / efficiency.
    """
    return [bound(one, row) for one, row in _pairs(rows) if row["spread"] == "ddp"]


def bound(one: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bound of `separate` for a run of several GPUs.

    Args:
        one: the run of one GPU with the same updates.
        row: the run of several GPUs.
    """
    count, rollout, train = row["gpus"], one["seconds"] - one["train_seconds"], one["train_seconds"]
    moved = 4 * one.get("trained_parameters", 0) / NVLINK
    best, drawing = min((max(rollout / k, train / (count - k)) + moved, k) for k in range(1, count))
    return {
        "run": row["run"],
        "gpus": count,
        "rollout_gpus": drawing,
        "rollout_share": rollout / one["seconds"],
        "seconds": row["seconds"],
        "separate_seconds": best,
        "gain": row["seconds"] / best,
    }


def _pairs(rows: Rows) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Yield (run of one GPU, run of several GPUs) for each timed run of several GPUs."""
    timed = [row for row in rows if "seconds" in row]
    alone = {_key(row): row for row in timed if row["gpus"] == 1}
    for row in timed:
        if row["gpus"] > 1 and _key(row) in alone:
            yield alone[_key(row)], row


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("part", "method", "lora", "samples", "group"))


def times(result: Mapping[str, Any]) -> Iterable[str]:
    """Yield the lines of the table of times and memory."""
    yield "| model | method | weights | distribution | GPUs | s per update | speed-up | rollout share | peak GB |"
    yield "|---|---|---|---|---|---|---|---|---|"
    gains = {each["run"]: each["speedup"] for each in result["speedups"]}
    names = {"tiny": "embedded", "wan": "Wan 1.3B shape", "wan14": "Wan 14B shape"}
    for row in result["rows"]:
        if row["part"] in names:
            cells = [names[row["part"]], row["method"], "LoRA" if row["lora"] else "all", row["spread"], row["gpus"]]
            numbers = [row.get("seconds"), gains.get(row["run"]), row.get("rollout_share"), row.get("peak_gb")]
            yield "| " + " | ".join([*map(str, cells), *map(_number, numbers)]) + " |"


def equality(result: Mapping[str, Any]) -> Iterable[str]:
    """Yield the lines of the table of differences from one GPU."""
    yield "| run | GPUs | largest difference from one GPU |"
    yield "|---|---|---|"
    for row in result["rows"]:
        if row["part"] == "equal" and not row["run"].startswith(tuple(f"equal-{name}-one-of" for name in METHODS)):
            told = row["error"].splitlines()[0][:80] if row["error"] else f"{row['max_abs']:.1e}"
            yield f"| {row['run'].removeprefix('equal-')} | {row['gpus']} | {told} |"


def apart(result: Mapping[str, Any]) -> Iterable[str]:
    """Yield the lines of the table of separate GPUs for rollouts."""
    yield "| run | rollout share | s, data parallel | s at best, separate | gain at most |"
    yield "|---|---|---|---|---|"
    for row in result["separate"]:
        numbers = [row["rollout_share"], row["seconds"], row["separate_seconds"], row["gain"]]
        yield f"| {row['run']} | " + " | ".join(map(_number, numbers)) + " |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


MAKERS = {"rl_times": times, "rl_equality": equality, "rl_separate": apart}
"""Name of a table of docs/several_gpus.md -> the function that makes it."""
PAGE = Path(__file__).resolve().parents[1] / "docs" / "several_gpus.md"


def tables() -> dict[str, list[str]]:
    """Return the lines of each table for the committed result, or that nothing was measured."""
    there = (RESULTS / "rl_scale.json").is_file()
    return docs_tables.of_result(read_result("rl_scale") if there else None, MAKERS)


if __name__ == "__main__":
    docs_tables.write(PAGE, tables())
