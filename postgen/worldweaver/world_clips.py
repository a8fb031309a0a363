"""Render long scenes of the world with exact depth, flow and cameras, and encode them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from postgen import world
from postgen.errors import UserError
from postgen.training.digests import digest
from postgen.training.logging import say
from postgen.world.camera import camera_path
from postgen.world.physics import Motion, Simulation
from postgen.world.processes import spread
from postgen.world.scenes import FIRST_TRAINING_SEED

from .clips import CORRUPTED, PLACED, ClipPool, ClipsConfig, encoded, in_parts
from .depth import GREYS, DisparityRange
from .model import WorldWeaverModel
from .placed_clips import Placing
from .pool_files import encoder_key, lock_of, read_latents, unwritable, write_latents
from .texts import Texts

_CHUNK = 64
"""Number of scenes that a process draws at a time."""
_RENDERED = {"cpu": 2, "cuda": 32}
"""Number of clips that are rendered and encoded together, by device type."""


def world_pool(
    config: ClipsConfig,
    model: WorldWeaverModel,
    texts: Texts,
    *,
    part: int = 0,
    evaluation: bool = False,
    wrong: bool,
    cameras: bool = False,
    placing: Placing | None = None,
    bf16: bool = False,
) -> ClipPool:
    """Render and encode scenes. The latents are kept on the device of the model.

    Args:
        config: number, length and size of the scenes.
        model: encodes the clips and determines the modalities.
        texts: receives the captions.
        part: rank of the process; each process has its own scenes.
        evaluation: make `config.eval_clips` scenes that training never uses.
        wrong: whether to make corrupted RGB.
        cameras: whether to return poses.
        placing: settings of the sights; None: no sights.
        bf16: encode in bfloat16.

    Raises:
        UserError: a width that differs from the height, stored latents that cannot be read, or a `pool_dir` that
            cannot be written.
    """
    if config.size[0] != config.size[1]:
        raise UserError(
            f"width {config.width} with height {config.height}: scenes of the world are square, omit width"
        )
    count = config.eval_clips if evaluation else config.pool_clips
    first = 0 if evaluation else FIRST_TRAINING_SEED + part * count
    specs = long_specs(range(first, first + count), config.num_frames)
    names = [*model.modalities, *([CORRUPTED] if wrong else []), *([PLACED] if placing else [])]
    places = _places(config, model, range(first, first + count), names, placing, bf16)
    with _alone(places):
        # Another run may have written the files while this run waited for the lock.
        found = {name: read_latents(place) for name, place in places.items() if place.is_file()}
        if missing := [name for name in names if name not in found]:
            found |= _rendered(specs, first, config, model, missing, placing, bf16)
            for name in missing if places else ():
                write_latents(places[name], found[name])
    device = model.transformer.device
    latents = {name: found[name].to(device) for name in names}
    frames = latents["rgb"].shape[2]
    return ClipPool(
        latents={name: latents[name] for name in model.modalities},
        corrupted=latents.get(CORRUPTED),
        poses=_poses(specs, config.num_frames, frames) if cameras else None,
        texts=_texts(specs, config.num_frames, frames, texts),
        sights=latents.get(PLACED),
    )


def long_specs(seeds: range, num_frames: int) -> list[world.Spec]:
    """Draw scenes of `world.sample_long` for the seeds; several processes draw a large number."""
    parts = [seeds[each] for each in in_parts(len(seeds), _CHUNK)]
    draw = partial(_specs, num_frames=num_frames)
    return [spec for each in spread(draw, parts, "draws scenes") for spec in each]


def _specs(seeds: range, num_frames: int) -> list[world.Spec]:
    return [world.sample_long(seed, num_frames=num_frames) for seed in seeds]


def latent_ends(num_frames: int, latents: int) -> list[int]:
    """Return the last video frame of each latent frame: 0 for the first, then every k-th frame."""
    step = (num_frames - 1) // max(1, latents - 1)
    return [step * place for place in range(latents)]


def _rendered(
    specs: Sequence[world.Spec],
    first: int,
    config: ClipsConfig,
    model: WorldWeaverModel,
    names: Sequence[str],
    placing: Placing | None,
    bf16: bool,
) -> dict[str, Tensor]:
    device = model.transformer.device
    # Simulate all scenes at once: one scene takes as many calls as thousands of scenes.
    motion = Simulation(specs, "cpu").run(config.num_frames)
    geometry, noise = bool({"depth", "flow", PLACED} & {*names}), torch.Generator().manual_seed(first)
    pictures = [name for name in names if name != PLACED]
    parts: list[dict[str, Tensor]] = []
    spans = list(in_parts(len(specs), _RENDERED.get(device.type, 2)))
    for span in tqdm(spans, desc=f"rendering and encoding {len(specs)} scenes", disable=len(spans) < 4, leave=False):
        frames = world.render(
            specs[span],
            num_frames=config.num_frames,
            size=config.height,
            geometry=geometry,
            device=device,
            motion=_moved(motion, span, device),
        )
        disparity = frames.disparity_BFHW if geometry else None
        part = encoded(model, pictures, frames.rgb_BF3HW, disparity, frames.flow_BF2HW, noise, bf16=bf16)
        if placing is not None and PLACED in names:
            assert disparity is not None
            if (depth := part.get("depth")) is None:  # depth came from pool_dir, but sights need it here
                depth = encoded(model, ["depth"], frames.rgb_BF3HW, disparity, None, noise, bf16=bf16)["depth"]
            ends = latent_ends(config.num_frames, depth.shape[2])
            limits, poses = DisparityRange.of(disparity), frames.pose_BF34[:, ends]
            # Seed with the scene numbers, so that every scene has its own disturbance in every process.
            part[PLACED] = placing.sights(model, depth, limits, poses, range(first + span.start, first + span.stop))
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def _moved(motion: Motion, span: slice, device: torch.device) -> Motion:
    each = (motion.positions_BFK3, motion.rotations_BFK33, motion.contact_BFK)
    return Motion(*(tensor[span].to(device) for tensor in each))


def _poses(specs: Sequence[world.Spec], num_frames: int, latents: int) -> Tensor:
    rows = []
    for spec in specs:
        position, rotation = camera_path(spec, 0, num_frames)
        pose = torch.cat([rotation, position[..., None]], -1)
        rows.append(pose[latent_ends(num_frames, latents)])
    return torch.stack(rows)


def _texts(specs: Sequence[world.Spec], num_frames: int, latents: int, texts: Texts) -> Tensor:
    """Caption each scene from each latent frame on. A scene keeps the same wording in all its captions."""
    # The first video frame of a latent frame follows the last video frame of the latent frame before.
    firsts = [0, *(end + 1 for end in latent_ends(num_frames, latents)[:-1])]
    told = [[world.caption_at(spec, frame, number) for frame in firsts] for number, spec in enumerate(specs)]
    texts.add(text for line in told for text in line)
    return torch.tensor([[texts.numbers[text] for text in line] for line in told])


def _places(
    config: ClipsConfig,
    model: WorldWeaverModel,
    seeds: range,
    names: Sequence[str],
    placing: Placing | None,
    bf16: bool,
) -> dict[str, Path]:
    """Return the file for each kind of latents; empty without `pool_dir`."""
    if config.pool_dir is None:
        return {}
    said: list[Any] = [seeds.start, len(seeds), config.num_frames, config.height, *encoder_key(model, bf16=bf16)]
    folder = Path(config.pool_dir).expanduser()
    sights = list(GREYS) if placing is None else [*GREYS, *placing.told]
    more: dict[str, list[Any]] = {"depth": list(GREYS), PLACED: sights}
    return {name: folder / f"{name}-{digest([*said, name, *more.get(name, [])])}.safetensors" for name in names}


@contextmanager
def _alone(places: Mapping[str, Path]) -> Iterator[None]:
    """Context manager that locks the files of the scenes against other runs if some of them are missing."""
    if not places or all(place.is_file() for place in places.values()):
        yield
        return
    rgb = places["rgb"]
    # Lock the RGB file: equal scenes share it, whatever other latents a run needs.
    lock = lock_of(rgb)
    try:
        lock.wait(say, "renders the same scenes")
    except OSError as error:
        raise unwritable(rgb, error) from error
    try:
        yield
    finally:
        lock.release()
