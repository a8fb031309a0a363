"""The handle of a plug-in: one class for all of them, so that switching, changing and removing mean the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from numbers import Number
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar

from postgen.errors import UserError
from postgen.families.installed import installed, transformers_of

if TYPE_CHECKING:
    from torch import nn


class Attached(Protocol):
    """A plug-in as it stands on one transformer. Methods that can fail change nothing then."""

    @property
    def config(self) -> Any:
        """The settings, a frozen dataclass."""

    @property
    def enabled(self) -> bool:
        """Whether it acts."""

    def check(self, model: nn.Module, config: Any) -> None:
        """Find everything that is wrong with settings on this transformer as it is now.

        Raises:
            UserError: what is wrong.
        """

    def install(self, model: nn.Module) -> None:
        """Put it on the transformer and enter it among its plug-ins; it acts from then on."""

    def configure(self, model: nn.Module, config: Any) -> None:
        """Take new settings, enabled or not."""

    def enable(self, model: nn.Module) -> None:
        """Act again after `disable`."""

    def disable(self, model: nn.Module) -> None:
        """Give the stock model back, bit by bit, but stay entered."""

    def remove(self, model: nn.Module) -> None:
        """Take it off for good."""

    def describe(self) -> str:
        """Say in one line what is on and how it is set."""


C = TypeVar("C")
A = TypeVar("A", bound=Attached)
Parts = Mapping[str, tuple["nn.Module", A]]
"""Component of a pipeline -> its transformer, and what stands on it."""


class PlugInHandle(Generic[C, A]):
    """A plug-in as it stands on one or more transformers.

    What was removed meanwhile, by this handle or another way, refuses everything but `stats`.
    """

    name: ClassVar[str]
    """Under which a transformer has it among its plug-ins."""
    config_class: ClassVar[type[Any]]
    """Dataclass of its settings."""
    removed: ClassVar[str]
    """The message to those who use it afterwards."""
    doubled: ClassVar[str]
    """The message to those who apply it twice; `{where}` stands for the transformer."""

    def __init__(self, parts: Parts[A]) -> None:
        self._parts = dict(parts)

    @classmethod
    def of(cls, target: Any) -> Self | None:
        """Return a handle to what is on a pipeline or transformer (a deep copy has its own); None where nothing is."""
        models = transformers_of(target).items()
        on = {part: (m, installed(m).plug_ins[cls.name]) for part, m in models if cls.name in installed(m).plug_ins}
        return cls(on) if on else None

    @classmethod
    def attach(cls, target: Any, make: Callable[[nn.Module], A]) -> Self:
        """Put the plug-in on every transformer of a pipeline, or on a transformer; where one is wrong, on none.

        Args:
            target: the pipeline or transformer.
            make: checks a transformer and returns what is installed on it.

        Raises:
            UserError: it is on one of them already, or `make` refuses one.
        """
        models = transformers_of(target)
        for component, model in models.items():
            if cls.name in installed(model).plug_ins:
                raise UserError(cls.doubled.format(where=component or "this transformer"))
        # Everything that can be wrong shows here, before anything is installed.
        parts = {component: (model, make(model)) for component, model in models.items()}
        with ExitStack() as undo:
            for model, part in parts.values():
                part.install(model)
                undo.callback(part.remove, model)
            undo.pop_all()
        return cls(parts)

    @classmethod
    def settings(cls, config: Any | None) -> C:
        """Return settings as they were given; None is the default ones.

        Raises:
            UserError: they are not of this plug-in.
        """
        made: C = cls.config_class() if config is None else config
        if not isinstance(made, cls.config_class):
            raise UserError(f"the settings are {made!r}, they must be a {cls.config_class.__name__}")
        return made

    @classmethod
    def spelled_out(cls, setting: Any) -> C:
        """Return the settings that a setting of one call stands for; True is the default ones.

        A plug-in that also takes a number or a word says here what it means.

        Raises:
            UserError: it stands for none.
        """
        return cls.settings(None if setting is True else setting)

    @classmethod
    @contextmanager
    def for_call(cls, target: Any, setting: Any, make: Callable[[nn.Module, C], A]) -> Iterator[None]:
        """Set the plug-in on a pipeline or transformer for the calls in a block; afterwards it is as it was before.

        Args:
            target: the pipeline (all its transformers are taken) or transformer.
            setting: None leaves it as it is, False or 0 is off, anything else is what `spelled_out` takes.
            make: what is installed where it is not on yet.

        Raises:
            UserError: settings that are wrong, or a model that it does not know; nothing changes.
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
        """The settings."""
        config: C = self._on[0][1].config
        return config

    @property
    def enabled(self) -> bool:
        """Whether it acts."""
        return self._on[0][1].enabled

    @property
    def still_on(self) -> dict[str, tuple[nn.Module, A]]:
        """The transformers that it is on, by component."""
        parts = self._parts.items()
        return {part: each for part, each in parts if installed(each[0]).plug_ins.get(self.name) is each[1]}

    @property
    def _on(self) -> list[tuple[nn.Module, A]]:
        found = list(self.still_on.values())
        if not found:
            raise UserError(self.removed)
        return found

    def enable(self) -> None:
        """Act again after `disable`.

        Raises:
            UserError: it was removed, or the model changed meanwhile so that it cannot act; nothing changes.
        """
        off = [(model, part) for model, part in self._on if not part.enabled]
        for model, part in off:
            part.check(model, part.config)
        for model, part in off:
            part.enable(model)

    def disable(self) -> None:
        """Give the stock model back, bit by bit, until `enable`."""
        for model, part in self._on:
            part.disable(model)

    def update(self, config: C | None = None, **changes: Any) -> None:
        """Change the settings.

        Args:
            config: all of them; None keeps the present ones.
            changes: fields of the settings to change.

        Raises:
            UserError: it was removed, settings that are wrong or another plug-in's, an unknown field; nothing changes.
        """
        known = self.config_class.__dataclass_fields__
        if unknown := sorted(changes.keys() - known.keys()):
            raise UserError(f"unknown settings {', '.join(unknown)}. Known: {', '.join(known)}")
        on = self._on
        given: Any = self.config if config is None else self.settings(config)
        new: Any = dataclasses.replace(given, **self.completed(changes))
        for model, part in on:
            part.check(model, new)
        for model, part in on:
            part.configure(model, new)

    def completed(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Return the changes with those that follow from them: fields that exclude each other, say."""
        return changes

    def remove(self) -> None:
        """Take it off: the model is as before, bit by bit.

        Raises:
            UserError: it was removed already.
        """
        for model, part in self._on:
            part.remove(model)
        self._parts = {}


def is_off(setting: Any) -> bool:
    """Whether a setting of one call switches a plug-in off: False or 0. None, which leaves it as it is, does not."""
    return isinstance(setting, Number) and not setting


@contextmanager
def set_for_call(
    model: nn.Module, name: str, config: Any | None, make: Callable[[nn.Module, Any], Attached]
) -> Iterator[None]:
    """Set a plug-in on a transformer for the calls in a block; afterwards it is as it was before.

    What is removed within the block stays removed.

    Args:
        model: the transformer.
        name: of the plug-in.
        config: settings; None is off.
        make: what is installed where it is not on yet.

    Raises:
        UserError: settings that are wrong, or a model that it does not know; nothing changes.
    """
    found: Attached | None = installed(model).plug_ins.get(name)
    if found is None:
        added = None if config is None else make(model, config)
        if added is not None:
            added.install(model)
        try:
            yield
        finally:
            if added is not None and _is_on(model, name, added):
                added.remove(model)
        return
    before, enabled = found.config, found.enabled
    if config is not None:
        found.check(model, config)
    try:
        _set(model, found, before if config is None else config, config is not None)
        yield
    finally:
        if _is_on(model, name, found):
            _set(model, found, before, enabled)


def _is_on(model: nn.Module, name: str, part: Attached) -> bool:
    return installed(model).plug_ins.get(name) is part


def _set(model: nn.Module, part: Attached, config: Any, enabled: bool) -> None:
    if part.config is not config:
        part.configure(model, config)
    if enabled != part.enabled:
        (part.enable if enabled else part.disable)(model)
