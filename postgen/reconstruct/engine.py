"""Block-wise reconstruction: train each student to reproduce the output of its block for the same input."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from postgen.errors import UserError, shown
from postgen.reading import check_name
from postgen.training import Reason, checkpoint, rng
from postgen.training.launch import ignore_mixed_norms
from postgen.training.logging import say
from postgen.training.run_folder import RunLock, written
from postgen.training.stop import Signals

from .block_run import Bench, BlockRun, drop_checkpoints, is_finished
from .config import ReconstructConfig
from .records import Records
from .report import Report, block_folder, finished, read_report
from .share import Share
from .task import ReconstructTask


def reconstruct(
    tasks: Iterable[ReconstructTask],
    records: Records,
    config: ReconstructConfig,
    *,
    share: Share | None = None,
) -> Report:
    """Train the students of blocks, one after the other. Several processes divide the blocks.

    The training of a block depends only on its own records, so neither the other blocks nor the number of processes
    change its weights. Ctrl-C, SIGTERM and SIGHUP end the run after the current step, with a checkpoint. On the CPU, a
    run that was killed and started again with `resume` ends with the same weights as an uninterrupted run. The random
    states of the caller do not change.

    Args:
        tasks: the tasks of the blocks.
        records: the records of the teacher, see `postgen.reconstruct.collect`.
        config: settings of the training.
        share: the blocks of this process; None for the division of the launcher.

    Returns:
        The report of all finished blocks in `output_dir`, including those of other processes. The first process also
        prints the table to stderr.

    Raises:
        UserError: two tasks have the same name, a module was not recorded, `output_dir` holds an earlier run (without
            `resume`, or with other settings, records or teacher weights), or another run uses the folder.
        FloatingPointError: the loss of a block is not finite; earlier checkpoints are kept.
    """
    tasks, share = list(tasks), share or Share.launched()
    _check(tasks, records)
    bench = Bench(
        records=records,
        config=config,
        device=share.device(config.device),
        shown=share.rank == 0 and not config.disable_tqdm,
    )
    own = share.of(tasks)
    _check_folders(own, config)
    if config.bf16:
        ignore_mixed_norms()
    with ExitStack() as stack:
        if bench.device.type == "cuda":
            stack.enter_context(torch.cuda.device(bench.device))  # Triton launches kernels on the current device
        stack.enter_context(written(config.folder))
        stack.enter_context(rng.preserved(torch.Generator(bench.device)))
        stop = stack.enter_context(Signals())
        done = _train(own, bench, stop)
    report = read_report(config.folder, [task.name for task in tasks])
    report = replace(report, reason=Reason.DONE if done else Reason.INTERRUPTED, signal=stop.number)
    if share.rank == 0:
        say(report.table())
    return report


def _train(tasks: Sequence[ReconstructTask], bench: Bench, stop: Signals) -> bool:
    """Train the unfinished blocks. Return False if a signal stopped the run before all blocks were finished."""
    for number, task in enumerate(tasks, 1):
        folder = block_folder(bench.config.folder, task.name)
        folder.mkdir(parents=True, exist_ok=True)
        with RunLock(folder):
            if is_finished(task, bench):
                drop_checkpoints(folder)
                continue
            if stop.received or not BlockRun(task, bench, f"{task.name} ({number}/{len(tasks)})").train(stop):
                return False
    return True


def _check(tasks: Sequence[ReconstructTask], records: Records) -> None:
    if not tasks:
        raise UserError("tasks is empty, so there is nothing to reconstruct: pass a task for each block")
    names = [task.name for task in tasks]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two tasks have the name {', '.join(sorted(doubled))}: give each task its own name")
    for name in names:
        check_name(name, f"the name of a task, {shown(name)}")
        if "/" in name or name.startswith("."):
            raise UserError(
                f"the task name {shown(name)} must be a valid folder name: without / and without a dot at the start"
            )
    for task in tasks:
        try:
            json.dumps(dict(task.settings))
        except (TypeError, ValueError) as error:
            raise UserError(f"the settings of {task.name} must be JSON values: {error}") from error
        records.calls(task.modules, held_out=True)


def _check_folders(tasks: Sequence[ReconstructTask], config: ReconstructConfig) -> None:
    """Refuse a folder with an earlier run unless `resume` is set."""
    for task in tasks if not config.resume else ():
        folder = block_folder(config.folder, task.name)
        if finished(config.folder, task.name).exists() or checkpoint.named(folder):
            raise UserError(
                f"{config.folder} holds an earlier run of {task.name}: continue it with resume=True, or choose another"
                " output_dir"
            )
