"""The report of a conversion, block by block."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One self-attention module."""

    block: int
    """Index of its block, in running order."""
    module: str
    """Name of the module in the transformer."""
    kind: str
    """Layer type."""
    new: int
    """Number of parameters of the new layer, without those of the base model."""
    inherited: tuple[str, ...]
    """Weights of the base model that the module keeps."""
    fresh: tuple[str, ...] = ()
    """Weights of the base model that are initialised anew."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The report of one conversion. `print` shows a table."""

    transformer: str
    """Class name of the transformer."""
    types: tuple[str, ...]
    """Layer type of each block."""
    rows: tuple[Row, ...]
    """Every self-attention module, in running order."""
    base_parameters: int
    """Number of parameters of the whole transformer before the conversion."""

    @property
    def new_parameters(self) -> int:
        """Number of parameters that the conversion added."""
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
