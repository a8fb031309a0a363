"""`postgen export-lora`."""

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[
    Path, typer.Argument(help="LoRA file with keys of any of the formats, its folder, a peft folder, or a run folder.")
]
Output = Annotated[
    Path,
    typer.Option("-o", "--output", help="Path of the .safetensors file to write; an existing file is overwritten."),
]
Format = Annotated[str, typer.Option("--format", help="comfyui, kohya (sd-scripts, musubi-tuner), or diffusers.")]
Family = Annotated[
    str | None,
    typer.Option(
        "--family",
        help="wan, hunyuan_video, ltx, cogvideox, flux, stable_diffusion_3, stable_diffusion (and XL). "
        "\\[default: detected from the export or from its layers]",
    ),
]


def export_lora(path: Source, output: Output, format: Format, family: Family = None) -> None:
    """Write a LoRA with the keys of ComfyUI, kohya's tools or diffusers. Its effect on the weights stays the same."""
    from postgen.families.lora_export import export_lora as export

    layers = export(path, output, format, family)  # type: ignore[arg-type]
    typer.echo(f"{output}: {len(layers)} layers, {layers[0]} to {layers[-1]}")
