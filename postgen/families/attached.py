"""A plug-in on one transformer, with settings that can differ between calls.

`apply_*` sets the settings for all calls. `for_call` opens a `with` block with settings of its own. They apply only to
calls from the thread or asyncio task that opened the block (a Python context variable). Calls of other threads on the
same transformer at the same time keep their settings. If blocks overlap, the settings of the block that was opened
last apply. Overlapping blocks may end in any order; each one removes only its own settings.
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
"""Lock that a thread holds while it puts a plug-in on a model or removes it, but not while a model computes."""


class Setting(Generic[C]):
    """Settings and whether they are enabled: the usual settings of a plug-in, or those of one `for_call` block."""

    __slots__ = ("config", "enabled", "open", "prepared")

    def __init__(self, config: C, *, enabled: bool, prepared: Any = None) -> None:
        self.config, self.enabled = config, enabled
        self.prepared = prepared
        """The result of `AttachedPlugIn.prepare` for the config."""
        self.open = True
        """False after the end of the block to which the settings belong."""


_blocks: ContextVar[tuple[tuple[AttachedPlugIn[Any], Setting[Any]], ...]] = ContextVar("postgen_for_call", default=())
"""(plug-in, settings) of the open blocks of the current context, in the order in which they were opened."""


class _Here(threading.local):
    """Settings of the running forward pass of a thread. Compiled code can read them, unlike a context variable."""

    # An instance attribute in every thread, not a class attribute: compiled code guards on its presence.
    def __init__(self) -> None:
        self.setting: Setting[Any] | None = None


class AttachedPlugIn(Generic[C]):
    """Base class of the object that a method puts on a transformer.

    A method implements `arrange`, which changes the modules of the transformer. Code inside a forward pass reads
    `now`, which can differ between threads. Other code reads `config` and `enabled`.
    """

    name: ClassVar[str]
    """Name of the plug-in in the record of a transformer (`installed(transformer).plug_ins`)."""

    def __init__(self, model: nn.Module, config: C) -> None:
        """Check the settings for a transformer, without changing the transformer.

        Raises:
            UserError: `prepare` refuses the settings.
        """
        self._usual = Setting(config, enabled=False, prepared=self.prepare(model, config))
        self._applied = False
        self._calls: list[Setting[C]] = []  # open blocks of all threads
        self._kept: Setting[C] | None = None
        self._here = _Here()
        self._hooks: list[Any] = []

    # A method implements these.

    def prepare(self, model: nn.Module, config: C) -> Any:
        """Check the settings for the current state of the transformer, without changing the transformer.

        Returns:
            Any object that the method needs to apply the settings; it becomes their `Setting.prepared`.

        Raises:
            UserError: the settings do not fit the transformer.
        """

    @abstractmethod
    def arrange(self, model: nn.Module, live: Sequence[Setting[C]]) -> None:
        """Change the modules of the transformer for the settings in use; if there are none, remove all changes.

        While `now.enabled` is False, the changed modules must compute the same bits as the stock model. If this method
        raises, it must leave the transformer unchanged.

        Args:
            model: the transformer.
            live: all settings that a call may read.
        """

    @abstractmethod
    def describe(self) -> str:
        """Return one line that describes the plug-in and its settings."""

    # The settings.

    @property
    def now(self) -> Setting[C]:
        """The settings of the running forward pass of this thread."""
        found = self._here.setting
        if found is not None:
            return found
        # Gradient checkpointing recomputes layers outside a forward pass, on a GPU in another thread.
        kept = self._kept
        return kept if kept is not None and kept.open else self._usual

    @property
    def setting(self) -> Setting[C]:
        """The settings of the current thread or task, also outside a forward pass."""
        return self._of_block() or self._usual

    @property
    def config(self) -> C:
        """The config of the current thread or task."""
        return self.setting.config

    @property
    def enabled(self) -> bool:
        """Whether the plug-in is enabled for the current thread or task."""
        return self.setting.enabled

    @property
    def visible(self) -> bool:
        """Whether the current thread or task sees the plug-in; False if only a block of another thread has it."""
        return self._applied or self._of_block() is not None

    def _of_block(self) -> Setting[C] | None:
        for plug_in, setting in reversed(_blocks.get()):
            if plug_in is self and setting.open:
                found: Setting[C] = setting
                return found
        return None

    # The operations of a handle. Inside a block they change the settings of that block.

    def check(self, model: nn.Module, config: C) -> None:
        """Check settings for the current state of the transformer.

        Raises:
            UserError: `prepare` refuses the settings.
        """
        self.prepare(model, config)

    def install(self, model: nn.Module) -> None:
        """Put the plug-in on the transformer for all calls."""
        self._usual.enabled = self._applied = True
        try:
            self._changed(model)
        except BaseException:
            self._usual.enabled = self._applied = False
            raise

    def configure(self, model: nn.Module, config: C) -> None:
        """Replace the settings; the plug-in stays enabled or disabled.

        Raises:
            UserError: the settings do not fit the transformer; nothing changes.
        """
        self._set(model, self.setting, config, self.setting.enabled)

    def enable(self, model: nn.Module) -> None:
        """Enable the plug-in again after `disable`.

        Raises:
            UserError: the plug-in cannot be enabled; nothing changes.
        """
        self._set(model, self.setting, self.setting.config, True)

    def disable(self, model: nn.Module) -> None:
        """Let the transformer compute the same bits as the stock model; the plug-in stays on it."""
        if self.setting.enabled:
            self._set(model, self.setting, None, False)

    def remove(self, model: nn.Module) -> None:
        """Remove the plug-in from the transformer. Open blocks of other threads keep their settings until they end.

        Raises:
            UserError: the plug-in cannot be removed; nothing changes.
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
        """Return a function `(transformer)` that restores the present state of the plug-in.

        A handle changes several transformers together. If one of them fails, it restores the others.
        """
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
        """Open a block in which calls have settings of their own.

        Args:
            model: the transformer.
            made: a plug-in object with these settings, which may be this object; None disables the plug-in.

        Returns:
            The settings of the block, for `close_block`.

        Raises:
            UserError: the plug-in cannot be put on the transformer; nothing changes.
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
        """Close a block; a block that `remove` has closed already stays closed."""
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
            # Hooks of torch: these remain when hooks of diffusers or accelerate replace `forward`.
            self._hooks.append(model.register_forward_pre_hook(self.before_forward, with_kwargs=True))
            self._hooks.append(model.register_forward_hook(self.after_forward, always_call=True))
            installed(model).plug_ins[self.name] = self
        elif not live and self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            del installed(model).plug_ins[self.name]

    # The hooks of the forward pass.

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Use the settings of the calling thread or task for this pass.

        In a model that is compiled as a whole, this hook does nothing: the pass uses the last settings of the thread.
        """
        if not torch.compiler.is_compiling():
            self._here.setting = self.setting

    def after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        """End the pass, also if it failed or if it began before the hooks were registered."""
        if not torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                self._kept = self._here.setting
            self._here.setting = self._of_block()

    def __getstate__(self) -> dict[str, Any]:
        # A copy keeps the settings that hold when it is made. Blocks of the original model do not change the copy.
        usual = Setting(self.config, enabled=self.enabled, prepared=self.setting.prepared)
        fresh = {"_usual": usual, "_applied": True, "_calls": [], "_kept": None, "_hooks": living(self._hooks)}
        return {name: value for name, value in {**self.__dict__, **fresh}.items() if name != "_here"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._here = _Here()
