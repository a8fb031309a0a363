"""Checkpoints: folders `checkpoint-N` that are complete or absent, tensors as safetensors, everything else as JSON.

checkpoint-N/
  state.json               step, settings, names of the files with their sizes; written last
  weights.safetensors      trained parameters and buffers
  ema.safetensors          their moving average, when there is one
  copies.safetensors       other policies, `<copy>|<parameter>`, when there are any
  optimizer.safetensors    moments, `<parameter>|<moment>`
  rank-R.safetensors/json  random states and the method's own state, one pair per process
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from postgen.errors import UserError
from postgen.files import replacing
from postgen.tensor_files import read_tensors

FORMAT = 1
_GROUPS = ("weights", "ema", "optimizer")
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(kw_only=True)
class Snapshot:
    """Everything a run needs to go on as if it had not stopped."""

    step: int
    """Optimiser steps done."""

    weights: dict[str, Tensor]
    """Trained parameters and buffers by `<model>.<name>`."""

    ema: dict[str, Tensor] = field(default_factory=dict)
    """Averages under the names of the parameters; empty without an average."""

    copies: dict[str, Tensor] = field(default_factory=dict)
    """Copies of the weights that the method keeps, by `<copy>|<parameter>`."""

    optimizer: dict[str, Tensor] = field(default_factory=dict)
    """Moments by `<parameter>|<moment>`."""

    ranks: list[dict[str, Any]] = field(default_factory=list)
    """For each process: random states and method state, JSON values and tensors under flat names."""

    meta: dict[str, Any] = field(default_factory=dict)
    """JSON values: configuration, number of averages, what the optimiser keeps beside moments, versions."""


def write(output_dir: Path, snapshot: Snapshot) -> Path:
    """Write `checkpoint-<step>` in `output_dir`, under a temporary name first, and return its path.

    Raises:
        UserError: it cannot be written; nothing of it is left, and earlier checkpoints are as they were.
    """
    target = output_dir / f"checkpoint-{snapshot.step}"
    try:
        _write(target, snapshot)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{target} cannot be written: {error}. Make room, then go on from the last checkpoint with --resume."
        ) from error
    return target


def _write(target: Path, snapshot: Snapshot) -> None:
    with replacing(target) as part:
        part.mkdir()
        for name in (*_GROUPS, *(["copies"] if snapshot.copies else [])):
            _save_tensors(part / f"{name}.safetensors", getattr(snapshot, name))
        for rank, state in enumerate(snapshot.ranks):
            tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
            plain = {name: value for name, value in state.items() if name not in tensors}
            _save_tensors(part / f"rank-{rank}.safetensors", tensors)
            (part / f"rank-{rank}.json").write_text(json.dumps(plain))
        head = {
            "format": FORMAT,
            "step": snapshot.step,
            "ranks": len(snapshot.ranks),
            "files": {path.name: path.stat().st_size for path in sorted(part.iterdir())},
            "meta": snapshot.meta,
        }
        (part / "state.json").write_text(json.dumps(head, indent=1))


def read(folder: Path) -> Snapshot:
    """Read a checkpoint, tensors on the CPU.

    Raises:
        UserError: the folder is no complete checkpoint.
    """
    head = _head(folder)
    if head is None:
        raise UserError(f"{folder} is no complete checkpoint. Give a folder checkpoint-N of a run, or 'latest'.")
    if head["format"] != FORMAT:
        raise UserError(f"{folder} has checkpoint format {head['format']}, this version reads {FORMAT}.")
    try:
        copies = ["copies"] if "copies.safetensors" in head["files"] else []
        groups = {name: read_tensors(folder / f"{name}.safetensors") for name in (*_GROUPS, *copies)}
        ranks = [
            {
                **json.loads((folder / f"rank-{rank}.json").read_text()),
                **read_tensors(folder / f"rank-{rank}.safetensors"),
            }
            for rank in range(head["ranks"])
        ]
    except (OSError, UserError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} is damaged ({error}). Resume from an earlier checkpoint.") from error
    return Snapshot(step=head["step"], ranks=ranks, meta=head["meta"], **groups)


def find(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    steps = {
        int(match[1]): path
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (match := _NAME.fullmatch(path.name)) and _head(path) is not None
    }
    return [steps[step] for step in sorted(steps)]


def to_resume(output_dir: Path, wanted: str | None) -> Path | None:
    """Return the checkpoint that a run in `output_dir` goes on from: `wanted` may be None, "latest" or a folder.

    Raises:
        UserError: the folder holds checkpoints that this run would mix with its own.
    """
    found = find(output_dir)
    if wanted == "latest":
        return found[-1] if found else None
    if wanted is None:
        if found:
            raise UserError(
                f"{output_dir} holds the checkpoints of an earlier run. Resume it (--resume), or name another "
                "output_dir."
            )
        return None
    source = Path(wanted)
    # Kept, the later ones would pass for newer than what this run writes.
    if source in found[:-1]:
        raise UserError(f"{found[-1]} is newer than {source.name}: remove what follows it, or copy it elsewhere.")
    return source


def prune(output_dir: Path, keep: int | None) -> None:
    """Remove all but the newest `keep` checkpoints; None keeps all."""
    for path in find(output_dir)[: -keep if keep else 0]:
        # Renamed first: killed half-way through the removal, no half checkpoint is left under a good name.
        gone = path.with_name(f".{path.name}.gone.part")
        path.rename(gone)
        shutil.rmtree(gone)


def sweep(output_dir: Path) -> None:
    """Remove the temporary files and folders that a killed run left behind."""
    for path in output_dir.glob(".export.*.old"):
        # Killed between stepping aside and being replaced, the old export is the only one.
        if (output_dir / "export").exists():
            shutil.rmtree(path)
        else:
            path.rename(output_dir / "export")
    for path in output_dir.glob(".*.part"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_names(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], location: str) -> None:
    """Compare names and shapes of tensors.

    Raises:
        UserError: something is missing, unknown or of another shape; the message names the first of each kind.
    """
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    shapes = [
        f"{name} is {tuple(found[name].shape)} there and {tuple(wanted[name].shape)} here"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    parts = [
        *([f"{len(missing)} missing, first {missing[0]}"] if missing else ()),
        *([f"{len(unknown)} unknown, first {unknown[0]}"] if unknown else ()),
        *([f"{len(shapes)} of another shape, first {shapes[0]}"] if shapes else ()),
    ]
    if parts:
        raise UserError(f"{location} does not fit this model: {'; '.join(parts)}. Use the recipe that made it.")


def _head(folder: Path) -> dict[str, Any] | None:
    """Return the contents of state.json, or None for a folder that is not complete."""
    try:
        head = json.loads((folder / "state.json").read_text())
        complete = all((folder / name).stat().st_size == size for name, size in head["files"].items())
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return None
    return head if complete else None


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}, path)
