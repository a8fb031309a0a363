"""What postgen has put on a model, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from postgen.families.installed import installed, transformers_of
from postgen.families.processors import ProcessorStack


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerSummary:
    """What is on one transformer."""

    component: str
    """Name in the pipeline; empty for a bare transformer."""
    kind: str
    """Class name."""
    plug_ins: dict[str, str]
    """What is on, by method, each in one line."""
    claims: dict[str, int]
    """Who computes attention instead of diffusers, and of how many modules."""
    wrappers: tuple[str, ...]
    """What is wrapped around the attention processors, innermost first."""
    displaced: tuple[str, ...]
    """Attention modules whose processor was replaced behind our back: nothing of ours acts there."""

    def __str__(self) -> str:
        title = f"{self.component}: {self.kind}" if self.component else self.kind
        lines = [title, *(f"  {name}: {text}" for name, text in self.plug_ins.items())]
        if not self.plug_ins:
            lines.append("  nothing is on")
        if self.claims or self.wrappers:
            lines.append(f"  attention processors: {' < '.join(['diffusers', *self._computing, *self.wrappers])}")
        if self.displaced:
            lines.append(f"  replaced since, so without effect: {len(self.displaced)} processors")
        return "\n".join(lines)

    @property
    def _computing(self) -> list[str]:
        """At most one place in the line: claimants have different modules, so none stands above another."""
        if len(self.claims) > 1:
            return [", ".join(f"{name} (computes {count})" for name, count in self.claims.items())]
        return [f"{name} (computes)" for name in self.claims]


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What is on a pipeline or transformer; `print` it."""

    transformers: tuple[TransformerSummary, ...]
    """One for each transformer."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.transformers))


def summary(target: Any) -> Summary:
    """Tell what postgen has put on a diffusers pipeline or transformer.

    Args:
        target: the pipeline or transformer.

    Raises:
        UserError: it has no transformer.

    Example:
        print(postgen.summary(pipe))
    """
    rows = []
    for component, model in transformers_of(target).items():
        found = installed(model)
        stack = found.stack or ProcessorStack(model)
        rows.append(
            TransformerSummary(
                component=component,
                kind=type(model).__name__,
                plug_ins={
                    name: plug_in.describe()
                    for name, plug_in in found.plug_ins.items()
                    if getattr(plug_in, "visible", True)  # and not on for a call in another thread only
                },
                claims={name: len(modules) for name, modules in stack.claims.items()},
                wrappers=stack.wrappers,
                displaced=stack.displaced(),
            )
        )
    return Summary(transformers=tuple(rows))
