"""`postgen convert quant`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from postgen.errors import UserError, first_line, shown
from postgen.files import replacing

if TYPE_CHECKING:
    from postgen.families.loading import ModelFacts
    from postgen.quant import QuantSpec

Source = Annotated[
    str, typer.Argument(help="Folder or Hub id of a video pipeline, or embedded; its transformer is quantised.")
]
Output = Annotated[
    Path,
    typer.Option(
        "-o", "--output", help="New or empty folder for the quantised transformer and the name of its base model."
    ),
]
Weight = Annotated[
    str,
    typer.Option(
        "--weight",
        help="Format of the weights, such as int4:g64, int2:g32:asym, fp8, mxint8, nvfp4 or bp2:g64; none keeps them"
        " exact.",
    ),
]
Act = Annotated[
    str,
    typer.Option(
        "--act", help="Format of the layers' inputs, such as fp8:token or int8:token; none keeps them exact."
    ),
]
Recipe = Annotated[
    str,
    typer.Option(
        "--recipe",
        help="How codes and scales are found. Without data: rtn, ls. With prompts: gptq, bpdq, omniquant, sos,"
        " block_ap, fdda, and NAME+fdda.",
    ),
]
Rotate = Annotated[int, typer.Option("--rotate", help="Channels that a Hadamard rotation mixes, a power of two.")]
Rank = Annotated[int, typer.Option("--rank", help="Rank of an exact low-rank branch of each layer.")]
Override = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        help=r"Other values for some layers: a regular expression for their names, then keys, such as '.*ffn\.net\.2"
        " act=int8:token weight=none' in quotes; can be repeated.",
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option("--prompts", help="File of calibration prompts, as for training; the last one measures errors."),
]
Prompt = Annotated[list[str] | None, typer.Option("--prompt", help="A calibration prompt; can be repeated.")]
Points = Annotated[
    int | None, typer.Option("--points", help="Number of calibration points on the trajectories. \\[default: 64]")
]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Denoising steps of the trajectories. \\[default: the model's]")
]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance-scale", help="Guidance scale of the trajectories. \\[default: the model's]"),
]
Frames = Annotated[
    int | None,
    typer.Option("--frames", help="Frames of the calibration clips. \\[default: the model's, at most 17]"),
]
Height = Annotated[
    int | None, typer.Option("--height", help="Height of the clips in pixels. \\[default: the model's]")
]
Width = Annotated[int | None, typer.Option("--width", help="Width of the clips in pixels. \\[default: the model's]")]
Simulate = Annotated[
    bool,
    typer.Option(
        "--simulate",
        help="Allow inputs in a format that this GPU cannot multiply, so that layers are slower than exact.",
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]


def convert_quant(
    model: Source,
    output: Output,
    weight: Weight = "int4:g64",
    act: Act = "none",
    recipe: Recipe = "rtn",
    rotate: Rotate = 0,
    rank: Rank = 0,
    override: Override = None,
    prompts: Prompts = None,
    prompt: Prompt = None,
    points: Points = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    simulate: Simulate = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Quantise the linear layers of a model. The result loads with from_pretrained after `import postgen`."""
    from postgen.compat import quiet_libraries
    from postgen.families.loading import check_device, inspect_model, load_pipeline
    from postgen.quant.stages import recipe_of

    spec = _spec(weight, act, rotate, rank, override or ())
    of_data = {"--points": points, "--steps": steps, "--guidance-scale": guidance_scale, "--frames": frames,
               "--height": height, "--width": width}  # fmt: skip
    given = [name for name, value in of_data.items() if value is not None]
    rows = _rows(recipe, prompts, prompt or (), given, calibrated=recipe_of(recipe).calibrated)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"{output} already exists: give a new folder with -o")
    config = _calibration_config(points, steps, guidance_scale, frames, height, width) if rows else None
    facts = inspect_model(model, images=True)
    place = check_device(device)
    _check_layers(facts, spec, place, simulate=simulate)
    if rows:
        facts.check_size(frames, height, width)
    with quiet_libraries():
        pipe = load_pipeline(facts, dtype=dtype, device=place)
    _quantized(pipe, spec, recipe, rows, config)
    _write(output, pipe)
    typer.echo(f"{output}: a quantised model for generate, compare and train (student of the method quant)")


def _spec(weight: str, act: str, rotate: int, rank: int, overrides: Sequence[str]) -> QuantSpec:
    """Return the spec that the options describe.

    Raises:
        UserError: a format or value is wrong, or an override is not a pattern with keys.
    """
    from postgen.quant import QuantSpec

    exceptions: dict[str, dict[str, Any]] = {}
    for text in overrides:
        pattern, *words = text.split()
        said = dict(word.partition("=")[::2] for word in words)
        if not words or not all("=" in word for word in words):
            raise UserError(
                f"--override {shown(text)} must be a pattern and then keys with values, such as '.*attn2.* act=none'"
            )
        exceptions[pattern] = {key: _value(key, value) for key, value in said.items()}
    return QuantSpec(
        weight=_value("weight", weight), act=_value("act", act), rotate=rotate, rank=rank, overrides=exceptions
    )


