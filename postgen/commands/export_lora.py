"""`postgen export-lora`."""

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[
    Path, typer.Argument(help="LoRA file under any of the keys, its folder, a peft folder, or the folder of a run.")
]
Output = Annotated[Path, typer.Option("-o", "--output", help="The .safetensors file to write.")]
Format = Annotated[str, typer.Option("--format", help="comfyui, kohya (sd-scripts, musubi-tuner), or diffusers.")]
Family = Annotated[
    str | None,
    typer.Option(
        "--family",
        help="wan, hunyuan_video, ltx, cogvideox, flux, stable_diffusion_3, stable_diffusion (and XL). "
        "\\[default: what the export or its layers say]",
    ),
]


def export_lora(path: Source, output: Output, format: Format, family: Family = None) -> None:
    """Write a LoRA under the keys of ComfyUI, kohya's tools or diffusers; the changed weights stay the same."""
    from postgen.families.lora_export import export_lora as export

    layers = export(path, output, format, family)  # type: ignore[arg-type]
    typer.echo(f"{output}: {len(layers)} layers, {layers[0]} to {layers[-1]}")
