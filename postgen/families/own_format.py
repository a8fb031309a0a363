"""A model that diffusers must not load as it is: what we say of it in its config, where diffusers refuses it.

diffusers asks `quantization_config` of a config how the weights are to be read, and raises for a way that it does not
know. A model whose structure is ours says there which function of ours loads it, so that it is never loaded as the
stock class, which would leave our layers out.

A pipeline's `save_pretrained` writes its parts and nothing else, so what the folder says of itself (`postgen.json`)
goes along in the note.
"""

from __future__ import annotations

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
"""What the folder said that the model was loaded from; there it is a file of this name."""
_OURS = re.compile(r"(postgen\.[a-z_]+)\.load\(folder\)")
"""A room of ours that has a format: its `load(folder)`, and `empty(config)` beside it. Configs come from anywhere, so
no other function is called that one names."""


def write_note(model: Any, loader: str, note: Mapping[str, Any]) -> None:
    """Put a note into the config of a transformer; `save_pretrained` writes it.

    Args:
        model: the transformer, perhaps wrapped.
        loader: the function that loads it, by its dotted name: what diffusers' error names.
        note: what the function needs; JSON. Of a note that is there already (the class' `from_config` copies it with
            the rest of a config) only what the folder said is kept.

    Raises:
        UserError: the model is quantised by diffusers, or another method's note is there.
    """
    inner: Any = unwrap(model)
    if inner.config.get(_ENTRY) is None:
        around = _words_beside(inner)
    elif read_note(inner.config, loader) is None:
        way = dict(inner.config[_ENTRY]).get(_WAY, "an unknown way")
        raise UserError(f"the config of this {type(inner).__name__} says that it is read by {way}: undo that first")
    else:
        around = inner.config[_ENTRY].get(_AROUND)
    said = {} if around is None else {_AROUND: around}
    inner.register_to_config(**{_ENTRY: {_WAY: _way(loader), **note, **said}})


def erase_note(model: Any) -> None:
    """Take the note out again: the config is that of the stock model."""
    forget_config(unwrap(model), _ENTRY)


def read_note(config: Mapping[str, Any], loader: str) -> dict[str, Any] | None:
    """Return what `write_note` put into a config for a loader; None: nothing."""
    note = config.get(_ENTRY)
    if not isinstance(note, Mapping) or note.get(_WAY) != _way(loader):
        return None
    return {name: value for name, value in note.items() if name not in (_WAY, _AROUND)}


def without_note(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the note."""
    return {name: value for name, value in config.items() if name != _ENTRY}


def noted_words(folder: Path) -> Any:
    """Return what the `postgen.json` said of the folder from which the networks of a pipeline's folder were loaded.

    Nothing where the notes of its transformers do not say.
    """
    for path in sorted(folder.glob("transformer*/config.json")):
        config = read_json(path, f"cannot read {path}")
        note = config.get(_ENTRY) if isinstance(config, dict) else None
        if isinstance(note, Mapping) and _OURS.fullmatch(str(note.get(_WAY))) and _AROUND in note:
            return note[_AROUND]
    return {}


def _words_beside(model: Any) -> Any:
    """Return what the folder says of itself that a network was loaded from; None: nothing."""
    place = Path(loaded_from(model))
    path = place.parent / _AROUND
    return read_json(path, f"cannot read {path}") if place.is_dir() and path.is_file() else None


def load_noted(folder: Path, dtype: torch.dtype | None = None) -> Any | None:
    """Load a network by the function of ours that its config names; None: it names none, so diffusers loads it.

    Args:
        folder: of the network.
        dtype: to cast it to, but for what its class keeps in float32 as diffusers loads it; None keeps what was saved.

    Raises:
        UserError: as the function says.
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
    """Load one network of a pipeline's folder, or of an export's, by what its config names: a function or a class.

    Args:
        source: the folder, or a hub id.
        name: of the network in it.
        dtype: as of `load_noted`.

    Raises:
        UserError: as `load_noted`.
    """
    import diffusers

    if (network := load_noted(Path(source) / name, dtype)) is not None:
        return network
    kind: Any = diffusers.AutoModel
    return kind.from_pretrained(source, subfolder=name, dtype=dtype)


def noted_networks(
    folder: Path, dtype: Callable[[str], torch.dtype | None], without: Collection[str] = ()
) -> dict[str, Any]:
    """Load the transformers of a pipeline's folder that diffusers cannot load by itself, because they are ours.

    Args:
        folder: of the pipeline.
        dtype: of a part by its name, as `load_noted` takes it.
        without: names of parts that are left out.

    Raises:
        UserError: as `load_noted`.
    """
    names = [path.parent.name for path in sorted(folder.glob("transformer*/config.json"))]
    found = {name: load_noted(folder / name, dtype(name)) for name in names if name not in without}
    return {name: network for name, network in found.items() if network is not None}


def _cast(network: Any, dtype: torch.dtype) -> None:
    """Cast weights as diffusers' `from_pretrained` does; tables that are computed are none, and stay as they are."""
    import torch

    kept = {*kept_in_float32(network)}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if kept & {*name.split(".")} else dtype)


def empty_noted(config: Mapping[str, Any]) -> Any | None:
    """Build a network for its weights to be put in, where its config names a function of ours; None: it names none.

    Beside the function that loads, its module has `empty(config)`.
    """
    room = _room(config.get(_ENTRY))
    return None if room is None else room.empty(config)


def _room(note: Any) -> Any | None:
    """Return the module that loads what a note is of; None: it is no note of ours.

    Raises:
        UserError: this version has no such module.
    """
    way = _OURS.fullmatch(str(note.get(_WAY))) if isinstance(note, Mapping) else None
    if way is None:
        return None
    try:
        room = import_module(way[1])
    except ModuleNotFoundError:
        room = None
    if not (hasattr(room, "load") and hasattr(room, "empty")):
        raise UserError(f"a network is to be loaded by {way[1]}.load, which this postgen does not have: update it")
    return room


def names_loader(text: str) -> bool:
    """Whether an error of diffusers names a function of ours that loads a network."""
    return _OURS.search(text) is not None


def _way(loader: str) -> str:
    return f"{loader}(folder)"
