"""Checkpoints: folders `checkpoint-N` that are complete or absent, tensors as safetensors, everything else as JSON.

checkpoint-N/
  state.json               step, settings, names of the files with their sizes and what is in them; written last
  weights.safetensors      trained parameters and buffers
  ema.safetensors          their moving average, when there is one
  copies.safetensors       other policies, `<copy>|<parameter>`, when there are any
  optimizer.safetensors    moments, `<parameter>|<moment>`
  rank-R.safetensors/json  random states and the method's own state, one pair per process
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
    """Read a checkpoint, tensors on the CPU.

    Raises:
        DamagedCheckpoint: the folder is no complete checkpoint, its files are not those that the run wrote, or its
            tensors hold NaN.
        UserError: it has the format of another version.
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
            # Infinity may be meant: in the buffer of a mask, in what an optimiser keeps.
            if tensor.dtype in _FLOATS and bool(tensor.isnan().any()):
                raise DamagedCheckpoint(f"{folder} is damaged: {name} in {group}.safetensors holds NaN")
    for rank, state in enumerate(ranks):
        if reason := _wrong_rank(state):
            raise DamagedCheckpoint(f"{folder} is damaged: rank-{rank} {reason}")
    return Snapshot(step=head.step, ranks=ranks, meta=head.meta, **groups)


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no names with values")
    return found


def _wrong_rank(state: Mapping[str, Any]) -> str:
    """Return what is wrong with the state of a process; nothing where all is well."""
    averages = state.get("averages")
    sums, counts = (averages.get(key) if isinstance(averages, dict) else None for key in ("sums", "counts"))
    if not isinstance(sums, dict) or not isinstance(counts, dict) or sums.keys() != counts.keys():
        return "has no averages of metrics"
    if not all(isinstance(value, int | float) for value in [*sums.values(), *counts.values()]):
        return "has averages of metrics that are no numbers"
    return rng.wrong({name.removeprefix("rng."): value for name, value in state.items() if name.startswith("rng.")})


def named(output_dir: Path) -> list[Path]:
    """Return what is called as a checkpoint in the folder of a run, whole or not, the oldest first."""
    found = {
        int(match[1]): path
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (match := NAME.fullmatch(path.name))
    }
    return [found[step] for step in sorted(found)]


def find(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return [path for path in named(output_dir) if _is_complete(path)]


def to_resume(output_dir: Path, wanted: str | None) -> list[Path]:
    """Return the checkpoints that a run in `output_dir` may go on from, the best first.

    Args:
        output_dir: folder of the run.
        wanted: None for a new run; "latest" for the newest, and for those before it where that is damaged; "auto" for
            the same where there are any, and a new run where there are none; a folder.

    Raises:
        UserError: the folder holds checkpoints that this run would mix with its own, or none for "latest".
    """
    found = named(output_dir)
    if wanted == "latest" and not found:
        raise UserError(
            f"output_dir {output_dir} holds no checkpoint to resume. Leave --resume out to begin a run there, or give"
            " --resume auto, which begins one where there is none."
        )
    if wanted in ("latest", "auto"):
        return found[::-1]
    if wanted is None:
        if found:
            raise UserError(
                f"{output_dir} holds the checkpoints of an earlier run. Resume it (--resume), or name another "
                "output_dir."
            )
        return []
    source = Path(wanted)
    # Kept, the later ones would pass for newer than what this run writes.
    if source in found[:-1]:
        raise UserError(f"{found[-1]} is newer than {source.name}: remove what follows it, or copy it elsewhere.")
    return [source]


def prune(output_dir: Path, keep: int | None) -> None:
    """Remove all but the newest `keep` checkpoints; None keeps all."""
    for path in find(output_dir)[: -keep if keep else 0]:
        # Renamed first: killed half-way through the removal, no half checkpoint is left under a good name.
        gone = path.with_name(f".{path.name}.gone.part")
        with held():
            path.rename(gone)
            shutil.rmtree(gone)


def sweep(output_dir: Path) -> None:
    """Remove the temporary files and folders that a killed run left behind."""
    for path in output_dir.glob(".export.*.old"):
        # Killed between stepping aside and being replaced, the old export is the only one.
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


def _is_complete(folder: Path) -> bool:
    try:
        read_head(folder)
    except UserError:
        return False
    return True


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}, path)
