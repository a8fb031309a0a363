"""Checkpoints: folders `checkpoint-N`, either complete or absent, with tensors as safetensors and the rest as JSON.

checkpoint-N/
  state.json               step, settings, and name, size and digest of each other file; written last
  weights.safetensors      trained parameters and buffers
  ema.safetensors          moving average of the parameters; empty without one
  copies.safetensors       other policies, `<copy>|<parameter>`; only if the method keeps any
  optimizer.safetensors    moments, `<parameter>|<moment>`
  rank-R.safetensors/json  random states and the method's own state, one pair of files per process
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from postgen.errors import UserError, first_line
from postgen.files import replacing
from postgen.interrupts import held
from postgen.tensor_files import read_tensors

from . import rng
from .checkpoint_head import FORMAT, NAME, DamagedCheckpoint, check_contents, contents_of, read_head

_GROUPS = ("weights", "ema", "optimizer")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(kw_only=True)
class Snapshot:
    """The complete state of a run, from which it can resume exactly."""

    step: int
    """Optimiser steps done."""

    weights: dict[str, Tensor]
    """Trained parameters and buffers by `<model>.<name>`."""

    ema: dict[str, Tensor] = field(default_factory=dict)
    """Moving averages by parameter name; empty if the run keeps no average."""

    copies: dict[str, Tensor] = field(default_factory=dict)
    """Copies of the weights that the method keeps, by `<copy>|<parameter>`."""

    optimizer: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of the optimiser's state by `<parameter>|<moment>`."""

    ranks: list[dict[str, Any]] = field(default_factory=list)
    """For each process its random states and method state: JSON values and tensors under flat names."""

    meta: dict[str, Any] = field(default_factory=dict)
    """JSON values: configuration, update count of the average, other state of the optimiser, seconds, versions."""


def write(output_dir: Path, snapshot: Snapshot) -> Path:
    """Write `checkpoint-<step>` into `output_dir` under a temporary name, rename it, and return its path.

    Raises:
        UserError: the checkpoint cannot be written. Nothing of it remains, and earlier checkpoints are unchanged.
    """
    target = output_dir / f"checkpoint-{snapshot.step}"
    try:
        _write(target, snapshot)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{target} cannot be written: {error}. Make room, then continue from the last checkpoint with --resume."
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
        files = sorted(part.iterdir())
        head = {
            "format": FORMAT,
            "step": snapshot.step,
            "ranks": len(snapshot.ranks),
            "files": {path.name: path.stat().st_size for path in files},
            "contents": {path.name: contents_of(path) for path in files},
            "meta": snapshot.meta,
        }
        (part / "state.json").write_text(json.dumps(head, indent=1))


