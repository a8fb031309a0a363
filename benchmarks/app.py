"""The app under load and attack, and as a pip user gets it. `python -m benchmarks.app` writes `results/app.json`.

Everything is asked of real servers, `postgen demo` in processes of their own, on the CPU. Parts: `start` (the median
of three starts), `jobs` (`benchmarks.app_jobs`), `paths` (`benchmarks.app_paths`), `uploads`
(`benchmarks.app_uploads`), `wheel` (`benchmarks.app_wheel`). The file is written after each part, so what an
interrupted run has measured stays; `--only PART` measures some and keeps what the file says of the others. `--tiny`
goes through it with less of everything, in less than a minute, and writes elsewhere. `--docs` measures nothing and
writes the table of `docs/app.md` anew.
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
"""Fewest tries to read a file of the server that count."""
PAGE = RESULTS.parent.parent / "docs" / "app.md"


def start(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """Start the command so many times; return the seconds until its page is answered, and the median of them."""
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
    """As `benchmarks.app_jobs.measured`."""
    from benchmarks.app_jobs import measured

    return measured(folder, tiny=tiny)


def paths(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """As `benchmarks.app_paths.measured`."""
    from benchmarks.app_paths import measured

    return measured(folder, tiny=tiny)


def uploads(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """As `benchmarks.app_uploads.measured`, with the value of its gate."""
    from benchmarks.app_uploads import measured, stopped

    found = measured(folder)
    return {"stopped": stopped(found), **found}


def wheel(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """As `benchmarks.app_wheel.measured`, with the value of its gate."""
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
    """Return the gates of what was measured; what was not has no value."""
    found = {name: parts.get(name, {}) for name in PARTS}
    lost = found["jobs"].get("lost")
    # A page that cannot be read any more, or too few tries, show nothing.
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
    """Measure parts one after another and write the file after each; return the gates.

    Args:
        only: names of parts.
        output: the file, from which the other parts are kept.
        tiny: less of everything.
    """
    before = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    parts = {name: part for name, part in before.get("parts", {}).items() if name in PARTS}
    for name in only:
        print(f"{name}: begins", flush=True)
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
    """Return what the numbers depend on: processors, memory, and whether others were at work."""
    return {
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "shared": "other work ran on the same cores; CPU seconds stand beside wall seconds, the load before each part",
    }


def _children_seconds() -> float:
    """Return the processor seconds of this process and of those that it started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def markdown(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the table of `docs/app.md`; what was not measured says so."""
    parts = result["parts"]
    rows = []
    for row in result["gates"]:
        part, words = _TOLD[row["name"]]
        told = words(parts[part]) if part in parts else "not measured yet"
        value = "" if row["value"] is None else f"{row['value']:g}"
        rows.append([f"`{row['name']}`", value, f"{row['op']} {row['target']:g}", told])
    yield from table(["Gate", "Measured", "Asked for", "What"], rows)


def _of_jobs(part: Mapping[str, Any]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in part["by_kind"].items() if kind != "make")
    return (
        f"of {part['jobs']} jobs of {part['users']} users at once ({kinds}), valid ones without video and sidecar;"
        f" {part['wall_seconds']:.0f} s, {part['server_cpu_seconds']:.0f} s of CPU"
    )


def _of_start(part: Mapping[str, Any]) -> str:
    return (
        f"until the page answers, median of {len(part['rows'])} starts: {part['cpu_seconds']:.1f} s of CPU;"
        f" {part['measured']['load_before']:g} processes wanted the cores before"
    )


_TOLD: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "queued_jobs_lost": ("jobs", _of_jobs),
    "memory_growth_mb": (
        "jobs",
        lambda part: f"after these jobs, above {part['after_first_jobs']['rss_mb']:.0f} MB after the first ones",
    ),
    "start_seconds": ("start", _of_start),
    "server_paths_readable": ("paths", lambda part: f"files of the server that {part['tries']} tries could read"),
    "oversize_uploads_stopped": (
        "uploads",
        lambda part: (
            f"of {part['uploads']} uploads over a limit {len(part['got_through'])} got through, and"
            f" {len(part['left_on_disk'])} left something on the disk"
        ),
    ),
    "wheel_install_works": (
        "wheel",
        lambda part: f"the wheel in a fresh environment, its commands and its app, {len(part['rows'])} steps",
    ),
}
"""Part that measures each gate, and what the docs say of its number."""


def write_table(page: Path = PAGE) -> None:
    """Write the table of the docs anew, of the result that is there."""
    docs_tables.write(page, {"app": markdown(read_result("app"))})


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.app", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="measure these alone")
    parser.add_argument("--tiny", action="store_true", help="less of everything, to see that it works")
    parser.add_argument("--output", type=Path, help="results/app.json, or out/app-tiny.json with --tiny")
    parser.add_argument("--docs", action="store_true", help="measure nothing, write the table of docs/app.md")
    options = parser.parse_args(argv)
    if options.docs:
        write_table()
        return 0
    output = options.output or (Path("out/app-tiny.json") if options.tiny else RESULTS / "app.json")
    if options.tiny and output.resolve() == (RESULTS / "app.json").resolve():
        parser.error("what --tiny measures is no result: name another --output")
    for row in measure(options.only, output, tiny=options.tiny):
        print(
            f"{row['name']}: {row['value']}, asked for {row['op']} {row['target']:g}{'' if row['ok'] else ': MISSED'}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
