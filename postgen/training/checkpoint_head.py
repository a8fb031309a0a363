"""`state.json` of a checkpoint, and the check that the other files are those that the run wrote."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgen.errors import UserError, first_line
from postgen.tensor_files import opened

FORMAT = 1
Span = Sequence[int]
"""First and last step of a span of steps."""
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,14})")


class DamagedCheckpoint(UserError):
    """A checkpoint is incomplete or damaged. An earlier checkpoint may be usable."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """The checked contents of `state.json`."""

    step: int
    """Optimiser steps done."""
    ranks: int
    """Number of processes of the run."""
    files: Mapping[str, int]
    """Size in bytes of each other file, by name."""
    contents: Mapping[str, str]
    """Digest (`contents_of`) of each other file, by name; empty for checkpoints of versions without digests."""
    meta: dict[str, Any]
    """See `Snapshot.meta`."""

    @property
    def spiked(self) -> list[Span]:
        """Spans of steps whose checkpoints belong to a spike of the loss from which the run was rescued."""
        return list(self.meta.get("spikes", {}).get("spiked", ()))


def in_spans(step: int, spans: Iterable[Span]) -> bool:
    """Return whether a step is in one of several spans."""
    return any(first <= step <= last for first, last in spans)


def read_head(folder: Path) -> Head:
    """Read and check `state.json` of a checkpoint, and check the sizes of the other files.

    Raises:
        DamagedCheckpoint: `state.json` cannot be read, an entry is missing or has a wrong type, or a file is missing
            or has another size.
        UserError: the checkpoint has the format of another version.
    """
    try:
        head = json.loads((folder / "state.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(
            f"{folder} is not a complete checkpoint: state.json cannot be read: {_reason(error)}"
        ) from error
    if not isinstance(head, dict) or not _is_count(head.get("format")):
        raise _damaged(folder, "state.json has no format number")
    if head["format"] != FORMAT:
        raise UserError(
            f"{folder} has checkpoint format {head['format']}, this version of postgen reads format {FORMAT}."
        )
    _check(folder, head)
    found = Head(
        step=head["step"],
        ranks=head["ranks"],
        files=head["files"],
        contents=head.get("contents", {}),
        meta=head["meta"],
    )
    for name, size in found.files.items():
        try:
            there = (folder / name).stat().st_size if (folder / name).is_file() else None
        except OSError as error:
            raise _damaged(folder, f"{name} cannot be read: {_reason(error)}") from error
        if there != size:
            has = "is missing" if there is None else f"has {there} bytes"
            raise _damaged(folder, f"{name} {has}, the run wrote {size} bytes")
    return found


def check_contents(folder: Path, head: Head) -> None:
    """Compare the files of a checkpoint with the digests in its head. Values of tensors are not read.

    Raises:
        DamagedCheckpoint: a file differs from the one that the run wrote.
    """
    for name, digest in head.contents.items():
        if contents_of(folder / name) != digest:
            raise _damaged(folder, f"{name} is not the file that the run wrote")


def contents_of(path: Path) -> str:
    """Return the SHA-256 digest of a JSON file, or of names, dtypes and shapes of the tensors in a safetensors file.

    Raises:
        UserError: the safetensors file cannot be read.
    """
    if path.suffix == ".json":
        text = path.read_bytes()
    else:
        with opened(path) as content:
            slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118
            rows = sorted((name, str(one.get_dtype()), list(one.get_shape())) for name, one in slices.items())
        text = json.dumps(rows).encode()
    return hashlib.sha256(text).hexdigest()


def _check(folder: Path, head: Mapping[str, Any]) -> None:
    files, contents, meta = head.get("files"), head.get("contents", {}), head.get("meta")
    own = NAME.fullmatch(folder.name)
    wrong = {
        "step": not _is_count(head.get("step")) or (own is not None and head["step"] != int(own[1])),
        "ranks": not _is_count(head.get("ranks")) or not 1 <= head["ranks"] <= 10**6,
        "files": not isinstance(files, dict) or not all(map(_is_count, files.values())) or not _plain(files),
        "contents": not isinstance(contents, dict) or not _plain(contents),
        "meta": not isinstance(meta, dict),
    }
    if isinstance(meta, dict):
        kept = meta.get("optimizer", {})
        wrong |= {
            "meta.config": not isinstance(meta.get("config"), dict),
            "meta.seconds": not _is_number(meta.get("seconds")),
            "meta.spikes": not _is_spikes(meta.get("spikes", {})),
            "meta.ema_steps": not _is_count(meta.get("ema_steps")),
            "meta.optimizer": not isinstance(kept, dict)
            or not isinstance(kept.get("parameters", {}), dict)
            or not isinstance(kept.get("groups", []), list)
            or not all(isinstance(group, dict) for group in kept.get("groups", [])),
        }
    if names := [name for name, bad in wrong.items() if bad]:
        raise _damaged(folder, f"state.json has no valid {names[0]}")
    needed = ["weights.safetensors", "ema.safetensors", "optimizer.safetensors"]
    needed += [f"rank-{rank}.{kind}" for rank in range(head["ranks"]) for kind in ("json", "safetensors")]
    if absent := [name for name in needed if name not in head["files"]]:
        raise _damaged(folder, f"state.json does not list {absent[0]}")


def _plain(names: Mapping[str, Any]) -> bool:
    """Return whether all names are plain file names without a path."""
    return all(Path(name).name == name and name != ".." for name in names)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_spikes(value: Any) -> bool:
    """Return whether a value is a state of `rescue.Spikes`; empty in checkpoints of earlier versions."""
    if not isinstance(value, dict) or not isinstance(value.get("window", []), list):
        return False
    losses = [one for one in value.get("window", []) if not isinstance(one, int | float) or isinstance(one, bool)]
    spans = value.get("spiked", [])
    if not isinstance(spans, list) or not all(isinstance(span, list) and len(span) == 2 for span in spans):
        return False
    counts = [value.get(name, 0) for name in ("row", "rescues")] + [step for span in spans for step in span]
    return not losses and all(map(_is_count, counts))


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value) and value >= 0
    except OverflowError:
        return False


def _damaged(folder: Path, reason: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{folder} is damaged: {reason}")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or first_line(error)
