"""Training with rewards on several GPUs: equality with one GPU, seconds and memory of an update, the rollout's share.

    python -m benchmarks.rl_scale --part equal tiny split -o FILE [--gpus 1 2] [--seconds 600]
    python -m benchmarks.rl_scale --part wan -o FILE
    python -m benchmarks.rl_scale --part wan14 -o FILE
    python -m benchmarks.rl_scale --part all -o FILE --device cpu --tiny    # tests the benchmark with tiny models

Each run is a launch of its own with a time limit. FILE is written after each run; a further call with the same FILE
measures only the runs that it lacks (`--again` repeats all). Runs for which the time of a call does not suffice are
left out. Run it from the root of a checkout, because it uses the tiny models of the tests.

equal   all weights of a tiny Wan in float32, 4 updates, both trainers: largest difference from one GPU with averaged
        gradients (DDP), FSDP2 by accelerate and `fully_shard`, and of runs that resume on another number of GPUs
tiny    the recipes dancegrpo-tiny and nft-tiny, 256 samples per update, for each distribution of the weights
wan     the shape of Wan 2.1 1.3B with random weights, 480 x 832 x 33, LoRA and all weights, 4 samples per GPU of the
        largest launch and update; the recipes fast-video and nft-video, with one window per rollout and no networks
        in the reward; all weights also sharded
wan14   the same for LoRA on Wan 2.1 14B, 2 samples per GPU
split   the LoRA runs of `wan`, from which `separate` is computed: the best possible time if some GPUs only draw
        rollouts while the others train on the rollout before

All launches of a part have the same number of samples in an update, so the ratio of two times is a speed-up.

Expected on H200, written before the first measurement. One forward pass of a clip is 73 TFLOP with 1.3B and 505 TFLOP
with 14B (`postgen.families.cost`): 0.18 s and 1.3 s at 400 TFLOP/s. fast-video takes about 10 passes in the rollout
of a sample (12 in batches of 1) and 4 in training (with checkpointing), nft-video 10 and 6: for 8 samples 20 s and 23
s per update on one GPU, and the decoder (float32, perhaps 1 s per clip), so the rollout's share is 0.65 to 0.75. 14B
with 4 samples: 80 s. Two GPUs halve this: they exchange gradients once per update, 0.09 GB with LoRA and 5.7 GB with
all weights, 20 ms over NVLink. So `ddp_2gpu_speedup` should be 1.9 or more. Memory: 1.3B LoRA 2.8 GB of weights, 2.6
GB of checkpointed activations, some GB for a block and the decoder; all weights 16 bytes per parameter and 4 for the
average, 28 GB (40 GB with the reference and the old policy of DiffusionNFT); 14B LoRA 29 GB of weights and 6 GB of
checkpoints, on two GPUs with `fully_shard` 14 GB and 6 GB. The tiny recipes should gain least: a pass of 128 of their
clips takes some 20 ms, and rewards, which run on the CPU, and the decoder take as long as the passes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import ended
from benchmarks.faults_two_gpus import SPREADS, TOLERANCE, TRAINERS, Bench, compared, jobs_of, resumes
from benchmarks.gates import RESULTS, gate, largest, read_result, write_result
from benchmarks.launches import ROOT, launcher
from benchmarks.rl_scale_rows import LAUNCHES, METHODS, MODELS, SIZE, Row, rows_of
from benchmarks.rl_scale_tables import separate, speedups
from postgen.errors import UserError
from postgen.training.run_curves import read_metrics

PARTS = ("equal", "tiny", "split", "wan", "wan14")
RESULT = RESULTS / "rl_scale.json"
LEAST = 45.0
"""Seconds below which no further run is started."""


class Scale:
    """Measures runs until the time is over, and writes the file after each of them.

    Args:
        output: file to write; its rows of an earlier call are kept.
        device: "cuda" or "cpu".
        seconds: time for all runs of this call.
        again: measure runs that the file has already.
    """

    def __init__(self, output: Path, device: str, seconds: float, *, again: bool = False) -> None:
        self.output, self.device = output, device
        self.end = time.monotonic() + seconds
        found = read_result(output) if output.exists() else {"rows": []}
        self.rows: list[dict[str, Any]] = found["rows"]
        self.known = set() if again else {row["run"] for row in self.rows if not row["error"]}

    @property
    def left(self) -> float:
        """Seconds left for further runs."""
        return self.end - time.monotonic()

    def keep(self, row: Mapping[str, Any]) -> None:
        """Add a row, or replace the row of the same run, and write the file."""
        print(json.dumps({key: value for key, value in row.items() if value not in ("", None)}), flush=True)
        self.rows = [*(old for old in self.rows if old["run"] != row["run"]), dict(row)]
        write_result(self.output, payload(self.rows))

    def equal(self, count: int, *, small: bool) -> None:
        """Compare the weights of one process with those of `count`, for each way of distributing the weights."""
        wanted = {f"equal-{job.name}-of-{count}" for jobs in jobs_of(self.device, count) for job in jobs}
        if wanted <= self.known:
            print(f"equal, {count} processes: in the file already")
            return
        with tempfile.TemporaryDirectory() as name:
            bench = Bench(Path(name), self.device, count=count)
            bench.build()
            groups = jobs_of(self.device, count)
            if small:
                groups = [[job for job in jobs if job.trainer == TRAINERS[1]] for jobs in groups]
            sets: list[Callable[[], Any]] = [lambda: groups, *([] if small else [lambda: resumes(bench)])]
            for jobs in (jobs for each in sets for jobs in each()):
                names = [job.name for job in jobs]
                if self.left < LEAST:
                    print(f"left out, the time is over: {', '.join(names)}")
                    continue
                bench.run(jobs)
                for job in jobs:
                    found = compared(bench, job)
                    error = found["refused"] or "; ".join(found["log"])[-2000:]
                    own = {"part": "equal", "run": f"equal-{job.name}-of-{count}", "gpus": found["processes"]}
                    own |= {"of": count, "max_abs": found["max_abs"], "wall_seconds": found["seconds"]}
                    self.keep({**own, "error": error})

    def measure(self, row: Row) -> None:
        """Measure a run, unless the file has it or the time does not suffice."""
        if row.name in self.known:
            print(f"{row.name}: in the file already")
            return
        if self.left < min(LEAST, row.limit):
            print(f"{row.name}: left out, the time is over")
            return
        with tempfile.TemporaryDirectory() as name:
            self.keep(measured(row, Path(name), self.device, min(row.limit, self.left)))
        self.known.add(row.name)


def measured(row: Row, folder: Path, device: str, limit: float) -> dict[str, Any]:
    """Train a run in new processes and return its row.

    Args:
        row: the run.
        folder: empty folder for the run.
        device: "cuda" or "cpu".
        limit: time limit in seconds.
    """
    prompts = [{"prompt": f"a ball rolls to the left, number {number}"} for number in range(row.samples)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in prompts), encoding="utf-8")
    job = folder / "job.json"
    job.write_text(json.dumps({"row": {**row.as_dict(), "limit": limit}, "device": device}), encoding="utf-8")
    launch = LAUNCHES[row.spread]
    words = [*(launcher(launch, device, row.gpus) if launch else ()), "-m", "benchmarks.rl_scale_worker", str(job)]
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if device == "cpu" else {})}
    began = time.monotonic()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            # The workers end themselves at the limit; the launcher notices this within seconds.
            process.wait(timeout=limit + 30)
        except BaseException as error:
            process.send_signal(signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
    found = summary(row, folder)
    return {**found, "wall_seconds": round(time.monotonic() - began, 1)}


def summary(row: Row, folder: Path) -> dict[str, Any]:
    """Return the row of a run from the files in its folder.

    Seconds are those of an update: the median of the whole, and means of the parts of a rollout. A run that was ended
    after its first measured update has numbers and an error.
    """
    updates = [each for each in read_metrics(folder / "run" / "metrics.jsonl") if each["step"] > row.warm]
    ranks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("rank-*.json"))]
    error = next((each["error"] for each in ranks if each["error"]), "")
    if not error and len(ranks) < row.gpus:
        error = "ended without a result: " + (folder / "log").read_text(encoding="utf-8", errors="replace")[-1500:]
    found: dict[str, Any] = {"run": row.name, **row.as_dict(), "error": error, "measured_updates": len(updates)}
    if updates:
        means = {name: statistics.fmean(each[f"timing/{name}"] for each in updates) for name in PIECES}
        step = statistics.median(each["step_time"] for each in updates)
        found |= {"seconds": step, "rollout_share": sum(means.values()) / step}
        found |= {f"{name}_seconds": value for name, value in means.items()}
        found |= {"train_seconds": step - sum(means.values())}
    if ranks and not error:
        passes = sum(each["cost"]["forward_equivalents"] for each in ranks) / row.updates
        found["forward_equivalents"] = passes
        for name in ("peak_gb", "peak_at_start_gb"):
            found[name] = max((each[name] for each in ranks if each[name] is not None), default=None)
        found |= {"trained_parameters": max(each["trained_parameters"] for each in ranks)}
        if row.part in MODELS and not row.small and updates:
            found["tflops_per_gpu"] = passes * forward_tflop(row.part) / found["seconds"] / row.gpus
    return found


PIECES = ("rollout", "decode", "reward")
"""Timed pieces of a rollout, in the log as `timing/<piece>`."""


def forward_tflop(part: str) -> float:
    """Return the 10^12 floating point operations of a forward pass of one clip."""
    from postgen.families.cost import forward_cost

    config = {"_class_name": "WanTransformer3DModel", "attention_head_dim": 128, "text_dim": 4096, **MODELS[part]}
    return forward_cost(config, **SIZE).flops / 1e12


def payload(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of the result file for the rows of all runs."""
    found = speedups(rows)
    wanted = [f"wan-{method}-{kind}-ddp-2" for method in METHODS for kind in ("lora", "full")]
    times = {each["run"]: each["speedup"] for each in found}
    slowest = min(times[name] for name in wanted) if all(name in times for name in wanted) else None
    two = [row for row in rows if row["part"] == "equal" and row["of"] == 2 and row["gpus"] == 2]
    fresh = {f"equal-{trainer}-{spread}-of-2" for trainer in TRAINERS for spread in SPREADS}
    complete = fresh <= {row["run"] for row in two} and not any(row["error"] for row in two)
    return {
        "rows": list(rows),
        "speedups": found,
        "separate": separate(rows),
        "gates": [
            gate("two_gpu_max_abs", largest(two, "max_abs") if complete else None, "<=", TOLERANCE),
            gate("ddp_2gpu_speedup", slowest, ">=", 1.7),
        ],
    }


