"""Fused operations on one transformer: what they take the place of, put on and taken off."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from postgen.families import layout_of, video_tokens_of
from postgen.families.attention import attention_of
from postgen.families.attention.dispatch import install_attention_tap
from postgen.families.fingerprints import known_for
from postgen.families.installed import installed, processor_stack
from postgen.fused.blocks import check_block, fuse_block, fused_blocks, restore_block
from postgen.fused.config import FusedOpsConfig
from postgen.fused.known import fused_blocks_of

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
            UserError: an unknown transformer, processor or block, somebody replaced the forward of a block, or
                somebody else computes attention.
        """
        known, layout = fused_blocks_of(model), layout_of(model)
        computes: dict[str, Callable[..., Any]] = {}
        forwards: dict[str, Callable[..., Any]] = {}
        if config.norm_rope or config.attention is not None:
            computes = _computes(model, config, video_tokens_of(model).attention_modules(model))
            processor_stack(model).check_claim(NAME, computes)
        if config.adaln:
            for name, block in layout.block_modules(model).items():
                kind: Any = type(block)
                kind = getattr(kind, "postgen_parent", kind)
                advice = "leave it as it is with adaln=False"
                forwards[name] = known_for(kind, kind.forward, known, what="fused form", advice=advice).forward
                check_block(block)
        self.config, self._computes, self._forwards = config, computes, forwards

    def install(self, model: nn.Module) -> None:
        """Put everything in its place.

        Raises:
            UserError: somebody replaced the forward of a block, or computes attention; nothing is changed then.
        """
        fused: list[nn.Module] = []
        try:
            for name, forward in self._forwards.items():
                block = model.get_submodule(name)
                fuse_block(block, forward)
                fused.append(block)
            if self._computes:
                install_attention_tap()
                processor_stack(model).claim(NAME, self._computes, dispatches=True)
        except BaseException:
            for block in fused:
                restore_block(block)
            raise
        installed(model).plug_ins[NAME] = self
        self.enabled = True

    def check(self, model: nn.Module, config: FusedOpsConfig) -> None:
        """Refuse settings that are wrong on the transformer as it is now; layers may have come or gone since.

        Raises:
            UserError: as `apply_fused_ops` raises it.
        """
        Fusion(model, config)

    def enable(self, model: nn.Module) -> None:
        """Put everything in its place again.

        Raises:
            UserError: as `apply_fused_ops` raises it; nothing changes then.
        """
        self.configure(model, self.config)
        self.install(model)

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
        if self._computes:
            processor_stack(model).release(NAME)
        self.enabled = False

    def configure(self, model: nn.Module, config: FusedOpsConfig) -> None:
        """Take new settings; nothing changes where they are wrong.

        Raises:
            UserError: as `apply_fused_ops` raises it.
        """
        wanted = Fusion(model, config)
        enabled = self.enabled
        self.disable(model)
        self.config, self._computes, self._forwards = wanted.config, wanted._computes, wanted._forwards
        if enabled:
            self.install(model)

    def counts(self) -> dict[str, int]:
        """Return in how many attention layers and blocks which operation is fused."""
        config, layers = self.config, len(self._computes)
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
            parts[-1] = f"attention {self.config.attention} in {len(self._computes)} layers"
        return f"{'on' if self.enabled else 'off'}, {', '.join(parts)}"


def _computes(
    model: nn.Module, config: FusedOpsConfig, modules: Mapping[str, nn.Module]
) -> dict[str, Callable[..., Any]]:
    """Return what computes the attention of each module."""
    from postgen.fused.processor import compute_fused

    anatomy, advice = attention_of(model), "leave it as it is with norm_rope=False, attention=None"
    readers = {
        name: anatomy.reader(module.processor, what="fused form", advice=advice) for name, module in modules.items()
    }
    return {name: functools.partial(compute_fused, config, reader) for name, reader in readers.items()}
