"""The handle of a plug-in: one class for all of them, so that switching, changing and removing mean the same."""

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
        found = {part: (m, installed(m).plug_ins.get(cls.name)) for part, m in transformers_of(target).items()}
        on = {part: (m, plug_in) for part, (m, plug_in) in found.items() if plug_in is not None and plug_in.visible}
        return cls(on) if on else None

    @classmethod
    def attach(cls, target: Any, make: Callable[[nn.Module], A]) -> Self:
        """Put the plug-in on every transformer of a pipeline, or on a transformer; where one is wrong, on none.

        Args:
            target: the pipeline or transformer.
            make: checks a transformer and returns what is installed on it.

        Raises:
            UserError: it is on one of them already, also for a call in another thread, or `make` refuses one.
        """
        models = transformers_of(target)
        with CHANGING, ExitStack() as undo:
            for component, model in models.items():
                if (standing := installed(model).plug_ins.get(cls.name)) is not None:
                    where = component or "this transformer"
                    if standing.visible:
                        raise UserError(cls.doubled.format(where=where))
                    raise UserError(f"a call in another thread has {cls.name} on {where}: apply it when that ended")
            # Everything that can be wrong shows here, before anything is installed.
            parts = {component: (model, make(model)) for component, model in models.items()}
            for model, part in parts.values():
                part.install(model)
                undo.callback(part.remove, model)
            undo.pop_all()
        watch_replacements()
        return cls(parts)

    @classmethod
    def settings(cls, config: Any | None) -> C:
        """Return settings as they were given; None is the default ones.

        Raises:
            UserError: they are not of this plug-in.
        """
        made: C = cls.config_class() if config is None else config
        if not isinstance(made, cls.config_class):
            raise UserError(f"the settings are {shown(made)}, they must be a {cls.config_class.__name__}")
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

        It is set for the thread or task that opens the block, as context variables are: `asyncio.to_thread` takes it
        along, a thread that is started otherwise runs `contextvars.copy_context().run` to have it.

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
        """Act again after `disable`.

        Raises:
            UserError: it was removed, or the model changed meanwhile so that it cannot act; nothing changes.
        """
        with CHANGING:
            off = [(model, part) for model, part in self._on if not part.enabled]
            for model, part in off:
                part.check(model, part.config)
            _each(off, _enable)

    def disable(self) -> None:
        """Give the stock model back, bit by bit, until `enable`.

        Raises:
            UserError: it was removed, or cannot be taken off one of the transformers; nothing changes.
        """
        with CHANGING:
            _each(self._on, lambda model, part: part.disable(model))

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
        with CHANGING:
            on = self._on
            given: Any = self.config if config is None else self.settings(config)
            new: Any = dataclasses.replace(given, **self.completed(changes))
            for model, part in on:
                part.check(model, new)
            _each(on, lambda model, part: part.configure(model, new))

    def completed(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Return the changes with those that follow from them: fields that exclude each other, say."""
        return changes

    def remove(self) -> None:
        """Take it off: the model is as before, bit by bit.

        Raises:
            UserError: it was removed already, or cannot be taken off one of the transformers; nothing changes then.
        """
        with CHANGING:
            _each(self._on, lambda model, part: part.remove(model))
            self._parts = {}


def _each(parts: Sequence[tuple[nn.Module, A]], change: Callable[[nn.Module, A], None]) -> None:
    """Change what stands on every transformer of a pipeline; where one refuses, on none."""
    with ExitStack() as undo:
        for model, part in parts:
            bring_back = part.snapshot()
            change(model, part)
            undo.callback(bring_back, model)
        undo.pop_all()


def _enable(model: nn.Module, part: AttachedPlugIn[Any]) -> None:
    part.configure(model, part.config)  # layers may have come or gone since
    part.enable(model)


def is_off(setting: Any) -> bool:
    """Whether a setting of one call switches a plug-in off: False or 0. None, which leaves it as it is, does not."""
    return isinstance(setting, Number) and not setting


@contextmanager
def set_for_call(
    model: nn.Module, name: str, config: Any | None, make: Callable[[nn.Module, Any], AttachedPlugIn[Any]]
) -> Iterator[None]:
    """Set a plug-in on a transformer for the calls in a block; afterwards it is as it was before.

    What is removed within the block stays removed.

    Args:
        model: the transformer.
        name: of the plug-in.
        config: settings; None is off.
        make: checks the settings, and returns what is installed where it is not on yet.

    Raises:
        UserError: settings that are wrong, or a model that it does not know; nothing changes.
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
