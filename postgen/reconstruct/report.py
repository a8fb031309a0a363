"""The results of a run: errors of each block before and after training, times, and the weights of the students."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from postgen.errors import UserError
from postgen.reading import read_json
from postgen.tensor_files import read_tensors
from postgen.training import Reason

STUDENT, RESULT = "student.safetensors", "result.json"


_LEGEND = (
    "errors: of the block's output on held-out data before and after training, relative to its variation: 0 is exact,"
    " 1 is as wrong as a constant (L1: in the L1 norm); trained: parameters; new: those that the exact block lacks"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockResult:
    """The result of one finished block. Errors are those of `loss.error` on held-out records."""

    name: str
    """Name of the task."""
    error_before: float
    """Relative L2 error of the student before training."""
    error_after: float
    """Relative L2 error after training, of the EMA weights if there is an EMA."""
    l1_before: float
    """Relative L1 error of the student before training."""
    l1_after: float
    """Relative L1 error after training, of the EMA weights if there is an EMA."""
    steps: int
    """Number of optimiser steps."""
    parameters: int
    """Number of trained parameters."""
    new: int
    """Number of trained parameters that the teacher does not have."""
    seconds: float
    """Seconds of training, including the time before a resume."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The state of a run of `reconstruct`, over all processes."""

    folder: Path
    """`output_dir` of the run."""
    blocks: dict[str, BlockResult] = field(default_factory=dict)
    """Results of the finished tasks of all processes, by name, in the order of the tasks."""
    unfinished: tuple[str, ...] = ()
    """Names of the unfinished tasks: the run was interrupted, or another process trains them."""
    reason: Reason = Reason.DONE
    """Why this process ended: done or interrupted."""
    signal: int = 0
    """Number of the signal that this process received; 0 for none."""

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the state dict of a trained student, on the CPU. If there is an EMA, the weights are those of the
        EMA.

        Raises:
            UserError: the task is not finished.
        """
        return read_tensors(finished(self.folder, name) / STUDENT, f"{name} is not finished in {self.folder}")

    def table(self) -> str:
        """Return a text table of the finished blocks, one per line, and a line that explains the columns."""
        names = "block,error before,after,L1 before,after,trained,new,steps,seconds"
        rows: list[tuple[str, ...]] = [tuple(names.split(","))]
        for row in self.blocks.values():
            errors = (row.error_before, row.error_after, row.l1_before, row.l1_after)
            counts = (f"{row.parameters:,}", f"{row.new:,}", f"{row.steps:,}", f"{row.seconds:.1f}")
            rows.append((row.name, *(f"{each:.4f}" for each in errors), *counts))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        lines += [_LEGEND] if self.blocks else []
        return "\n".join([*lines, *([f"not finished: {', '.join(self.unfinished)}"] if self.unfinished else ())])


def read_report(output_dir: Path | str, names: Iterable[str] | None = None) -> Report:
    """Read the report of a run from its folder, over all processes.

    Args:
        output_dir: the folder of the run.
        names: names of the tasks; None for all tasks that have a folder in the run.

    Raises:
        UserError: a result cannot be read.
    """
    folder = Path(output_dir)
    begun = (path.name for path in sorted((folder / "blocks").glob("*")) if path.is_dir())
    found = list(begun if names is None else names)
    done = {name: _result(finished(folder, name)) for name in found if finished(folder, name).is_dir()}
    return Report(folder=folder, blocks=done, unfinished=tuple(name for name in found if name not in done))


def block_folder(folder: Path, name: str) -> Path:
    """Return the folder of a task within a run: checkpoints, `metrics.jsonl` and the finished student."""
    return folder / "blocks" / name


def finished(folder: Path, name: str) -> Path:
    """Return the folder of the finished student of a task. The folder is complete or does not exist."""
    return block_folder(folder, name) / "finished"


def write_result(place: Path, result: BlockResult, meta: dict[str, Any]) -> None:
    """Write the result of a block and the values that identify its run (`meta`) beside the weights of its student."""
    (place / RESULT).write_text(json.dumps({"result": asdict(result), "meta": meta}, indent=1), encoding="utf-8")


def read_meta(place: Path) -> dict[str, Any]:
    """Read the values that identify the run of a finished block.

    Raises:
        UserError: the file cannot be read.
    """
    meta: dict[str, Any] = _read(place)["meta"]
    return meta


def _result(place: Path) -> BlockResult:
    try:
        return BlockResult(**_read(place)["result"])
    except TypeError as error:
        raise UserError(
            f"{place / RESULT} is from another version ({error}): remove {place.parent} to train the block again"
        ) from error


def _read(place: Path) -> dict[str, Any]:
    read = read_json(place / RESULT, f"{place} is not a finished block")
    if not isinstance(read, dict) or not all(isinstance(read.get(key), dict) for key in ("result", "meta")):
        raise UserError(
            f"{place / RESULT} is damaged, it lacks result or meta: remove {place.parent} to train the block again"
        )
    return read
