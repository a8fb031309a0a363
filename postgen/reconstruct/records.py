"""Recorded calls of a teacher's modules, in a folder or in memory.

folder/
  records.json     the plan: settings, noise levels, digest of the teacher, names of the records; written first
  00000-000/       a record: one forward pass of the teacher on a batch of rows, in the format of
                   `postgen.families.recording`; it is complete or does not exist
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from postgen.errors import UserError
from postgen.families.recording import RecordedCall, Recording
from postgen.families.recording_store import INDEX
from postgen.reading import read_json
from postgen.training.digests import digest

PLAN = "records.json"
FORMAT = 1


class Records:
    """Recorded calls of a teacher's modules on its own trajectories. Some records are held out for evaluation.

    Args:
        plan: the content of `records.json`, see `postgen.reconstruct.collect`.
        recordings: the recordings, by the name of the record.
    """

    def __init__(self, plan: Mapping[str, Any], recordings: Mapping[str, Recording]) -> None:
        self.plan, self._recordings = plan, recordings

    @classmethod
    def read(cls, folder: Path | str) -> Records:
        """Open the records of a folder. Tensors are read on first use.

        Raises:
            UserError: the folder has no records, or not all of them.
        """
        folder = Path(folder).absolute()
        plan = read_plan(folder)
        if missing := [name for name in plan["records"] if not is_complete(folder / name)]:
            raise UserError(
                f"{folder} has only {len(plan['records']) - len(missing)} of {len(plan['records'])} records: call"
                " collect again with the same settings to add the missing ones"
            )
        return cls(plan, {name: Recording.read(folder / name) for name in plan["records"]})

    @property
    def identity(self) -> str:
        """A digest of settings, prompts, noise levels and teacher. It does not include the list of modules."""
        return digest({name: value for name, value in self.plan.items() if name != "modules"})

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules whose calls were recorded."""
        return tuple(self.plan["modules"])

    def __repr__(self) -> str:
        return f"Records({len(self._recordings)} of {', '.join(self.modules)})"

    def calls(self, modules: Sequence[str], *, held_out: bool) -> list[tuple[RecordedCall, ...]]:
        """Return the recorded calls of some modules, in a fixed order. Each entry has one call of each module.

        Args:
            modules: names of the modules.
            held_out: True for the records of held-out prompts, False for the others.

        Raises:
            UserError: a module was not recorded, or the modules were not called equally often.
        """
        if missing := [name for name in modules if name not in self.modules]:
            raise UserError(f"{', '.join(missing)} was not recorded. Recorded: {', '.join(self.modules)}")
        found: list[tuple[RecordedCall, ...]] = []
        for name, said in self.plan["records"].items():
            if said["held_out"] == held_out:
                each = [self._recordings[name][module] for module in modules]
                counts = {module: len(calls) for module, calls in zip(modules, each, strict=True)}
                if len(set(counts.values())) > 1:
                    raise UserError(
                        f"the modules of a task must be called equally often, but record {name} has these numbers of"
                        f" calls: {counts}"
                    )
                found += zip(*each, strict=True)
        return found


def read_plan(folder: Path) -> dict[str, Any]:
    """Read the plan of a folder of records.

    Raises:
        UserError: the folder has no plan, or one of another format version.
    """
    said = f"{folder} holds no records"
    plan = read_json(folder / PLAN, said)
    if not isinstance(plan, dict) or not isinstance(plan.get("records"), dict):
        raise UserError(f"{said}: its {PLAN} is not a plan of records")
    if plan.get("format") != FORMAT:
        raise UserError(
            f"{folder / PLAN} has format {plan.get('format')}, but this version reads format {FORMAT}: collect again"
            " into another folder"
        )
    return plan


def is_complete(record: Path) -> bool:
    """Whether a record exists. A record's folder gets its name only when it is complete."""
    return (record / INDEX).is_file()
