"""What `benchmarks.rl_scale` computes from its runs: speed-ups, the bound for separate GPUs, and tables for pages.

`python -m benchmarks.rl_scale_tables` writes the tables of docs/several_gpus.md from benchmarks/results/scaling.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import docs_tables
from benchmarks.gates import RESULTS, gate_lines, read_result
from benchmarks.rl_scale_rows import METHODS

RESULT_NAME = "scaling"
"""Name of the result of `benchmarks.rl_scale`."""
NVLINK = 3e11
"""Assumed bytes per second between two GPUs, about two thirds of NVLink 4's 450 GB/s in one direction."""
Rows = Sequence[Mapping[str, Any]]


def speedups(rows: Rows) -> list[dict[str, Any]]:
    """Return the speed-up of each run of several GPUs over the run of one GPU on the same machine.

    The speed-up is the ratio of samples per second. With the same samples per update, or for passes of the part
    `ulysses`, it is the ratio of seconds.
    """
    found = []
    for one, row in _pairs(rows):
        speedup = alike(one, row) * one["seconds"] / row["seconds"]
        own = {"run": row["run"], "device": row.get("device"), "gpus": row["gpus"]}
        found.append({**own, "speedup": speedup, "efficiency": speedup / row["gpus"]})
    return found


def alike(one: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """Return how many times the samples of the first run the second has in an update."""
    return float(row.get("samples", 1) / one.get("samples", 1))


def separate(rows: Rows) -> list[dict[str, Any]]:
    """Return, for each run with averaged gradients, the best time if some of its GPUs only drew rollouts.

    With R seconds of rollout, decoding and rewards and T seconds of training on one GPU, n GPUs of which k draw the
    next rollout take at least max(R / k, T / (n - k)) seconds per update, plus the transfer of the trained weights
    (float32). This assumes that neither part loses anything by its distribution, so it is a bound. As max(R / k,
    T / (n - k)) >= (R + T) / n, separate GPUs cannot be faster than data parallel training without losses: `gain`, the
    measured time divided by the bound, is at most 1 / efficiency.
    """
    return [bound(one, row) for one, row in _pairs(rows) if row["spread"] == "ddp" and "samples" in row]


def bound(one: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bound of `separate` for a run of several GPUs.

    Args:
        one: the run of one GPU; with fewer samples per update, its times are scaled to those of `row`.
        row: the run of several GPUs.
    """
    count, more = row["gpus"], alike(one, row)
    rollout, train = more * (one["seconds"] - one["train_seconds"]), more * one["train_seconds"]
    moved = 4 * one.get("trained_parameters", 0) / NVLINK
    best, drawing = min((max(rollout / k, train / (count - k)) + moved, k) for k in range(1, count))
    return {
        "run": row["run"],
        "gpus": count,
        "rollout_gpus": drawing,
        "rollout_share": rollout / (rollout + train),
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
    return tuple(row.get(name) for name in ("device", "part", "method", "lora", "group", "precision"))


def times(result: Mapping[str, Any]) -> Iterable[str]:
    """Yield the lines of the table of times and memory."""
    heads = ["model", "method", "weights", "distribution", "GPUs", "samples", "s per update", "speed-up"]
    yield from _head(*heads, "rollout share", "peak GB")
    gains = _gains(result)
    names = {"tiny": "embedded", "wan": "Wan 1.3B shape", "wan14": "Wan 14B shape"}
    for row in result["rows"]:
        if row["part"] in names:
            cells = [names[row["part"]], row["method"], "LoRA" if row["lora"] else "all", row["spread"], row["gpus"]]
            numbers = [row.get("seconds"), gains.get(_run(row)), row.get("rollout_share"), row.get("peak_gb")]
            yield "| " + " | ".join([*map(str, [*cells, row["samples"]]), *map(_number, numbers)]) + " |"


def split(result: Mapping[str, Any]) -> Iterable[str]:
    """Yield the lines of the table of passes whose tokens are split over GPUs."""
    heads = ["numbers", "GPUs", "s per pass", "s without Enhance-A-Video", "speed-up", "relative error"]
    yield from _head(*heads, "effect of Enhance-A-Video", "peak GB")
    gains = _gains(result)
    for row in result["rows"]:
        if row["part"] == "ulysses":
            names = ("seconds", "seconds_off", "speedup", "relative_error", "effect", "peak_gb")
            numbers = [{**row, "speedup": gains.get(_run(row))}.get(name) for name in names]
            yield f"| {row['precision']} | {row['gpus']} | " + " | ".join(map(_number, numbers)) + " |"


def _head(*names: str) -> Iterable[str]:
    return "| " + " | ".join(names) + " |", "|" + "---|" * len(names)


def _gains(result: Mapping[str, Any]) -> dict[tuple[Any, ...], float]:
    return {_run(each): each["speedup"] for each in result["speedups"]}


def _run(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["run"], row.get("device")


def equality(result: Mapping[str, Any]) -> Iterable[str]:
    """Yield the lines of the table of differences from one GPU."""
    yield from _head("run", "GPUs", "largest difference from one GPU")
    for row in result["rows"]:
        if row["part"] == "equal" and not row["run"].startswith(tuple(f"equal-{name}-one-of" for name in METHODS)):
            told = row["error"].splitlines()[0][:80] if row["error"] else f"{row['max_abs']:.1e}"
            yield f"| {row['run'].removeprefix('equal-')} | {row['gpus']} | {told} |"


def apart(result: Mapping[str, Any]) -> Iterable[str]:
    """Yield the lines of the table of separate GPUs for rollouts."""
    yield from _head("run", "rollout share", "s, data parallel", "s at best, separate", "gain at most")
    for row in result["separate"]:
        numbers = [row["rollout_share"], row["seconds"], row["separate_seconds"], row["gain"]]
        yield f"| {row['run']} | " + " | ".join(map(_number, numbers)) + " |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def measured_only(make: Callable[[Mapping[str, Any]], Iterable[str]]) -> Callable[[Mapping[str, Any]], Iterable[str]]:
    """Return a function that makes the same table, or the line `NOTHING` for a table without rows."""

    def made(result: Mapping[str, Any]) -> Iterable[str]:
        lines = list(make(result))
        return lines if len(lines) > HEAD else [docs_tables.NOTHING]

    return made


HEAD = 2
"""Lines of a table above its rows."""
MAKERS = {
    **{"rl_times": measured_only(times), "rl_equality": measured_only(equality), "rl_split": measured_only(split)},
    **{"rl_separate": measured_only(apart), "rl_gates": gate_lines},
}
"""Name of a table of docs/several_gpus.md -> the function that makes it."""
PAGE = Path(__file__).resolve().parents[1] / "docs" / "several_gpus.md"


def tables() -> dict[str, list[str]]:
    """Return the lines of each table for the committed result, or that nothing was measured."""
    there = (RESULTS / f"{RESULT_NAME}.json").is_file()
    return docs_tables.of_result(read_result(RESULT_NAME) if there else None, MAKERS)


if __name__ == "__main__":
    docs_tables.write(PAGE, tables())
