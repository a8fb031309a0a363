"""What two runs of `benchmarks.faults_two_gpus` left behind, compared."""

from __future__ import annotations

from pathlib import Path

STEPS = 4
"""Updates of a run."""
GROUPS = ("weights", "ema", "copies")


def largest_difference(run: Path, reference: Path) -> float:
    """Return the largest difference of weights, average and other policies between the last checkpoints of two runs.

    Raises:
        RuntimeError: they hold other tensors, or a number that is none.
    """
    from safetensors.torch import load_file

    worst = 0.0
    for group in GROUPS:
        files = [folder / f"checkpoint-{STEPS}" / f"{group}.safetensors" for folder in (run, reference)]
        if not any(file.exists() for file in files):
            continue  # only DiffusionNFT keeps another policy
        found, expected = (load_file(file) for file in files)
        if found.keys() != expected.keys():
            raise RuntimeError(f"{files[0]} holds other tensors than {files[1]}")
        for name, value in found.items():
            difference = float((value.double() - expected[name].double()).abs().max())
            if difference != difference:
                raise RuntimeError(f"{files[0]}: {name} holds NaN")
            worst = max(worst, difference)
    return worst


def moved(run: Path, model: Path) -> float:
    """Return how far the weights of a run are from those it began with: a comparison says nothing if they stood."""
    from safetensors.torch import load_file

    weights = load_file(run / f"checkpoint-{STEPS}" / "weights.safetensors")
    start = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    return max(float((weights[f"transformer.{name}"] - value).abs().max()) for name, value in start.items())


def check_export(run: Path) -> None:
    """Load what a run exported: it is the average of its last checkpoint.

    Raises:
        RuntimeError: it is something else.
    """
    import torch
    from diffusers import WanTransformer3DModel
    from safetensors.torch import load_file

    model = WanTransformer3DModel.from_pretrained(run / "export" / "transformer")
    average = load_file(run / f"checkpoint-{STEPS}" / "ema.safetensors")
    if wrong := [
        name for name, value in model.named_parameters() if not torch.equal(value, average[f"transformer.{name}"])
    ]:
        raise RuntimeError(f"the export of {run} is not its average: {wrong[:3]}")
