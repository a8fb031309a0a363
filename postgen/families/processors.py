"""One ordered stack of attention-processor wrappers per transformer, so that methods compose and come off again.

A wrapper is a function `wrapper(inner, attention, *args, **kwargs)`: it may call `inner(attention, *args, **kwargs)`
(what stands below it, at the bottom the processor diffusers put there) and change what goes in or comes out, or not
call it and compute the attention itself. A method pushes one wrapper per module under its name and pops them by it.

While the stack is not empty, each of its modules carries a copy of its own processor whose class is a subclass of the
processor's: attributes that diffusers sets on processors (attention backend, parallel config) keep working, a shared
processor is no longer shared, and forward methods stay untouched, so that regional compilation still sees one code
object. The original objects go back when the last wrapper is popped.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from postgen.compat import register_processor_class, unwrap
from postgen.errors import UserError
from postgen.families.installed import installed

if TYPE_CHECKING:
    from torch import nn

Wrapper = Callable[..., Any]
"""`wrapper(inner, attention, *args, **kwargs)` -> what the attention returns."""


def processor_stack(transformer: nn.Module) -> ProcessorStack:
    """Return the stack of a transformer (which may be wrapped by DDP, peft, compile), an empty one at first."""
    model = unwrap(transformer)
    found = installed(model)
    if found.stack is None:
        found.stack = ProcessorStack(model)
    return found.stack


class ProcessorStack:
    """The wrappers on a transformer's attention processors. Get it from `processor_stack`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers: list[tuple[str, dict[str, Wrapper]]] = []  # innermost first
        self._originals: dict[str, Any] = {}
        self._stacked: dict[str, Any] = {}
        self._modules: dict[str, Any] = {}
        self._dispatching: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of what is pushed, innermost first."""
        return tuple(name for name, _ in self._layers)

    @property
    def dispatches(self) -> bool:
        """Whether a wrapper computes the attention where `compat.tap_dispatched` sees it, whoever did before."""
        return bool(self._dispatching)

    def push(
        self, name: str, wrappers: Mapping[str, Wrapper], *, innermost: bool = False, dispatches: bool = False
    ) -> None:
        """Put a wrapper around the processor of every named module.

        Args:
            name: who pushes; `pop` takes it.
            wrappers: by module name, as `VideoTokens.attention_modules` has it. They must survive deepcopy and pickle,
                so bound methods and module-level functions, no lambdas.
            innermost: below everything pushed so far, next to the processor itself: for wrappers that compute the
                attention instead of diffusers' processor. Otherwise around everything.
            dispatches: the wrappers compute the attention, and `compat.tap_dispatched` sees it.

        Raises:
            UserError: the name is on the stack already.
        """
        if name in self.names:
            raise UserError(f"{name} is on the processors already: pop it first")
        for module in wrappers:
            self._install(module)
        if dispatches:
            self._dispatching.add(name)
        self._layers.insert(0 if innermost else len(self._layers), (name, dict(wrappers)))
        self._refresh()

    def pop(self, name: str) -> None:
        """Take the wrappers of this name off, wherever in the stack they are.

        A module whose processor somebody else replaced meanwhile keeps that one.

        Raises:
            UserError: the name is not on the stack.
        """
        if name not in self.names:
            raise UserError(f"{name} is not on the processors. On them: {', '.join(self.names) or 'nothing'}")
        self._layers = [layer for layer in self._layers if layer[0] != name]
        self._dispatching.discard(name)
        self._refresh()
        used = {module for _, wrappers in self._layers for module in wrappers}
        for module in [module for module in self._stacked if module not in used]:
            self._uninstall(module)

    def displaced(self) -> tuple[str, ...]:
        """Return the modules whose processor somebody replaced after a push: no wrapper acts on them any more."""
        return tuple(name for name, mine in self._stacked.items() if self._modules[name].processor is not mine)

    def _install(self, name: str) -> None:
        module: Any = self._model.get_submodule(name)
        self._modules[name] = module
        original = module.processor
        if name in self._stacked:
            if original is self._stacked[name]:
                return
            # Somebody replaced it and may put it back: nothing of ours acts on it then.
            self._stacked[name].postgen_wrappers = ()
        stacked = copy.copy(original)
        # A processor that was ours, and that somebody kept and put back, is not wrapped twice.
        kind: Any = getattr(type(original), "postgen_parent", type(original))
        stacked.__class__ = _stacked_class(kind)
        stacked.postgen_wrappers = ()
        self._originals[name], self._stacked[name] = original, stacked
        _set_processor(module, stacked)

    def _uninstall(self, name: str) -> None:
        module, original, stacked = (kept.pop(name) for kept in (self._modules, self._originals, self._stacked))
        if module.processor is not stacked:
            return
        # What diffusers set on the processor meanwhile stays.
        for key in ("_attention_backend", "_parallel_config"):
            if key in vars(stacked):
                setattr(original, key, getattr(stacked, key))
        _set_processor(module, original)

    def _refresh(self) -> None:
        for module, stacked in self._stacked.items():
            stacked.postgen_wrappers = tuple(wrappers[module] for _, wrappers in self._layers if module in wrappers)


def _set_processor(module: Any, processor: Any) -> None:
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:  # MochiAttention
        module.processor = processor


@functools.cache
def _stacked_class(parent: Any) -> Any:
    """Return the subclass of a processor class that calls its wrappers; one per class, so compiled code is shared."""

    # diffusers reads the signature of `__call__`, which `wraps` keeps.
    @functools.wraps(parent.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(parent.__call__, self)
        for wrapper in self.postgen_wrappers:
            call = functools.partial(wrapper, call)
        return call(*args, **kwargs)

    # The class is made at run time, so an object of it is pickled as an object of its parent and made again.
    def __reduce__(self: Any) -> tuple[Any, ...]:
        return _empty, (parent,), self.__dict__

    # The same name: diffusers looks for words such as "Added" in it.
    body = {"__call__": __call__, "__reduce__": __reduce__, "__module__": parent.__module__, "__doc__": parent.__doc__}
    made = type(parent.__name__, (parent,), {**body, "postgen_parent": parent})
    register_processor_class(made, parent)
    return made


def _empty(parent: Any) -> Any:
    kind = _stacked_class(parent)
    return kind.__new__(kind)