def check(options: argparse.Namespace) -> None:
    """Check the options.

    Raises:
        UserError: they contradict each other, or there are too few GPUs.
    """
    import torch

    if options.device == "cpu":
        if not options.tiny:
            raise UserError("--device cpu only tests the benchmark: add --tiny")
        if options.output.resolve() == RESULT.resolve():
            raise UserError(f"{RESULT.name} holds times of GPUs: give another file for --device cpu")
    elif torch.cuda.device_count() < max(options.gpus):
        raise UserError(
            f"--gpus has {max(options.gpus)}, but torch finds {torch.cuda.device_count()} CUDA devices: give smaller"
            " numbers, or --device cpu --tiny to test the benchmark"
        )


def parts_of(names: Sequence[str]) -> Iterator[str]:
    """Yield the parts to measure, in a fixed order, without the alias `all`."""
    yield from PARTS if "all" in names else (part for part in PARTS if part in names)


def work(options: argparse.Namespace) -> int:
    """Measure the parts and write the file."""
    check(options)
    scale = Scale(options.output, options.device, options.seconds, again=options.again)
    for part in parts_of(options.part):
        if part == "equal":
            for count in sorted(set(options.gpus) - {1}):
                scale.equal(count, small=options.tiny)
        else:
            for row in rows_of(part, options.gpus, small=options.tiny):
                scale.measure(row)
    for each in payload(scale.rows)["gates"]:
        print(
            f"{each['name']}: {each['value']} (target {each['op']} {each['target']}){'' if each['ok'] else ' MISSED'}"
        )
    return int(any(row["error"] for row in scale.rows))


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1 if a run has failed, 2 after wrong options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl_scale", description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=(*PARTS, "all"), required=True, help="what to measure")
    parser.add_argument("--gpus", nargs="+", type=int, choices=(1, 2, 4, 8), default=[1, 2], help="numbers of GPUs")
    parser.add_argument("--seconds", type=float, default=600.0, help="time of this call; default 600")
    parser.add_argument("-o", "--output", type=Path, required=True, help="result file, .json; continued if it exists")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a few runs of tiny models")
    parser.add_argument("--again", action="store_true", help="repeat runs that the file has")
    options = parser.parse_args(argv)
    return ended("rl_scale", lambda: work(options), "the file has the runs so far; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
