"""Many scenes with captions, and their renders: training data for models and judges of the world."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .plan import eligible_events, sample
from .processes import spread
from .render import render
from .spec import PAIR_EVENTS, Spec, Split
from .wording import captions as worded

#: First seed of the training scenes; evaluation uses smaller seeds.
FIRST_TRAINING_SEED = 1_000_000
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Scene:
    """A scene and its captions, the plainest first."""

    spec: Spec
    captions: tuple[str, ...]


def draw_scenes(
    first_seed: int,
    count: int,
    num_frames: int,
    *,
    captions: int = 0,
    split: Split = "train",
    bodies: tuple[float, ...] | None = None,
    pair_share: float = 0.0,
    synonym_share: float = 0.0,
    unknown_share: float = 0.0,
) -> list[Scene]:
    """Draw the scenes of consecutive seeds, each with some captions. Several processes share a large number of scenes.

    Args:
        first_seed: seed of the first scene.
        count: number of scenes.
        num_frames, split: as in `world.sample`.
        captions: number of captions per scene, the plainest first.
        bodies: shares of scenes with one, two and three bodies; None uses the shares of `world.sample`.
        pair_share: share of the scenes with several bodies that must show a collision or a body that passes behind
            another one, in addition to those that `world.sample` draws; needs `bodies`.
        synonym_share, unknown_share: as in `wording.captions`.
    """
    shares = (synonym_share, unknown_share)
    drawn = partial(_sample, num_frames=num_frames, split=split, bodies=bodies, pair_share=pair_share)
    task = partial(_draw, drawn=drawn, captions=captions, shares=shares)
    starts = range(first_seed, first_seed + count, _CHUNK)
    spans = [range(low, min(low + _CHUNK, first_seed + count)) for low in starts]
    return [scene for part in spread(task, spans, "draws scenes") for scene in part]


def _draw(seeds: range, drawn: Callable[[int], Spec], captions: int, shares: tuple[float, float]) -> list[Scene]:
    scenes = []
    for seed in seeds:
        spec = drawn(seed)
        texts = worded(spec, [1000 * seed + i for i in range(1, captions)], *shares) if captions else ()
        scenes.append(Scene(spec, texts))
    return scenes


def _sample(seed: int, *, num_frames: int, split: Split, bodies: tuple[float, ...] | None, pair_share: float) -> Spec:
    if bodies is None:
        return sample(seed, num_frames=num_frames, split=split)
    number = random.Random(f"bodies-{seed}").choices((1, 2, 3), bodies)[0]
    chance, event = random.Random(f"pairs-{seed}"), None
    possible = [name for name in PAIR_EVENTS if name in eligible_events(num_frames, number)]
    if possible and chance.random() < pair_share:
        event = chance.choice(possible)
    return sample(seed, num_frames=num_frames, num_bodies=number, event=event, split=split)


def specs_of(first_seed: int, count: int, num_frames: int, split: Split = "train") -> list[Spec]:
    """Return the scenes of consecutive seeds."""
    return [scene.spec for scene in draw_scenes(first_seed, count, num_frames, split=split)]


def render_in_batches(
    specs: Sequence[Spec],
    size: int,
    device: torch.device | str,
    *,
    mask: bool,
    label: str = "rendering",
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Render consecutive scenes batch by batch, with a progress bar.

    Args:
        specs: the scenes.
        size: height and width in pixels.
        device: device of the computation.
        mask: also yield the instance ids.
        label: text of the progress bar.

    Yields:
        (rgb_BT3HW float in [0,1], ids_BTHW uint8 or None).
    """
    # On a GPU the physics takes as long for one clip as for thousands, so batches are large.
    batch = 256 if torch.device(device).type == "cpu" else 2048
    starts = range(0, len(specs), batch)
    for low in tqdm(starts, desc=label, unit="batch", disable=len(starts) < 4, leave=False):
        frames = render(specs[low : low + batch], size=size, geometry=mask, device=device)
        yield frames.rgb_BF3HW, frames.ids_BFHW
