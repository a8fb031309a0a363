"""A note in the config of a model with layers of postgen, which keeps diffusers from loading it as the stock class.

diffusers reads the entry `quantization_config` of a config and raises an error for a `quant_method` that it does not
know. For a model with layers of postgen, this entry names the postgen function that loads the model. So diffusers
never loads it as the stock class, which would ignore these layers.

A pipeline's `save_pretrained` writes only its components. The note therefore also carries the content of
`postgen.json`, the default settings of the folder from which the model was loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postgen.compat import forget_config, kept_in_float32, loaded_from, unwrap
from postgen.errors import UserError
from postgen.reading import read_json

if TYPE_CHECKING:
    import torch

_ENTRY = "quantization_config"
_WAY = "quant_method"
_AROUND = "postgen.json"
"""Key of the note for the default settings of the folder from which the model was loaded; the file has this name."""
_OURS = re.compile(r"(postgen\.[a-z_]+)\.load\(folder\)")
"""A package of postgen that loads a format with `load(folder)`; it also has `empty(config)`.

Configs may come from untrusted sources, so no other function that a config names is called.
"""


def write_note(model: Any, loader: str, note: Mapping[str, Any]) -> None:
    """Add a note to the config of a transformer; `save_pretrained` writes it with the config.

    Args:
        model: the transformer, which may be wrapped.
        loader: dotted name of the function that loads the model. The error of diffusers shows it.
        note: JSON values that this function needs. They replace an earlier note of the same loader, which
            `from_config` copies with the rest of the config. Only its default settings (`postgen.json`) are kept.

    Raises:
        UserError: the model is quantised by diffusers, or its config has the note of another method.
    """
    inner: Any = unwrap(model)
    if inner.config.get(_ENTRY) is None:
        around = _words_beside(inner)
    elif read_note(inner.config, loader) is None:
        way = dict(inner.config[_ENTRY]).get(_WAY, "an unknown way")
        raise UserError(
            f"the config of this {type(inner).__name__} has the quantisation method {way}: undo that method first"
        )
    else:
        around = inner.config[_ENTRY].get(_AROUND)
    said = {} if around is None else {_AROUND: around}
    inner.register_to_config(**{_ENTRY: {_WAY: _way(loader), **note, **said}})


def erase_note(model: Any) -> None:
    """Remove the note, so that the config is that of the stock model."""
    forget_config(unwrap(model), _ENTRY)


def read_note(config: Mapping[str, Any], loader: str) -> dict[str, Any] | None:
    """Return the note that `write_note` added to a config for this loader; None if there is none."""
    note = config.get(_ENTRY)
    if not isinstance(note, Mapping) or note.get(_WAY) != _way(loader):
        return None
    return {name: value for name, value in note.items() if name not in (_WAY, _AROUND)}


def without_note(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the note."""
    return {name: value for name, value in config.items() if name != _ENTRY}


def other_settings(model: Any, other: Any) -> str:
    """Compare the settings of two networks of the same class, which may have the same weights and yet differ in them.

    Returns:
        The settings with other values, as a text for a message; empty if there are none.
    """
    own, theirs = _settings(model), _settings(other)
    return ", ".join(
        f"{name} {own.get(name)} and not {theirs[name]}" for name in theirs if own.get(name) != theirs[name]
    )


def _settings(model: Any) -> dict[str, str]:
    """Return the config of a network as JSON texts, which have no tuples, without the note."""
    inner: Any = unwrap(model)
    config = without_note(inner.config)
    return {name: json.dumps(value, default=str) for name, value in config.items() if not name.startswith("_")}


def noted_words(folder: Path) -> Any:
    """Return the `postgen.json` settings that the notes of a pipeline's transformers carry.

    Args:
        folder: the pipeline's folder.

    Returns:
        The settings of the folder from which these transformers were loaded; {} if no note has them.
    """
    for path in sorted(folder.glob("transformer*/config.json")):
        config = read_json(path, f"cannot read {path}")
        note = config.get(_ENTRY) if isinstance(config, dict) else None
        if isinstance(note, Mapping) and _OURS.fullmatch(str(note.get(_WAY))) and _AROUND in note:
            return note[_AROUND]
    return {}


