"""Graded ways to spoil clips, which `world_judge` learns to rank and is measured by.

Level 0 leaves a clip as it is; levels 1 to 4 are fixed strengths. With equally seeded generators two levels spoil a
clip in the same way and differ in strength only. Suffixes: B clips, T frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from postgen import world
from postgen.world import Body, Spec

LEVELS: dict[str, tuple[float, ...]] = {
    "blur": (0.5, 0.9, 1.5, 3.0),
    "noise": (0.02, 0.04, 0.08, 0.16),
    "colour drift": (0.08, 0.15, 0.3, 0.6),
    "flicker": (0.03, 0.06, 0.12, 0.25),
    "vanishing": (1, 2, 4, 8),
    "teleport": (0.5, 0.9, 1.4, 2.0),
    "freeze": (2, 4, 6, 9),
}
"""Kind -> strengths: blur in pixels (standard deviation), noise in [0,1] (the same), drift and flicker in parts of the
brightness, vanishing and freezing in frames, leaps in metres."""

HEAD = {kind: "visual" if kind in ("blur", "noise", "colour drift") else "motion" for kind in LEVELS}
"""Kind -> which of the judge's heads it is for."""

_MOVING = ("moves left", "moves right", "moves closer", "moves away")


@dataclass(slots=True)
class Takes:
    """Renders of B scenes, uint8: as they are, without their first body, and with that body elsewhere.

    `clean`, `empty` (B,T,3,H,W); `aside` (4,B,T,3,H,W), one for each strength of a leap.
    """

    clean: Tensor
    empty: Tensor
    aside: Tensor
    specs: list[Spec]

    def pick(self, rows: Tensor) -> Takes:
        """Some of the scenes, as floats in [0,1]; without their specs, which would have to come from the device."""
        clean, empty, aside = (
            part.float() / 255 for part in (self.clean[rows], self.empty[rows], self.aside[:, rows])
        )
        return Takes(clean, empty, aside, [])


def render_takes(specs: list[Spec], size: int, device: torch.device | str) -> Takes:
    """Render scenes and the versions of them that vanishing and leaps are made of."""

    def pictures(versions: list[Spec]) -> Tensor:
        parts = [
            world.render(versions[low : low + 512], size=size, geometry=False, device=device).rgb_BF3HW
            for low in range(0, len(versions), 512)
        ]
        return (torch.cat(parts) * 255).round().to(torch.uint8)

    aside = [pictures([_moved(spec, metres) for spec in specs]) for metres in LEVELS["teleport"]]
    return Takes(pictures(specs), pictures([_without(spec) for spec in specs]), torch.stack(aside), specs)


def _without(spec: Spec) -> Spec:
    first = Body(colour=spec.bodies[0].colour, shape="ball", position=(0.0, 900.0, 0.6))
    rest = tuple(replace(body, event="stays", partner=None) for body in spec.bodies[1:])
    return replace(spec, bodies=(first, *rest))


def _moved(spec: Spec, metres: float) -> Spec:
    """The first body to the side, towards the middle; it goes its way from there."""
    x, y, z = spec.bodies[0].position
    first = replace(spec.bodies[0], position=(x - metres if x > 0 else x + metres, y, z))
    return replace(spec, bodies=(first, *spec.bodies[1:]))


def shows(kind: str, spec: Spec) -> bool:
    """Whether a kind can be seen on a scene at all: a body that rests cannot freeze."""
    return kind != "freeze" or spec.bodies[0].event in _MOVING


def corrupt(kind: str, level: Tensor, takes: Takes, generator: torch.Generator) -> Tensor:
    """Return the clips (B,T,3,H,W) of takes in [0,1], spoilt.

    Args:
        kind: key of `LEVELS`.
        level: (B,) int64, 0 to 4.
        takes: from `Takes.pick`.
        generator: on the clips' device.
    """
    strengths = torch.tensor((0.0, *LEVELS[kind]), device=level.device)
    return _SPOIL[kind](takes, strengths[level], level, generator).clamp(0, 1)


