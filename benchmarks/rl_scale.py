"""Several GPUs: equality with one GPU, seconds and memory of an update of training with rewards, split forward passes.

    python -m benchmarks.rl_scale --part equal ulysses -o FILE [--gpus 1 2] [--seconds 540]
    python -m benchmarks.rl_scale --part wan -o FILE
    python -m benchmarks.rl_scale --part all -o FILE --device cpu --tiny    # tests the benchmark with tiny models
    python -m benchmarks.rl_scale --report -o benchmarks/results/scaling.json    # only the gates

Each run is a launch of its own with a time limit. FILE is written after each run; a further call with the same FILE
measures only the runs that it lacks for this machine (`--again` repeats all). Runs for which the time of a call does
not suffice are left out, and the exit code is 3: repeat the call. Run it from the root of a checkout, because it uses
the tiny models of the tests. On GPUs, `--tiny` with a FILE of its own shows in a few minutes whether all parts start.

equal   all weights of a tiny Wan in float32, 4 updates, both trainers: largest difference from one GPU with averaged
        gradients (DDP), FSDP2 by accelerate and `fully_shard`, and of runs that resume on another number of GPUs:
        from one to N, and from N to one and to N / 2
ulysses a forward pass of Wan 2.1 14B at 720p (81 frames, random weights) with Enhance-A-Video, its tokens split by
        diffusers' Ulysses attention: seconds, memory, and the difference from the pass of one GPU
split   the LoRA runs of `wan`, from which `separate` is computed: the best possible time if some GPUs only draw
        rollouts while the others train on the rollout before
wan     the shape of Wan 2.1 1.3B with random weights, 480 x 832 x 33, LoRA and all weights, 4 samples per GPU and
        update (8 on one GPU); the recipes fast-video and nft-video, with one window per rollout and no networks in
        the reward; also sharded
wan14   the same for LoRA on Wan 2.1 14B, 2 samples per GPU (4 on one GPU)
tiny    the recipes dancegrpo-tiny and nft-tiny, 256 samples per update, for each distribution of the weights

One and two GPUs have the same samples in an update. A speed-up is the ratio of samples per second on one machine.

Calls of at most 10 minutes, the most important ones first, with estimated minutes. Two GPUs, with `--gpus 1 2`:

    --part equal ulysses       8   gates two_gpu_max_abs, fsdp2_equal_2, ulysses_exact_2
    --part wan                13   two calls: averaged gradients, gates ddp_2gpu_speedup, ddp_efficiency_2
    --part wan                11   two calls more: sharded weights
    --part wan14              17   two calls
    --part tiny                8

Four GPUs, with `--gpus 1 4`; afterwards `--gpus 1 2 4` adds the rows of two GPUs of this machine:

    --part equal ulysses       9   gate ulysses_step_speedup_4; 4 processes resume as 2
    --part wan                13   two calls: averaged gradients
    --part wan                11   two calls more: sharded weights
    --part wan14              17   two calls

Eight GPUs, with `--gpus 1 8` where nothing else is said; afterwards `--gpus 1 2 4 8` adds the rows between:

    --part split               7   the first half of gate ddp_efficiency_8
    --part wan                 7   the second half, and the beginning of the sharded runs
    --part ulysses --gpus 1 4 8    7   gate ulysses_step_speedup_4
    --part equal --gpus 8      5   8 processes resume as 4
    --part wan                11   two calls: sharded weights
    --part wan14              17   two calls

Expected on H200, written before the first measurement. One forward pass of a clip is 73 TFLOP with 1.3B and 505 TFLOP
with 14B (`postgen.families.cost`): 0.18 s and 1.3 s at 400 TFLOP/s. fast-video takes about 10 passes in the rollout
of a sample (12 in batches of 1) and 4 in training (with checkpointing), nft-video 10 and 6: for 8 samples 20 s and 23
s per update on one GPU, and the decoder (float32, perhaps 1 s per clip), so the rollout's share is 0.65 to 0.75. 14B
with 4 samples: 80 s. Two GPUs halve this: they exchange gradients once per update, 0.09 GB with LoRA and 5.7 GB with
all weights, 20 ms over NVLink. So `ddp_2gpu_speedup` should be 1.9 or more. Memory: 1.3B LoRA 2.8 GB of weights, 2.6
GB of checkpointed activations, some GB for a block and the decoder; all weights 16 bytes per parameter and 4 for the
average, 28 GB (40 GB with the reference and the old policy of DiffusionNFT); 14B LoRA 29 GB of weights and 6 GB of
checkpoints, on two GPUs with `fully_shard` 14 GB and 6 GB. The tiny recipes should gain least: a pass of 128 of their
clips takes some 20 ms, and rewards, which run on the CPU, and the decoder take as long as the passes. A pass of 14B at
720p is 6,500 TFLOP, 13 s on one GPU at 500 TFLOP/s. Each block exchanges queries, keys, values and the output, and
queries and keys once more for Enhance-A-Video: of four GPUs each sends 0.9 GB per block, 3 ms of some 85. So four GPUs
should be at least 3.5 times as fast as one.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import ended
from benchmarks.faults_two_gpus import TRAINERS, Bench, compared, jobs_of, resumes
from benchmarks.gates import RESULTS, amend_result, read_result, write_result
from benchmarks.gates import device as machine
from benchmarks.launches import ROOT, launcher
from benchmarks.rl_scale_gates import gates_of, payload
from benchmarks.rl_scale_rows import LAUNCHES, MODELS, SIZE, Row, rows_of
from benchmarks.rl_scale_tables import RESULT_NAME, speedups
from benchmarks.rl_scale_ulysses import PART as ULYSSES
from benchmarks.rl_scale_ulysses import Split, splits_of
from postgen.errors import UserError
from postgen.training.run_curves import read_metrics

PARTS = ("equal", ULYSSES, "split", "wan", "wan14", "tiny")
RESULT = RESULTS / f"{RESULT_NAME}.json"
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
        self.machine = machine()
        mine = [row for row in self.rows if row.get("device") == self.machine]
        self.known = set() if again else {row["run"] for row in mine if not row["error"]}
        self.left_out: list[str] = []
        """Runs for which the time did not suffice."""

    @property
    def left(self) -> float:
        """Seconds left for further runs."""
        return self.end - time.monotonic()

    def keep(self, row: Mapping[str, Any]) -> None:
        """Add a row, or replace the row of the same run, and write the file."""
        print(json.dumps({key: value for key, value in row.items() if value not in ("", None)}), flush=True)
        new = {**row, "device": self.machine}
        self.rows = [*(old for old in self.rows if identity(old) != identity(new)), new]
        write_result(self.output, payload(self.rows))

    def equal(self, count: int, *, small: bool) -> None:
        """Compare the weights of one process with those of `count`, for each way of distributing the weights."""
        with tempfile.TemporaryDirectory() as name:
            bench = Bench(Path(name), self.device, count=count)
            trainers = TRAINERS[1:] if small else TRAINERS
            groups = [
                [job for job in jobs if job.trainer in trainers]
                for jobs in [*jobs_of(self.device, count), *resumes(bench)]
            ]
            # A comparison needs the run of one process, and a resume the checkpoint of another run.
            if {f"equal-{job.name}-of-{count}" for jobs in groups for job in jobs} <= self.known:
                print(f"equal, {count} processes: in the file already")
                return
            bench.build()
            for jobs in groups:
                if self.left < LEAST:
                    self.leave_out(*(f"equal-{job.name}-of-{count}" for job in jobs))
                    continue
                bench.run(jobs)
                for job in jobs:
                    self.keep(equal_row(compared(bench, job), count))

    def leave_out(self, *names: str) -> None:
        """Note runs for which the time does not suffice."""
        print(f"left out, the time is over: {', '.join(names)}")
        self.left_out += names

    def measure(self, row: Row | Split) -> None:
        """Measure a run, unless the file has it or the time does not suffice."""
        if row.name in self.known:
            print(f"{row.name}: in the file already")
            return
        if self.left < row.least:
            self.leave_out(row.name)
            return
        with tempfile.TemporaryDirectory() as name:
            self.keep(measured(row, Path(name), self.device, min(row.limit, self.left)))
        self.known.add(row.name)


def identity(row: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return what a row is kept by. Each machine has its own rows, so that a ratio is of one machine."""
    return row["run"], row.get("device")


