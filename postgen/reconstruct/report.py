"""What a run leaves: errors of each block before and after, seconds, and the weights of its student."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockResult:
    """How the reconstruction of one block ended. Errors are those of `loss.error`, on held-out records."""

    name: str
    """Of the task."""
    error_before: float
    """Relative L2 error of the student as it was built."""
    error_after: float
    """Relative L2 error at the end, of the averaged weights where there is an average."""
    l1_before: float
    """Relative L1 error of the student as it was built."""
    l1_after: float
    """Relative L1 error at the end."""
    steps: int
    """Optimiser steps."""
    parameters: int
    """Trained parameters."""
    new: int
    """Those of them that the teacher does not have."""
    seconds: float
    """Seconds of training, those before a resume included."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a call of `reconstruct` has done."""

    folder: Path
    """`output_dir`."""
    blocks: dict[str, BlockResult] = field(default_factory=dict)
    """Of the tasks that are finished, by name, in the order of the tasks; of all processes."""
    unfinished: tuple[str, ...] = ()
    """Tasks that are not: the run was interrupted, or another process has them."""
    reason: Reason = Reason.DONE
    """Why this process ended: done or interrupted."""
    signal: int = 0
    """Number of the signal that it got; 0 for none."""

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the `state_dict` of a trained student, on the CPU, averaged where there is an average.

        Raises:
            UserError: the task is not finished.
        """
        return read_tensors(finished(self.folder, name) / STUDENT, f"{name} is not finished in {self.folder}")

    def table(self) -> str:
        """Return a table of the finished blocks, one a line."""
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
        return "\n".join([*lines, *([f"not finished: {', '.join(self.unfinished)}"] if self.unfinished else ())])


def read_report(output_dir: Path | str, names: Iterable[str] | None = None) -> Report:
    """Return what is finished in the folder of a run, of all its processes.

    Args:
        output_dir: the folder.
        names: of the tasks; none is those that have a folder there.

    Raises:
        UserError: a result cannot be read.
    """
    folder = Path(output_dir)
    begun = (path.name for path in sorted((folder / "blocks").glob("*")) if path.is_dir())
    found = list(begun if names is None else names)
    done = {name: _result(finished(folder, name)) for name in found if finished(folder, name).is_dir()}
    return Report(folder=folder, blocks=done, unfinished=tuple(name for name in found if name not in done))


def block_folder(folder: Path, name: str) -> Path:
    """Return the folder of a task in that of a run: its checkpoints, `metrics.jsonl`, and what is finished."""
    return folder / "blocks" / name


def finished(folder: Path, name: str) -> Path:
    """Return where the student of a task stands when it is finished; whole or absent."""
    return block_folder(folder, name) / "finished"


def write_result(place: Path, result: BlockResult, meta: dict[str, Any]) -> None:
    """Write the result of a block, and what it was made with, beside the weights of its student."""
    (place / RESULT).write_text(json.dumps({"result": asdict(result), "meta": meta}, indent=1), encoding="utf-8")


def read_meta(place: Path) -> dict[str, Any]:
    """Return what a finished block was made with.

    Raises:
        UserError: it cannot be read.
    """
    meta: dict[str, Any] = _read(place)["meta"]
    return meta


def _result(place: Path) -> BlockResult:
    try:
        return BlockResult(**_read(place)["result"])
    except TypeError as error:
        raise UserError(f"{place / RESULT} is of another version ({error}): remove {place.parent}") from error


def _read(place: Path) -> dict[str, Any]:
    read = read_json(place / RESULT, f"{place} is no finished block")
    if not isinstance(read, dict) or not all(isinstance(read.get(key), dict) for key in ("result", "meta")):
        raise UserError(f"{place / RESULT} does not say what it is: remove {place.parent} to train the block again")
    return read
