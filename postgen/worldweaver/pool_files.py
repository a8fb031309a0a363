"""Files in `pool_dir`: encoded clips that other processes and later runs reuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from postgen.errors import UserError
from postgen.files import replacing
from postgen.tensor_files import read_tensors
from postgen.training.digests import weights_digest
from postgen.training.run_folder import RunLock

from .model import WorldWeaverModel

_STATISTICS = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")
"""Config entries of an autoencoder on which latents depend, beside its weights."""


def encoder_key(model: WorldWeaverModel, *, bf16: bool) -> list[Any]:
    """Return JSON values that identify the encoder: weights digest, statistics and precision."""
    pipe: Any = getattr(model.denoiser, "pipe", None)
    said = [weights_digest(pipe.vae), *(pipe.vae.config.get(name) for name in _STATISTICS)]
    return [*said, "bfloat16"] if bf16 else said


def lock_of(place: Path) -> RunLock:
    """Return the lock for writing a file, and create the folder of the file.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(place, error) from error
    return RunLock(place.parent, f".{place.stem}.lock", "pool_dir")


def unwritable(place: Path, error: OSError) -> UserError:
    """Return the error for a folder that cannot be written."""
    return UserError(f"pool_dir {place.parent} cannot be written: {error.strerror}. Give another folder")


def read_latents(place: Path) -> Tensor:
    """Read latents that `write_latents` wrote.

    Raises:
        UserError: the file is damaged.
    """
    tensors = read_tensors(place, f"pool_dir: {place} cannot be read")
    if "latents" not in tensors:
        raise UserError(f"pool_dir: {place} has no latents: delete the file")
    return tensors["latents"]


def write_latents(place: Path, latents: Tensor) -> None:
    """Write latents to a file atomically: the file is complete or does not exist."""
    with replacing(place) as part:
        save_file({"latents": latents.cpu().contiguous()}, part)
