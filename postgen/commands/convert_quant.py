"""`postgen convert quant`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from postgen.errors import UserError, check_number, first_line, shown
from postgen.files import check_apart, check_place, replacing

if TYPE_CHECKING:
    from postgen.families.loading import ModelFacts
    from postgen.quant import QuantSpec
    from postgen.quant.calibration_config import CalibrationConfig

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
        help="Format of the weights, such as int4:g64 (4 bits, 64 input channels share a scale), int2:g32:asym, fp8,"
        " mxint8, nvfp4 or bp2:g64; none keeps them exact. The group must divide the channels of every layer: use"
        " int4:g32 for the embedded model.",
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
        help="How codes and scales are found. Without data: rtn (round to nearest), ls (least squares). With prompts:"
        " gptq, bpdq, omniquant, sos, block_ap, fdda, and NAME+fdda.",
    ),
]
Rotate = Annotated[
    int, typer.Option("--rotate", help="Channels that a Hadamard rotation mixes, a power of two; 0: none.")
]
Rank = Annotated[int, typer.Option("--rank", help="Rank of an exact low-rank branch of each layer; 0: none.")]
Override = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        help="Other values for some layers: a regular expression that matches their whole names, then keys, such as"
        r" '.*ffn\.net\.2 act=int8:token weight=none' in quotes; can be repeated.",
    ),
]
Modulation = Annotated[
    str,
    typer.Option(
        "--modulation",
        help="Format of the weights of the layers that compute scales and shifts from the timestep, such as int8; none"
        " keeps them exact. They are a quarter of HunyuanVideo, Mochi and FLUX.",
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="File of calibration prompts, as for training, two lines or more; the last one only measures errors.",
    ),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="A calibration prompt; give two or more, the last one only measures errors."),
]
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
TrainSteps = Annotated[
    int | None,
    typer.Option("--train-steps", help="Training steps of each block. \\[default: those of the recipe]"),
]
Run = Annotated[
    Path | None,
    typer.Option(
        "--run",
        help="Folder for the state of the work, with which the same command continues after an interruption. It may"
        " become large.",
    ),
]
Simulate = Annotated[
    bool,
    typer.Option(
        "--simulate",
        help="Allow inputs in a format that this GPU cannot multiply, so that layers are slower than exact.",
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]


_OPTIONS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "num_frames": "--frames",
    "train_steps": "--train-steps",
}
"""Settings whose option has another name."""
_FAST = ("fp8:token", "int8:token")
"""Formats of inputs that some GPU multiplies in 8 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """What to do with the transformers of a pipeline."""

    spec: QuantSpec
    recipe: str
    rows: Sequence[dict[str, Any]]
    """Calibration prompts; empty for recipes without data."""
    points: CalibrationConfig
    steps: int | None
    """Training steps of each block; None: those of the recipe."""
    run: Path | None
    """Folder for the state of the work; None keeps nothing."""

    def quantized(self, pipe: Any) -> Iterator[str]:
        """Quantise the transformers one after the other, and yield the reports."""
        from postgen.families.installed import transformers_of
        from postgen.quant.calibration import Calibration
        from postgen.quant.recipes import quantize

        calibration = Calibration(pipe, self.rows, self.points) if self.rows else None
        transformers = transformers_of(pipe)
        if calibration is not None and len(transformers) > 1:
            calibration.draw(progress=True)  # before the first of two experts changes
        for name, transformer in transformers.items():
            work: dict[str, Any] = {}
            if self.run is not None:
                work = {"output_dir": self.run / name, "resume": True, "where": self.run / name / "records"}
            report = quantize(
                transformer, self.spec, recipe=self.recipe, calibration=calibration, steps=self.steps, **work
            )
            yield f"{name}: {report}"


