"""A plug-in as it stands on one transformer, with settings that belong to the call.

What `apply_*` sets holds for every call. What `for_call` sets holds in its block, for the thread or task that opened
it (a context variable of Python) and for nobody else, whatever else is called on the same transformer meanwhile. Of
blocks that overlap the one opened last counts, and each takes its own settings away, in whatever order they end.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch

from postgen.families.installed import installed, living

if TYPE_CHECKING:
    from torch import nn

C = TypeVar("C")

CHANGING = threading.RLock()
"""Held while something is put on a model or taken off; not while a model computes."""


class Setting(Generic[C]):
    """Settings, and whether they act: the usual ones of a plug-in, or those of one `for_call` block."""

    __slots__ = ("config", "enabled", "open", "prepared")

    def __init__(self, config: C, *, enabled: bool, prepared: Any = None) -> None:
        self.config, self.enabled = config, enabled
        self.prepared = prepared
        """What `AttachedPlugIn.prepare` made of the config."""
        self.open = True
        """Whether the block that they are of has not ended."""


_blocks: ContextVar[tuple[tuple[AttachedPlugIn[Any], Setting[Any]], ...]] = ContextVar("postgen_for_call", default=())
"""(plug-in, settings) of the blocks that this context is in, the one opened last at the end."""


class _Here(threading.local):
    """Settings of the forward under way in this thread. Unlike a context variable, compiled code can read it."""

    # Set in every thread rather than on the class: compiled code guards on the attribute being there.
    def __init__(self) -> None:
        self.setting: Setting[Any] | None = None


class AttachedPlugIn(Generic[C]):
    """What a method leaves on a transformer; the method says what is put where in `arrange`.

    Code that runs within a forward reads `now`, which may be another in every thread; everybody else reads `config`
    and `enabled`.
    """

    name: ClassVar[str]
    """Under which a transformer has it among its plug-ins."""

    def __init__(self, model: nn.Module, config: C) -> None:
        """Check settings on a transformer; nothing is put there.

        Raises:
            UserError: as `prepare`.
        """
        self._usual = Setting(config, enabled=False, prepared=self.prepare(model, config))
        self._applied = False
        self._calls: list[Setting[C]] = []  # of every thread
        self._kept: Setting[C] | None = None
        self._here = _Here()
        self._hooks: list[Any] = []

    # What a method says.

    def prepare(self, model: nn.Module, config: C) -> Any:
        """Find everything that is wrong with settings on the transformer as it is now, and change nothing.

        Returns:
            Whatever the method needs to act by these settings; it is their `Setting.prepared`.

        Raises:
            UserError: what is wrong.
        """

    @abstractmethod
    def arrange(self, model: nn.Module, live: Sequence[Setting[C]]) -> None:
        """Bring the transformer in line with the settings that some call may read; of none, take everything off.

        What is in place must give the stock model's bits while `now.enabled` is false. Where it fails, it changes
        nothing.
        """

    @abstractmethod
    def describe(self) -> str:
        """Say in one line what is on and how it is set."""

    # The settings.

    @property
    def now(self) -> Setting[C]:
        """The settings of the forward under way in this thread."""
        found = self._here.setting
        if found is not None:
            return found
        # Gradient checkpointing runs layers again outside a forward, on a GPU in a thread of its own.
        kept = self._kept
        return kept if kept is not None and kept.open else self._usual

    @property
    def setting(self) -> Setting[C]:
        """The settings of this thread or task, also between forwards."""
        return self._of_block() or self._usual

    @property
    def config(self) -> C:
        """The settings of this thread or task."""
        return self.setting.config

    @property
    def enabled(self) -> bool:
        """Whether it acts in this thread or task."""
        return self.setting.enabled

    @property
    def visible(self) -> bool:
        """Whether it stands here for this thread or task, and not only for a call in another one."""
        return self._applied or self._of_block() is not None

    def _of_block(self) -> Setting[C] | None:
        for plug_in, setting in reversed(_blocks.get()):
            if plug_in is self and setting.open:
                found: Setting[C] = setting
                return found
        return None

    # What a handle does. Inside a block it acts on the settings of the block.

    def check(self, model: nn.Module, config: C) -> None:
        """Refuse settings that are wrong on the transformer as it is now.

        Raises:
            UserError: as `prepare`.
        """
        self.prepare(model, config)

    def install(self, model: nn.Module) -> None:
        """Put it on the transformer for all calls."""
        self._usual.enabled = self._applied = True
        try:
            self._changed(model)
        except BaseException:
            self._usual.enabled = self._applied = False
            raise

    def configure(self, model: nn.Module, config: C) -> None:
        """Take new settings, enabled or not.

        Raises:
            UserError: they are wrong; nothing changes.
        """
        self._set(model, self.setting, config, self.setting.enabled)

    def enable(self, model: nn.Module) -> None:
        """Act again after `disable`.

        Raises:
            UserError: it cannot any more; nothing changes.
        """
        self._set(model, self.setting, self.setting.config, True)

    def disable(self, model: nn.Module) -> None:
        """Give the stock model back, bit by bit, but stay entered."""
        if self.setting.enabled:
            self._set(model, self.setting, None, False)

    def remove(self, model: nn.Module) -> None:
        """Take it off for good. Calls of other threads that brought settings of their own keep them to their end.

        Raises:
            UserError: it cannot be taken off; nothing changes.
        """
        before = self._applied, self._usual.enabled, [*self._calls]
        own = [setting for plug_in, setting in _blocks.get() if plug_in is self and setting.open]
        self._applied = self._usual.enabled = False
        self._calls = [setting for setting in self._calls if setting not in own]
        try:
            self._changed(model)
        except BaseException:
            self._applied, self._usual.enabled, self._calls = before
            raise
        for setting in own:
            setting.open = False

    def snapshot(self) -> Callable[[nn.Module], None]:
        """Return what brings it back to how it stands now, for changes of several transformers of which one fails."""
        setting, standing = self.setting, (self._applied, self._usual.enabled, [*self._calls])
        before = setting.config, setting.prepared, setting.enabled
        usable = [each for each in self._calls if each.open]

        def bring_back(model: nn.Module) -> None:
            self._applied, self._usual.enabled, self._calls = standing
            setting.config, setting.prepared, setting.enabled = before
            for each in usable:
                each.open = True
            self._changed(model)

        return bring_back

    def open_block(self, model: nn.Module, made: AttachedPlugIn[C] | None) -> Setting[C]:
        """Begin a block of calls with settings of their own.

        Args:
            model: the transformer.
            made: one that was made with these settings, perhaps this one; None is off.

        Raises:
            UserError: it cannot be put on; nothing changes.
        """
        given = self.setting if made is None else made.setting
        setting = Setting(given.config, enabled=made is not None, prepared=given.prepared)
        self._calls.append(setting)
        try:
            self._changed(model)
        except BaseException:
            self._close(setting)
            raise
        _blocks.set((*_blocks.get(), (self, setting)))
        self._here.setting = self._of_block()
        return setting

    def close_block(self, model: nn.Module, setting: Setting[C]) -> None:
        """End a block; one that `remove` ended is left."""
        _blocks.set(tuple(each for each in _blocks.get() if each[1] is not setting))
        if setting.open:
            self._close(setting)
            self._changed(model)
        self._here.setting = self._of_block()

    def _close(self, setting: Setting[C]) -> None:
        setting.open = False
        self._calls.remove(setting)

    def _set(self, model: nn.Module, setting: Setting[C], config: C | None, enabled: bool) -> None:
        before = setting.config, setting.prepared, setting.enabled
        if config is not None:
            setting.prepared = self.prepare(model, config)
            setting.config = config
        setting.enabled = enabled
        try:
            self._changed(model)
        except BaseException:
            setting.config, setting.prepared, setting.enabled = before
            raise

    def _changed(self, model: nn.Module) -> None:
        live = [*([self._usual] if self._applied else []), *self._calls]
        self.arrange(model, live)
        if live and not self._hooks:
            # Native hooks: the hooks of diffusers and accelerate replace `forward`, and these survive that.
            self._hooks.append(model.register_forward_pre_hook(self.before_forward, with_kwargs=True))
            self._hooks.append(model.register_forward_hook(self.after_forward, always_call=True))
            installed(model).plug_ins[self.name] = self
        elif not live and self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            del installed(model).plug_ins[self.name]

    # The forward.

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the settings of the thread or task that calls. In a model compiled as a whole, the thread's last."""
        if not torch.compiler.is_compiling():
            self._here.setting = self.setting

    def after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        """End the call, also one that failed, or that began before this was put here."""
        if not torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                self._kept = self._here.setting
            self._here.setting = self._of_block()

    def __getstate__(self) -> dict[str, Any]:
        # A copy keeps what it was copied with, for good: no block of another model ends it.
        usual = Setting(self.config, enabled=self.enabled, prepared=self.setting.prepared)
        fresh = {"_usual": usual, "_applied": True, "_calls": [], "_kept": None, "_hooks": living(self._hooks)}
        return {name: value for name, value in {**self.__dict__, **fresh}.items() if name != "_here"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._here = _Here()