def _value(key: str, text: str) -> Any:
    if key in ("rotate", "rank"):
        return int(text) if text.isdecimal() else text  # the spec refuses other texts
    return None if text == "none" else text


def _rows(
    recipe: str, prompts: Path | None, texts: Sequence[str], of_data: Sequence[str], *, calibrated: bool
) -> list[dict[str, Any]]:
    """Return the calibration prompts: at least two for a recipe that needs data, none for the others.

    Raises:
        UserError: there are too few, or the recipe uses none.
    """
    from postgen.prompt_rows import read_prompts

    named = [name for name, value in (("--prompts", prompts), ("--prompt", texts)) if value]
    if not calibrated:
        if named or of_data:
            raise UserError(
                f"{', '.join((*named, *of_data))} can only be used with a recipe that needs data, but {recipe} needs"
                " none: name another --recipe"
            )
        return []
    if not named:
        raise UserError(
            f"--recipe {recipe} calibrates on prompts, but there are none: give --prompts FILE or --prompt TEXT twice"
            " or more, texts like those that the model will be used with"
        )
    rows = [] if prompts is None else read_prompts(prompts, "--prompts")
    rows += [{"prompt": text} for text in texts]
    if len(rows) < 2:
        raise UserError("calibration needs at least 2 prompts, of which the last one measures errors, but got 1")
    return rows


def _calibration_config(
    points: int | None, steps: int | None, guidance: float | None, frames: int | None, height: int | None,
    width: int | None,
) -> Any:  # fmt: skip
    from postgen.quant.calibration_config import CalibrationConfig

    given = {
        **{"points": points, "num_inference_steps": steps, "guidance_scale": guidance},
        **{"num_frames": frames, "height": height, "width": width},
    }
    return CalibrationConfig(**{name: value for name, value in given.items() if value is not None})


def _check_layers(facts: ModelFacts, spec: QuantSpec, place: str, *, simulate: bool) -> None:
    """Check that the spec fits the layers of the model, and that the GPU computes in its formats.

    Raises:
        UserError: a group does not divide the channels of a layer, the model is quantised already, or a GPU can only
            simulate the inputs.
    """
    import torch

    from postgen.families.empty import empty_transformer, transformer_configs
    from postgen.families.linear import find_linears
    from postgen.quant.layers import layers_of
    from postgen.quant.products import mode_for

    configs = transformer_configs(facts)
    if not configs:
        raise UserError(f"{facts.pipeline} has no transformer to quantise: use a model with a transformer")
    device = torch.device(place)
    for name, config in configs.items():
        if config.get("quantization_config"):
            raise UserError(f"the {name} of this model is quantised or converted already: give the exact model")
        empty = empty_transformer(config)
        linears = find_linears(empty)
        for layer, each in layers_of(empty, spec).items():
            shape = linears[layer].weight.shape
            if device.type != "cuda" or simulate or mode_for(each, (shape[0], shape[1]), device) != "sim":
                continue
            assert each.act is not None
            raise UserError(
                f"{torch.cuda.get_device_name(device)} cannot multiply inputs in {each.act.text} (layer {layer},"
                f" {shape[1]} x {shape[0]}), so it would round them and then multiply in the model's dtype, slower"
                " than exact: use --act fp8:token or int8:token (none keeps inputs exact), or add --simulate"
            )


def _quantized(pipe: Any, spec: QuantSpec, recipe: str, rows: Sequence[dict[str, Any]], config: Any) -> None:
    """Quantise the transformers of a pipeline, and print the reports."""
    from postgen.families.installed import transformers_of
    from postgen.quant.calibration import Calibration
    from postgen.quant.recipes import quantize

    calibration = Calibration(pipe, rows, config) if rows else None
    if calibration is not None:
        calibration.draw(progress=True)  # before one of two experts changes
    for name, transformer in transformers_of(pipe).items():
        report = quantize(transformer, spec, recipe=recipe, calibration=calibration)
        typer.echo(f"{name}: {report}")


def _write(output: Path, pipe: Any) -> None:
    from postgen.families.exports import write_note
    from postgen.families.installed import transformers_of

    try:
        with replacing(output) as part:
            for name, transformer in transformers_of(pipe).items():
                transformer.save_pretrained(part / name)  # type: ignore[operator]
            write_note(part, pipe, [*transformers_of(pipe)])
    except OSError as error:
        raise UserError(f"cannot write {output}: {first_line(error)}") from error
