"""Attention processors of a transformer: one method computes, any number of methods wrap, so that methods compose.

Each attention module has one compute slot. A method claims the slot with a function `compute(inner, attention, *args,
**kwargs)` that returns the output of the attention. `inner` is diffusers' processor; the function may call it instead
of computing. A second claim on the same module raises an error. Any number of wrappers `wrapper(inner, attention,
*args, **kwargs)` stand around the slot. Each calls `inner(attention, *args, **kwargs)` and changes the arguments or
the output. Claims and wrappers are registered under the name of their method.

A module with a claim or a wrapper has a copy of its processor, whose class is a subclass of the processor's class.
Attributes that diffusers sets on processors (attention backend, parallel config) keep working. Modules that shared a
processor get one copy each. Forward methods do not change, so regional compilation still sees one code object. When
the last claim or wrapper of a module is removed, the module gets its original processor back.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from postgen.compat.attention import hand_settings_over, install_attention_tap, register_processor_class
from postgen.errors import UserError

if TYPE_CHECKING:
    from torch import nn

Wrapper = Callable[..., Any]
"""`wrapper(inner, attention, *args, **kwargs)` returns the output of the attention."""


class ProcessorStack:
    """Claims and wrappers on a transformer's attention processors; `families.installed.processor_stack` returns it.

    Functions that are passed to `claim` and `push` must support deepcopy and pickle: bound methods, functions of a
    module and `functools.partial` of these, but no lambdas. Modules have the names that
    `VideoTokens.attention_modules` returns.
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
        """Methods that compute the attention instead of diffusers, each with the names of its modules."""
        return {name: tuple(computes) for name, computes in self._claims.items()}

    @property
    def wrappers(self) -> tuple[str, ...]:
        """Names of the methods with wrappers, innermost first."""
        return tuple(name for name, _ in self._layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all methods on the processors: those that compute, then the wrappers, innermost first."""
        return (*self._claims, *self.wrappers)

    def dispatches(self, module: str) -> bool:
        """Whether a claimant computes a module's attention and `attention.dispatch.tap_dispatched` can observe it."""
        return any(module in self._claims[name] and sees() for name, sees in self._dispatching.items())

    @property
    def changed_layers(self) -> dict[str, str]:
        """Modules that the model itself has without softmax attention, each with the method that changed the model.

        Methods that compute softmax attention in another way skip these modules.
        """
        return {module: name for name in self._of_model for module in self._claims[name]}

    def claim(
        self,
        name: str,
        computes: Mapping[str, Wrapper],
        *,
        dispatches: bool | Callable[[], bool] = False,
        of_model: bool = False,
    ) -> None:
        """Compute the attention of modules instead of diffusers' processor; all wrappers stay around the functions.

        Args:
            name: name of the method, for `release`.
            computes: functions by module name.
            dispatches: whether `attention.dispatch.tap_dispatched` can observe the queries and keys: the functions go
                through diffusers' dispatcher or call `attention.show_attention_call`. A claimant that passes some
                calls on to diffusers' processor gives a function, which is evaluated in every call.
            of_model: whether the model itself was changed to have these layers; see `changed_layers`.

        Raises:
            UserError: the name is on the processors already, another method computes one of the modules, or the
                transformer lacks a module. Nothing is changed in these cases.
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
        """Check that no other method has claimed one of these modules. Nothing is changed.

        Raises:
            UserError: another method has claimed one. The message names both methods.
        """
        wanted = set(modules)
        for other, computes in self._claims.items():
            taken = [module for module in computes if module in wanted]
            if other != name and taken:
                more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
                raise UserError(
                    f"{name} cannot compute the attention of {taken[0]}{more}: {other} computes it already."
                    f" Remove {other}, or exclude these modules"
                )

    def release(self, name: str) -> None:
        """Remove the claim of a method, so that diffusers' processors compute again; wrappers stay.

        Raises:
            UserError: there is no claim of this name.
        """
        if name not in self._claims:
            raise UserError(f"{name} computes no attention here. Known: {', '.join(self._claims) or 'none'}")
        del self._claims[name]
        self._dispatching.pop(name, None)
        self._of_model.discard(name)
        self._take_off()

    def push(self, name: str, wrappers: Mapping[str, Wrapper]) -> None:
        """Add wrappers around everything on the given modules. A method that computes the attention must `claim`.

        Args:
            name: name of the method, for `pop`.
            wrappers: functions by module name.

        Raises:
            UserError: the name is on the processors already, or the transformer lacks a module. Nothing is changed in
                these cases.
        """
        self._install_all(name, wrappers)
        self._layers.append((name, dict(wrappers)))
        self._refresh()

    def pop(self, name: str) -> None:
        """Remove the wrappers of this name, at any position in the stack.

        A module whose processor other code has replaced keeps that processor.

        Raises:
            UserError: there are no wrappers of this name.
        """
        if name not in self.wrappers:
            raise UserError(
                f"{name} is not on the attention processors. On them: {', '.join(self.names) or 'nothing'}"
            )
        self._layers = [layer for layer in self._layers if layer[0] != name]
        self._take_off()

    def displaced(self) -> tuple[str, ...]:
        """Return the modules whose processor other code has replaced, so that claims and wrappers have no effect."""
        return tuple(name for name, mine in self._stacked.items() if self._modules[name].processor is not mine)

    def _install_all(self, name: str, modules: Iterable[str]) -> None:
        if name in self.names:
            act = "release" if name in self._claims else "pop"
            raise UserError(f"{name} is on the attention processors already: {act} it first")
        found = {each: self._module(each) for each in modules}
        for each, module in found.items():
            self._install(each, module)

    def _module(self, name: str) -> Any:
        try:
            module = self._model.get_submodule(name)
        except AttributeError:
            module = None
        if not hasattr(module, "processor"):
            raise UserError(
                f"{type(self._model).__name__} has no attention module {name!r}: use names from its layout"
            )
        return module

    def _install(self, name: str, module: Any) -> None:
        self._modules[name] = module
        original = module.processor
        if name in self._stacked:
            if original is self._stacked[name]:
                return
            # Other code replaced the stacked processor and may put it back: it must have no effect then.
            self._stacked[name].postgen_wrappers = ()
        stacked = copy.copy(original)
        # An earlier stacked processor that other code has put back is not wrapped twice.
        kind: Any = getattr(type(original), "postgen_parent", type(original))
        stacked.__class__ = _stacked_class(kind)
        stacked.postgen_wrappers = ()
        self._originals[name], self._stacked[name] = original, stacked
        _set_processor(module, stacked)

    def _uninstall(self, name: str) -> None:
        module, original, stacked = (kept.pop(name) for kept in (self._modules, self._originals, self._stacked))
        if module.processor is not stacked:
            return
        # Settings that diffusers has made on the stacked processor stay.
        hand_settings_over(stacked, original)
        _set_processor(module, original)

    def _take_off(self) -> None:
        """Update the processors, and restore those of modules without claims and wrappers."""
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
        """Return the functions of claims, at most one per module, then those of wrappers, innermost first."""
        return [*self._claims.values(), *(wrappers for _, wrappers in self._layers)]


def _set_processor(module: Any, processor: Any) -> None:
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:  # MochiAttention has no set_processor
        module.processor = processor


def _always() -> bool:
    return True


@functools.cache
def _stacked_class(parent: Any) -> Any:
    """Return the subclass of a processor class that calls its wrappers.

    There is one subclass for each class, so that compiled code is shared.
    """

    # diffusers reads the signature of `__call__`; `wraps` keeps it.
    @functools.wraps(parent.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(parent.__call__, self)
        for wrapper in self.postgen_wrappers:
            call = functools.partial(wrapper, call)
        return call(*args, **kwargs)

    # Pickle cannot find a class that is made at run time. It stores the parent, and unpickling makes the class again.
    def __reduce__(self: Any) -> tuple[Any, ...]:
        return _empty, (parent,), self.__dict__

    # The class keeps its name because diffusers looks for words such as "Added" in it.
    body = {"__call__": __call__, "__reduce__": __reduce__, "__module__": parent.__module__, "__doc__": parent.__doc__}
    made = type(parent.__name__, (parent,), {**body, "postgen_parent": parent})
    register_processor_class(made, parent)
    return made


def _empty(parent: Any) -> Any:
    # Wrappers may rely on the tap, and in the process that unpickles a model nobody has installed it yet.
    install_attention_tap()
    kind = _stacked_class(parent)
    return kind.__new__(kind)
