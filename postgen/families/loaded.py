"""What is known of a pipeline that somebody has loaded, as `inspect_model` knows it of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from postgen.families.model_folder import Defaults, own_defaults
from postgen.families.video_calls import ROWS, rate_of, sizes_of


def defaults_of(pipe: Any) -> Defaults:
    """Return the playback rate of a pipeline's family, or what `postgen.json` of the folder it came from says.

    Args:
        pipe: a pipeline; sizes are left to the user, but where that file names some.

    Raises:
        UserError: the file is damaged.
    """
    folder = getattr(pipe, "name_or_path", None)
    own = own_defaults(Path(folder) / "postgen.json") if folder else {}
    return Defaults(**{"fps": rate_of(_name(pipe), _config(pipe), _network(pipe)), **own})


def sizes_of_pipeline(pipe: Any) -> tuple[int, int, int] | None:
    """Return what height, width and frames - 1 must divide by; None where that is not known."""
    vae = getattr(pipe, "vae", None)
    return sizes_of(_name(pipe), {"_class_name": type(vae).__name__, **_config(vae)}, _network(pipe))


def _name(pipe: Any) -> str:
    """The first of a pipeline's classes that has a row: there are subclasses of users' own."""
    names = [kind.__name__ for kind in type(pipe).__mro__]
    return next((name for name in names if name in ROWS), names[0])


def _network(pipe: Any) -> Mapping[str, Any]:
    names = ("transformer", "transformer_2", "unet")
    return next((_config(part) for name in names if (part := getattr(pipe, name, None)) is not None), {})


def _config(part: Any) -> Mapping[str, Any]:
    found = getattr(part, "config", None)
    return found if isinstance(found, Mapping) else {}
