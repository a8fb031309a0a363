"""Check the folders of the image experiment of LiT before a command continues in them, and read their results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.lit_image_arms import ARMS, FULL, TEACHERS, Size, recipe_of
from postgen.assets import verify
from postgen.errors import UserError, shown
from postgen.files import check_place
from postgen.reading import read_json
from postgen.tensor_files import opened

_FREE = {
    *("output_dir", "pool_dir", "model", "student", "train_dataset", "latents"),
    *("cuda_graphs", "device", "logging_steps", "save_steps", "save_seconds"),
}
"""Settings that do not change the measured numbers: paths, and how a run is computed, logged and saved."""
_MEASURED = {"settings", "device", "versions", "rows", "fd", "fd_draws"}
"""Keys that every measurement has."""
_OTHER = "choose another --out, or run with the same size as before"


def check_folder(out: Path, results: Path, names: Iterable[str], size: Size) -> None:
    """Check that the files in both folders belong to this experiment, so that no result is mixed with others or lost.

    Args:
        out: folder of the experiment.
        results: folder for the results to keep.
        names: names ARM.SEED of the runs.
        size: size of the experiment.

    Raises:
        UserError: the folders hold runs or measurements with other settings; `results` holds measurements that `out`
            does not have; a folder cannot be written; or the weights of EfficientNet-Lite0 are missing and the size
            is that of the whole experiment.
    """
    check_place(results, folder=True)
    for name in names:
        if name.split(".")[0] in (*TEACHERS, *ARMS):
            _check_recipe(out, name, size)
    measured, now = all_measured(out), measured_with(size, out)
    for name, each in measured.items():
        if each["settings"] != now:
            raise UserError(f"{out} has measurements of {name} with the settings {shown(each['settings'])}: {_OTHER}")
    _check_reference(out / "reference.safetensors", size)
    kept = results / "measures.json"
    if kept.is_file() and (lost := [name for name in read_measures(kept)["measured"] if name not in measured]):
        raise UserError(
            f"{kept} has {', '.join(lost)}, which are not in {out} and would be lost: choose other --results"
        )
    if is_whole(size.classes, size.per_class):
        verify("efficientnet-lite0")  # the page's rule compares Frechet distances, which need these weights


def measured_with(size: Size, out: Path) -> dict[str, int]:
    """Return the settings that a measurement of this size contains."""
    stills = recipe_of("teacher.0", out, size)
    of_size = {"classes": size.classes, "per_class": size.per_class, "draws": size.draws}
    return {"size": stills["size"], "bodies": stills["bodies"], **of_size}


def all_measured(out: Path) -> dict[str, dict[str, Any]]:
    """Return the measurements in a folder, as `lit_image_measure` wrote them, by name ARM.SEED.

    Raises:
        UserError: a file is damaged.
    """
    places = sorted((out / "measured").glob("[!.]*.json"))  # a leading dot marks an incomplete file
    found = {place.stem: _json(place) for place in places}
    for name, each in found.items():
        if not each.keys() >= _MEASURED:
            raise UserError(f"{out / 'measured' / name}.json is not a measurement: remove it and run again")
    return found


def kept_files(out: Path) -> Iterator[Path]:
    """Yield the files that continue the experiment on another machine: all but trained weights and the pool."""
    for pattern in ("measured/[!.]*.json", "reference.safetensors", "runs/*/metrics.jsonl", "strips/*.webp"):
        yield from sorted(out.glob(pattern))


def read_measures(place: Path) -> dict[str, Any]:
    """Return the content of `measures.json`, which `lit_image.collect` writes.

    Raises:
        UserError: the file is damaged.
    """
    found = _json(place)
    parts = [found.get(name) for name in ("measured", "losses", "judged")]
    if not all(isinstance(part, dict) for part in parts) or not all({*run} >= _MEASURED for run in parts[0].values()):
        raise UserError(f"{place} is not a file of measurements: run benchmarks.lit_image again to write a new one")
    return found


def _json(place: Path) -> dict[str, Any]:
    found = read_json(place, f"{place} cannot be read: remove it and run benchmarks.lit_image again")
    if not isinstance(found, dict):
        raise UserError(
            f"{place} must hold a JSON object, got {shown(found)}: remove it and run benchmarks.lit_image again"
        )
    return found


def _check_recipe(out: Path, name: str, size: Size) -> None:
    place = out / "recipes" / f"{name}.yaml"
    if not place.is_file():
        return
    before, now = yaml.safe_load(place.read_text(encoding="utf-8")), recipe_of(name, out, size)
    changed = sorted(key for key in {*before, *now} - _FREE if before.get(key) != now.get(key))
    if changed:
        told = ", ".join(f"{key}: {shown(before.get(key))} -> {shown(now.get(key))}" for key in changed[:3])
        raise UserError(f"{out} has a run {name} with other settings ({told}): {_OTHER}")


def _check_reference(place: Path, size: Size) -> None:
    if not place.is_file():
        return
    with opened(place) as content:
        count = len(content.get_tensor("features"))
    wanted = size.classes * size.per_class
    if count != wanted and (
        count or is_whole(size.classes, size.per_class)
    ):  # a small test may have no features, because the weights are missing
        raise UserError(f"{place} has features of {count} stills, but this size needs {wanted}: {_OTHER}")


def is_whole(classes: int, per_class: int) -> bool:
    """Return whether these numbers of pictures are those of the whole experiment, and not of a small test."""
    return (classes, per_class) == (FULL.classes, FULL.per_class)
