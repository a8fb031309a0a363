"""What postgen has put on a model, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from postgen.families.installed import installed, transformers_of


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerSummary:
    """What is on one transformer."""

    component: str
    """Name in the pipeline; empty for a bare transformer."""
    kind: str
    """Class name."""
    plug_ins: dict[str, str]
    """What is on, by method, each in one line."""
    wrappers: tuple[str, ...]
    """Stack of attention-processor wrappers, innermost first."""
    displaced: tuple[str, ...]
    """Attention modules whose processor was replaced behind our back: no wrapper acts there."""

    def __str__(self) -> str:
        title = f"{self.component}: {self.kind}" if self.component else self.kind
        lines = [title, *(f"  {name}: {text}" for name, text in self.plug_ins.items())]
        if not self.plug_ins:
            lines.append("  nothing is on")
        if self.wrappers:
            lines.append(f"  attention processors: diffusers < {' < '.join(self.wrappers)}")
        if self.displaced:
            lines.append(f"  replaced since, so without effect: {len(self.displaced)} processors")
        return "\n".join(lines)


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
        rows.append(
            TransformerSummary(
                component=component,
                kind=type(model).__name__,
                plug_ins={name: plug_in.describe() for name, plug_in in found.plug_ins.items()},
                wrappers=found.stack.names if found.stack is not None else (),
                displaced=found.stack.displaced() if found.stack is not None else (),
            )
        )
    return Summary(transformers=tuple(rows))
