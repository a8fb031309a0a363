"""`postgen convert lit`."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from postgen.errors import UserError, check_number, first_line
from postgen.files import replacing

Source = Annotated[
    str, typer.Argument(help="Folder or Hub id of a video pipeline, or embedded; its transformer is converted.")
]
Output = Annotated[
    Path,
    typer.Option(
        "-o", "--output", help="New or empty folder for the converted transformer and the name of its base model."
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        help="Layer type of each block, counted from 0, such as 'every 2nd:window_delta,1:lit' in quotes. Types: lit,"
        " mhla, anchor, chunk, window_delta, window_linear. All other blocks keep softmax.",
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget",
        help="Instead of --layers: share of the cost of a denoising step that may remain, such as 0.9. Scores and"
        " costs determine the layers. With short or small clips little or nothing can be saved.",
    ),
]
Kinds = Annotated[
    str | None,
    typer.Option(
        "--kinds",
        help="With --budget: layer types to choose from besides softmax, separated by commas, as in --layers; lit"
        " needs long training."
        " \\[default: window_delta]",
    ),
]
Measured = Annotated[
    bool, typer.Option("--measure", help="With --budget: measure times on this device as costs, instead of FLOPs.")
]
First = Annotated[
    bool, typer.Option("--first-block", help="Allow the conversion of block 0, the most sensitive block.")
]
Inherit = Annotated[
    str,
    typer.Option(
        "--inherit",
        help="all: keep the weights of the base model; output: reinitialise the projections of queries, keys and"
        " values.",
    ),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        help="With --budget: prompt for the scores of the blocks; can be repeated. \\[default: the model's examples]",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", help="With --budget: denoising steps for each prompt. \\[default: 4]"),
]
Frames = Annotated[
    int | None,
    typer.Option("--frames", help="Number of frames of the clip for scores and costs. \\[default: the model's]"),
]
Height = Annotated[int | None, typer.Option("--height", help="Height of the clip in pixels. \\[default: the model's]")]
Width = Annotated[int | None, typer.Option("--width", help="Width of the clip in pixels. \\[default: the model's]")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]

STEPS = 4
PROMPTS = ("a red ball rolls over the grass", "a blue cube spins on a table")


def convert_lit(
    model: Source,
    output: Output,
    layers: Layers = None,
    budget: Budget = None,
    kinds: Kinds = None,
    measure: Measured = False,
    first_block: First = False,
    inherit: Inherit = "all",
    prompt: Prompt = None,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Convert attention layers of some blocks to hybrid linear attention. The new layers are not trained."""
    from postgen.compat import quiet_libraries
    from postgen.families.installed import transformers_of
    from postgen.generate import load, prepare
    from postgen.lit import LitConfig
    from postgen.request import GenerateConfig

    of_budget = {"--kinds": kinds, "--measure": measure or None, "--prompt": prompt, "--steps": steps}
    _check(layers, budget, output, [name for name, given in of_budget.items() if given is not None])
    config = GenerateConfig(
        model=model, prompt=(prompt or PROMPTS)[0], num_frames=frames, height=height, width=width, dtype=dtype,
        num_inference_steps=STEPS if steps is None else steps, device=device,
    )  # fmt: skip
    settings = LitConfig(layers="all:softmax" if layers is None else layers, first_block=first_block, inherit=inherit)
    names = None if kinds is None else _layer_types(kinds)
    job = prepare(config)
    if job.facts.transformer is None:
        raise UserError(f"{job.facts.pipeline} has no transformer to convert: use a model with a transformer")
    with quiet_libraries():
        pipe = load(job)
    transformers = transformers_of(pipe).values()
    chosen = [settings for _ in transformers]
    if budget is not None:
        texts = prompt or job.facts.closed_vocabulary or PROMPTS
        # All plans come first: with an untrained first expert, the second expert would be scored on wrong latents.
        chosen = [_planned(pipe, each, job, texts, settings, budget, names, measured=measure) for each in transformers]
    for transformer, of_transformer in zip(transformers, chosen, strict=True):
        typer.echo(_converted(transformer, job, of_transformer))
    _write(output, pipe)
    typer.echo(f"{output}: a model for generate, compare and train; its new layers are not trained yet (docs/lit.md)")


