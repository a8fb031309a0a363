"""Check that training on two GPUs learns the same as on one, for every way of distributing the weights.

    python -m benchmarks.faults_two_gpus -o FILE

The benchmark trains all weights of a tiny Wan model with both trainers for 4 updates, with a reference model, an EMA
and, for DiffusionNFT, an old policy. It trains once in one process, and then in two processes: with averaged gradients
(DDP), with weights sharded by torch's `fully_shard`, and with weights sharded by accelerate's FSDP2. It compares the
whole content of the last checkpoints in full float32, and loads the exports. Then it resumes a run of one process in
two processes, and a run of two in one, in the middle of a rollout. If a run fails or hangs, the result holds the
output of each of its processes, and the next run begins in new processes. Run the benchmark from the root of a
checkout, because it uses the tiny model of the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.gates import gate, write_result
from benchmarks.launches import ROOT, free_ports, launcher, send, wait_for
from benchmarks.two_gpus_compare import STEPS, check_export, largest_difference, moved

TRAINERS = ("dancegrpo", "diffusion_nft")
SPREADS = {"ddp": "ddp", "fully_shard": "ddp", "fsdp2": "fsdp2"}
"""Ways of distributing the weights over two processes -> the file of `recipes/accelerate` that starts them."""
LIMIT = 60.0
"""Time limit of a run in seconds. After it, the processes print their stacks."""
AFTER = 5.0
"""Time limit in seconds for the other process after the error of one process."""
START = 120.0
"""Time limit in seconds for the imports of new processes."""
MIDDLE = 3
"""Number of updates after which a run resumes in another number of processes.

A rollout lasts for two updates, so this is in the middle of one.
"""
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run and the launch of its processes."""

    name: str
    """`<trainer>-<spread>`."""
    trainer: str
    launch: str
    """Name of a file of `recipes/accelerate`, or an empty text for one process."""
    count: int = 2
    """Number of processes of a launch."""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """Number of processes of the run."""
        return self.count if self.launch else 1


