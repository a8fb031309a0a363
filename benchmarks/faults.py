"""Count silent faults: wrong results without a message. `python -m benchmarks.faults` writes `results/faults.json`.

Each gate has a function that returns its value and the rows from which the value follows. A gate without a function is
marked as not measured in the file. `--only NAME` measures some gates and keeps the values of the others in the file.
`--take FILE` measures nothing; it copies gates from a file of `benchmarks.faults_two_gpus`, with their date, device
and versions.
"""

import argparse
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import torch

from benchmarks.gates import RESULTS, amend_result, gate, read_result, write_result
from postgen.video import VideoError, probe, read_video

SEED = 18
TWO_GPUS = {"two_gpu_max_abs": ("<=", 1e-4), "two_gpu_combinations": ("==", 6), "resume_other_count": ("==", 1)}
CUTS = 25
FRAMES = 40
CODECS: Mapping[str, tuple[str, ...]] = {
    "webm": ("-c:v", "libvpx-vp9", "-cpu-used", "8", "-b:v", "400k"),
    "gif": (),
    "mkv": ("-c:v", "libx264"),
    "ts": ("-c:v", "libx264"),
    "ogv": ("-c:v", "libtheora", "-q:v", "6"),
    "avi": ("-c:v", "mpeg4", "-q:v", "4"),
    "mov": ("-c:v", "libx264", "-movflags", "+faststart"),
    "flv": ("-c:v", "libx264"),
}


def short_reads() -> tuple[int, list[dict[str, Any]]]:
    """Cut a file of each of eight containers at 25 random bytes; count cuts that read as a shorter video.

    A cut file should raise an error instead.
    """
    generator = random.Random(SEED)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for suffix, codec in CODECS.items():
            whole = Path(name, f"whole.{suffix}")
            _make(whole, codec)
            if _frames(whole) != (FRAMES, FRAMES):
                raise RuntimeError(f"the uncut {suffix} file has {FRAMES} frames, but is read as {_frames(whole)}")
            data = whole.read_bytes()
            cuts = sorted(generator.sample(range(1, len(data)), CUTS))
            short = [cut for cut in cuts if _reads_short(Path(name, f"cut.{suffix}"), data[:cut])]
            rows.append({"container": suffix, "bytes": len(data), "cuts": cuts, "short": short})
            print(f"{suffix}: {len(data)} bytes, {len(short)} of {CUTS} cuts read as a shorter video")
            if suffix == "ts":
                rows[-1]["between_packets"] = _between_packets(Path(name, "cut.ts"), data)
    return sum(len(row["short"]) for row in rows), rows


def _between_packets(path: Path, data: bytes) -> dict[str, int]:
    """Count short reads of a stream cut exactly between two packets, at every third boundary.

    No reader can detect these cuts, so they do not count for the gate.
    """
    cuts = range(188, len(data), 3 * 188)
    return {"cuts": len(cuts), "short": sum(_reads_short(path, data[:cut]) for cut in cuts)}


