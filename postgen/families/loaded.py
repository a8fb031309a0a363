"""Defaults and allowed sizes of a pipeline in memory, as `inspect_model` returns them for a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from postgen.families.model_folder import Defaults, own_defaults
from postgen.families.video_calls import ROWS, rate_of, sizes_of


def defaults_of(pipe: Any) -> Defaults:
    """Return the defaults from the `postgen.json` of the folder that a pipeline was loaded from.

    Without such an entry, the playback rate is that of the pipeline's family, and the other fields keep the defaults
    of `Defaults`.

    Args:
        pipe: a loaded pipeline.

    Raises:
        UserError: the file is damaged.
    """
    folder = getattr(pipe, "name_or_path", None)
    own = own_defaults(Path(folder) / "postgen.json") if folder else {}
    return Defaults(**{"fps": rate_of(_name(pipe), _config(pipe), _network(pipe)), **own})


def sizes_of_pipeline(pipe: Any) -> tuple[int, int, int] | None:
    """Return the numbers of which height, width and frames - 1 must be multiples; None if they are not known."""
    vae = getattr(pipe, "vae", None)
    return sizes_of(_name(pipe), {"_class_name": type(vae).__name__, **_config(vae)}, _network(pipe))


def _name(pipe: Any) -> str:
    """Return the name of the first class in the pipeline's MRO that has a row: users may define subclasses."""
    names = [kind.__name__ for kind in type(pipe).__mro__]
    return next((name for name in names if name in ROWS), names[0])


def _network(pipe: Any) -> Mapping[str, Any]:
    names = ("transformer", "transformer_2", "unet")
    return next((_config(part) for name in names if (part := getattr(pipe, name, None)) is not None), {})


def _config(part: Any) -> Mapping[str, Any]:
    found = getattr(part, "config", None)
    return found if isinstance(found, Mapping) else {}