def read(folder: Path) -> Snapshot:
    """Read a checkpoint, with tensors on the CPU.

    Raises:
        DamagedCheckpoint: the folder is not a complete checkpoint, its files differ from those that the run wrote, or
            its tensors contain NaN.
        UserError: the checkpoint has the format of another version.
    """
    head = read_head(folder)
    try:
        check_contents(folder, head)
        copies = ["copies"] if "copies.safetensors" in head.files else []
        groups = {name: read_tensors(folder / f"{name}.safetensors") for name in (*_GROUPS, *copies)}
        ranks = [
            {**_json(folder / f"rank-{rank}.json"), **read_tensors(folder / f"rank-{rank}.safetensors")}
            for rank in range(head.ranks)
        ]
    except DamagedCheckpoint:
        raise
    except (OSError, UserError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{folder} is damaged: {first_line(error)}") from error
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            # Infinity is allowed: masks in buffers and states of optimisers may contain it.
            if tensor.dtype in _FLOATS and bool(tensor.isnan().any()):
                raise DamagedCheckpoint(f"{folder} is damaged: {name} in {group}.safetensors holds NaN")
    for rank, state in enumerate(ranks):
        if reason := _wrong_rank(state):
            raise DamagedCheckpoint(f"{folder} is damaged: rank-{rank} {reason}")
    return Snapshot(step=head.step, ranks=ranks, meta=head.meta, **groups)


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object")
    return found


def _wrong_rank(state: Mapping[str, Any]) -> str:
    """Return what is wrong with the state of a process; an empty text if it is valid."""
    averages = state.get("averages")
    sums, counts = (averages.get(key) if isinstance(averages, dict) else None for key in ("sums", "counts"))
    if not isinstance(sums, dict) or not isinstance(counts, dict) or sums.keys() != counts.keys():
        return "has no averages of metrics"
    if not all(isinstance(value, int | float) for value in [*sums.values(), *counts.values()]):
        return "has averages of metrics that are not numbers"
    return rng.wrong({name.removeprefix("rng."): value for name, value in state.items() if name.startswith("rng.")})


def named(output_dir: Path) -> list[Path]:
    """Return all folders of a run that are named like a checkpoint, complete or not, ordered by step."""
    found = {
        int(match[1]): path
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (match := NAME.fullmatch(path.name))
    }
    return [found[step] for step in sorted(found)]


def find(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, ordered by step."""
    return [path for path in named(output_dir) if _is_complete(path)]


def to_resume(output_dir: Path, wanted: str | None) -> list[Path]:
    """Return the checkpoints that a run in `output_dir` may resume, in the order in which to try them.

    Args:
        output_dir: folder of the run.
        wanted: None for a new run. "latest" for all checkpoints, newest first, so that an older one is used if the
            newest is damaged. "auto" for the same, or a new run if there are no checkpoints. Or a checkpoint folder.

    Returns:
        Folders, which need not be complete checkpoints; an empty list for a new run.

    Raises:
        UserError: a new run would mix with the checkpoints in the folder, "latest" finds no checkpoint, or the named
            checkpoint is not a folder or is followed by a newer one.
    """
    found = named(output_dir)
    if wanted == "latest" and not found:
        raise UserError(
            f"output_dir {output_dir} holds no checkpoint to resume. Omit --resume to start a new run, or use"
            " --resume auto, which starts a new run if there is no checkpoint."
        )
    if wanted in ("latest", "auto"):
        return found[::-1]
    if wanted is None:
        if found:
            raise UserError(
                f"{output_dir} holds the checkpoints of an earlier run. Resume it (--resume), or choose another "
                "output_dir."
            )
        return []
    source = Path(wanted)
    if not source.is_dir():
        raise UserError(
            f"resume_from_checkpoint is {wanted!r}, which is not a folder. --resume takes no value (the newest"
            f" checkpoint of output_dir), latest, auto, or a checkpoint such as {output_dir / 'checkpoint-50'}."
        )
    # Later checkpoints that stay in the folder would look newer than those that this run writes.
    if source in found[:-1]:
        raise UserError(
            f"{found[-1]} is newer than {source.name}: remove the checkpoints after {source.name}, or copy"
            f" {source.name} to another folder."
        )
    return [source]


def prune(output_dir: Path, keep: int | None) -> None:
    """Remove all complete checkpoints but the newest `keep`; None keeps all."""
    for path in find(output_dir)[: -keep if keep else 0]:
        # Renamed first, so that a kill during the removal leaves no incomplete folder under a checkpoint's name.
        gone = path.with_name(f".{path.name}.gone.part")
        with held():
            path.rename(gone)
            shutil.rmtree(gone)


def sweep(output_dir: Path) -> None:
    """Remove the temporary files and folders that a killed run left behind."""
    for path in output_dir.glob(".export.*.old"):
        # If the run was killed after moving the old export away and before moving the new one in place, the old
        # export is the only one.
        if (output_dir / "export").exists():
            _remove(path)
        else:
            path.rename(output_dir / "export")
    for path in [*output_dir.glob(".checkpoint-*.old"), *output_dir.glob(".*.part")]:
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def check_names(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], location: str) -> None:
    """Compare the names and shapes of tensors.

    Args:
        found: tensors of a file or checkpoint.
        wanted: tensors of the model.
        location: the origin of `found`, for the message.

    Raises:
        UserError: tensors are missing, unknown or have another shape; the message names the first of each kind.
    """
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    shapes = [
        f"{name} has shape {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    parts = [
        *([f"{len(missing)} missing, first {missing[0]}"] if missing else ()),
        *([f"{len(unknown)} unknown, first {unknown[0]}"] if unknown else ()),
        *([f"{len(shapes)} with another shape, first {shapes[0]}"] if shapes else ()),
    ]
    if parts:
        raise UserError(
            f"{location} does not fit this model: {'; '.join(parts)}. Use the recipe of the run that wrote it."
        )


def _is_complete(folder: Path) -> bool:
    try:
        read_head(folder)
    except UserError:
        return False
    return True


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}, path)
