"""Summary of everything that postgen has applied to a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from postgen.families.installed import installed, transformers_of
from postgen.families.processors import ProcessorStack


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerSummary:
    """Plug-ins, claims and wrappers on one transformer."""

    component: str
    """Component name in the pipeline; empty for a bare transformer."""
    kind: str
    """Class name of the transformer."""
    plug_ins: dict[str, str]
    """One line of description for each plug-in, by name of its method."""
    claims: dict[str, int]
    """Methods that compute attention instead of diffusers, each with its number of modules."""
    wrappers: tuple[str, ...]
    """Methods with wrappers around the attention processors, innermost first."""
    displaced: tuple[str, ...]
    """Attention modules whose processor other code has replaced, so that claims and wrappers have no effect there."""

    def __str__(self) -> str:
        title = f"{self.component}: {self.kind}" if self.component else self.kind
        lines = [title, *(f"  {name}: {text}" for name, text in self.plug_ins.items())]
        if not self.plug_ins:
            lines.append("  nothing is on")
        if self.claims or self.wrappers:
            lines.append(f"  attention processors: {' < '.join(['diffusers', *self._computing, *self.wrappers])}")
        if self.displaced:
            lines.append(f"  without effect, because other code replaced the processor: {len(self.displaced)} modules")
        return "\n".join(lines)

    @property
    def _computing(self) -> list[str]:
        """Methods that compute attention, as one entry: they have different modules, so none wraps another."""
        if len(self.claims) > 1:
            return [", ".join(f"{name} (computes {count})" for name, count in self.claims.items())]
        return [f"{name} (computes)" for name in self.claims]


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Everything that postgen has applied to a pipeline or transformer; `print` shows it as text."""

    transformers: tuple[TransformerSummary, ...]
    """One summary per transformer."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.transformers))


def summary(target: Any) -> Summary:
    """Return what postgen has applied to a diffusers pipeline or transformer.

    Args:
        target: the pipeline or transformer.

    Raises:
        UserError: the pipeline has no transformer.

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
                    if getattr(plug_in, "visible", True)  # False: on only for a call in another thread
                },
                claims={name: len(modules) for name, modules in stack.claims.items()},
                wrappers=stack.wrappers,
                displaced=stack.displaced(),
            )
        )
    return Summary(transformers=tuple(rows))
