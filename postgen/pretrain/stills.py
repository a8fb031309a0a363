"""Stills of the world with 576 classes: the body on the left and the body on the right.

A class is a sentence that `world.check` can evaluate on the still, repeated as a clip. Shape, colour and side of both
bodies are determined by the class. Sizes (medium, large), distance, background and light vary within a class.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
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
_SPAN = 512
LATENTS, PROMPTS = "latents.safetensors", "prompts.jsonl"
"""Files of a pool: latents (N, 3, H, W), and one row {"prompt": class} per latent."""


@cache
def labels() -> tuple[str, ...]:
    """Return the sentences of all classes, in the order of the class numbers.

    >>> labels()[1], len(labels())
    ('a red ball stays on the left and an orange ball stays on the right', 576)
    """
    bodies = [*itertools.product(SHAPES, COLOURS)]
    return tuple(
        f"{_body(*left)} stays on the left and {_body(*right)} stays on the right"
        for left, right in itertools.product(bodies, bodies)
    )


def _body(shape: str, colour: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def still(number: int) -> Spec:
    """Return the scene of a still, a deterministic function of its number; its class is number % 576."""
    bodies = [*itertools.product(SHAPES, COLOURS)]
    left, right = divmod(number % len(labels()), len(bodies))
    rng = random.Random(f"postgen-still-{number}")
    while True:
        wishes = [
            Wish(colour=colour, shape=shape, event="stays", size=rng.choice(_SIZES), place=place)
            for (shape, colour), place in ((bodies[left], "left"), (bodies[right], "right"))
        ]
        # Most attempts succeed; two large bodies may not fit.
        if (spec := arrange(wishes, rng, num_frames=FRAMES)) is not None:
            return spec


def draw(numbers: Sequence[int]) -> list[Spec]:
    """Return the scenes of the stills with these numbers, drawn by several processes if there are many."""
    spans = [numbers[low : low + _SPAN] for low in range(0, len(numbers), _SPAN)]
    return [spec for part in spread(_drawn, spans, "draws stills") for spec in part]


def _drawn(numbers: Sequence[int]) -> list[Spec]:
    return [still(number) for number in numbers]


def render_stills(numbers: Sequence[int], size: int, device: torch.device | str) -> Tensor:
    """Render the stills with these numbers: (N, 3, H, W) in [-1, 1], float16, on the device."""
    specs = [replace(spec, num_frames=1) for spec in draw(numbers)]
    return torch.cat([(rgb[:, 0] * 2 - 1).half() for rgb, _ in render_in_batches(specs, size, device, mask=False)])


def pool_of(folder: Path | None, count: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first stills and their classes, read from a folder; render and write them if they are missing.

    If several processes call this function, one renders and the others wait.

    Args:
        folder: folder of the stills; None does not store them.
        count, size: number of stills, and their height and width in pixels.
        device: device of the rendering and of the result.

    Raises:
        UserError: the folder has other stills, or cannot be written.
    """
    classes = torch.arange(count, device=device) % len(labels())
    if folder is None:
        return render_stills(range(count), size, device), classes
    if not _there(folder):
        _make(folder, count, size, device)
    place = folder / LATENTS
    kept = read_tensors(place, f"pool_dir: {place} cannot be read").get("latents")
    rows = read_prompts(folder / PROMPTS, "pool_dir:")
    wanted = [labels()[number % len(labels())] for number in range(count)]
    shape = (count, 3, size, size)
    if kept is None or tuple(kept.shape) != shape or [row["prompt"] for row in rows] != wanted:
        raise UserError(f"pool_dir: {folder} does not have {count} stills of {size} px: use another folder")
    return kept.to(device), classes


def _there(folder: Path) -> bool:
    return (folder / LATENTS).is_file() and (folder / PROMPTS).is_file()


def _make(folder: Path, count: int, size: int, device: torch.device) -> None:
    """Render the stills of a folder, unless another process has done so in the meantime."""
    lock = RunLock(folder, ".stills.lock", "pool_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.wait(say, "renders the same stills")
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        if not _there(folder):
            _write(folder, render_stills(range(count), size, device))
    finally:
        lock.release()


def _write(folder: Path, latents: Tensor) -> None:
    texts = (json.dumps({"prompt": labels()[number % len(labels())]}) for number in range(len(latents)))
    try:
        with replacing(folder / PROMPTS) as part:
            part.write_text("\n".join(texts) + "\n", encoding="utf-8")
        with replacing(folder / LATENTS) as part:
            save_file({"latents": latents.cpu().contiguous()}, part)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"pool_dir {folder} cannot be written: {error.strerror}. Use another folder")
