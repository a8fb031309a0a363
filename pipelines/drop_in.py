"""What every drop-in pipeline has in common: diffusers' own call, with a keyword argument for each plug-in."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from postgen.errors import UserError
from postgen.families.exports import NOTE, read_note
from postgen.families.model_folder import is_hub_id
from postgen.families.own_format import load_part, names_loader, noted_networks
from postgen.plug_ins import PlugIn, known_plug_ins, plug_ins_for_call

_OF_THE_HUB = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "token", "variant"}
"""Arguments of `from_pretrained` that say what is fetched."""

_DOCUMENTATION = """

        {row.name} (*optional*):
            {row.title} for this call: {row.values} is on, 0 or False is off, None leaves it as it is.
            Afterwards it is as it was before, also after an error.
"""


class DropIn:
    """First parent of a drop-in pipeline; the second one is the class of diffusers that it stands for.

    The pair has the diffusers class' name, its whole call and a keyword argument for each row of `postgen.plug_ins`. A
    folder that it saves names the diffusers class, so it loads without postgen. Only where postgen has changed the
    structure of a transformer it does not, and `from_pretrained` of the pair loads it.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load as the class of diffusers does, with transformers that only postgen can load (`postgen.lit`).

        Args:
            pretrained_model_name_or_path: as of diffusers; or a folder of networks and a note of the model around
                them, as training and `postgen convert` write it.
            kwargs: as of diffusers; a part that is given is not loaded.

        Raises:
            UserError: such a transformer is not whole, or the note of another folder names no whole model.
        """
        parent: Any = super()
        if Path(pretrained_model_name_or_path).is_dir():
            folder = Path(pretrained_model_name_or_path)
            export = None if (folder / "model_index.json").is_file() else read_note(folder)
            if export is not None:
                if not is_hub_id(export.base) and not (Path(export.base) / "model_index.json").is_file():
                    raise UserError(f"{folder / NOTE} names {export.base}, which is no whole model: name one there")
                dtype = _dtypes(kwargs)
                parts = {name: load_part(folder, name, dtype(name)) for name in export.parts if name not in kwargs}
                return cls.from_pretrained(export.base, **kwargs, **parts)
            return parent.from_pretrained(folder, **kwargs, **noted_networks(folder, _dtypes(kwargs), kwargs))
        try:
            return parent.from_pretrained(pretrained_model_name_or_path, **kwargs)
        except ValueError as error:
            if not names_loader(str(error)):
                raise
        # From the hub, and fetched by now.
        place = {name: kwargs[name] for name in _OF_THE_HUB & kwargs.keys()}
        folder = Path(parent.download(pretrained_model_name_or_path, **place))
        return parent.from_pretrained(folder, **kwargs, **noted_networks(folder, _dtypes(kwargs), kwargs))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if DropIn in cls.__bases__:
            (parent,) = (base for base in cls.__bases__ if base is not DropIn)
            cls.__call__ = _Call(parent.__call__)  # type: ignore[assignment, method-assign]

    if TYPE_CHECKING:  # at run time every class has its parent's signature and the keywords

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Run the pipeline with plug-ins set for this call. Every other argument is that of diffusers."""


def _dtypes(kwargs: Mapping[str, Any]) -> Callable[[str], Any]:
    """Return the dtype of each part that arguments of `from_pretrained` ask for, as diffusers reads them."""
    asked = kwargs.get("dtype", kwargs.get("torch_dtype"))
    if isinstance(asked, Mapping):
        return lambda name: asked.get(name, asked.get("default", torch.float32))
    return lambda name: asked if isinstance(asked, torch.dtype) else torch.float32


class _Call:
    """A pipeline's `__call__` with the keyword arguments that the table has when it is looked up."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __get__(self, instance: Any, owner: type) -> Any:
        function = _with_settings(self._call, known_plug_ins())
        return function if instance is None else MethodType(function, instance)


@functools.cache
def _with_settings(call: Callable[..., Any], rows: tuple[PlugIn, ...]) -> Callable[..., Any]:
    """Return a pipeline's `__call__` with our keyword arguments, which `inspect.signature` shows too.

    Raises:
        UserError: the pipeline has an argument of the name of a plug-in.
    """
    signature = inspect.signature(call)
    for row in rows:
        if row.name in signature.parameters:
            raise UserError(f"{call.__qualname__} has an argument {row.name} itself: name the plug-in otherwise")

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = {row.name: kwargs.pop(row.name, None) for row in rows}
        with plug_ins_for_call(self, settings):
            return call(self, *args, **kwargs)

    theirs = list(signature.parameters.values())
    ours = [inspect.Parameter(row.name, inspect.Parameter.KEYWORD_ONLY, default=None) for row in rows]
    at_end = [one for one in theirs if one.kind is one.VAR_KEYWORD]
    theirs = [one for one in theirs if one.kind is not one.VAR_KEYWORD]
    __call__.__signature__ = signature.replace(parameters=[*theirs, *ours, *at_end])  # type: ignore[attr-defined]
    texts = [_DOCUMENTATION.format(row=row).rstrip() for row in rows]
    __call__.__doc__ = (call.__doc__ or "").rstrip() + "".join(texts) + "\n"
    return __call__
