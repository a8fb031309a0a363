"""Hybrid linear attention: convert the self-attention of a trained transformer, block by block (LiT,
arXiv:2501.12976; Video DeltaNet, arXiv:2609.20744; and others).

    report = convert(pipe.transformer, LitConfig(layers="every 2nd:window_delta"))
    save(pipe.transformer, "out")
    transformer = load("out")  # does not need the stock model
    revert(pipe.transformer)

    scores = score(pipe.transformer, lambda: pipe(prompts))
    costs = count(pipe.transformer, num_frames=81, height=480, width=832)  # or measure, in milliseconds
    print(chosen := plan(scores, costs, budget=0.6))
    convert(pipe.transformer, chosen.config(pipe.transformer))

The training modules are imported when `transfer` is first used, so that inference does not wait for them.
"""

from typing import TYPE_CHECKING, Any

from postgen.lit.adapter import apply_adapter, save_adapter
from postgen.lit.config import LitConfig
from postgen.lit.convert import conversion_of, convert, layers_of, revert, set_grid
from postgen.lit.costs import CostTable, count, measure
from postgen.lit.options import AnchorOptions, ChunkOptions, LitOptions, MhlaOptions, WindowOptions
from postgen.lit.plan import Plan, plan
from postgen.lit.report import Report
from postgen.lit.saving import empty, load, save
from postgen.lit.score import Scores, score

if TYPE_CHECKING:
    from postgen.lit.attention_transfer import transfer

__all__ = [
    "AnchorOptions",
    "ChunkOptions",
    "CostTable",
    "LitConfig",
    "LitOptions",
    "MhlaOptions",
    "Plan",
    "Report",
    "Scores",
    "WindowOptions",
    "apply_adapter",
    "conversion_of",
    "convert",
    "count",
    "empty",
    "layers_of",
    "load",
    "measure",
    "plan",
    "revert",
    "save",
    "save_adapter",
    "score",
    "set_grid",
    "transfer",
]


def __getattr__(name: str) -> Any:
    """Import `transfer` on first use."""
    if name != "transfer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from postgen.lit.attention_transfer import transfer

    globals()[name] = transfer
    return transfer
