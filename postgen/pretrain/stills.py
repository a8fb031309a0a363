"""Stills of the world with classes: one body on the left or right (48 classes), or one on each side (576 classes).

A class is a sentence that `world.check` can evaluate on the still, repeated as a clip. It determines shape, colour and
side of the bodies. Sizes (medium, large), distance, background and light vary within a class.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from postgen.errors import UserError
from postgen.files import replacing
from postgen.prompt_rows import read_prompts
from postgen.tensor_files import read_tensors
from postgen.training.logging import say
from postgen.training.run_folder import RunLock
from postgen.world import Spec
from postgen.world.plan import Wish, arrange
from postgen.world.processes import spread
from postgen.world.scenes import render_in_batches
from postgen.world.spec import COLOURS, SHAPES

FRAMES = 5
"""Number of frames when a still is repeated as a clip; the minimum of the world's checker."""
_SIZES = ("medium", "large")
SIDES = ("left", "right")
_SPAN = 512
LATENTS, PROMPTS = "latents.safetensors", "prompts.jsonl"
"""Files of a pool: latents (N, 3, H, W), and one row {"prompt": class} per latent."""


@cache
def _classes(bodies: int) -> tuple[tuple[tuple[str, str, str], ...], ...]:
    """Return the bodies of each class as (shape, colour, side)."""
    kinds = [*itertools.product(SHAPES, COLOURS)]
    if bodies == 1:
        return tuple(((*kind, side),) for side in SIDES for kind in kinds)
    return tuple(((*left, SIDES[0]), (*right, SIDES[1])) for left, right in itertools.product(kinds, kinds))


@cache
def labels(bodies: int = 2) -> tuple[str, ...]:
    """Return the sentences of all classes, in the order of the class numbers.

    Args:
        bodies: number of bodies of a still, 1 or 2.

    >>> labels()[1], len(labels())
    ('a red ball stays on the left and an orange ball stays on the right', 576)
    >>> labels(1)[1], len(labels(1))
    ('an orange ball stays on the left', 48)
    """
    return tuple(" and ".join(_sentence(*body) for body in each) for each in _classes(bodies))


def _sentence(shape: str, colour: str, side: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape} stays on the {side}"


def still(number: int, bodies: int = 2) -> Spec:
    """Return the scene of a still, a deterministic function of its number and its number of bodies.

    Its class is the remainder of its number and the number of classes.
    """
    wanted = _classes(bodies)[number % len(_classes(bodies))]
    rng = random.Random(f"postgen-still-{number}")
    while True:
        wishes = [
            Wish(colour=colour, shape=shape, event="stays", size=rng.choice(_SIZES), place=side)
            for shape, colour, side in wanted
        ]
        # Most attempts succeed; two large bodies may not fit.
        if (spec := arrange(wishes, rng, num_frames=FRAMES)) is not None:
            return spec


def draw(numbers: Sequence[int], bodies: int = 2) -> list[Spec]:
    """Return the scenes of the stills with these numbers, drawn by several processes if there are many."""
    spans = [numbers[low : low + _SPAN] for low in range(0, len(numbers), _SPAN)]
    return [spec for part in spread(partial(_drawn, bodies=bodies), spans, "draws stills") for spec in part]


def _drawn(numbers: Sequence[int], bodies: int) -> list[Spec]:
    return [still(number, bodies) for number in numbers]


def render_stills(numbers: Sequence[int], size: int, device: torch.device | str, bodies: int = 2) -> Tensor:
    """Render the stills with these numbers: (N, 3, H, W) in [-1, 1], float16, on the device."""
    specs = [replace(spec, num_frames=1) for spec in draw(numbers, bodies)]
    return torch.cat([(rgb[:, 0] * 2 - 1).half() for rgb, _ in render_in_batches(specs, size, device, mask=False)])


def pool_of(
    folder: Path | None, count: int, size: int, device: torch.device, bodies: int = 2
) -> tuple[Tensor, Tensor]:
    """Return the first stills and their classes, read from a folder; render and write them if they are missing.

    If several processes call this function, one renders and the others wait.

    Args:
        folder: folder of the stills; None does not store them.
        count, size: number of stills, and their height and width in pixels.
        device: device of the rendering and of the result.
        bodies: number of bodies of a still, 1 or 2.

    Raises:
        UserError: the folder has other stills, or cannot be written.
    """
    names = labels(bodies)
    classes = torch.arange(count, device=device) % len(names)
    if folder is None:
        return render_stills(range(count), size, device, bodies), classes
    if not _there(folder):
        _make(folder, count, size, device, bodies)
    place = folder / LATENTS
    kept = read_tensors(place, f"pool_dir: {place} cannot be read").get("latents")
    rows = read_prompts(folder / PROMPTS, "pool_dir:")
    wanted = [names[number % len(names)] for number in range(count)]
    shape = (count, 3, size, size)
    if kept is None or tuple(kept.shape) != shape or [row["prompt"] for row in rows] != wanted:
        raise UserError(
            f"pool_dir: {folder} does not have {count} stills of {size} px with bodies {bodies}: use another folder"
        )
    return kept.to(device), classes


def _there(folder: Path) -> bool:
    return (folder / LATENTS).is_file() and (folder / PROMPTS).is_file()


def _make(folder: Path, count: int, size: int, device: torch.device, bodies: int) -> None:
    """Render the stills of a folder, unless another process has done so in the meantime."""
    lock = RunLock(folder, ".stills.lock", "pool_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.wait(say, "renders the same stills")
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        if not _there(folder):
            _write(folder, render_stills(range(count), size, device, bodies), labels(bodies))
    finally:
        lock.release()


def _write(folder: Path, latents: Tensor, names: Sequence[str]) -> None:
    texts = (json.dumps({"prompt": names[number % len(names)]}) for number in range(len(latents)))
    try:
        with replacing(folder / PROMPTS) as part:
            part.write_text("\n".join(texts) + "\n", encoding="utf-8")
        with replacing(folder / LATENTS) as part:
            save_file({"latents": latents.cpu().contiguous()}, part)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"pool_dir {folder} cannot be written: {error.strerror}. Use another folder")