def _blur(takes: Takes, strength: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    clips = takes.clean
    batch = len(clips)
    steps = torch.arange(-9, 10, device=clips.device).float()
    kernel = torch.exp(-0.5 * (steps / strength.clamp_min(1e-2)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True))[:, None]
    # A group a clip; its frames and colours are the batch.
    x = clips.flatten(1, 2).transpose(0, 1)
    x = functional.pad(x, (9,) * 4, mode="replicate")
    x = functional.conv2d(x, kernel[..., None], groups=batch)
    x = functional.conv2d(x, kernel[:, :, None], groups=batch)
    return x.transpose(0, 1).reshape(clips.shape)


def _noise(takes: Takes, strength: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    clips = takes.clean
    noise = torch.randn(clips.shape, generator=generator, device=clips.device)
    return clips + _wide(strength) * noise


def _drift(takes: Takes, strength: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    """Each channel gains or loses brightness, more and more."""
    clips = takes.clean
    batch, frames = clips.shape[:2]
    way = torch.randn(batch, 1, 3, 1, 1, generator=generator, device=clips.device)
    way = functional.normalize(way - way.mean(2, keepdim=True), dim=2)
    time = torch.linspace(0, 1, frames, device=clips.device)[:, None, None, None]
    return clips * (1 + _wide(strength) * way * time)


def _flicker(takes: Takes, strength: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    clips = takes.clean
    change = torch.randn(clips.shape[:2], generator=generator, device=clips.device)
    return clips * (1 + _wide(strength) * _wide(change))


def _vanishing(takes: Takes, strength: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    """The first body is gone for some frames in the midst of the clip."""
    gone = _window(takes.clean, strength, generator)
    return torch.where(gone, takes.empty, takes.clean)


def _teleport(takes: Takes, strength: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    """From some frame on the first body is elsewhere."""
    clips = takes.clean
    batch, frames = clips.shape[:2]
    start = torch.randint(frames // 4, 3 * frames // 4 + 1, (batch, 1), generator=generator, device=clips.device)
    later = torch.arange(frames, device=clips.device) >= start
    other = takes.aside[(level - 1).clamp_min(0), torch.arange(batch, device=clips.device)]
    return torch.where(_wide(later & (level > 0)[:, None]), other, clips)


def _freeze(takes: Takes, strength: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    """The clip stands still for some frames and then goes on where it would have been."""
    clips = takes.clean
    batch, frames = clips.shape[:2]
    held = _window(clips, strength, generator)[:, :, 0, 0, 0]
    time = torch.arange(frames, device=clips.device).expand(batch, -1)
    first = torch.where(held, time, frames).amin(1, keepdim=True)
    source = torch.where(held, first - 1, time)
    return clips[torch.arange(batch, device=clips.device)[:, None], source]


def _window(clips: Tensor, length: Tensor, generator: torch.Generator) -> Tensor:
    """Frames of a stretch of a length, after the first frame and, where it fits, before the last: (B,T,1,1,1)."""
    batch, frames = clips.shape[:2]
    part = torch.rand(batch, generator=generator, device=clips.device)
    start = 1 + (part * (frames - 1 - length).clamp_min(1)).floor()
    time = torch.arange(frames, device=clips.device)
    return _wide((time >= start[:, None]) & (time < (start + length)[:, None]))


def _wide(value: Tensor) -> Tensor:
    """(B,) or (B,T) -> (B,1 or T,1,1,1)."""
    return value.reshape(len(value), -1, 1, 1, 1)


_SPOIL: dict[str, Callable[[Takes, Tensor, Tensor, torch.Generator], Tensor]] = {
    "blur": _blur,
    "noise": _noise,
    "colour drift": _drift,
    "flicker": _flicker,
    "vanishing": _vanishing,
    "teleport": _teleport,
    "freeze": _freeze,
}
