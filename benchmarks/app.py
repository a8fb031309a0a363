"""Benchmark of the app under load, under attack, and installed with pip: `python -m benchmarks.app`.

The benchmark starts real servers (`postgen demo`) as processes on the CPU and writes `results/app.json`. Parts:
`start` (median time of three starts), `jobs` (`benchmarks.app_jobs`), `paths` (`benchmarks.app_paths`), `uploads`
(`benchmarks.app_uploads`) and `wheel` (`benchmarks.app_wheel`). The file is written after each part, so an interrupted
run keeps its finished parts. `--only PART` measures some parts and keeps the results of the others. `--tiny` is a
short run of less than a minute that writes to another file. `--docs` only rewrites the table in `docs/app.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]

from benchmarks import docs_tables
from benchmarks.gates import RESULTS, Gate, gate, read_result, write_result
from benchmarks.lit_tables import table

STARTS = 3
TRIES = 20
"""Smallest number of tries to read a file of the server for which the gate has a value."""
PAGE = RESULTS.parent.parent / "docs" / "app.md"


def start(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """Start the command several times; return wall and CPU seconds until the page answers, with their medians."""
    from tests.apps.served import serving

    rows = []
    for number in range(1 if tiny else STARTS):
        own = folder / str(number)
        own.mkdir()
        with serving(["-m", "postgen", "demo", "--port", "0"], own, seconds=600) as served:
            times = psutil.Process(served.process.pid).cpu_times()
        rows.append({"wall_seconds": round(served.seconds, 2), "cpu_seconds": round(times.user + times.system, 2)})
        print(f"start {number + 1}: {rows[-1]}", flush=True)
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]} | {"rows": rows}


def jobs(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """Run `benchmarks.app_jobs.measured`."""
    from benchmarks.app_jobs import measured

    return measured(folder, tiny=tiny)


def paths(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """Run `benchmarks.app_paths.measured`."""
    from benchmarks.app_paths import measured

    return measured(folder, tiny=tiny)


def uploads(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """Run `benchmarks.app_uploads.measured` and add the value of its gate."""
    from benchmarks.app_uploads import measured, stopped

    found = measured(folder)
    return {"stopped": stopped(found), **found}


def wheel(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """Run `benchmarks.app_wheel.measured` and add the value of its gate."""
    from benchmarks.app_wheel import measured, works

    found = measured(folder, tiny=tiny)
    return {"works": works(found), **found}


PARTS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "start": start,
    "jobs": jobs,
    "paths": paths,
    "uploads": uploads,
    "wheel": wheel,
}


def gates(parts: Mapping[str, Mapping[str, Any]]) -> list[Gate]:
    """Return the gates; the gate of a part that was not measured has no value."""
    found = {name: parts.get(name, {}) for name in PARTS}
    lost = found["jobs"].get("lost")
    # "No file was readable" means nothing if results cannot be read either, or if there were too few tries.
    sound = found["paths"].get("result_is_given") and found["paths"].get("tries", 0) >= TRIES
    return [
        gate("queued_jobs_lost", None if lost is None else len(lost), "==", 0),
        gate("memory_growth_mb", found["jobs"].get("memory_growth_mb"), "<=", 100),
        gate("start_seconds", found["start"].get("wall_seconds"), "<=", 15),
        gate("server_paths_readable", len(found["paths"]["readable"]) if sound else None, "==", 0),
        gate("oversize_uploads_stopped", found["uploads"].get("stopped"), "==", 1),
        gate("wheel_install_works", found["wheel"].get("works"), "==", 1),
    ]


def measure(only: Sequence[str], output: Path, *, tiny: bool) -> list[Gate]:
    """Measure parts one after another, write the file after each part, and return the gates.

    Args:
        only: names of the parts.
        output: result file; parts in it that are not measured again are kept.
        tiny: whether to run the short version.
    """
    before = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    parts = {name: part for name, part in before.get("parts", {}).items() if name in PARTS}
    for name in only:
        print(f"{name}: started", flush=True)
        load, begin, used = os.getloadavg()[0], time.monotonic(), _children_seconds()
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[name](Path(folder), tiny=tiny)
        stamp = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "wall_seconds": round(time.monotonic() - begin, 1),
            "cpu_seconds": round(_children_seconds() - used, 1),
            "load_before": round(load, 2),
        }
        parts[name] = {"measured": stamp, **found}
        print(f"{name}: {stamp}", flush=True)
        ordered = {part: parts[part] for part in PARTS if part in parts}
        output.parent.mkdir(parents=True, exist_ok=True)
        write_result(output, {"machine": machine(), "tiny": tiny, "gates": gates(parts), "parts": ordered})
    return gates(parts)


def machine() -> dict[str, Any]:
    """Return the facts of the machine that the numbers depend on: CPU cores, memory, other load."""
    return {
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "shared": "other programs used the same cores: see the CPU seconds and the load average of each part",
    }


def _children_seconds() -> float:
    """Return the CPU seconds of this process and of its child processes that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def markdown(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the table in `docs/app.md`; rows of missing parts say "not measured yet"."""
    parts = result["parts"]
    rows = []
    for row in result["gates"]:
        part, words = _TOLD[row["name"]]
        told = words(parts[part]) if part in parts else "not measured yet"
        value = "" if row["value"] is None else f"{row['value']:g}"
        rows.append([f"`{row['name']}`", value, f"{row['op']} {row['target']:g}", told])
    yield from table(["Gate", "Measured", "Target", "Meaning"], rows)


def _of_jobs(part: Mapping[str, Any]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in part["by_kind"].items() if kind != "make")
    return (
        f"valid jobs without a video and a sidecar, of {part['jobs']} jobs from {part['users']} concurrent users"
        f" ({kinds}); {part['wall_seconds']:.0f} s, {part['server_cpu_seconds']:.0f} s of CPU time"
    )


def _of_start(part: Mapping[str, Any]) -> str:
    return (
        f"seconds until the page answers, median of {len(part['rows'])} starts; {part['cpu_seconds']:.1f} s of CPU"
        f" time, load average of the machine before: {part['measured']['load_before']:g}"
    )


_TOLD: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "queued_jobs_lost": ("jobs", _of_jobs),
    "memory_growth_mb": (
        "jobs",
        lambda part: (
            f"memory of the server after these jobs, above the {part['after_first_jobs']['rss_mb']:.0f} MB after its"
            " first jobs"
        ),
    ),
    "start_seconds": ("start", _of_start),
    "server_paths_readable": (
        "paths",
        lambda part: f"private files of the server that {part['tries']} tries could read",
    ),
    "oversize_uploads_stopped": (
        "uploads",
        lambda part: (
            f"1 if every upload over a limit is refused: of {part['uploads']} uploads"
            f" {len(part['got_through'])} were accepted, and {len(part['left_on_disk'])} left files on the disk"
        ),
    ),
    "wheel_install_works": (
        "wheel",
        lambda part: (
            f"1 if the wheel installs in a fresh environment and its commands and app work, {len(part['rows'])} steps"
        ),
    ),
}
"""Gate -> its part, and a function that writes the meaning of its number for the table in the docs."""


def write_table(page: Path = PAGE) -> None:
    """Rewrite the table of the docs page from the stored result."""
    docs_tables.write(page, {"app": markdown(read_result("app"))})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.app", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure (default: all)"
    )
    parser.add_argument("--tiny", action="store_true", help="short run that checks the benchmark itself")
    parser.add_argument(
        "--output", type=Path, help="result file (default: results/app.json, with --tiny out/app-tiny.json)"
    )
    parser.add_argument("--docs", action="store_true", help="only rewrite the table in docs/app.md")
    options = parser.parse_args(argv)
    if options.docs:
        write_table()
        return 0
    output = options.output or (Path("out/app-tiny.json") if options.tiny else RESULTS / "app.json")
    if options.tiny and output.resolve() == (RESULTS / "app.json").resolve():
        parser.error("a --tiny run must not overwrite results/app.json: give another --output")
    for row in measure(options.only, output, tiny=options.tiny):
        print(f"{row['name']}: {row['value']}, target {row['op']} {row['target']:g}{'' if row['ok'] else ': MISSED'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
