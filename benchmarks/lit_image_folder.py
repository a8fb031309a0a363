"""What a folder of the image experiment of LiT may hold before a command goes on in it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.lit_image_arms import ARMS, FULL, TEACHERS, Size, recipe_of
from postgen.assets import verify
from postgen.errors import UserError, shown
from postgen.files import check_place
from postgen.locks import FolderLock
from postgen.reading import read_json
from postgen.tensor_files import opened

_FREE = {
    *("output_dir", "pool_dir", "model", "student", "train_dataset", "latents"),
    *("cuda_graphs", "device", "logging_steps", "save_steps", "save_seconds"),
}
"""Settings of a run that change nothing of what is measured: places, and how a run is computed and kept."""
_MEASURED = {"settings", "device", "versions", "rows", "fd", "fd_draws"}
_OTHER = "name another --out, or the same size as before"


def lock_of(out: Path) -> FolderLock:
    """Return the lock of the command that works in a folder, which is made.

    Raises:
        UserError: the folder cannot be written.
    """
    check_place(out, folder=True)
    out.mkdir(parents=True, exist_ok=True)
    return FolderLock(out, setting="--out")


def check_folder(out: Path, results: Path, names: Iterable[str], size: Size) -> None:
    """See that what is in the folders is of the same experiment, so that nothing is lost, and nothing mixed.

    Args:
        out: folder of the experiment.
        results: folder of what is kept.
        names: ARM.SEED of runs.
        size: of the experiment.

    Raises:
        UserError: runs or measures of other settings, measures in `results` that `out` does not have, a folder that
            cannot be written, or no weights for the distances of the whole experiment.
    """
    check_place(results, folder=True)
    for name in names:
        if name.split(".")[0] in (*TEACHERS, *ARMS):
            _check_recipe(out, name, size)
    measured, now = all_measured(out), measured_with(size, out)
    for name, each in measured.items():
        if each["settings"] != now:
            raise UserError(f"{out} has measures of {name} with {shown(each['settings'])}: {_OTHER}")
    _check_reference(out / "reference.safetensors", size)
    kept = results / "measures.json"
    if kept.is_file() and (lost := [name for name in read_measures(kept)["measured"] if name not in measured]):
        raise UserError(
            f"{kept} has {', '.join(lost)}, which are not in {out} and would be lost: name other --results"
        )
    if is_whole(size.classes, size.per_class):
        verify("efficientnet-lite0")  # nothing else could say what the page's rule asks for


def measured_with(size: Size, out: Path) -> dict[str, int]:
    """Return the settings that a measurement notes."""
    side = recipe_of("teacher.0", out, size)["size"]
    return {"size": side, "classes": size.classes, "per_class": size.per_class, "draws": size.draws}


def all_measured(out: Path) -> dict[str, dict[str, Any]]:
    """Return every run of a folder as `lit_image_measure` writes it, by ARM.SEED.

    Raises:
        UserError: one is damaged.
    """
    places = sorted((out / "measured").glob("[!.]*.json"))  # with a dot it is being written
    found = {place.stem: _json(place) for place in places}
    for name, each in found.items():
        if not each.keys() >= _MEASURED:
            raise UserError(f"{out / 'measured' / name}.json is no measurement: remove it, and it is made again")
    return found


def read_measures(place: Path) -> dict[str, Any]:
    """Return what `lit_image` collects.

    Raises:
        UserError: it is damaged.
    """
    found = _json(place)
    parts = [found.get(name) for name in ("measured", "losses", "judged")]
    if not all(isinstance(part, dict) for part in parts) or not all({*run} >= _MEASURED for run in parts[0].values()):
        raise UserError(f"{place} is no file of measures: run benchmarks.lit_image again, which writes it anew")
    return found


def _json(place: Path) -> dict[str, Any]:
    found = read_json(place, f"{place} cannot be read, remove it and run benchmarks.lit_image again")
    if not isinstance(found, dict):
        raise UserError(f"{place} holds {shown(found)}: remove it, and run benchmarks.lit_image again")
    return found


def _check_recipe(out: Path, name: str, size: Size) -> None:
    place = out / "recipes" / f"{name}.yaml"
    if not place.is_file():
        return
    before, now = yaml.safe_load(place.read_text(encoding="utf-8")), recipe_of(name, out, size)
    changed = sorted(key for key in {*before, *now} - _FREE if before.get(key) != now.get(key))
    if changed:
        told = ", ".join(f"{key}: {shown(before.get(key))} -> {shown(now.get(key))}" for key in changed[:3])
        raise UserError(f"{out} has {name} with other settings ({told}): {_OTHER}")


def _check_reference(place: Path, size: Size) -> None:
    if not place.is_file():
        return
    with opened(place) as content:
        count = len(content.get_tensor("features"))
    wanted = size.classes * size.per_class
    if count != wanted and (
        count or is_whole(size.classes, size.per_class)
    ):  # 0 without the weights, which a try may be
        raise UserError(f"{place} is of {count} stills, this size takes {wanted}: {_OTHER}")


def is_whole(classes: int, per_class: int) -> bool:
    """Whether so many pictures are those of the experiment, and not of a try."""
    return (classes, per_class) == (FULL.classes, FULL.per_class)
