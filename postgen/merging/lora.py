"""Merging of LoRA files: the exact weighted sum of the changes of the weights, and TIES and DARE.

The factors are never averaged: the mean of the factors is not the mean of the changes, and peft's
`add_weighted_adapter` with `linear` sums sqrt(w) A and sqrt(w) B separately, so that N equal LoRAs with weights 1/N
become N times too strong. `postgen.families.lora_sums` has the algebra.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families.lora_export import find_lora, layers_of
from postgen.families.lora_file import LoraFile, open_lora
from postgen.families.lora_found import families_like
from postgen.families.lora_layers import Layer, adapter_settings, adapter_state, shortened
from postgen.families.lora_sums import LowRank, low_rank_of, low_rank_sum, matrices, padded, shaped

from .lora_checks import Layers, check_alike, check_arguments
from .lora_report import Energies, LoraMergeReport, retained_of

Pairs = Sequence[tuple[Tensor, Tensor]]
"""up (out, r) and down (r, in) of one layer in each file."""
Merger = Callable[[Pairs], LowRank]
Track = Callable[[Iterable[tuple[str, str]]], Iterable[tuple[str, str]]]
DENSITY = 0.5
"""Default share of the values that TIES, DARE and magnitude pruning keep."""

_UNET_FAMILY = "stable_diffusion"
"""The family whose network is a UNet."""


def _exact(pairs: Pairs, weights: Sequence[float], density: float) -> LowRank:
    return low_rank_sum(pairs, weights)


def _of_peft(name: str, disjoint: bool) -> Callable[[Pairs, Sequence[float], float], LowRank]:
    """Return a method of peft, applied to the changes of the weights and not to the factors.

    Args:
        name: name of the function in `peft.utils.merge_utils`.
        disjoint: whether the function divides each value by the number of files that contribute to it. The weights are
            then multiplied by the number of files, so that a sum of 1 means the strength of one file.
    """

    def merge(pairs: Pairs, weights: Sequence[float], density: float) -> LowRank:
        from peft.utils import merge_utils

        changes = [(up @ down).float() for up, down in pairs]
        factors = torch.tensor([weight * (len(pairs) if disjoint else 1) for weight in weights])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The density")  # a density of 1, which keeps everything
            return low_rank_of(getattr(merge_utils, name)(changes, factors, density))

    return merge


MERGERS: Mapping[str, Callable[..., LowRank]] = {
    "exact": _exact,
    "ties": _of_peft("ties", disjoint=True),
    "dare_linear": _of_peft("dare_linear", disjoint=False),
    "dare_ties": _of_peft("dare_ties", disjoint=True),
    "magnitude_prune": _of_peft("magnitude_prune", disjoint=False),
}
"""Methods for LoRA files: (up and down of one layer in each file, weights=, density=) -> the merged change."""


def merge_loras(
    files: Sequence[Path],
    weights: Sequence[float],
    *,
    rank: int | None = None,
    method: str = "exact",
    density: float = DENSITY,
    seed: int = 0,
    track: Track = iter,
) -> tuple[dict[str, Tensor], LoraMergeReport]:
    """Return the weighted sum of LoRA files as one LoRA with the keys of diffusers.

    A single file with weight 1 keeps its values bit by bit. Any other result is float32 with scale 1. Write it with
    `write_lora`, because the metadata in the report belong to the file.

    Args:
        files: LoRA files or folders with one, in any format that postgen reads, for the same layers of one model.
        weights: factor of each file's change of the weights, of any sign and sum. One file and a weight scale it.
        rank: largest rank of the result, which is then the best approximation of this rank. None keeps everything with
            `exact`, up to the sum of the ranks, and the rank of the files with other methods. Needed if ranks differ.
        method: `exact`, the weighted sum of the changes of the weights; or a method of peft on these changes: `ties`
            (arXiv:2306.01708), `dare_linear`, `dare_ties` (arXiv:2311.03099), `magnitude_prune`. If the weights have
            the sum 1, a merge of equal files is as strong as one file.
        density: share of the values that the methods of peft keep, above 0 and at most 1.
        seed: seed of the random choice of DARE.
        track: wraps the iteration over the layers, for instance in a progress bar.

    Returns:
        The tensors by key, and the report.

    Raises:
        UserError: a file cannot be read; the files are for other models, layers or shapes, or have different ranks
            while `rank` is None; DoRA files are to be summed or scaled; or an argument is wrong.
    """
    check_arguments(len(files), weights, rank, method, density, MERGERS)
    opened = [open_lora(find_lora(Path(file).expanduser())) for file in files]
    sources = [_layers_in(file) for file in opened]
    check_alike(opened, sources, rank)
    ranks = [max(layer.rank for layer in own.values()) for own in sources]
    merged: Layers
    energies: Energies
    if method == "exact" and list(weights) == [1] and (rank is None or rank >= ranks[0]):
        merged, energies = sources[0], {".".join(name): (1.0, 1.0) for name in sources[0]}
    else:
        _check_plain(opened, sources)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            kept = rank if rank is not None else None if method == "exact" else max(ranks)
            merge = partial(MERGERS[method], weights=weights, density=density)
            merged, energies = _merged(sources, weights, merge, kept, track)
    tensors, metadata = _as_diffusers(merged)
    retained, weakest = retained_of(energies)
    return tensors, LoraMergeReport(
        method=method,
        files=tuple(str(file.path) for file in opened),
        digests=tuple(hashlib.sha256(file.path.read_bytes()).hexdigest() for file in opened),
        weights=tuple(float(weight) for weight in weights),
        ranks=tuple(ranks),
        rank=max(layer.rank for layer in merged.values()),
        layers=len(merged),
        retained=retained,
        weakest=weakest,
        metadata=metadata,
        note=opened[0].note,
    )


def _layers_in(file: LoraFile) -> Layers:
    """Return the changes of a file by component and layer."""
    flat = any(key.startswith("lora_unet_") for key in file.tensors)
    unet = any(key.startswith("unet.") for key in file.tensors) or (flat and families_like(file) == [_UNET_FAMILY])
    found: dict[tuple[str, str], Layer] = {}
    for component, part in file.parts("unet" if unet else "transformer").items():
        if part.tensors:
            found |= {(component, name): layer for name, layer in layers_of(part).items()}
    return found


def _check_plain(files: Sequence[LoraFile], sources: Sequence[Layers]) -> None:
    for file, own in zip(files, sources, strict=True):
        if having := [name for (_, name), layer in own.items() if layer.magnitude is not None]:
            raise UserError(
                f"{file.path} has DoRA magnitudes ({shortened(having)}), whose effect depends on the weights of the"
                " base model, so it can be neither summed nor scaled: fuse it into the base model and merge the models"
            )


def _merged(
    sources: Sequence[Layers], weights: Sequence[float], merge: Merger, kept: int | None, track: Track
) -> tuple[Layers, Energies]:
    """Return the layers of the result, and what they hold of the sums.

    Args:
        sources: the layers of each file.
        weights: weight of each file.
        merge: merges one layer.
        kept: rank of the result; None keeps everything.
        track: wraps the iteration.
    """
    merged: dict[tuple[str, str], Layer] = {}
    widths: dict[tuple[str, str], int] = {}
    energies: dict[str, tuple[float, float]] = {}
    for name in track(sorted(sources[0])):
        low = merge([matrices(own[name], name[1]) for own in sources])
        rank = low.rank if kept is None else kept
        merged[name] = replace(
            shaped(low, rank, sources[0][name]), bias=_bias([own[name] for own in sources], weights)
        )
        widths[name], energies[".".join(name)] = len(low.sigma), low.energy(rank)
    # One rank for all layers that are wide enough: without metadata, programs take the scale of the most common rank.
    most = max(layer.rank for layer in merged.values())
    return {name: padded(layer, min(most, widths[name])) for name, layer in merged.items()}, energies


def _bias(layers: Sequence[Layer], weights: Sequence[float]) -> Tensor | None:
    biases = [layer.bias.double() for layer in layers if layer.bias is not None]
    if not biases:
        return None
    return torch.stack([weight * bias for weight, bias in zip(weights, biases, strict=True)]).sum(0).float()


def _as_diffusers(merged: Layers) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file, in the form that diffusers writes."""
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component in dict.fromkeys(component for component, _ in merged):
        own = {name: layer for (part, name), layer in merged.items() if part == component}
        tensors |= {f"{component}.{key}": value for key, value in adapter_state(own).items()}
        settings |= {f"{component}.{key}": value for key, value in adapter_settings(own).items()}
    return tensors, {"lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True)}
