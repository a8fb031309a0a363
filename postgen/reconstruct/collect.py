"""Record the inputs and outputs of a teacher's modules on its own sampling trajectories.

Each prompt is sampled from its own initial noise over all steps. `collect` then selects some latents of the
trajectory, runs the teacher on them once more, and records this forward pass. The rows of a record are at different
noise levels, and over all prompts each noise level occurs equally often.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families import Block, Denoiser
from postgen.families.recording import Recording, capture
from postgen.files import check_place, replacing
from postgen.training.logging import Progress, say
from postgen.training.modes import evaluating
from postgen.training.run_folder import RunLock

from .config import RecordsConfig
from .records import PLAN, Records, is_complete, read_plan
from .share import Share
from .teacher import Chunk, Teacher

Latents = Mapping[tuple[int, int], Tensor]
"""(number of the prompt, step) -> latents of one sample before the step, float32 on the CPU."""
LOCK = ".collect-{rank}.lock"
"""Lock file in a folder of records, held by the process of this rank while it records."""


def collect(
    denoiser: Denoiser,
    modules: Iterable[Block | str] | str,
    prompts: Iterable[str | Mapping[str, Any]],
    config: RecordsConfig,
    *,
    where: Path | str = "cpu",
    transformer: str = "transformer",
    share: Share | None = None,
    progress: bool = True,
    drawn: Latents | None = None,
) -> Records:
    """Record calls of a teacher's modules. The size is measured and printed first, and refused if it is too large.

    If the folder already has some of these records, the missing ones are added. Several processes divide the work into
    one folder, and each process returns when all records exist.

    Args:
        denoiser: the denoiser of the teacher's pipeline.
        modules: blocks (from `blocks_of`, or their names) and names of modules inside blocks.
            `ReconstructTask.modules` are the modules that a task needs.
        prompts: texts, or rows with `prompt` and optionally `negative_prompt` and `image`. The last ones are held out.
        config: settings of the recording.
        where: "cpu" to keep the records in memory, or a folder for safetensors files.
        transformer: name of the transformer to record, for pipelines with two. Steps in which it does not run are left
            out.
        share: the part of this process; None for the division of the launcher. With "cpu" each process records
            everything.
        progress: whether the first process shows a progress bar.
        drawn: latents before the recorded steps, if the trajectories were sampled before with the same settings.

    Raises:
        UserError: too few prompts, an unknown module or transformer, records larger than `max_gb` or the free disk
            space, a folder with other records, another process that records the same part into the folder, or a
            teacher whose latents are not finite.
    """
    share = share or Share.launched()
    named = [modules] if isinstance(modules, str) else list(modules)
    teacher = Teacher(denoiser, named, transformer, config, prompts)
    with torch.no_grad(), evaluating(denoiser.transformers.values()):
        plan = teacher.plan()
        if str(where) == "cpu":
            _announce(teacher, plan, None, set())
            kept: dict[str, Recording] = {}
            _record(teacher, plan, Share(), kept, None, progress, drawn)
            return Records(plan, kept)
        folder = Path(where).absolute()
        _check_folder(folder, plan)
        if missing := _missing(folder, plan):
            _announce(teacher, plan, folder, set(plan["records"]) - missing)
            if not (folder / PLAN).is_file():
                _write_plan(folder, plan)
            with RunLock(folder, LOCK.format(rank=share.rank), "where"):
                _check_folder(folder, plan)  # another run may have written to the folder before the lock
                there = set(plan["records"]) - _missing(folder, plan)
                _record(teacher, plan, share, dict.fromkeys(there), folder, progress, drawn)
    _wait(folder, plan)
    return Records.read(folder)


def _record(
    teacher: Teacher,
    plan: Mapping[str, Any],
    share: Share,
    done: dict[str, Any],
    folder: Path | None,
    progress: bool,
    drawn: Latents | None,
) -> None:
    """Record the missing records of this process and add them to `done`, which holds the records by name."""
    bar = Progress(step=0, max_steps=len(teacher.chunks), shown=progress and share.rank == 0, name="record")
    for chunk in share.of(teacher.chunks):
        steps = teacher.steps(plan, chunk)
        missing = [place for place in range(len(steps)) if chunk.record(place) not in done]
        if missing:
            latents, told = drawn or _drawn(teacher, chunk), teacher.conditions(chunk.prompts)
        for place in missing:
            x = torch.stack([latents[each] for each in zip(chunk.prompts, steps[place], strict=True)])
            name = chunk.record(place)
            done[name] = capture(
                teacher.network,
                teacher.modules,
                partial(teacher.forward, x, steps[place], told),
                where=folder / name if folder else "cpu",
            )
        bar.step()
    bar.close()


def _drawn(teacher: Teacher, chunk: Chunk) -> Latents:
    """Sample the trajectories of a chunk."""
    latents = teacher.trajectory(chunk)
    return {
        (prompt, step): latents[step, row] for row, prompt in enumerate(chunk.prompts) for step in range(len(latents))
    }


def _announce(teacher: Teacher, plan: Mapping[str, Any], folder: Path | None, there: set[str]) -> None:
    """Print the size of the records, and refuse it if it is too large."""
    per_row = teacher.bytes(plan) / len(teacher.chunks[0].prompts)
    sizes = {name: said["rows"] * per_row for name, said in plan["records"].items()}
    total, left = sum(sizes.values()), sum(size for name, size in sizes.items() if name not in there)
    limit = teacher.config.max_gb * 1e9
    told = f"{len(sizes)} records of {len(teacher.modules)} modules take {total / 1e9:.3g} GB"
    if total > limit:
        raise UserError(
            f"{told}, but max_gb is {teacher.config.max_gb:g}: raise it, or record fewer prompts, levels_per_prompt or"
            " modules at a time"
        )
    if folder is not None and left > (free := shutil.disk_usage(_existing(folder)).free):
        raise UserError(
            f"{told}, of which {left / 1e9:.3g} GB are still to be written, but the disk of {folder} has only"
            f" {free / 1e9:.3g} GB free: make room, or choose another folder"
        )
    say(f"{told} {f'in {folder}' if folder else 'of memory'}" + (f", {len(there)} exist already" if there else ""))


def _write_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    try:
        with replacing(folder / PLAN) as part:
            part.write_text(json.dumps(plan, indent=1), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder / PLAN} cannot be written ({error}): make room or choose another folder") from error


def _missing(folder: Path, plan: Mapping[str, Any]) -> set[str]:
    return {name for name in plan["records"] if not is_complete(folder / name)}


def _wait(folder: Path, plan: Mapping[str, Any]) -> None:
    """Wait until the records of other processes exist."""
    if missing := _missing(folder, plan):
        say(f"waiting for {len(missing)} records of other processes in {folder}")
    while _missing(folder, plan):
        time.sleep(1)


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.parents) if each.exists())


def _check_folder(folder: Path, plan: Mapping[str, Any]) -> None:
    """Check that a folder is empty or holds records of the same plan."""
    check_place(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    before = read_plan(folder)
    if different := [name for name in plan if before.get(name) != plan[name]]:
        raise UserError(
            f"{folder} holds records with other values of {', '.join(different)}: choose another folder, or collect"
            " with the same settings as before"
        )