def _write(output: Path, pipe: Any) -> None:
    from postgen.families.exports import write_note
    from postgen.families.installed import transformers_of
    from postgen.lit import save

    try:
        with replacing(output) as part:
            for name, transformer in transformers_of(pipe).items():
                save(transformer, part / name)
            write_note(part, pipe, [*transformers_of(pipe)])
    except UserError as error:  # its message names the temporary folder
        raise UserError(f"cannot write {output}: {first_line(error.__cause__ or error)}") from error


def _layer_types(text: str) -> tuple[str, ...]:
    from postgen.lit.score import check_kinds

    names = tuple(kind.strip() for kind in text.split(","))
    check_kinds(names)
    return names


def _check(layers: str | None, budget: float | None, output: Path, of_budget: Sequence[str]) -> None:
    if layers is not None and budget is not None:
        raise UserError("--layers and --budget exclude each other: give one of them, not both")
    if layers is None and budget is None:
        raise UserError("give either --layers (layer types of blocks) or --budget (share of the cost that may remain)")
    if budget is None and of_budget:
        raise UserError(f"{', '.join(of_budget)} can only be used with --budget: give --budget instead of --layers")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"{output} already exists: give a new folder with -o")
    if budget is not None:
        check_number("budget", budget, 1e-6, 1)


def _converted(transformer: Any, job: Any, settings: Any) -> Any:
    """Convert a transformer. Layers that need a fixed token grid get the grid of the clip."""
    from postgen.lit import convert
    from postgen.lit.clips import grid_of_clip
    from postgen.lit.convert import stock_transformer

    stock_transformer(transformer, "convert")
    grid = grid_of_clip(transformer, *_shape(job))
    if grid is not None:
        settings = dataclasses.replace(settings, grid=(grid.frames, grid.height, grid.width))
    return convert(transformer, settings)


def _planned(
    pipe: Any,
    transformer: Any,
    job: Any,
    prompts: Sequence[str],
    settings: Any,
    budget: float,
    kinds: Sequence[str] | None,
    *,
    measured: bool,
) -> Any:
    """Choose the layers by their costs and their scores on the prompts, and print the plan."""
    from postgen.commands.progress import steps, waiting
    from postgen.generate import run
    from postgen.lit import count, measure, plan, score
    from postgen.lit.plan import check_budget

    frames, height, width = _shape(job)
    of_size: dict[str, Any] = {"num_frames": frames, "height": height, "width": width, "config": settings}
    with waiting("Measuring" if measured else "Counting"):
        costs = (measure if measured else count)(transformer, **of_size, kinds=kinds)
    kinds = tuple(costs.changes)
    check_budget(costs, budget, kinds, first_block=settings.first_block)  # before the slow scores

    def sample() -> None:
        with steps("Scoring") as on_step:
            for place, text in enumerate(prompts):
                told = functools.partial(_told, on_step, place, len(prompts))
                run(pipe, job.again(prompt=text, seed=place), told)

    scores = score(transformer, sample, kinds=kinds, config=settings)
    chosen = plan(scores, costs, budget, first_block=settings.first_block)
    typer.echo(chosen)
    return chosen.config(transformer, settings, shape=(frames, height, width))


def _told(on_step: Any, place: int, prompts: int, done: int, total: int) -> None:
    """Report the progress of one prompt as progress over all prompts."""
    on_step(place * total + done, prompts * total)


def _shape(job: Any) -> tuple[int, int, int]:
    """Return frames, height and width of the clip.

    Raises:
        UserError: neither the options nor the model define them.
    """
    config = job.config
    shape = config.num_frames, config.height, config.width
    if None in shape:
        raise UserError("the model has no default size of a clip: give --frames, --height and --width")
    return shape
