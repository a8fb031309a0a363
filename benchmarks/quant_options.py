"""Options that the experiments of quantisation share: where their jobs run, how long, and where results are kept."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.lit_video_files import unpack
from postgen.errors import UserError


def add_run_options(parser: argparse.ArgumentParser, *, each: int, output: str) -> None:
    """Add the options.

    Args:
        parser: the parser of an experiment, which already has --device and --out.
        each: default number of jobs at the same time on a GPU.
        output: default name of the result.
    """
    add = parser.add_argument
    add("--gpus", nargs="*", default=["0"], help="indices of the GPUs; no index for the CPU")
    add("--each", type=int, default=each, help=f"jobs at the same time on a GPU (default: {each})")
    add("--seconds", type=float, default=0.0, help="end after this number of seconds; 0 for no limit")
    add("--tiny", action="store_true", help="a few steps of everything, only to show that the benchmark runs")
    add("--back", type=Path, metavar="FOLDER", help="save the results so far here, in files of less than 16 MiB")
    add("--unpack", type=Path, metavar="FOLDER", help="first restore the saved files of this folder to --out")
    add("--report", action="store_true", help="write the result")
    add("-o", "--output", default=output, help="with --report: name or path of the result file")


def check_small(test: str, output: str, *, docs: bool = False) -> None:
    """Check that results of a small test do not replace measured ones.

    Args:
        test: what is smaller than in the experiment.
        output: name or path of the result file.
        docs: whether a page of the docs is written too.

    Raises:
        UserError: they would.
    """
    if docs or not output.endswith(".json"):
        raise UserError(
            f"the results are from a small test ({test}): write them to a separate file with -o PATH.json, without"
            " --docs"
        )


def begin(options: argparse.Namespace, tiny: Mapping[str, Any]) -> None:
    """Apply the options: tiny sizes, the CPU, and saved files.

    Args:
        options: the parsed options, which are changed.
        tiny: values of other options with --tiny.
    """
    if options.tiny:
        vars(options).update(tiny)
    if not options.gpus:
        options.device, options.each = "cpu", 1
    if options.unpack is not None and any(options.unpack.glob("part-*.tar.gz")):
        unpack(options.unpack, options.out)
