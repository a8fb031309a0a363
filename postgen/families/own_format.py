"""A model that diffusers must not load as it is: what we say of it in its config, where diffusers refuses it.

diffusers asks `quantization_config` of a config how the weights are to be read, and raises for a way that it does not
know. A model whose structure is ours says there which function of ours loads it, so that it is never loaded as the
stock class, which would leave our layers out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from postgen.compat import forget_config, unwrap
from postgen.errors import UserError

_ENTRY = "quantization_config"
_WAY = "quant_method"


def write_note(model: Any, loader: str, note: Mapping[str, Any]) -> None:
    """Put a note into the config of a transformer; `save_pretrained` writes it.

    Args:
        model: the transformer, perhaps wrapped.
        loader: the function that loads it, by its dotted name: what diffusers' error names.
        note: what the function needs; JSON.

    Raises:
        UserError: the model is quantised by diffusers, or another method's note is there.
    """
    inner: Any = unwrap(model)
    if inner.config.get(_ENTRY) is not None:
        way = dict(inner.config[_ENTRY]).get(_WAY, "an unknown way")
        raise UserError(f"the config of this {type(inner).__name__} says that it is read by {way}: undo that first")
    inner.register_to_config(**{_ENTRY: {_WAY: _way(loader), **note}})


def erase_note(model: Any) -> None:
    """Take the note out again: the config is that of the stock model."""
    forget_config(unwrap(model), _ENTRY)


def read_note(config: Mapping[str, Any], loader: str) -> dict[str, Any] | None:
    """Return what `write_note` put into a config for a loader; None: nothing."""
    note = config.get(_ENTRY)
    if not isinstance(note, Mapping) or note.get(_WAY) != _way(loader):
        return None
    return {name: value for name, value in note.items() if name != _WAY}


def without_note(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the note."""
    return {name: value for name, value in config.items() if name != _ENTRY}


def _way(loader: str) -> str:
    return f"{loader}(folder)"
