"""Base class of the drop-in pipelines: diffusers' own call with one more keyword argument per plug-in."""

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
"""Arguments of `from_pretrained` that select what is downloaded from the Hub."""

_DOCUMENTATION = """

        {row.name} (*optional*):
            {row.title} for this call: {row.values} switches it on, 0 or False switches it off, None changes nothing.
            The previous state is restored after the call, also after an error.
"""


ENHANCER = "prompt_enhancer"
"""Keyword argument of every drop-in pipeline that rewrites the prompt of a call."""
_ENHANCER_DOCUMENTATION = f"""

        {ENHANCER} (*optional*):
            Rewrites `prompt` for this call: True for phrases of the model's family, a name such as "smollm2", a
            [`postgen.prompt.PromptEnhancer`], or a function from a list of prompts to a list of prompts. None and
            False change nothing.
"""


class DropIn:
    """First base class of a drop-in pipeline; the second base class is the diffusers class of the same name.

    The drop-in pipeline has all call arguments of the diffusers class, one keyword argument for each row of
    `postgen.plug_ins`, and `prompt_enhancer`. A saved folder names the diffusers class, so it loads without postgen.
    The exception is a transformer whose structure postgen has changed: only `from_pretrained` of the drop-in class
    loads it.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a pipeline as diffusers does, also with transformers that only postgen can load (`postgen.lit`).

        Args:
            pretrained_model_name_or_path: a folder or Hub id, as in diffusers; or a folder of networks with a
                `base.json` that names their base model, as training and `postgen convert` write it.
            kwargs: arguments of `from_pretrained` of diffusers; components that are given are not loaded.

        Raises:
            UserError: such a transformer is not complete, or `base.json` does not name a complete model.
        """
        parent: Any = super()
        if Path(pretrained_model_name_or_path).is_dir():
            folder = Path(pretrained_model_name_or_path)
            export = None if (folder / "model_index.json").is_file() else read_note(folder)
            if export is not None:
                if not is_hub_id(export.base) and not (Path(export.base) / "model_index.json").is_file():
                    raise UserError(f"{folder / NOTE} names {export.base}, which is no complete model: name one there")
                dtype = _dtypes(kwargs)
                parts = {name: load_part(folder, name, dtype(name)) for name in export.parts if name not in kwargs}
                return cls.from_pretrained(export.base, **kwargs, **parts)
            return parent.from_pretrained(folder, **kwargs, **noted_networks(folder, _dtypes(kwargs), kwargs))
        try:
            return parent.from_pretrained(pretrained_model_name_or_path, **kwargs)
        except ValueError as error:
            if not names_loader(str(error)):
                raise
        # The model is on the Hub and was downloaded by the call above: `download` returns its folder in the cache.
        place = {name: kwargs[name] for name in _OF_THE_HUB & kwargs.keys()}
        folder = Path(parent.download(pretrained_model_name_or_path, **place))
        return parent.from_pretrained(folder, **kwargs, **noted_networks(folder, _dtypes(kwargs), kwargs))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if DropIn in cls.__bases__:
            (parent,) = (base for base in cls.__bases__ if base is not DropIn)
            cls.__call__ = _Call(parent.__call__)  # type: ignore[assignment, method-assign]

    if TYPE_CHECKING:  # at run time, every class has the signature of its parent plus the keyword arguments

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Run the pipeline with plug-ins set for this call. All other arguments are those of diffusers."""


def _dtypes(kwargs: Mapping[str, Any]) -> Callable[[str], Any]:
    """Return a function from component name to the dtype that the arguments of `from_pretrained` select."""
    asked = kwargs.get("dtype", kwargs.get("torch_dtype"))
    if isinstance(asked, Mapping):
        return lambda name: asked.get(name, asked.get("default", torch.float32))
    return lambda name: asked if isinstance(asked, torch.dtype) else torch.float32


class _Call:
    """Descriptor for the `__call__` of a pipeline; each access takes the current rows of `postgen.plug_ins`."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __get__(self, instance: Any, owner: type) -> Any:
        function = _with_settings(self._call, known_plug_ins())
        return function if instance is None else MethodType(function, instance)


@functools.cache
def _with_settings(call: Callable[..., Any], rows: tuple[PlugIn, ...]) -> Callable[..., Any]:
    """Return the `__call__` of a pipeline with a keyword argument per plug-in, also in `inspect.signature`.

    Raises:
        UserError: the pipeline already has an argument with the name of a plug-in or of the enhancer.
    """
    signature = inspect.signature(call)
    names = [*(row.name for row in rows), ENHANCER]
    for name in names:
        if name in signature.parameters or names.count(name) > 1:
            raise UserError(f"{call.__qualname__} already has an argument {name}: give the plug-in another name")

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = {row.name: kwargs.pop(row.name, None) for row in rows}
        enhancer = kwargs.pop(ENHANCER, None)
        if enhancer is not None and enhancer is not False:
            args, kwargs = _enhanced(self, signature, enhancer, args, kwargs)
        with plug_ins_for_call(self, settings):
            return call(self, *args, **kwargs)

    theirs = list(signature.parameters.values())
    ours = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    at_end = [one for one in theirs if one.kind is one.VAR_KEYWORD]
    theirs = [one for one in theirs if one.kind is not one.VAR_KEYWORD]
    __call__.__signature__ = signature.replace(parameters=[*theirs, *ours, *at_end])  # type: ignore[attr-defined]
    texts = [*(_DOCUMENTATION.format(row=row).rstrip() for row in rows), _ENHANCER_DOCUMENTATION.rstrip()]
    __call__.__doc__ = (call.__doc__ or "").rstrip() + "".join(texts) + "\n"
    return __call__


def _enhanced(
    pipe: Any, signature: inspect.Signature, enhancer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with the enhanced prompt.

    Raises:
        UserError: there is no prompt, or the enhancer cannot be used.
    """
    from postgen.prompt.calls import enhanced_for_call

    if kwargs.get("prompt_segments"):
        raise UserError(
            "prompt_enhancer cannot change prompt_segments, which replace prompt: omit one of the two, or give the"
            " texts as prompt, separated by |"
        )
    place = list(signature.parameters).index("prompt") - 1  # without self
    if place < len(args):
        return (*args[:place], enhanced_for_call(pipe, enhancer, args[place]), *args[place + 1 :]), kwargs
    return args, {**kwargs, "prompt": enhanced_for_call(pipe, enhancer, kwargs.get("prompt"))}
