"""What `benchmarks.rl_scale` writes to `scaling.json`: the rows, what follows from them, and the gates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.faults_two_gpus import SPREADS, TOLERANCE, TRAINERS
from benchmarks.gates import Gate, gate, largest
from benchmarks.rl_scale_rows import METHODS
from benchmarks.rl_scale_tables import separate, speedups
from benchmarks.rl_scale_ulysses import PART

EXACT = 2e-3
"""Largest relative error of an output whose tokens are split."""
SEEN = 5 * EXACT
"""Smallest relative difference that Enhance-A-Video must make, so that its absence would miss the gate."""
Rows = Sequence[Mapping[str, Any]]


def payload(rows: Rows) -> dict[str, Any]:
    """Return the content of the result file for the rows of all runs."""
    found = speedups(rows)
    return {"rows": list(rows), "speedups": found, "separate": separate(rows), "gates": gates_of(rows, found)}


def gates_of(rows: Rows, found: Rows) -> list[Gate]:
    """Return the gates; a gate without all its runs has no value, which misses it.

    Gates of four and eight GPUs exist only after a run on so many GPUs, also after a failed one.

    Args:
        rows: the rows of all runs.
        found: what `speedups` returns for them.
    """
    most = max((row["gpus"] for row in rows), default=1)
    fresh = {f"equal-{trainer}-{spread}-of-2" for trainer in TRAINERS for spread in SPREADS}
    two = [row for row in rows if row["part"] == "equal" and row["of"] == 2 and row["gpus"] == 2]
    fsdp2 = {f"equal-{trainer}-fsdp2-of-2" for trainer in TRAINERS}
    gates = [
        gate("two_gpu_max_abs", _furthest(two, fresh), "<=", TOLERANCE),
        gate("ddp_2gpu_speedup", _slowest(found, 2, "speedup"), ">=", 1.7),
        gate("ddp_efficiency_2", _slowest(found, 2, "efficiency"), ">=", 0.85),
        gate("fsdp2_equal_2", _furthest([row for row in two if row["run"] in fsdp2], fsdp2), "<=", TOLERANCE),
        gate("ulysses_exact_2", split_error(rows, 2), "<=", EXACT),
    ]
    if most >= 8:
        gates.append(gate("ddp_efficiency_8", _slowest(found, 8, "efficiency"), ">=", 0.8))
    if most >= 4:
        faster = [each for each in found if each["run"] == f"{PART}-bfloat16-4"]
        gates.append(gate("ulysses_step_speedup_4", min(_values(faster, "speedup"), default=None), ">=", 3))
    return gates


def split_error(rows: Rows, count: int) -> float | None:
    """Return the largest relative error of Wan 14B in bfloat16 with its tokens split over `count` GPUs.

    None if it was not measured, or if Enhance-A-Video did not change the output enough to be seen.
    """
    own = [row for row in rows if row["run"] == f"{PART}-bfloat16-{count}"]
    if any(row["error"] or row["effect"] < SEEN for row in own):
        return None
    return largest(own, "relative_error")


def _furthest(rows: Rows, wanted: set[str]) -> float | None:
    """Return the largest difference from one GPU, if all wanted runs are there and none has failed."""
    complete = wanted <= {row["run"] for row in rows} and not any(row["error"] for row in rows)
    return largest(rows, "max_abs") if complete else None


def _slowest(found: Rows, count: int, key: str) -> float | None:
    """Return the smallest value of the runs of Wan with averaged gradients, if those of 1.3B are all there.

    Runs of Wan 14B count if they are there.
    """
    wanted = {f"wan-{method}-{kind}-ddp-{count}" for method in METHODS for kind in ("lora", "full")}
    large = {f"wan14-{method}-lora-ddp-{count}" for method in METHODS}
    if not wanted <= {each["run"] for each in found}:
        return None
    return min(_values([each for each in found if each["run"] in wanted | large], key))


def _values(rows: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    return [float(row[key]) for row in rows]
