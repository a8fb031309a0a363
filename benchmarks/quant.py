"""Quality of quantised models: every recipe and format on the embedded model, against its exact clips.

    python -m benchmarks.quant --group plain --gpus 0 1                # rounding, solvers, checks, the advisor
    python -m benchmarks.quant --group trained --gpus 0 1              # recipes that train, three seeds
    python -m benchmarks.quant --group e2e --gpus 0 1                  # training of the scales end to end, three seeds
    python -m benchmarks.quant_law --gpus 0                            # scaling law of quantisation-aware training
    python -m benchmarks.quant --report --docs

Several jobs (`benchmarks.quant_arms`) run at the same time on each GPU. Finished jobs are skipped and an interrupted
training continues, so a repeated command continues where it stopped; repeat it until its exit code is 0 (1: a job
failed, 2: invalid input, 3: jobs are left). `--seconds` limits the time. `--back FOLDER` saves the results so far to a
few small files, every minute and at the end, and `--unpack FOLDER` restores them. Models that other jobs need and
interrupted trainings come back only as far as they fit, and missing ones are made again. A small run on a CPU:
`--group plain --gpus --tiny --only rtn-w4a8 --out runs/try`.

The rules of the experiment, written before any run:

- **Model.** The embedded model, in float32 without autocast. Quantised are the linear layers of the blocks that the
  default policy selects; the rest stays exact. Every arm is saved and then loaded by diffusers' `from_pretrained`.
- **Arms.** Every recipe in the formats of `quant_arms.RECIPES`. All arms are in the result, none is picked. Recipes
  that train run with three seeds, which also draw their calibration points; their numbers are means over the seeds.
- **Calibration** is the same for all recipes with the same seed: 64 prompts, 256 points on trajectories of the exact
  model with the settings of the measurement, each with its prompt and with the negative prompt. Training steps and
  learning rates are those of the recipes in `postgen.quant.stages`, except that recipes that train weights (Block-AP,
  SOS) have 10 times the learning rate, because theirs are for models a thousand times as large. `--block_steps` gives
  all recipes the same number of steps for each block.
- **Measured** on 512 prompts that no calibration uses, half with one body and half with two; clip i has prompt i and
  seed i in all arms. PSNR compares with the exact clip, both as bytes. The judge is the world's checker: the share of
  clips that are right in every attribute. Its drop is paired by prompt, after the mean over seeds, with a 95 %
  bootstrap interval over prompts. The velocity error is |v - v_exact| / |v_exact| on the exact model's own calls, 32
  prompts at all steps. Bits per weight count scales, zero points and coefficients.
- **e2e_qp** begins with the weights of `quant_arms.BEGINS` of the same seed and trains their scales alone: 500 steps
  on latents that the exact model samples, with the settings of `recipes/quant-tiny.yaml` without its branches.
- **Gates.** `omniquant_w4a4_gain_db` and `block_ap_w2_gain_db`: mean PSNR minus that of `rtn` in the same format.
  `e2e_qp_gain_db`: the least gain over the weights with which it began, of all its formats. `bpdq_vs_gptq_w2_db`:
  `bpdq` in bp2 (3.5 bits per weight) minus `gptq` in int2 with groups of 16 (4.5 bits), a control with no fewer bits.
  `w4a8_judge_drop`: recipe `omniquant`, upper end of the interval. `w3_judge`: of the recipes in the format w3, that
  with the highest mean PSNR. The gates of speed and of the law are those of their own results.
- **Papers.** A claim is reproduced if the 95 % interval of the paired difference of PSNR is above 0, refuted if it is
  below, and otherwise undecided.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import quant_report
from benchmarks.command import ended
from benchmarks.job_queue import SAVE_EVERY, SAVE_GRACE, exit_code, lock_of, places_on, run_jobs, wanted
from benchmarks.lit_video_arms import check_settings
from benchmarks.lit_video_files import pack_files
from benchmarks.quant_arms import GROUPS, SEEDS, Place, goals_of, table
from benchmarks.quant_files import kept_files, restore, weights_of
from benchmarks.quant_job import FIRST_CALIBRATION, SHARED, SIZES, add_options, captions, settings_of
from benchmarks.quant_options import add_run_options, begin
from postgen.assets import model_folder
from postgen.errors import UserError
from postgen.files import replacing

TRAIN_PROMPTS = 512
"""Number of prompts for the training of scales."""
TINY: dict[str, Any] = {
    "prompts": 4,
    "calibration": 3,
    "points": 4,
    "block_steps": 2,
    "e2e_steps": 2,
    "batch": 2,
    "steps": 2,
}
TINY |= {"size": 32, "frames": 17, "train_prompts": 4, "seeds": [0]}


def write_prompts(path: Path, count: int) -> None:
    """Write the prompts for the training of scales, which follow those of the calibration; an existing file stays."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = captions(FIRST_CALIBRATION + 1_000_000, count, 33)
    with replacing(path) as part:
        part.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Run the jobs of a group, and return the exit code.

    Raises:
        UserError: invalid options, another command that works in the folder, or results with other settings there.
    """
    place = Place(out=options.out, words=tuple(words))
    arms, goals = goals_of(options.group, options.seeds, options.only)

    def keep() -> None:
        if options.back is not None:
            pack_files(kept_files(place), place.out, options.back)

    places = places_on(options.gpus, options.each)
    with lock_of(options.out):
        check_settings(options.out, read_rows(options.out), settings_of(options))
        write_prompts(place.prompts, options.train_prompts)
        todo = wanted(place.jobs(arms), goals)
        left = run_jobs(todo, places, seconds=options.seconds, tick=keep, every=SAVE_EVERY, grace=SAVE_GRACE)
    return exit_code(left)


def read_rows(out: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of the finished jobs in a folder by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("rows/*.json"))}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(made)
    add_run_options(made, each=4, output="quant")
    add = made.add_argument
    add("--group", choices=[*GROUPS], help="arms to run")
    add("--only", nargs="+", default=[], metavar="ARM", help="run only these arms of the group: RECIPE, RECIPE-FORMAT")
    add("--seeds", type=int, nargs="+", default=[*SEEDS], help="seeds of recipes that train (default: 0 1 2)")
    add("--train_prompts", type=int, default=TRAIN_PROMPTS, help=f"prompts of e2e_qp (default: {TRAIN_PROMPTS})")
    add("--table", action="store_true", help="print the table of arms")
    add("--docs", action="store_true", help="with --report: also write docs/quantization_results.md")
    return made


def job_words(options: argparse.Namespace) -> list[str]:
    """Return the command-line options that every job receives."""
    words = ["--model", str(options.model), "--device", options.device]
    for name in SHARED:
        words += [f"--{name}", str(getattr(options, name))]
    for name in SIZES:
        words += [f"--{name}", str(getattr(options, name))] if getattr(options, name) else []
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Run jobs, restore results, or write the report.

    The exit code is 0 if all jobs are finished, 1 if a job failed, 2 after invalid input, and 3 if jobs are left for
    another call. After a signal it is 130, 143 or 129.
    """
    options = parser().parse_args(argv)
    return ended("benchmarks.quant", lambda: _work(options))


def _work(options: argparse.Namespace) -> int:
    begin(options, TINY)
    if options.unpack is not None:
        restore(options.out, weights_of(model_folder(options.model)))
    if options.table:
        print(table())
    elif options.report:
        quant_report.write(options.out, options.output, docs=options.docs)
    elif options.group is not None:
        return run(options, job_words(options))
    elif options.unpack is None:
        raise UserError(f"nothing to do: give one of --group ({', '.join(GROUPS)}), --report, --table or --unpack")
    return 0


if __name__ == "__main__":
    sys.exit(main())