def _words_beside(model: Any) -> Any:
    """Return the `postgen.json` of the folder from which a network was loaded; None if there is none."""
    place = Path(loaded_from(model))
    path = place.parent / _AROUND
    return read_json(path, f"cannot read {path}") if place.is_dir() and path.is_file() else None


def load_noted(folder: Path, dtype: torch.dtype | None = None) -> Any | None:
    """Load a network with the postgen function that its config names.

    Args:
        folder: the network's folder.
        dtype: dtype of the returned network, except for modules that its class keeps in float32; None keeps the saved
            dtype.

    Returns:
        The network; None if the config names no postgen function, so that diffusers must load it.

    Raises:
        UserError: the postgen function cannot load the network, or this version lacks the function.
    """
    config = (
        read_json(folder / "config.json", f"{folder} cannot be read") if (folder / "config.json").is_file() else {}
    )
    note = config.get(_ENTRY) if isinstance(config, dict) else None
    room = _room(note)
    if room is None:
        return None
    network = room.load(folder)
    if dtype is not None:
        _cast(network, dtype)
    return network


def load_part(source: str | Path, name: str, dtype: torch.dtype | None) -> Any:
    """Load one network of a pipeline or of an export, with the postgen function or diffusers class of its config.

    Args:
        source: the folder, or a Hub id.
        name: name of the network, which is its subfolder.
        dtype: see `load_noted`.

    Raises:
        UserError: see `load_noted`.
    """
    import diffusers

    if (network := load_noted(Path(source) / name, dtype)) is not None:
        return network
    kind: Any = diffusers.AutoModel
    return kind.from_pretrained(str(source), subfolder=name, dtype=dtype)


def noted_networks(
    folder: Path, dtype: Callable[[str], torch.dtype | None], without: Collection[str] = ()
) -> dict[str, Any]:
    """Load those transformers of a pipeline's folder that need a postgen function.

    Args:
        folder: the pipeline's folder.
        dtype: returns the dtype of a component by its name; see `load_noted`.
        without: names of components that are not loaded.

    Returns:
        Networks by component name, without the transformers that diffusers can load.

    Raises:
        UserError: see `load_noted`.
    """
    names = [path.parent.name for path in sorted(folder.glob("transformer*/config.json"))]
    found = {name: load_noted(folder / name, dtype(name)) for name in names if name not in without}
    return {name: network for name, network in found.items() if network is not None}


def _cast(network: Any, dtype: torch.dtype) -> None:
    """Cast weights as diffusers' `from_pretrained` does. Computed tables (non-persistent buffers) keep their dtype."""
    import torch

    kept = {*kept_in_float32(network)}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if kept & {*name.split(".")} else dtype)


def empty_noted(config: Mapping[str, Any]) -> Any | None:
    """Build a network without weights, with the `empty(config)` of the package that its config names.

    Returns:
        The network; None if the config has no note of postgen.

    Raises:
        UserError: this version lacks the package.
    """
    room = _room(config.get(_ENTRY))
    return None if room is None else room.empty(config)


def _room(note: Any) -> Any | None:
    """Return the package whose format a note names; None if it is not a note of postgen.

    Raises:
        UserError: this version lacks the package.
    """
    way = _OURS.fullmatch(str(note.get(_WAY))) if isinstance(note, Mapping) else None
    if way is None:
        return None
    try:
        room = import_module(way[1])
    except ModuleNotFoundError:
        room = None
    if not (hasattr(room, "load") and hasattr(room, "empty")):
        raise UserError(
            f"the config of a network names {way[1]}.load, which this version of postgen lacks: update postgen"
        )
    return room


def names_loader(text: str) -> bool:
    """Whether the text of a diffusers error names a postgen function that loads a network."""
    return _OURS.search(text) is not None


def _way(loader: str) -> str:
    return f"{loader}(folder)"