class Bench:
    """Starts the runs in a folder and collects their outcomes.

    Args:
        folder: empty folder for all runs.
        device: "cuda", or "cpu" (gloo; accelerate has no FSDP2 there).
        limit: time limit of a run in seconds.
        count: number of processes of a launch, a power of 2. Updates have two samples for each of them.
    """

    def __init__(self, folder: Path, device: str, limit: float = LIMIT, count: int = 2) -> None:
        self.folder, self.device, self.limit, self.count = folder, device, limit, count
        self.outcomes: dict[str, dict[str, Any]] = {}
        self._sessions = 0

    def build(self) -> None:
        """Write the model and the prompts to the folder."""
        from diffusers import WanPipeline

        from tests.tiny_wan import wan_components

        WanPipeline(**wan_components()).save_pretrained(self.folder / "model")
        rows = [{"prompt": text} for text in ("a ball", "a cube", "two balls", "a red ball")] * max(1, self.count // 4)
        (self.folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def run_of(self, name: str) -> Path:
        """Return the folder of a run."""
        return self.folder / name / "run"

    def settings(self, job: Job) -> dict[str, Any]:
        """Return the recipe of a job. Each update has the same samples for every number of processes."""
        micro_batches = self.count // job.processes
        values: dict[str, Any] = {
            **{"method": job.trainer, "model": str(self.folder / "model"), "output_dir": str(self.run_of(job.name))},
            **{
                "train_dataset": str(self.folder / "prompts.jsonl"),
                "eval_dataset": str(self.folder / "prompts.jsonl"),
            },
            **{"reward_funcs": ["tests.grpo.toy.near"], "use_peft": False, "device": self.device},
            **{"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 3, "max_sequence_length": 16},
            # Groups of four in micro-batches of two: a group spans two processes.
            **{"num_generations": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": micro_batches},
            **{"steps_per_generation": 2 * micro_batches, "max_steps": STEPS},
            **{"save_steps": 1, "save_total_limit": None},
            # With a small epsilon, AdamW would make full steps from gradients that are only rounding errors.
            **{"learning_rate": 1e-2, "adam_epsilon": 1e-2, "ema_decay": 0.9, "beta": 0.1},
            **{"eval_steps": 2, "eval_prompts": max(4, self.count), "eval_grid": 0, "logging_steps": 1},
            **{"report_to": "none", "disable_tqdm": True},
        }
        if job.trainer == "dancegrpo":
            values |= {"sde_window_size": 2, "sde_window_per": "rollout", "timestep_fraction": 1.0, "epsilon": 1e-2}
        else:
            values |= {"old_decay_rate": 0.1}
        return values | dict(job.settings)

    def run(self, jobs: Sequence[Job]) -> None:
        """Train runs with the same launch and record their outcomes. New processes start only after a failure."""
        left = list(jobs)
        while left:
            left = left[self._session(left) :]

    def _session(self, jobs: Sequence[Job]) -> int:
        """Start processes and train the runs until one fails; return the number of runs with an outcome."""
        self._sessions += 1
        path = self.folder / f"jobs-{self._sessions}.json"
        described = []
        for job, port in zip(jobs, free_ports(len(jobs)), strict=True):
            (self.folder / job.name).mkdir(exist_ok=True)
            values = {"name": job.name, "folder": str(self.folder / job.name), "port": port}
            described.append({**values, "settings": self.settings(job)})
        path.write_text(json.dumps(described), encoding="utf-8")
        ranks = range(jobs[0].processes)
        with self._started(jobs[0], path) as process:
            wait_for([Path(f"{path}.ready-{rank}") for rank in ranks], process, START)
            for job in jobs:
                began = time.monotonic()
                files = [self.folder / job.name / f"rank-{rank}.json" for rank in ranks]
                self._wait_for(files, process, path)
                self.outcomes[job.name] = self._outcome(job, files, path, time.monotonic() - began)
                if self.outcomes[job.name]["failed"]:
                    break
        return sum(job.name in self.outcomes for job in jobs)

    @contextmanager
    def _started(self, job: Job, path: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Start the processes for a file of jobs, and end all of them when the `with` block ends."""
        words = ["-m", "benchmarks.two_gpus_worker", str(path)]
        if job.launch:
            words = [*launcher(job.launch, self.device, job.count), *words]
        environment = dict(os.environ)
        if self.device == "cpu":
            environment |= {"OMP_NUM_THREADS": "1"}
        with Path(f"{path}.log").open("wb") as log:
            process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=log)
            try:
                yield process
                if process.returncode is None and not self._failed(path):
                    process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                pass
            finally:
                # Only SIGKILL ends a process that waits in a collective, and the launcher would wait for it.
                if process.poll() != 0:
                    send([process.pid, *self._workers(path).values()], signal.SIGKILL)
                    process.wait()

    def _workers(self, path: Path) -> dict[int, int]:
        """Return the process ids by rank."""
        return {int(file.name[-1]): int(file.read_text()) for file in self.folder.glob(f"{path.name}.ready-*")}

    def _wait_for(self, files: Sequence[Path], process: subprocess.Popen[bytes], path: Path) -> None:
        """Wait for the result files of a run. Processes without a result receive a signal to print their stacks."""
        end = time.monotonic() + self.limit
        while time.monotonic() < end and process.poll() is None and not all(file.exists() for file in files):
            if any(json.loads(file.read_text())["error"] for file in files if file.exists()):
                wait_for(files, process, AFTER)
                break
            time.sleep(0.05)
        silent = [number for rank, number in self._workers(path).items() if not files[rank].exists()]
        if silent and process.poll() is None:
            send(silent, signal.SIGUSR1)
            time.sleep(1)

    def _failed(self, path: Path) -> bool:
        jobs = json.loads(path.read_text(encoding="utf-8"))
        return any(self.outcomes.get(job["name"], {"failed": True})["failed"] for job in jobs)

    def _outcome(self, job: Job, files: Sequence[Path], path: Path, seconds: float) -> dict[str, Any]:
        """Return the outcome of a run. If it failed, the outcome holds the output of each of its processes."""
        told = [json.loads(file.read_text(encoding="utf-8")) if file.exists() else None for file in files]
        refused = next((each["refused"] for each in told if each and each["refused"]), "")
        found: dict[str, Any] = {"seconds": round(seconds, 1), "refused": refused, "failed": False, "log": []}
        if all(each is not None and not each["error"] for each in told):
            return found
        for rank, each in enumerate(told):
            said = each["error"] if each else "no result: the process died, or it hangs where its stack shows"
            log = Path(f"{path}.{rank}.log")
            text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            tail = text.rpartition(f"--- {job.name}, process")[2]
            found["log"].append(f"[process {rank}] {said}\n{tail[-6000:]}")
        if not all(told):
            launcher = Path(f"{path}.log").read_text(encoding="utf-8", errors="replace")
            found["log"].append(f"[launcher]\n{launcher[-3000:]}")
        found["failed"] = not (refused and all(told))
        return found


def jobs_of(device: str, count: int = 2) -> list[list[Job]]:
    """Return the runs, grouped by launch, in an order in which they can run."""
    spreads = {name: launch for name, launch in SPREADS.items() if device == "cuda" or name != "fsdp2"}
    one = [Job(name=f"{trainer}-one", trainer=trainer, launch="") for trainer in TRAINERS]
    pairs = [
        [
            Job(
                name=f"{trainer}-{spread}",
                trainer=trainer,
                launch=launch,
                count=count,
                settings={"fully_shard": True} if spread == "fully_shard" else {},
            )
            for spread, launch in spreads.items()
            if launch == kind
            for trainer in TRAINERS
        ]
        for kind in dict.fromkeys(spreads.values())
    ]
    return [one, *pairs]


def resumes(bench: Bench) -> list[list[Job]]:
    """Return the runs that resume from a checkpoint of another number of processes.

    They resume from one to all, from all to one, and with more than two processes from all to a half.
    """

    def job(trainer: str, source: str, count: int, **settings: Any) -> Job:
        path = str(bench.run_of(f"{trainer}-{source}") / f"checkpoint-{MIDDLE}")
        values = {"resume_from_checkpoint": path, **settings}
        launch = "ddp" if count > 1 else ""
        return Job(name=f"{trainer}-{source}-to-{count}", trainer=trainer, launch=launch, count=count, settings=values)

    many = [job(trainer, "one", bench.count, fully_shard=trainer == "diffusion_nft") for trainer in TRAINERS]
    fewer = [1, bench.count // 2] if bench.count > 2 else [1]
    return [many, *([job(trainer, "ddp", count) for trainer in TRAINERS] for count in fewer)]


def compared(bench: Bench, job: Job) -> dict[str, Any]:
    """Return the row of a run: its largest difference from the run of one process, or the reason for no number."""
    found = bench.outcomes[job.name]
    row = {"run": job.name, "processes": job.processes, "seconds": found["seconds"], "refused": found["refused"]}
    row |= {"max_abs": None, "log": found["log"]}
    if not found["failed"] and not found["refused"]:
        try:
            row["max_abs"] = largest_difference(bench.run_of(job.name), bench.run_of(f"{job.trainer}-one"))
            check_export(bench.run_of(job.name))
        except (OSError, RuntimeError, KeyError) as error:
            row["log"] = [f"[comparison] {type(error).__name__}: {error}"]
    said = "failed" if row["log"] else f"largest difference from one process {row['max_abs']:.3g}"
    print(f"{job.name}: {found['refused'] or said} ({found['seconds']} s)", flush=True)
    if not found["refused"]:
        print("\n".join(row["log"]), end="\n" if row["log"] else "", flush=True)
    return row


def goes_on(row: Mapping[str, Any]) -> bool:
    """Return whether a run that resumed in another number of processes is right.

    It is right if it learned the same as one process, or if the error message names a setting with which it can
    resume.
    """
    from postgen.grpo.config import GroupConfig

    if row["refused"]:
        return any(f"{name} " in row["refused"] for name in GroupConfig.named_in("share_out"))
    return not row["log"] and row["max_abs"] is not None and row["max_abs"] <= TOLERANCE


def measured(folder: Path, device: str) -> dict[str, Any]:
    """Train and compare all runs in a folder; return the payload of a result file.

    Raises:
        RuntimeError: if one process moves its weights too little for a comparison.
    """
    bench = Bench(folder, device)
    bench.build()
    began, rows = time.monotonic(), []
    for jobs in jobs_of(device):
        bench.run(jobs)
        rows += [compared(bench, job) for job in jobs]
    combinations = [row for row in rows if row["processes"] == 2]
    # The comparison has a meaning only if the training changes the weights much more than the tolerance.
    for trainer in TRAINERS:
        if not bench.outcomes[f"{trainer}-one"]["failed"]:
            far = moved(bench.run_of(f"{trainer}-one"), folder / "model")
            print(f"{trainer}: one process changed its weights by up to {far:.3g}")
            if far < 10 * TOLERANCE:
                raise RuntimeError(
                    f"{trainer} changed its weights only by {far:.3g}: a comparison needs at least {10 * TOLERANCE:g}"
                )
    # Resume from checkpoints of another number of processes.
    again = []
    for jobs in resumes(bench):
        bench.run(jobs)
        again += [compared(bench, job) for job in jobs]
    good = [row["max_abs"] for row in combinations if row["max_abs"] is not None and not row["log"]]
    seconds = round(time.monotonic() - began, 1)
    print(f"{len(good)} of {len(combinations)} combinations trained, in {seconds} s")
    return {
        "settings": {"device": device, "steps": STEPS, "resumed_after": MIDDLE, "seconds": seconds},
        "gates": [
            gate("two_gpu_max_abs", max(good, default=None), "<=", TOLERANCE),
            gate("two_gpu_combinations", len(good), "==", len(TRAINERS) * len(SPREADS)),
            gate("resume_other_count", int(all(goes_on(row) for row in again)), "==", 1),
        ],
        "rows": {"two_gpus": rows, "resume": again},
    }


@cache
def measured_once() -> dict[str, Any]:
    """Return `measured` on two GPUs in a temporary folder. Further calls return the first result."""
    with tempfile.TemporaryDirectory() as name:
        return measured(Path(name), "cuda")


def main(argv: list[str] | None = None) -> int:
    """Measure and write the file. Return 1 if a gate is missed, and 2 if there are fewer than two GPUs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults_two_gpus", description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="result file to write, .json")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="device; cpu uses gloo and leaves out FSDP2"
    )
    options = parser.parse_args(argv)
    if options.device == "cuda":
        import torch

        if torch.cuda.device_count() < 2:
            print(
                f"--device cuda needs two CUDA devices, torch finds {torch.cuda.device_count()}: use a machine with"
                " two GPUs, or --device cpu",
                file=sys.stderr,
            )
            return 2
    else:
        print("accelerate has no FSDP2 on CPUs: only 4 of the 6 combinations are trained")
    with tempfile.TemporaryDirectory() as name:
        payload = measured(Path(name), options.device)
    write_result(options.output, payload)
    for row in payload["gates"]:
        print(f"{row['name']}: {row['value']} (target {row['op']} {row['target']}){'' if row['ok'] else ' MISSED'}")
    return int(not all(row["ok"] for row in payload["gates"]))


if __name__ == "__main__":
    sys.exit(main())
