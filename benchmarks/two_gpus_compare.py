"""Comparison of the checkpoints of two runs of `benchmarks.faults_two_gpus`."""

from __future__ import annotations

from pathlib import Path

STEPS = 4
"""The number of optimizer steps of a run."""
GROUPS = ("weights", "ema", "copies")


def largest_difference(run: Path, reference: Path) -> float:
    """Return the largest difference of weights, EMA and other policies between the last checkpoints of two runs.

    Raises:
        RuntimeError: the checkpoints hold different tensors, or a tensor holds NaN.
    """
    from safetensors.torch import load_file

    worst = 0.0
    for group in GROUPS:
        files = [folder / f"checkpoint-{STEPS}" / f"{group}.safetensors" for folder in (run, reference)]
        if not any(file.exists() for file in files):
            continue  # only DiffusionNFT has a second policy
        found, expected = (load_file(file) for file in files)
        if found.keys() != expected.keys():
            raise RuntimeError(f"{files[0]} and {files[1]} hold different tensors")
        for name, value in found.items():
            difference = float((value.double() - expected[name].double()).abs().max())
            if difference != difference:
                raise RuntimeError(f"{files[0]}: {name} holds NaN")
            worst = max(worst, difference)
    return worst


def moved(run: Path, model: Path) -> float:
    """Return the largest change of a weight in a run; if it is 0, a comparison of two runs shows nothing."""
    from safetensors.torch import load_file

    weights = load_file(run / f"checkpoint-{STEPS}" / "weights.safetensors")
    start = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    return max(float((weights[f"transformer.{name}"] - value).abs().max()) for name, value in start.items())


def check_export(run: Path) -> None:
    """Check that the exported model of a run is the EMA of its last checkpoint.

    Raises:
        RuntimeError: some weights differ; the message names up to three of them.
    """
    import torch
    from diffusers import WanTransformer3DModel
    from safetensors.torch import load_file

    model = WanTransformer3DModel.from_pretrained(run / "export" / "transformer")
    average = load_file(run / f"checkpoint-{STEPS}" / "ema.safetensors")
    if wrong := [
        name for name, value in model.named_parameters() if not torch.equal(value, average[f"transformer.{name}"])
    ]:
        raise RuntimeError(f"the exported model of {run} differs from its EMA: {wrong[:3]}")
