"""Fused operations on one transformer: what they take the place of, put on and taken off."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from postgen.compat import install_attention_tap
from postgen.families import layout_of, video_tokens_of
from postgen.families.installed import installed
from postgen.families.processors import processor_stack
from postgen.fused.blocks import check_block, fuse_block, fused_blocks, restore_block
from postgen.fused.config import FusedOpsConfig
from postgen.fused.known import family_of, replacement_for

if TYPE_CHECKING:
    from torch import nn

NAME = "fused_ops"
"""Name on the processor stack and among the plug-ins of a transformer."""


class Fusion:
    """Everything on one transformer. `install` puts it there, `remove` takes it off."""

    def __init__(self, model: nn.Module, config: FusedOpsConfig) -> None:
        self.enabled = False
        self._plan(model, config)

    def _plan(self, model: nn.Module, config: FusedOpsConfig) -> None:
        """Find what is replaced by what; nothing changes where something is not known.

        Raises:
            UserError: an unknown transformer, processor or block, or somebody replaced the forward of a block.
        """
        family, layout = family_of(model), layout_of(model)
        attends: dict[str, Callable[..., Any]] = {}
        forwards: dict[str, Callable[..., Any]] = {}
        if config.norm_rope or config.attention is not None:
            for name, module in video_tokens_of(model).attention_modules(model).items():
                kind: Any = type(module.processor)
                kind = getattr(kind, "postgen_parent", kind)
                found = replacement_for(kind, kind.__call__, family.processors, "norm_rope=False, attention=None")
                attends[name] = functools.partial(found.fused, config)
        if config.adaln:
            for name, block in layout.block_modules(model).items():
                kind = type(block)
                kind = getattr(kind, "postgen_parent", kind)
                forwards[name] = replacement_for(kind, kind.forward, family.blocks, "adaln=False").fused
                check_block(block)
        self.config, self._attends, self._forwards = config, attends, forwards

    def install(self, model: nn.Module) -> None:
        """Put everything in its place.

        Raises:
            UserError: somebody replaced the forward of a block; nothing is changed then.
        """
        fused: list[nn.Module] = []
        try:
            for name, forward in self._forwards.items():
                block = model.get_submodule(name)
                fuse_block(block, forward)
                fused.append(block)
        except BaseException:
            for block in fused:
                restore_block(block)
            raise
        if self._attends:
            install_attention_tap()
            processor_stack(model).push(NAME, self._attends, innermost=True, dispatches=True)
        installed(model).plug_ins[NAME] = self
        self.enabled = True

    def remove(self, model: nn.Module) -> None:
        """Take everything off."""
        self.disable(model)
        del installed(model).plug_ins[NAME]

    def disable(self, model: nn.Module) -> None:
        """Take everything off, but stay known to the transformer.

        Raises:
            UserError: a block has another class by now; nothing changes then.
        """
        if not self.enabled:
            return
        for block in fused_blocks(model):
            restore_block(block)
        if self._attends:
            processor_stack(model).pop(NAME)
        self.enabled = False

    def configure(self, model: nn.Module, config: FusedOpsConfig) -> None:
        """Take new settings; nothing changes where they are wrong.

        Raises:
            UserError: an unknown processor or block, or somebody replaced the forward of a block.
        """
        wanted = Fusion(model, config)
        enabled = self.enabled
        self.disable(model)
        self.config, self._attends, self._forwards = wanted.config, wanted._attends, wanted._forwards
        if enabled:
            self.install(model)

    def counts(self) -> dict[str, int]:
        """Return in how many attention layers and blocks which operation is fused."""
        config, layers = self.config, len(self._attends)
        counts = {
            "norm_rope": layers if config.norm_rope else 0,
            "adaln": len(self._forwards),
            "attention": layers if config.attention is not None else 0,
        }
        return {name: count for name, count in counts.items() if count}

    def describe(self) -> str:
        """Say in one line what is on and how it is set."""
        units = {"norm_rope": "layers", "adaln": "blocks", "attention": "layers"}
        parts = [f"{name} in {count} {units[name]}" for name, count in self.counts().items()]
        if self.config.attention is not None:
            parts[-1] = f"attention {self.config.attention} in {len(self._attends)} layers"
        return f"{'on' if self.enabled else 'off'}, {', '.join(parts)}"
