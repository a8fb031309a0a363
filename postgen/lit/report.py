"""What a conversion did, block by block."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One attention module."""

    block: int
    """In running order."""
    module: str
    """Its name."""
    kind: str
    """Layer type."""
    new: int
    """Parameters that it has beside the base's."""
    inherited: tuple[str, ...]
    """Weights of the base that it goes on with."""
    fresh: tuple[str, ...] = ()
    """Weights of the base that begin anew."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A conversion; `print` it."""

    transformer: str
    """Class name."""
    types: tuple[str, ...]
    """Layer type of each block."""
    rows: tuple[Row, ...]
    """Every self-attention module, in running order."""
    base_parameters: int
    """Of the whole transformer."""

    @property
    def new_parameters(self) -> int:
        """Parameters that were added."""
        return sum(row.new for row in self.rows)

    def __str__(self) -> str:
        share = self.new_parameters / max(1, self.base_parameters)
        linear = sum(kind != "softmax" for kind in self.types)
        lines = [
            f"{self.transformer}: {linear} of {len(self.types)} blocks converted, {self.new_parameters:,} new"
            f" parameters ({share:.1%} of the base's)",
            f"{'block':>5}  {'type':14}{'new':>12}  {'module':36}weights",
        ]
        for row in self.rows:
            kept = "all of the base" if not row.fresh else f"{', '.join(row.inherited)} of the base"
            fresh = f"; anew: {', '.join(row.fresh)}" if row.fresh else ""
            lines.append(f"{row.block:5}  {row.kind:14}{row.new:12,}  {row.module:36}{kept}{fresh}")
        return "\n".join(lines)