def equal_row(found: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the row of a run whose weights were compared with those of one process.

    Args:
        found: what `compared` returned.
        count: number of processes of the comparison; a resumed run may have fewer.
    """
    row = {"part": "equal", "run": f"equal-{found['run']}-of-{count}", "gpus": found["processes"], "of": count}
    row |= {"max_abs": found["max_abs"], "wall_seconds": found["seconds"]}
    return {**row, "error": found["refused"] or "; ".join(found["log"])[-2000:]}


def measured(row: Row | Split, folder: Path, device: str, limit: float) -> dict[str, Any]:
    """Do a run in new processes and return its row.

    Args:
        row: the run.
        folder: empty folder for the run.
        device: "cuda" or "cpu".
        limit: time limit in seconds.
    """
    job = job_of(row, folder, device, limit)
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
            end(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
    found = summary(row, folder) if isinstance(row, Row) else summary_of_split(row, folder)
    return {**found, "wall_seconds": round(time.monotonic() - began, 1)}


def end(process: subprocess.Popen[bytes], seconds: float = 10.0) -> None:
    """End a launch. Only a launcher that is asked by SIGTERM ends its workers too, so SIGKILL comes later."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()


def job_of(row: Row | Split, folder: Path, device: str, limit: float) -> Path:
    """Write the file of a run for `benchmarks.rl_scale_worker` into its folder, and return its path."""
    if isinstance(row, Row):
        prompts = [{"prompt": f"a ball rolls to the left, number {number}"} for number in range(row.samples)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in prompts), encoding="utf-8")
    job = folder / "job.json"
    job.write_text(json.dumps({"row": {**row.as_dict(), "limit": limit}, "device": device}), encoding="utf-8")
    return job


