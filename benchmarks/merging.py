"""Merging of checkpoints on the embedded model: averages against real annealing, LoRAs, and hacked runs.

    python -m benchmarks.merging train --gpus 0 --each 4 --seconds 560 --back back     # repeat while it exits with 3
    python -m benchmarks.merging hacked --hacked runs/dancegrpo --gpus 0 --each 3      # after the hacked runs
    python -m benchmarks.merging lora                                                  # exactness, on the CPU
    python -m benchmarks.merge_memory                                                  # memory, on the CPU
    python -m benchmarks.merging report --docs

Rules, fixed before the runs:

- `constant`: all weights, clips of both worlds as in `benchmarks.sft`, 400 steps with a constant learning rate; the
  nine checkpoints of steps 200, 225, ..., 400 are merged. `annealed` resumes the checkpoint of step 200 of the same
  run, with optimiser and order of the clips, and anneals the learning rate linearly to 0 over the same 200 steps.
  Weights are not averaged otherwise. Seeds 0, 1, 2.
- `merge_vs_annealed`: share of wholly right clips of 128 prompts of the new world, merged by `linear` (which is `sma`,
  and emulates the schedule of `annealed`), divided by that of `annealed`; both are means over the seeds. The other
  averages are rows of the table. Beside it: the flow-matching loss of 64 held-out clips.
- The best single checkpoint of a run is the one with most right clips of 64 validation prompts, the later of equals.
- `lora_merge_error`: largest relative error over layers and cases against the best approximation of the dense sum.
- `interpolation_recovers`: the last checkpoint of each hacked run (arms `hack` of `benchmarks.dancegrpo`), at the eta
  of 0.25, 0.5, 0.75 with the best mean of the held-out judge on validation prompts; the share of the fall of the exact
  score on test prompts that is won back, mean over the runs. Runs whose score falls by less than 0.02 are listed
  without a share.
- `merge_peak_over_largest_tensor` is that of `benchmarks.merge_memory`.

Calls, with estimates for one H200:

    train                                                     7 min (6 runs, 45 measurements of 192 clips)
    hacked, after `benchmarks.dancegrpo train --arms hack --seeds 0 --later` (5 min, same machine)      3 min
    lora                                                      2 min on one core
    report --docs                                             seconds
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import merging_hacked, merging_lora, merging_report
from benchmarks.command import ended
from benchmarks.lit_video_files import unpack
from benchmarks.queued_arms import add_places, add_queue, add_report, check_gpus, keep, run_queue, words_of
from benchmarks.sft import kept_files, work_on
from benchmarks.sft_arms import OUT, SEEDS
from postgen.errors import UserError


def measure_hacked(options: argparse.Namespace) -> int:
    """Measure the hacked runs, and return the exit code.

    Raises:
        UserError: there are no hacked runs.
    """
    check_gpus(options.gpus)
    names = merging_hacked.names_in(options.hacked)
    if not names:
        raise UserError(
            f"{options.hacked} has no hacked runs: run `python -m benchmarks.dancegrpo train --arms hack` with --out"
            f" {options.hacked} on this machine first"
        )
    every = [merging_hacked.job(options.out, options.hacked, name, words_of(options)) for name in names]
    return run_queue(options, [job for job in every if not job.done], lambda: keep(options, kept_files))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True)
    for name in ("train", "hacked", "lora", "report"):
        add_places(commands.add_parser(name), OUT)
    for name in ("train", "hacked"):
        add_queue(commands.choices[name], "merging", SEEDS)
    commands.choices["hacked"].add_argument(
        "--hacked", type=Path, default=Path("runs/dancegrpo"), help="output folder of benchmarks.dancegrpo"
    )
    commands.choices["lora"].add_argument("--tiny", action="store_true", help="tiny shapes")
    add_report(commands.choices["report"], "merging")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the command line names."""
    options = parser().parse_args(argv)

    def work() -> int:
        if options.unpack is not None:
            unpack(options.unpack, options.out)
        if options.command == "train":
            return work_on(options)
        if options.command == "hacked":
            return measure_hacked(options)
        if options.command == "lora":
            merging_lora.measure(options.out, tiny=options.tiny)
            keep(options, kept_files)
        else:
            merging_report.write(options.out, options.output, docs=options.docs)
        return 0

    return ended("benchmarks.merging", work)


if __name__ == "__main__":
    sys.exit(main())
