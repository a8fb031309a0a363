"""The configuration of a conversion."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from postgen.errors import UserError, is_whole, shown
from postgen.lit.options import (
    AnchorOptions,
    ChunkOptions,
    LitOptions,
    MhlaOptions,
    WindowOptions,
    check_choice,
)
from postgen.lit.pattern import Layers, checked_layers

_OPTIONS: dict[str, Any] = {
    "lit": LitOptions,
    "mhla": MhlaOptions,
    "anchor": AnchorOptions,
    "chunk": ChunkOptions,
    "window": WindowOptions,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LitConfig:
    """The layer type of each block, and the options of the layer types."""

    layers: Layers = "every 2nd:window_delta"
    """One layer type per block in running order, or a text such as `all:window_delta,every 4th:softmax` (see
    `postgen.lit.pattern`). Types: softmax, lit, mhla, anchor, chunk, window_delta, window_linear."""
    first_block: bool = False
    """Whether block 0, the most sensitive one (arXiv:2510.08318), may be converted."""
    inherit: str = "all"
    """all: every weight of the base model stays; output: the projections of queries, keys and values of converted
    blocks are initialised anew (LiT, guideline 4)."""
    grid: tuple[int, int, int] | None = None
    """Frames, rows and columns of the token grid for which layers bound to a grid (`mhla`) are created."""
    seed: int = 0
    """Seed of the random initial weights, at least 0."""
    lit: LitOptions = field(default_factory=LitOptions)
    """Options of `lit` layers."""
    mhla: MhlaOptions = field(default_factory=MhlaOptions)
    """Options of `mhla` layers."""
    anchor: AnchorOptions = field(default_factory=AnchorOptions)
    """Options of `anchor` layers."""
    chunk: ChunkOptions = field(default_factory=ChunkOptions)
    """Options of `chunk` layers."""
    window: WindowOptions = field(default_factory=WindowOptions)
    """Options of `window_delta` and `window_linear` layers."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", checked_layers(self.layers))
        check_choice("first_block", self.first_block, (True, False))
        check_choice("inherit", self.inherit, ("all", "output"))
        if not is_whole(self.seed, 0):
            raise UserError(f"seed must be a whole number of at least 0, got {shown(self.seed)}")
        if self.grid is not None:
            sizes = isinstance(self.grid, tuple | list) and len(self.grid) == 3
            if not sizes or not all(is_whole(size, 1) for size in self.grid):
                raise UserError(
                    f"grid must be three whole numbers of at least 1 (frames, rows, columns), got {shown(self.grid)}"
                )
            object.__setattr__(self, "grid", tuple(self.grid))
        for name, kind in _OPTIONS.items():
            if not isinstance(getattr(self, name), kind):
                raise UserError(f"{name} must be {kind.__name__}, got {shown(getattr(self, name))}")

    def options(self, kind: str) -> Any:
        """Return the options of a layer type."""
        return getattr(self, "window" if kind.startswith("window") else kind)

    def as_json(self) -> dict[str, Any]:
        """Return the configuration as values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LitConfig:
        """Create a configuration from the values that `as_json` returned.

        Raises:
            UserError: an unknown setting, or a wrong value.
        """
        given = dict(values)
        for name, kind in _OPTIONS.items():
            if isinstance(given.get(name), Mapping):
                given[name] = _made(kind, name, given[name])
        made: LitConfig = _made(cls, "LitConfig", given)
        return made


def _made(kind: Any, what: str, values: Mapping[str, Any]) -> Any:
    known = {each.name for each in dataclasses.fields(kind)}
    if unknown := sorted(values.keys() - known):
        raise UserError(f"{what} has no setting {', '.join(unknown)}. Known: {', '.join(sorted(known))}")
    return kind(**values)
