"""Block-wise reconstruction: each student is trained to give what its block of the teacher gave for the same input."""

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
    """Train the students of blocks, one after the other; several processes have blocks of their own.

    A block depends on its own records alone, so that neither the other blocks nor the number of processes change its
    weights. Ctrl-C, SIGTERM and SIGHUP end the run after the step in work, with a checkpoint. Killed at any moment and
    started again with `resume`, a run on the CPU ends with the weights of one that was not. Random states of the
    program are afterwards as they were.

    Args:
        tasks: the blocks.
        records: of the teacher, see `postgen.reconstruct.collect`.
        config: how they are trained.
        share: which of the blocks this process trains; None is what its launcher says.

    Returns:
        What is finished in `output_dir`, by this and all other processes. The first one writes its table to stderr.

    Raises:
        UserError: two tasks of one name, a module that was not recorded, an earlier run in `output_dir` without
            `resume` or with other settings, records, or weights of the teacher, another run in the same folder.
        FloatingPointError: the loss of a block was not finite; what was saved before is kept.
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
            stack.enter_context(torch.cuda.device(bench.device))  # kernels are launched on the current one
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
    """Train the blocks that are not finished; False where a signal came before the last was."""
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
        raise UserError("there is nothing to reconstruct: give a task for each block")
    names = [task.name for task in tasks]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two tasks are called {', '.join(sorted(doubled))}: each needs a name of its own")
    for name in names:
        check_name(name, f"the name of a task, {shown(name)}")
        if "/" in name or name.startswith("."):
            raise UserError(f"the name of a task, {shown(name)}, must be that of a folder")
    for task in tasks:
        try:
            json.dumps(dict(task.settings))
        except (TypeError, ValueError) as error:
            raise UserError(f"the settings of {task.name} must be JSON values: {error}") from error
        records.calls(task.modules, held_out=True)


def _check_folders(tasks: Sequence[ReconstructTask], config: ReconstructConfig) -> None:
    """Refuse an earlier run where this one is not to go on with it."""
    for task in tasks if not config.resume else ():
        folder = block_folder(config.folder, task.name)
        if finished(config.folder, task.name).exists() or checkpoint.named(folder):
            raise UserError(
                f"{config.folder} holds an earlier run of {task.name}: go on with it (resume=True), or name another"
                " output_dir"
            )