def results_of(row: Row | Split, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Return what each process of a run has written, and the error of the run, empty if there is none."""
    ranks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("rank-*.json"))]
    error = next((each["error"] for each in ranks if each["error"]), "")
    if not error and len(ranks) < row.gpus:
        error = "ended without a result: " + (folder / "log").read_text(encoding="utf-8", errors="replace")[-1500:]
    return ranks, error


def summary_of_split(row: Split, folder: Path) -> dict[str, Any]:
    """Return the row of a run of the part `ulysses`: the largest numbers of its processes."""
    ranks, error = results_of(row, folder)
    found: dict[str, Any] = {"run": row.name, **row.as_dict(), "error": error}
    if not error:
        for name in [each for each in ranks[0] if each != "error"]:
            found[name] = max((each[name] for each in ranks if each[name] is not None), default=None)
    return found


def summary(row: Row, folder: Path) -> dict[str, Any]:
    """Return the row of a run from the files in its folder.

    Seconds are those of an update: the median of the whole, and means of the parts of a rollout. A run that was ended
    after its first measured update has numbers and an error.
    """
    updates = [each for each in read_metrics(folder / "run" / "metrics.jsonl") if each["step"] > row.warm]
    ranks, error = results_of(row, folder)
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
    """Measure the parts and write the file, or only its gates."""
    if options.report:
        return report(options.output)
    check(options)
    scale = Scale(options.output, options.device, options.seconds, again=options.again)
    for part in parts_of(options.part):
        if part == "equal":
            for count in sorted(set(options.gpus) - {1}):
                scale.equal(count, small=options.tiny)
        else:
            runs: Sequence[Row | Split] = (
                splits_of(options.gpus, small=options.tiny)
                if part == ULYSSES
                else rows_of(part, options.gpus, small=options.tiny)
            )
            for row in runs:
                scale.measure(row)
    tell(payload(scale.rows)["gates"])
    return 1 if any(row["error"] for row in scale.rows) else 3 if scale.left_out else 0


def report(path: Path) -> int:
    """Compute the gates of a file again; a file that does not exist is written without rows."""
    if path.exists():
        rows = read_result(path)["rows"]
        amend_result(path, {}, {}, gates_of(rows, speedups(rows)))
    else:
        write_result(path, payload([]))
    tell(read_result(path)["gates"])
    return 0


def tell(gates: Sequence[Mapping[str, Any]]) -> None:
    """Print the gates."""
    for each in gates:
        value = "not measured" if each["value"] is None else each["value"]
        print(f"{each['name']}: {value} (target {each['op']} {each['target']}){'' if each['ok'] else ' MISSED'}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1 if a run has failed, 2 after wrong options, 3 if runs were left out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl_scale", description=__doc__.splitlines()[0])
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--part", nargs="+", choices=(*PARTS, "all"), help="what to measure")
    task.add_argument("--report", action="store_true", help="measure nothing, compute the gates of the file again")
    parser.add_argument("--gpus", nargs="+", type=int, choices=(1, 2, 4, 8), default=[1, 2], help="numbers of GPUs")
    parser.add_argument("--seconds", type=float, default=540.0, help="time of this call; default 540")
    parser.add_argument("-o", "--output", type=Path, required=True, help="result file, .json; continued if it exists")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a few runs of tiny models")
    parser.add_argument("--again", action="store_true", help="repeat runs that the file has")
    options = parser.parse_args(argv)
    return ended("rl_scale", lambda: work(options), "the file has the runs so far; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
