"""Who computes the attention of a transformer's modules, and what is wrapped around it, so that methods compose.

Each module has one compute slot. A method claims it with a function `compute(inner, attention, *args, **kwargs)` that
returns what the attention returns, where `inner` is diffusers' processor, for the calls that it leaves to it. A
second claimant of a module is refused. Around the slot stands any number of wrappers `wrapper(inner, attention, *args,
**kwargs)`: each calls `inner(attention, *args, **kwargs)` and changes what goes in or comes out. Both go by the name
of their method.

While something is on a module, it carries a copy of its own processor whose class is a subclass of the processor's:
attributes that diffusers sets on processors (attention backend, parallel config) keep working, a shared processor is
no longer shared, and forward methods stay untouched, so that regional compilation still sees one code object. The
original objects go back when the last of it is taken off.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from postgen.compat.attention import hand_settings_over, register_processor_class
from postgen.errors import UserError

if TYPE_CHECKING:
    from torch import nn

Wrapper = Callable[..., Any]
"""`wrapper(inner, attention, *args, **kwargs)` -> what the attention returns."""


class ProcessorStack:
    """What is on a transformer's attention processors. Get it from `families.installed.processor_stack`.

    Functions given to it must survive deepcopy and pickle: bound methods, functions of a module and partial ones of
    them, no lambdas. Modules go by the names that `VideoTokens.attention_modules` gives them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._claims: dict[str, dict[str, Wrapper]] = {}
        self._layers: list[tuple[str, dict[str, Wrapper]]] = []  # innermost first
        self._originals: dict[str, Any] = {}
        self._stacked: dict[str, Any] = {}
        self._modules: dict[str, Any] = {}
        self._dispatching: dict[str, Callable[[], bool]] = {}
        self._of_model: set[str] = set()

    @property
    def claims(self) -> dict[str, tuple[str, ...]]:
        """Who computes the attention instead of diffusers, and of which modules."""
        return {name: tuple(computes) for name, computes in self._claims.items()}

    @property
    def wrappers(self) -> tuple[str, ...]:
        """Names of what is pushed around the computation, innermost first."""
        return tuple(name for name, _ in self._layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Everybody on the processors: those who compute, then the wrappers, innermost first."""
        return (*self._claims, *self.wrappers)

    def dispatches(self, module: str) -> bool:
        """Whether a claimant computes a module's attention where `attention.dispatch.tap_dispatched` sees it."""
        return any(module in self._claims[name] and sees() for name, sees in self._dispatching.items())

    @property
    def changed_layers(self) -> dict[str, str]:
        """Modules whose attention is no longer softmax, because the model itself was changed, and who did that.

        Methods that compute softmax otherwise leave these modules alone."""
        return {module: name for name in self._of_model for module in self._claims[name]}

    def claim(
        self,
        name: str,
        computes: Mapping[str, Wrapper],
        *,
        dispatches: bool | Callable[[], bool] = False,
        of_model: bool = False,
    ) -> None:
        """Compute the attention of modules instead of diffusers' processor, below every wrapper.

        Args:
            name: who claims; `release` takes it.
            computes: function by module name.
            dispatches: `attention.dispatch.tap_dispatched` sees the queries and keys that attention reads: the
                functions go through diffusers' dispatcher, or call `attention.show_attention_call`. A function is
                asked in every call, for a claimant that leaves some calls to diffusers' processor.
            of_model: the modules are other layers now, see `changed_layers`.

        Raises:
            UserError: the name is on the processors already, somebody else computes one of the modules, or the
                transformer has no such module; nothing changes then.
        """
        self.check_claim(name, computes)
        self._install_all(name, computes)
        self._claims[name] = dict(computes)
        if dispatches:
            self._dispatching[name] = dispatches if callable(dispatches) else _always
        if of_model:
            self._of_model.add(name)
        self._refresh()

    def check_claim(self, name: str, modules: Iterable[str]) -> None:
        """Refuse what `claim` would refuse of these modules because of somebody else; changes nothing.

        Raises:
            UserError: it names both, and says what to do.
        """
        wanted = set(modules)
        for other, computes in self._claims.items():
            taken = [module for module in computes if module in wanted]
            if other != name and taken:
                more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
                raise UserError(
                    f"{name} cannot compute the attention of {taken[0]}{more}: {other} computes it already."
                    f" Take {other} off, or leave these modules to it"
                )

    def release(self, name: str) -> None:
        """Give the modules that a name claimed back to diffusers' processors; wrappers stay.

        Raises:
            UserError: the name claims nothing.
        """
        if name not in self._claims:
            raise UserError(f"{name} computes no attention here. Those who do: {', '.join(self._claims) or 'nobody'}")
        del self._claims[name]
        self._dispatching.pop(name, None)
        self._of_model.discard(name)
        self._take_off()

    def push(self, name: str, wrappers: Mapping[str, Wrapper]) -> None:
        """Put a wrapper around whatever is on the named modules. What computes the attention itself must `claim`.

        Args:
            name: who pushes; `pop` takes it.
            wrappers: function by module name.

        Raises:
            UserError: the name is on the processors already, or the transformer has no such module; nothing changes
                then.
        """
        self._install_all(name, wrappers)
        self._layers.append((name, dict(wrappers)))
        self._refresh()

    def pop(self, name: str) -> None:
        """Take the wrappers of this name off, wherever in the stack they are.

        A module whose processor somebody else replaced meanwhile keeps that one.

        Raises:
            UserError: the name has pushed nothing.
        """
        if name not in self.wrappers:
            raise UserError(f"{name} is not on the processors. On them: {', '.join(self.names) or 'nothing'}")
        self._layers = [layer for layer in self._layers if layer[0] != name]
        self._take_off()

    def displaced(self) -> tuple[str, ...]:
        """Return the modules whose processor somebody replaced since: nothing of ours acts on them any more."""
        return tuple(name for name, mine in self._stacked.items() if self._modules[name].processor is not mine)

    def _install_all(self, name: str, modules: Iterable[str]) -> None:
        if name in self.names:
            act = "release" if name in self._claims else "pop"
            raise UserError(f"{name} is on the processors already: {act} it first")
        found = {each: self._module(each) for each in modules}
        for each, module in found.items():
            self._install(each, module)

    def _module(self, name: str) -> Any:
        try:
            module = self._model.get_submodule(name)
        except AttributeError:
            module = None
        if not hasattr(module, "processor"):
            raise UserError(f"{type(self._model).__name__} has no attention module {name!r}: take names of its layout")
        return module

    def _install(self, name: str, module: Any) -> None:
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
        hand_settings_over(stacked, original)
        _set_processor(module, original)

    def _take_off(self) -> None:
        """Bring the modules in line with what is left."""
        self._refresh()
        used = {module for functions in self._functions() for module in functions}
        for module in [module for module in self._stacked if module not in used]:
            self._uninstall(module)

    def _refresh(self) -> None:
        for module, stacked in self._stacked.items():
            stacked.postgen_wrappers = tuple(
                functions[module] for functions in self._functions() if module in functions
            )

    def _functions(self) -> list[dict[str, Wrapper]]:
        """Those who compute, of which a module has one at most, then the wrappers, innermost first."""
        return [*self._claims.values(), *(wrappers for _, wrappers in self._layers)]


def _set_processor(module: Any, processor: Any) -> None:
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:  # MochiAttention
        module.processor = processor


def _always() -> bool:
    return True


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
