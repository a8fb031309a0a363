"""The state of fused operations on one transformer: plan which modules change, change them, restore them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from postgen.families import layout_of, video_tokens_of
from postgen.families.attached import AttachedPlugIn, Setting
from postgen.families.attention import AttentionReader, attention_of
from postgen.families.attention.dispatch import install_attention_tap
from postgen.families.fingerprints import known_for
from postgen.families.installed import processor_stack
from postgen.fused.blocks import check_block, fuse_block, fused_blocks, is_fused, restore_block
from postgen.fused.config import FusedOpsConfig
from postgen.fused.known import fused_blocks_of

if TYPE_CHECKING:
    from torch import nn

NAME = "fused_ops"
"""The name on the processor stack and among the plug-ins of a transformer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The modules of one transformer that given settings change."""

    readers: dict[str, AttentionReader]
    """Name of an attention module -> the reader of its processor."""
    forwards: dict[str, Callable[..., Any]]
    """Name of a block -> its fused forward."""
    skipped: dict[str, str]
    """Name of an attention module that another method turned into a layer without softmax -> this method."""


class Fusion(AttachedPlugIn[FusedOpsConfig]):
    """The fused operations of one transformer.

    A changed module computes exactly like the stock module in calls whose settings do not select it.
    """

    name = NAME

    def __init__(self, model: nn.Module, config: FusedOpsConfig) -> None:
        self._blocks: dict[str, Callable[..., Any]] = {}
        self._readers: dict[str, AttentionReader] = {}
        self.kernel: str | None = None
        """Kernel that computed attention last, for the summary. None before a call, and if blocks are compiled."""
        super().__init__(model, config)

    def prepare(self, model: nn.Module, config: FusedOpsConfig) -> Plan:
        """Find the modules to change, in the current state of the transformer.

        Raises:
            UserError: the transformer, an attention processor or a block is unknown, other code replaced the forward
                of a block, or another method computes the attention of a module.
        """
        known, layout = fused_blocks_of(model), layout_of(model)
        readers: dict[str, AttentionReader] = {}
        forwards: dict[str, Callable[..., Any]] = {}
        skipped: dict[str, str] = {}
        if config.in_attention:
            modules, skipped = video_tokens_of(model).attention_modules(model), processor_stack(model).changed_layers
            readers = _readers(model, {name: each for name, each in modules.items() if name not in skipped})
            processor_stack(model).check_claim(NAME, readers)
        if config.adaln:
            for name, block in layout.block_modules(model).items():
                kind: Any = type(block)
                kind = getattr(kind, "postgen_parent", kind)
                advice = "leave the blocks unchanged with adaln=False"
                forwards[name] = known_for(kind, kind.forward, known, what="fused form", advice=advice).forward
                check_block(block)
        return Plan(readers=readers, forwards=forwards, skipped=skipped)

    def arrange(self, model: nn.Module, live: Sequence[Setting[FusedOpsConfig]]) -> None:
        """Change every module that a setting in use selects, and restore the other modules.

        Raises:
            UserError: other code replaced the forward or the class of a block, or another method computes the
                attention of a module; nothing is changed then.
        """
        self.kernel = None
        plans = [setting.prepared for setting in live if setting.enabled]
        blocks = {name: forward for plan in plans for name, forward in plan.forwards.items()}
        readers = {name: reader for plan in plans for name, reader in plan.readers.items()}
        if readers:
            processor_stack(model).check_claim(NAME, readers)
        # Blocks first; if the attention modules then fail, the blocks return to their earlier state.
        before = self._blocks
        self._arrange_blocks(model, blocks)
        try:
            self._arrange_attention(model, readers)
        except BaseException:
            self._arrange_blocks(model, before)
            raise

    def _arrange_blocks(self, model: nn.Module, wanted: dict[str, Callable[..., Any]]) -> None:
        standing = fused_blocks(model)
        new = [(model.get_submodule(name), forward) for name, forward in wanted.items()]
        blocks = [block for block, _ in new]
        for block in blocks:
            check_block(block)
        for block in standing:
            if all(block is not each for each in blocks):
                restore_block(block)
        for block, forward in new:
            if not is_fused(block):
                fuse_block(block, forward, self._wants_blocks)
        self._blocks = wanted

    def _arrange_attention(self, model: nn.Module, wanted: dict[str, AttentionReader]) -> None:
        if wanted == self._readers:
            return
        stack = processor_stack(model)
        if self._readers:
            stack.release(NAME)
        self._readers = {}
        if wanted:
            from postgen.fused.processor import compute_fused

            install_attention_tap()
            computes = {name: functools.partial(compute_fused, self, reader) for name, reader in wanted.items()}
            stack.claim(NAME, computes, dispatches=self._wants_attention)
        self._readers = wanted

    def _wants_blocks(self) -> bool:
        now = self.now
        return now.enabled and now.config.adaln

    def _wants_attention(self) -> bool:
        now = self.now
        return now.enabled and now.config.in_attention

    def counts(self) -> dict[str, int]:
        """Return the number of attention layers or blocks in which each operation is fused."""
        plan = self.setting.prepared
        config, layers = self.config, len(plan.readers)
        counts = {
            "norm_rope": layers if config.norm_rope else 0,
            "adaln": len(plan.forwards),
            "attention": layers if config.attention is not None else 0,
        }
        return {name: count for name, count in counts.items() if count}

    def describe(self) -> str:
        """Return one line that describes the state and the settings."""
        units = {"norm_rope": "layers", "adaln": "blocks", "attention": "layers"}
        parts = [f"{name} in {count} {units[name]}" for name, count in self.counts().items()]
        if self.config.attention is not None:
            parts[-1] = f"attention {self.config.attention} in {len(self.setting.prepared.readers)} layers"
            if self.enabled and self.kernel is not None:
                parts[-1] += f" (last call: {self.kernel})"
        if skipped := self.setting.prepared.skipped:
            parts.append(f"not in {len(skipped)} layers of {' and '.join(sorted({*skipped.values()}))}")
        return f"{'on' if self.enabled else 'off'}, {', '.join(parts)}"


def _readers(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, AttentionReader]:
    """Return the reader of each attention module's processor."""
    anatomy, advice = attention_of(model), "leave attention unchanged with norm_rope=False, attention=None"
    return {
        name: anatomy.reader(module.processor, what="fused form", advice=advice) for name, module in modules.items()
    }
