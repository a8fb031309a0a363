"""The handle of a plug-in: one base class, so that `enable`, `update` and `remove` mean the same for every plug-in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Number
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from postgen.errors import UserError, shown
from postgen.families.attached import CHANGING, AttachedPlugIn
from postgen.families.installed import installed, transformers_of
from postgen.families.replaced import watch_replacements

if TYPE_CHECKING:
    from torch import nn


C = TypeVar("C")
A = TypeVar("A", bound=AttachedPlugIn[Any])
Parts = Mapping[str, tuple["nn.Module", A]]
"""Component name of a pipeline -> (transformer, the plug-in on this transformer)."""


class PlugInHandle(Generic[C, A]):
    """A plug-in on one or more transformers, with methods to switch, change and remove it.

    After the plug-in was removed, by this handle or in another way, every method except `stats` raises `UserError`.
    """

    name: ClassVar[str]
    """Key of the plug-in in `Installed.plug_ins`."""
    config_class: ClassVar[type[Any]]
    """Dataclass of the settings."""
    removed: ClassVar[str]
    """Error message when the handle is used after the plug-in was removed."""
    doubled: ClassVar[str]
    """Error message when the plug-in is applied a second time; `{where}` stands for the transformer."""

    def __init__(self, parts: Parts[A]) -> None:
        self._parts = dict(parts)

    @classmethod
    def of(cls, target: Any) -> Self | None:
        """Return a handle to the plug-in on a pipeline or transformer, or None where the plug-in is not applied.

        A deep copy of a transformer carries its own copy of the plug-in.
        """
        found = {part: (m, installed(m).plug_ins.get(cls.name)) for part, m in transformers_of(target).items()}
        on = {part: (m, plug_in) for part, (m, plug_in) in found.items() if plug_in is not None and plug_in.visible}
        return cls(on) if on else None

    @classmethod
    def attach(cls, target: Any, make: Callable[[nn.Module], A]) -> Self:
        """Apply the plug-in to a transformer, or to every transformer of a pipeline: to all of them or to none.

        Args:
            target: the pipeline or transformer.
            make: checks a transformer and returns the plug-in object to install on it.

        Raises:
            UserError: the plug-in is already on one of the transformers, if only for a call in another thread, or
                `make` refuses a transformer.
        """
        models = transformers_of(target)
        with CHANGING, ExitStack() as undo:
            for component, model in models.items():
                if (standing := installed(model).plug_ins.get(cls.name)) is not None:
                    where = component or "this transformer"
                    if standing.visible:
                        raise UserError(cls.doubled.format(where=where))
                    raise UserError(f"a call in another thread uses {cls.name} on {where}: apply it after that call")
            # `make` checks every transformer before the plug-in is installed on the first one.
            parts = {component: (model, make(model)) for component, model in models.items()}
            for model, part in parts.values():
                part.install(model)
                undo.callback(part.remove, model)
            undo.pop_all()
        watch_replacements()
        return cls(parts)

    @classmethod
    def settings(cls, config: Any | None) -> C:
        """Return the given settings, or the default settings for None.

        Raises:
            UserError: `config` is not an instance of `config_class`.
        """
        made: C = cls.config_class() if config is None else config
        if not isinstance(made, cls.config_class):
            raise UserError(f"the settings are {shown(made)}, they must be a {cls.config_class.__name__}")
        return made

    @classmethod
    def spelled_out(cls, setting: Any) -> C:
        """Return the config for the value of a per-call argument: True means the default settings.

        A plug-in whose argument may also be a number or a word overrides this method.

        Raises:
            UserError: `setting` is not a valid value.
        """
        return cls.settings(None if setting is True else setting)

    @classmethod
    @contextmanager
    def for_call(cls, target: Any, setting: Any, make: Callable[[nn.Module, C], A]) -> Iterator[None]:
        """Set the plug-in for the calls inside a `with` block and restore the previous state afterwards.

        Like a context variable, the setting holds for the thread or task that opens the block. `asyncio.to_thread`
        passes the setting on; a thread started in another way must run `contextvars.copy_context().run` to have it.

        Args:
            target: the pipeline (the setting applies to all its transformers) or transformer.
            setting: None keeps the present state, False or 0 switches the plug-in off, any other value goes to
                `spelled_out`.
            make: checks the settings and returns the plug-in object for a transformer that has none yet.

        Raises:
            UserError: invalid settings, or a model that the plug-in does not support. Nothing changes.
        """
        if setting is None:
            yield
            return
        config = None if is_off(setting) else cls.spelled_out(setting)
        with ExitStack() as stack:
            for model in transformers_of(target).values():
                stack.enter_context(set_for_call(model, cls.name, config, make))
            yield

    @property
    def config(self) -> C:
        """The settings of the plug-in."""
        config: C = self._on[0][1].config
        return config

    @property
    def enabled(self) -> bool:
        """Whether the plug-in is switched on."""
        return self._on[0][1].enabled

    @property
    def still_on(self) -> dict[str, tuple[nn.Module, A]]:
        """The transformers that still carry the plug-in: component name -> (transformer, plug-in)."""
        parts = self._parts.items()
        return {
            part: (model, plug_in)
            for part, (model, plug_in) in parts
            if installed(model).plug_ins.get(self.name) is plug_in and plug_in.visible
        }

    @property
    def _on(self) -> list[tuple[nn.Module, A]]:
        found = list(self.still_on.values())
        if not found:
            raise UserError(self.removed)
        return found

    def enable(self) -> None:
        """Switch the plug-in on again after `disable`.

        Raises:
            UserError: the plug-in was removed, or does not fit the model any more. Nothing changes.
        """
        with CHANGING:
            off = [(model, part) for model, part in self._on if not part.enabled]
            for model, part in off:
                part.check(model, part.config)
            _each(off, _enable)

    def disable(self) -> None:
        """Switch the plug-in off until `enable`: outputs are bitwise those of the stock model.

        Raises:
            UserError: the plug-in was removed, or cannot be switched off on one of the transformers. Nothing changes.
        """
        with CHANGING:
            _each(self._on, lambda model, part: part.disable(model))

    def update(self, config: C | None = None, **changes: Any) -> None:
        """Change the settings.

        Args:
            config: the new settings; None starts from the present settings.
            changes: fields to change in these settings.

        Raises:
            UserError: the plug-in was removed, the settings are invalid or belong to another plug-in, or a field is
                unknown. Nothing changes.
        """
        known = self.config_class.__dataclass_fields__
        if unknown := sorted(changes.keys() - known.keys()):
            raise UserError(f"unknown settings {', '.join(unknown)}. Known: {', '.join(known)}")
        with CHANGING:
            on = self._on
            given: Any = self.config if config is None else self.settings(config)
            new: Any = dataclasses.replace(given, **self.completed(changes))
            for model, part in on:
                part.check(model, new)
            _each(on, lambda model, part: part.configure(model, new))

    def completed(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Return the changes plus the changes that they imply, for instance where two fields exclude each other."""
        return changes

    def remove(self) -> None:
        """Remove the plug-in: outputs are bitwise those of the model without it.

        Raises:
            UserError: the plug-in was already removed, or cannot be removed from one of the transformers. Nothing
                changes.
        """
        with CHANGING:
            _each(self._on, lambda model, part: part.remove(model))
            self._parts = {}


