"""The files of `benchmarks.quant` that come back from another machine, and models restored from them.

Of a quantised model, only the tensors that differ from those of the exact model come back (`OWN`, 2 to 4 MB of 11).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.quant_arms import BEGINS, MODEL_FILES, Arm, Place
from postgen.files import replacing
from postgen.tensor_files import read_tensors

OWN = "own.safetensors"
"""File in the folder of a quantised model with its own tensors."""
_NOTE, _CONFIG, _WHOLE = MODEL_FILES


def write_own(model: Path, exact: Path) -> None:
    """Write the tensors of a quantised model that differ from those of the exact one, beside the whole model.

    Args:
        model: folder of the quantised model.
        exact: file with the weights of the exact transformer, which is loaded in float32.
    """
    ours, theirs = read_tensors(model / _WHOLE), read_tensors(exact)
    same = {name for name, value in theirs.items() if name in ours and _equal(ours[name], value.float())}
    own = {name: value for name, value in ours.items() if name not in same}
    with replacing(model / OWN) as part:
        save_file(own, part)


def restore(out: Path, exact: Path) -> None:
    """Make whole models from their own tensors, where a folder has nothing else.

    Args:
        out: folder of the experiment.
        exact: as for `write_own`.
    """
    for path in sorted(out.glob(f"models/*/{OWN}")):
        model = path.parent
        if (model / _WHOLE).is_file() or not all((model / name).is_file() for name in (_NOTE, _CONFIG)):
            continue
        own, theirs = read_tensors(path), read_tensors(exact)
        # A quantised layer has all tensors of its linear layer, so the names of the exact model are those of ours.
        whole = {name: value.float() for name, value in theirs.items()} | own
        with replacing(model / _WHOLE) as part:
            save_file(whole, part, metadata={"format": "pt"})


def weights_of(model: Path) -> Path:
    """Return the file with the weights of the transformer of a pipeline's folder."""
    return model / _WHOLE


def kept_files(place: Place) -> Iterator[Path | Sequence[Path]]:
    """Yield the files of the experiment to bring back, the most important ones first.

    Files in a sequence are of no use without each other: those of a model that is needed again, and those of a
    training that was interrupted.
    """
    for pattern in ("rows/*.json", "prompts.jsonl", "logs/*.log", "sheets/*.webp", "law/*.json", "law/logs/*.log"):
        yield from sorted(place.out.glob(pattern))
    for path in sorted(place.out.glob(f"models/*/{OWN}")):
        arm = Arm.named(path.parent.name)
        if BEGINS.get(arm.format) == arm.recipe or not place.row(arm.name).is_file():
            yield [path.parent / _NOTE, path.parent / _CONFIG, path]
    for folder in sorted(place.out.glob("work/*")):
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_kept(path)]
        if files:
            yield files


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _is_kept(path: Path) -> bool:
    """Whether a file of a training is not a lock, an incomplete file, or latents, which are sampled again."""
    return "latents" not in path.parts and not path.name.endswith(".lock") and ".part" not in str(path)
