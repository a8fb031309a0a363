"""`postgen merge`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from postgen.errors import SettingError, UserError, shown

AVERAGE, WHOLE, LORA = "Averages", "Full weights", "LoRA files"

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...",
        help="Model folders, networks, .safetensors files, LoRAs, checkpoints, or run folders (their checkpoints).",
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "-o", "--output", help="Folder to write, or a .safetensors file if the sources are single files or LoRAs."
    ),
]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        help="Mean: sma, wma, ema, soup. Decay of the learning rate: linear, cosine, 1-sqrt, curve. Post-hoc EMA:"
        " power, posthoc_ema. Task vectors: add, negate. Two models: slerp. LoRA files: ties, dare_linear, dare_ties,"
        " magnitude_prune.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="Folder of the model that the sources began from, or embedded; for --eta, add, negate, slerp.",
    ),
]
Last = Annotated[
    int | None, typer.Option("--last", help="Use the last N checkpoints of each run. \\[default: all]", min=1)
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="Numbers with commas, one for each source: shares (soup and LoRA methods), or scales (add, negate).",
    ),
]
Eta = Annotated[
    float | None,
    typer.Option("--eta", help="The merge is base + ETA * (average - base). \\[default: 1]", rich_help_panel=AVERAGE),
]
Alpha = Annotated[
    float | None,
    typer.Option("--alpha", help="Weight of each new checkpoint, for ema. \\[default: 0.2]", rich_help_panel=AVERAGE),
]
Curve = Annotated[
    str | None,
    typer.Option(
        "--curve",
        help="Numbers with commas from 1 to 0, for curve: multiplier of the learning rate for each change.",
        rich_help_panel=AVERAGE,
    ),
]
SigmaRel = Annotated[
    float | None,
    typer.Option(
        "--sigma-rel", help="Relative width, for power and posthoc_ema, such as 0.1.", rich_help_panel=AVERAGE
    ),
]
T = Annotated[
    float | None,
    typer.Option(
        "--t", help="From the first source (0) to the second (1), for slerp. \\[default: 0.5]", rich_help_panel=WHOLE
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float32, bfloat16 or float16. \\[default: that of the sources]",
        rich_help_panel=WHOLE,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank", help="Rank of the merged LoRA. \\[default: without loss, with the exact merge]", rich_help_panel=LORA
    ),
]
Density = Annotated[
    float | None,
    typer.Option(
        "--density",
        help="Share of the values that ties, dare_linear, dare_ties and magnitude_prune keep.",
        rich_help_panel=LORA,
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Seed of dare_linear and dare_ties. \\[default: 0]", rich_help_panel=LORA)
]


def merge(
    sources: Sources,
    output: Output,
    method: Method = "sma",
    base: Base = None,
    last: Last = None,
    weights: Weights = None,
    eta: Eta = None,
    alpha: Alpha = None,
    curve: Curve = None,
    sigma_rel: SigmaRel = None,
    t: T = None,
    dtype: Dtype = None,
    rank: Rank = None,
    density: Density = None,
    seed: Seed = None,
) -> None:
    """Merge checkpoints, models or LoRA files into one, with a report."""
    given: dict[str, Any] = {
        "weights": _numbers("weights", weights),
        "curve": _numbers("curve", curve),
        "eta": eta,
        "alpha": alpha,
        "sigma_rel": sigma_rel,
        "t": t,
        "dtype": dtype,
        "rank": rank,
        "density": density,
        "seed": seed,
    }
    try:
        _merge(sources, output.expanduser(), method, base, last, given)
    except SettingError as error:
        # Names of options of other commands are words of `options.option_of`; those of this command are its fields.
        raise UserError(error.worded(f"--{error.setting.replace('_', '-')}")) from error


def _merge(
    sources: list[str], output: Path, method: str, base: str | None, last: int | None, given: dict[str, Any]
) -> None:
    from postgen.commands.progress import steps
    from postgen.merging import MergeConfig
    from postgen.merging import merge as merged

    config = MergeConfig(method=method, **given)
    with ExitStack() as stack:
        bar: list[Callable[[int, int], None]] = []

        def show(done: int, total: int) -> None:
            if not bar:  # the bar appears after the checks, so that their errors are one line
                bar.append(stack.enter_context(steps("merging", "%")))
            bar[0](done, total)

        report = merged(sources, output, config, base=base, last=last, progress=show)
    _tell(report.rows())
    if report.mean_cosine is not None:
        typer.echo(f"mean cosine of successive changes: {report.mean_cosine:.3f}")
    if report.relative_change is not None:
        typer.echo(f"relative change: {report.relative_change:.3g}")
    for network, told in report.lora.items():
        typer.echo(f"{network}: rank {told['rank']}, {100 * told['retained']:.4g} % of the change kept")
    typer.echo(f"{output}: {report.tensors} tensors")


def _tell(rows: list[tuple[str, ...]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(rows[0]):
        table.add_column(title, overflow="fold", justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)


def _numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    """Return the numbers in a text with commas."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--{name} must be numbers with commas, such as 1,0.5, got {shown(text)}") from error