def _each(parts: Sequence[tuple[nn.Module, A]], change: Callable[[nn.Module, A], None]) -> None:
    """Change the plug-in on every given transformer; if one change fails, undo the others."""
    with ExitStack() as undo:
        for model, part in parts:
            bring_back = part.snapshot()
            change(model, part)
            undo.callback(bring_back, model)
        undo.pop_all()


def _enable(model: nn.Module, part: AttachedPlugIn[Any]) -> None:
    part.configure(model, part.config)  # layers may have been added or removed since `disable`
    part.enable(model)


def is_off(setting: Any) -> bool:
    """Whether the value of a per-call argument switches a plug-in off: True for False and 0, but not for None."""
    return isinstance(setting, Number) and not setting


@contextmanager
def set_for_call(
    model: nn.Module, name: str, config: Any | None, make: Callable[[nn.Module, Any], AttachedPlugIn[Any]]
) -> Iterator[None]:
    """Set a plug-in on a transformer for the calls inside a `with` block and restore the previous state afterwards.

    A plug-in that is removed inside the block stays removed.

    Args:
        model: the transformer.
        name: name of the plug-in.
        config: the settings; None switches the plug-in off.
        make: checks the settings and returns the plug-in object for a transformer that has none yet.

    Raises:
        UserError: invalid settings, or a model that the plug-in does not support. Nothing changes.
    """
    with CHANGING:
        found: AttachedPlugIn[Any] | None = installed(model).plug_ins.get(name)
        made = None if config is None else make(model, config)
        found = found or made
        setting = None if found is None else found.open_block(model, made)
    try:
        yield
    finally:
        if found is not None and setting is not None:
            with CHANGING:
                found.close_block(model, setting)