def convert_quant(
    model: Source,
    output: Output,
    weight: Weight = "int4:g64",
    act: Act = "none",
    recipe: Recipe = "rtn",
    rotate: Rotate = 0,
    rank: Rank = 0,
    override: Override = None,
    modulation: Modulation = "none",
    prompts: Prompts = None,
    prompt: Prompt = None,
    points: Points = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    train_steps: TrainSteps = None,
    run: Run = None,
    simulate: Simulate = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Quantise the linear layers of a model. The result loads with from_pretrained after `import postgen`."""
    from postgen.compat import quiet_libraries
    from postgen.families.loading import check_device, inspect_model, load_pipeline

    spec = _spec(override or (), weight=weight, act=act, modulation=modulation, rotate=rotate, rank=rank)
    given = {
        **{"points": points, "num_inference_steps": steps, "guidance_scale": guidance_scale},
        **{"num_frames": frames, "height": height, "width": width, "train_steps": train_steps, "run": run},
    }
    job = _job(spec, recipe, prompts, prompt or (), {key: value for key, value in given.items() if value is not None})
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"{output} already exists: give a new folder with -o")
    if run is not None:
        check_place(run, folder=True)
        check_apart([output], [run])  # the complete output replaces its folder
    facts = inspect_model(model, images=True)
    place = check_device(device)
    if job.rows:
        facts.check_size(frames, height, width)
    _check_layers(facts, job, place, simulate=simulate)
    with quiet_libraries():
        pipe = load_pipeline(facts, dtype=dtype, device=place)
    for line in job.quantized(pipe):
        typer.echo(line)
    _write(output, pipe)
    typer.echo(f"{output}: a quantised model for generate and compare, and as student for the training method quant")


def _spec(overrides: Sequence[str], **options: Any) -> QuantSpec:
    """Return the spec that the options describe, each named like its field.

    Raises:
        UserError: a format or value is wrong, or an override is not a pattern with keys.
    """
    from postgen.quant import QuantSpec

    exceptions: dict[str, dict[str, Any]] = {}
    for text in overrides:
        pattern, *words = text.split() or [""]
        said = dict(word.partition("=")[::2] for word in words)
        if not words or not all("=" in word for word in words):
            raise UserError(
                f"--override {shown(text)} must be a pattern and then keys with values, such as '.*attn2.* act=none'"
            )
        if pattern in exceptions or len(said) < len(words):
            raise UserError(f"--override {shown(text)}: a pattern or a key is given twice, give each of them once")
        exceptions[pattern] = {key: _value(key, value) for key, value in said.items()}
    values: dict[str, Any] = {key: None if value == "none" else value for key, value in options.items()}
    return QuantSpec(overrides=exceptions, **values)


def _value(key: str, text: str) -> Any:
    if key in ("rotate", "rank"):
        return int(text) if text.isdecimal() else text  # the spec refuses other texts
    return None if text == "none" else text


def _job(spec: QuantSpec, recipe: str, prompts: Path | None, texts: Sequence[str], given: Mapping[str, Any]) -> _Job:
    """Return the job that the options describe.

    Args:
        spec: what to quantise.
        recipe: name of the recipe.
        prompts: file of calibration prompts.
        texts: calibration prompts.
        given: the given settings of calibration and training.

    Raises:
        UserError: the recipe is unknown, has no prompts, or does not use a setting.
    """
    from postgen.quant.calibration_config import CalibrationConfig
    from postgen.quant.stages import recipe_of

    chosen = recipe_of(recipe)
    unused = [_OPTIONS.get(name, f"--{name}") for name in given]
    rows = _rows(recipe, prompts, texts, unused, calibrated=chosen.calibrated)
    points = dict(given)
    steps, run = points.pop("train_steps", None), points.pop("run", None)
    if steps is not None:
        check_number("train-steps", steps, 1, whole=True)
        if not any(stage.trains for stage in chosen.stages):
            raise UserError(f"--train-steps can only be used with a recipe that trains, but {recipe} does not train")
    return _Job(spec=spec, recipe=recipe, rows=rows, points=CalibrationConfig(**points), steps=steps, run=run)


def _rows(
    recipe: str, prompts: Path | None, texts: Sequence[str], unused: Sequence[str], *, calibrated: bool
) -> list[dict[str, Any]]:
    """Return the calibration prompts: at least two for a recipe that needs data, none for the others.

    Raises:
        UserError: there are too few, or the recipe uses none.
    """
    from postgen.prompt_rows import read_prompts

    named = [name for name, value in (("--prompts", prompts), ("--prompt", texts)) if value]
    if not calibrated:
        if named or unused:
            raise UserError(
                f"{', '.join((*named, *unused))} can only be used with a recipe that needs data, but {recipe} needs"
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


def _check_layers(facts: ModelFacts, job: _Job, place: str, *, simulate: bool) -> None:
    """Check that spec and recipe fit the layers of the model, and that the GPU computes in the formats.

    Raises:
        UserError: a group does not divide the channels of a layer, the recipe cannot use a format, the model is
            quantised already, or a GPU can only simulate the inputs.
    """
    import torch

    from postgen.families.empty import empty_transformer, transformer_configs
    from postgen.families.linear import find_linears
    from postgen.quant.formats import format_of
    from postgen.quant.layers import layers_of, modulation_of
    from postgen.quant.products import mode_for
    from postgen.quant.recipes import check_recipe
    from postgen.quant.stages import recipe_of

    configs = transformer_configs(facts)
    if not configs:
        raise UserError(f"{facts.pipeline} has no transformer to quantise: use a model with a transformer")
    device = torch.device(place)
    for name, config in configs.items():
        if config.get("quantization_config"):
            raise UserError(f"the {name} of this model is quantised or converted already: give the exact model")
        empty = empty_transformer(config)
        linears = find_linears(empty)
        layers = layers_of(empty, job.spec)
        modulation_of(empty, job.spec)
        check_recipe(recipe_of(job.recipe), layers, named=job.recipe)
        for layer, each in layers.items():
            shape = linears[layer].out_features, linears[layer].in_features
            if device.type != "cuda" or simulate or mode_for(each, shape, device) != "sim":
                continue
            assert each.act is not None
            others = [text for text in _FAST if mode_for(replace(each, act=format_of(text)), shape, device) != "sim"]
            raise UserError(
                f"{torch.cuda.get_device_name(device)} cannot multiply inputs in {each.act.text} (layer {layer},"
                f" {shape[1]} x {shape[0]}), so it would round them and then multiply in the model's dtype, slower"
                f" than exact: use --act {' or '.join([*others, 'none'])}, or add --simulate"
            )


def _write(output: Path, pipe: Any) -> None:
    from safetensors import SafetensorError

    from postgen.families.exports import write_note
    from postgen.families.installed import transformers_of

    try:
        with replacing(output) as part:
            for name, transformer in transformers_of(pipe).items():
                transformer.save_pretrained(part / name)  # type: ignore[operator]
            write_note(part, pipe, [*transformers_of(pipe)])
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {output}: {first_line(error)}") from error
