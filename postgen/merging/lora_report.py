"""What a merge of LoRA files did, and the file that it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from postgen.errors import UserError, first_line
from postgen.families.lora_file import NOTE, SAID, WEIGHTS
from postgen.files import replacing

Energies = Mapping[str, tuple[float, float]]
"""Layer name -> squared Frobenius norm that the result holds, and that of the whole sum."""


@dataclass(frozen=True, kw_only=True)
class LoraMergeReport:
    """What `merge_loras` did."""

    method: str
    """A key of `MERGERS`."""
    files: tuple[str, ...]
    """The merged files."""
    digests: tuple[str, ...]
    """SHA-256 of each file."""
    weights: tuple[float, ...]
    """The weight of each file."""
    ranks: tuple[int, ...]
    """Largest rank in each file."""
    rank: int
    """Largest rank in the result."""
    layers: int
    """Number of merged layers."""
    retained: float
    """Share of the squared Frobenius norm of the merged changes that the result holds, in [0, 1]; 1 is all."""
    weakest: tuple[str, float]
    """The layer with the smallest such share, and its share."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Metadata of the merged file: ranks and scales, without which programs would guess the scales."""
    note: Mapping[str, Any] = field(default_factory=dict)
    """The note about the base model, see `postgen.families.lora_file.NOTE`; empty if the files have none."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, without the metadata of the file."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name not in ("metadata", "note")
        }


def retained_of(energies: Energies) -> tuple[float, tuple[str, float]]:
    """Return the share of the squared norm that all layers hold together, and the layer with the smallest share."""
    shares = {name: _share(held, whole) for name, (held, whole) in energies.items()}
    held, whole = (math.fsum(each) for each in zip(*energies.values(), strict=True))
    return _share(held, whole), min(shares.items(), key=lambda each: each[1])


def _share(held: float, whole: float) -> float:
    return held / whole if whole > 0 else 1.0


def write_lora(target: Path, tensors: Mapping[str, Tensor], report: LoraMergeReport) -> None:
    """Write a merged LoRA: a file, if the name ends in .safetensors, or a folder in diffusers' format.

    `pipe.load_lora_weights` loads both.

    Args:
        target: the file or folder; an existing one is replaced.
        tensors: the tensors by key, from `merge_loras`.
        report: its report, whose metadata and note belong to the file.

    Raises:
        UserError: the file or folder cannot be written; nothing of it remains.
    """
    from safetensors.torch import save_file

    note = json.dumps(dict(report.note)) if report.note else ""
    try:
        with replacing(target) as part:
            file = part
            if target.suffix != ".safetensors":
                part.mkdir()
                file = part / WEIGHTS
                if note:
                    (part / NOTE).write_text(note + "\n")
            metadata = {"format": "pt", **report.metadata, **({SAID: note} if note else {})}
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata=metadata)
    except Exception as error:  # on a full disk safetensors raises its own error type, not OSError
        raise UserError(f"cannot write {target}: {getattr(error, 'strerror', None) or first_line(error)}") from error
