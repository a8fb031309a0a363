"""Recorded calls of a teacher's modules, in a folder or in memory.

folder/
  records.json     what was to be recorded: settings, noise levels, what identifies the teacher; written first
  00000-000/       a record: one forward of the teacher on a batch of rows, as `postgen.families.recording` keeps it;
                   whole or absent
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families.recording import RecordedCall, Recording
from postgen.families.recording_store import INDEX
from postgen.reading import read_json

PLAN = "records.json"
FORMAT = 1
_VALUES = 64
"""Values of each tensor that identify a teacher: all of them would be read for minutes."""


class Records:
    """Calls of some modules of a teacher on its own trajectories, a part of them held out.

    Args:
        plan: what was recorded, see `postgen.reconstruct.collect`.
        recordings: by the name of the record.
    """

    def __init__(self, plan: Mapping[str, Any], recordings: Mapping[str, Recording]) -> None:
        self.plan, self._recordings = plan, recordings

    @classmethod
    def read(cls, folder: Path | str) -> Records:
        """Return the records of a folder; tensors are read when they are asked for.

        Raises:
            UserError: none were collected there, or not all of them.
        """
        folder = Path(folder).absolute()
        plan = read_plan(folder)
        if missing := [name for name in plan["records"] if not is_complete(folder / name)]:
            raise UserError(
                f"{folder} has {len(plan['records']) - len(missing)} of {len(plan['records'])} records: collect them"
                " again with the same settings, which goes on"
            )
        return cls(plan, {name: Recording.read(folder / name) for name in plan["records"]})

    @property
    def identity(self) -> str:
        """A digest of settings, prompts, noise levels and teacher; which modules were recorded is not in it."""
        return digest({name: value for name, value in self.plan.items() if name != "modules"})

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules whose calls were recorded."""
        return tuple(self.plan["modules"])

    def __repr__(self) -> str:
        return f"Records({len(self._recordings)} of {', '.join(self.modules)})"

    def calls(self, modules: Sequence[str], *, held_out: bool) -> list[tuple[RecordedCall, ...]]:
        """Return the calls of some modules that belong together, in a fixed order.

        Args:
            modules: their names.
            held_out: whether those of the held-out prompts, or the others.

        Raises:
            UserError: a module was not recorded, or was not called as often as the others.
        """
        if missing := [name for name in modules if name not in self.modules]:
            raise UserError(f"{', '.join(missing)} was not recorded. Recorded: {', '.join(self.modules)}")
        found: list[tuple[RecordedCall, ...]] = []
        for name, said in self.plan["records"].items():
            if said["held_out"] == held_out:
                each = [self._recordings[name][module] for module in modules]
                counts = {module: len(calls) for module, calls in zip(modules, each, strict=True)}
                if len(set(counts.values())) > 1:
                    raise UserError(f"modules that do not go together were called differently often: {counts}")
                found += zip(*each, strict=True)
        return found


def read_plan(folder: Path) -> dict[str, Any]:
    """Return what was to be recorded in a folder.

    Raises:
        UserError: nothing was, or by another version.
    """
    said = f"{folder} holds no records"
    plan = read_json(folder / PLAN, said)
    if not isinstance(plan, dict) or not isinstance(plan.get("records"), dict):
        raise UserError(f"{said}: {PLAN} says something else")
    if plan.get("format") != FORMAT:
        raise UserError(f"{folder / PLAN} has format {plan.get('format')}, this version reads {FORMAT}: collect anew")
    return plan


def is_complete(record: Path) -> bool:
    """Whether a record is there; a folder takes its name only when it is whole."""
    return (record / INDEX).is_file()


def digest(value: Any) -> str:
    """Return a short digest of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def weights_digest(module: nn.Module) -> str:
    """Return a short digest of a model's weights: names, shapes, types, and values evenly spaced in each tensor."""
    said = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            said.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            said.update(_sampled(tensor))
    return said.hexdigest()[:16]


@torch.no_grad()
def _sampled(tensor: Tensor) -> bytes:
    if tensor.device.type == "meta" or not tensor.numel():  # offloaded: its values are elsewhere
        return b""
    places = torch.linspace(0, tensor.numel() - 1, min(_VALUES, tensor.numel()), dtype=torch.float64).long()
    values = tensor.reshape(-1)[places.to(tensor.device)].cpu().contiguous()
    return bytes(values.view(torch.uint8).tolist())