def _make(path: Path, codec: tuple[str, ...]) -> None:
    source = ("-f", "lavfi", "-i", f"testsrc2=size=96x64:rate=10:duration={FRAMES / 10}")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, *codec, str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def _reads_short(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    return any(frames is not None and frames < FRAMES for frames in _frames(path))


def _frames(path: Path) -> tuple[int | None, int | None]:
    """Return the number of frames that `probe` counts and that `read_video` returns; None stands for an error."""
    found: list[int | None] = []
    for count in (lambda: probe(path).frames, lambda: len(read_video(path))):
        try:
            found.append(count())
        except VideoError:
            found.append(None)
    return found[0], found[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A gate, and the function that measures it (None if there is no function)."""

    name: str
    op: str
    target: float
    measure: Callable[[], tuple[float, list[dict[str, Any]]]] | None = None
    gpus: int = 0
    """Number of CUDA devices that the measurement needs. On a machine with fewer, the gate is not measured."""

    @property
    def here(self) -> bool:
        """Whether this machine can measure the gate."""
        return self.measure is not None and torch.cuda.device_count() >= self.gpus


def threads_wrong() -> tuple[float, list[dict[str, Any]]]:
    """Return how many calls in threads differ from the same calls alone, and the numbers by plug-in."""
    from benchmarks import faults_threads

    found = faults_threads.wrong_by_plug_in()
    return sum(found.values()), [
        {"plug_in": name, "wrong": n, "of": faults_threads.CALLS} for name, n in found.items()
    ]


def options_without_effect() -> tuple[float, list[dict[str, Any]]]:
    """Return how many options, over all families, have no effect and are not refused, and the outcome of each."""
    from benchmarks.faults_options import outcomes

    found = outcomes()
    rows = [{"family": each.family, "option": each.option, "state": each.state} for each in found]
    return sum(not each.holds for each in found), rows


def rss_mb_per_1000_steps() -> tuple[float, list[dict[str, Any]]]:
    """Return the largest growth of memory per 1,000 steps among the trainers, and the readings of each."""
    from benchmarks.faults_growth import by_trainer

    rows = by_trainer()
    return max(row["mb_per_1000_steps"] for row in rows), rows


def lora_formats_round_trip() -> tuple[float, list[dict[str, Any]]]:
    """Return the share of pairs (family, format) in which a LoRA is restored exactly, and the outcome of each pair.

    Pairs that are refused do not count.
    """
    from benchmarks.faults_lora import all_outcomes

    found = all_outcomes()
    rows = [{**dataclasses.asdict(each), "comes_back": each.holds} for each in found]
    return sum(each.holds for each in found) / sum(not each.refused for each in found), rows


def half_written() -> tuple[float, list[dict[str, Any]]]:
    """Return how many of 50 interrupted commands left a half-written file, and the outcome of each command."""
    from benchmarks import faults_interrupts

    return faults_interrupts.half_written()


def score_peak() -> tuple[float, list[dict[str, Any]]]:
    """Return the peak memory in MB of `postgen score` on a video of 10,000 frames, and one row per run."""
    from benchmarks.faults_score import by_rewards

    rows = by_rewards()
    return max(row["peak_mb"] for row in rows), rows


def server_lockout() -> tuple[float, list[dict[str, Any]]]:
    """Return the longest wait for a score in seconds, over all kinds of bad clients, and one row per kind.

    Raises:
        RuntimeError: if a connection was reset, or if the server wrote to the terminal.
    """
    from benchmarks.faults_server import by_attack

    rows = by_attack()
    if resets := sum(row["resets"] + row["lines"] for row in rows):
        raise RuntimeError(f"{resets} connections were reset or lines written, but there must be none: {rows}")
    return max(row["longest_wait_s"] for row in rows), rows


def bad_inputs() -> tuple[float, list[dict[str, Any]]]:
    """Return the number of wrong inputs in the tables of `tests/bad_inputs`, and the result of each table."""
    from benchmarks import faults_inputs

    return faults_inputs.total("wrong"), list(faults_inputs.measured())


def tracebacks() -> tuple[float, list[dict[str, Any]]]:
    """Return how many inputs end in a traceback or in no answer, and the number in each table."""
    from benchmarks import faults_inputs

    rows = [{"table": row["table"], "tracebacks": row["traceback"]} for row in faults_inputs.measured()]
    return faults_inputs.total("traceback"), rows


def silent_accepts() -> tuple[float, list[dict[str, Any]]]:
    """Return how many inputs are accepted silently with a wrong meaning, and the number in each table."""
    from benchmarks import faults_inputs

    rows = [{"table": row["table"], "silent_accepts": row["silent"]} for row in faults_inputs.measured()]
    return faults_inputs.total("silent"), rows


def two_gpus(name: str) -> tuple[float, list[dict[str, Any]]]:
    """Return the value of a gate of `benchmarks.faults_two_gpus`, and the rows of its runs."""
    from benchmarks import faults_two_gpus

    return _of_two_gpus(name, faults_two_gpus.measured_once())


def _of_two_gpus(name: str, found: Mapping[str, Any]) -> tuple[float, list[dict[str, Any]]]:
    value = next(row["value"] for row in found["gates"] if row["name"] == name)
    if value is None:
        raise RuntimeError(f"{name} has no value: no run of two processes finished")
    rows = found["rows"]["resume" if name == "resume_other_count" else "two_gpus"]
    if name == "two_gpu_combinations":
        rows = [{"run": row["run"], "trained": not row["log"]} for row in rows if row["processes"] == 2]
    return value, rows


FAULTS = (
    Fault(name="short_reads", op="==", target=0, measure=short_reads),
    Fault(name="threads_wrong", op="==", target=0, measure=threads_wrong),
    Fault(name="rss_mb_per_1000_steps", op="<=", target=0.3, measure=rss_mb_per_1000_steps),
    Fault(name="options_without_effect", op="==", target=0, measure=options_without_effect),
    Fault(name="lora_formats_round_trip", op="==", target=1.0, measure=lora_formats_round_trip),
    Fault(name="half_written", op="==", target=0, measure=half_written),
    Fault(name="score_peak_mb_10000_frames", op="<=", target=600, measure=score_peak),
    Fault(name="server_lockout_s", op="<=", target=5, measure=server_lockout),
    Fault(name="bad_inputs", op=">=", target=300, measure=bad_inputs),
    Fault(name="tracebacks", op="==", target=0, measure=tracebacks),
    Fault(name="silent_accepts", op="==", target=0, measure=silent_accepts),
    *(
        Fault(name=name, op=op, target=target, measure=partial(two_gpus, name), gpus=2)
        for name, (op, target) in TWO_GPUS.items()
    ),
)


def measured(only: list[str], before: Mapping[str, Any]) -> dict[str, Any]:
    """Measure gates; return the payload of the result file: gates, their rows, and the names of gates not measured.

    Args:
        only: names of the gates to measure; an empty list means all.
        before: content of the present result file, from which the other gates keep their values and rows.
    """
    values, rows = _values(before), dict(before.get("rows", {}))
    elsewhere = dict(before.get("remeasured", {}))
    for fault in FAULTS:
        if fault.measure is not None and fault.here and (not only or fault.name in only):
            values[fault.name], rows[fault.name] = fault.measure()
            elsewhere.pop(fault.name, None)
    gates = _gates(values)
    missing = [row["name"] for row in gates if row["value"] is None]
    found = {"seed": SEED, "not_measured": missing, "gates": gates, "rows": rows}
    return found | ({"remeasured": elsewhere} if elsewhere else {})


def take(output: Path, source: Path) -> None:
    """Copy the gates of two GPUs and their rows, measured on another machine, into a result file.

    Args:
        output: existing result file of this program.
        source: result file of `benchmarks.faults_two_gpus`; its date, device, versions and settings are copied too.
    """
    found, before = read_result(source), read_result(output)
    values, rows = _values(before), dict(before["rows"])
    for name in TWO_GPUS:
        values[name], rows[name] = _of_two_gpus(name, found)
    missing = [name for name in before["not_measured"] if name not in TWO_GPUS]
    measured = {"rows": rows, "not_measured": missing}
    amend_result(output, measured, found["settings"], _gates(values), stamp=found, parts=TWO_GPUS)


def _values(result: Mapping[str, Any]) -> dict[str, float | None]:
    return {row["name"]: row["value"] for row in result.get("gates", [])}


def _gates(values: Mapping[str, float | None]) -> list[dict[str, Any]]:
    return [gate(fault.name, values.get(fault.name), fault.op, fault.target) for fault in FAULTS]


def main(argv: list[str] | None = None) -> int:
    """Measure or copy the gates, and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.splitlines()[0])
    names = [fault.name for fault in FAULTS if fault.here]
    parser.add_argument("--only", nargs="+", choices=names, default=[], help="measure only these gates")
    parser.add_argument(
        "--take", type=Path, metavar="FILE", help="copy the gates of this file of benchmarks.faults_two_gpus"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "faults.json", help="path of the result file")
    options = parser.parse_args(argv)
    if options.take:
        take(options.output, options.take)
        return 0
    before = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
    payload = measured(options.only, before)
    write_result(options.output, payload)
    for name in payload["not_measured"]:
        print(f"{name}: not measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
