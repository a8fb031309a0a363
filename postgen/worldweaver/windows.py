"""Draw training windows: memory frames and groups in flight, at the noise levels of a rollout.

A window is cut from a clip at a latent frame at which memory ends and the groups in flight begin. The rows of a
micro-batch share a `Layout` (which groups are in flight, and where), so that they have equal shapes. Memory frames are
selected by the memory bank with the policy of the rollout, so training uses the same frames as a rollout would.

The noise levels of the groups follow from one phase, see `segments`. Some rows are different:

- each group has its own phase (diffusion forcing, arXiv:2407.01392);
- depth and flow have other noise levels than RGB; in half of these rows RGB is clean, so that the model learns to
  predict the depth of a given video;
- depth and flow are missing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from postgen.errors import UserError
from postgen.sampling.schedule import Schedule
from postgen.training.transfer import to_device

from .levels import FrameLevels, Role
from .segments import Segments
from .selection import Query, policy_of
from .sights import gathered, with_noise
from .window_config import WindowConfig

_FILL = (0.5, 0.25)
"""Shares of windows without memory, and with a single frame of memory, among the windows that fill: a video begins
from text, from a picture, or from a video. For other windows these shares are settings."""
_UNKNOWN = 0.5
"""Share of first frames without depth and flow, like a picture that a user gives."""
_STILL = 0.5
"""Share of rows with clean RGB, among the rows whose depth has its own noise levels."""
_BLOCKS = 4
"""Number of blocks along an edge of a frame. Some of the blocks become holes in placed memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The common layout of the rows of a micro-batch."""

    ages: tuple[int, ...]
    """Ages of the groups in flight, oldest first."""
    start: int
    """Latent frame of the clip at which the oldest group begins; all earlier frames are the past."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Placed memory of the frames of a window."""

    clean: Tensor
    """(B, M * C + 1, P, h, w) clean latents; the mask is the last channel."""
    level: Tensor
    """(B,) noise level of RGB."""
    modalities: int
    """M."""

    def noised(self, generator: torch.Generator) -> Tensor:
        """Return the input for the network, with noise on RGB."""
        channels = (self.clean.shape[1] - 1) // self.modalities
        shape = (len(self.clean), channels, *self.clean.shape[2:])
        noise = torch.randn(shape, generator=generator, device=self.clean.device)
        return with_noise(self.clean, self.level.view(-1, 1, 1, 1, 1), noise)


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """B rows of T latent frames; memory frames come first."""

    clean: Tensor
    """(B, M * C, T, h, w) float32 clean latents."""
    levels: FrameLevels
    """Noise levels that `noised` uses, and roles."""
    counted: Tensor
    """(B, P, M) bool: which of the P frames in flight count in the loss, for each modality."""
    placed: Placed | None = None
    """Placed memory of the frames in flight; None: no placed memory."""

    def noised(self, noise: Tensor) -> Tensor:
        """Return the latents with noise at their levels, (1 - sigma) z + sigma e."""
        each = self.clean.shape[1] // self.levels.sigma.shape[2]
        sigma = self.levels.sigma.movedim(2, 1).repeat_interleave(each, 1)[..., None, None]
        return (1 - sigma) * self.clean + sigma * noise

    def target(self, noise: Tensor) -> Tensor:
        """Return the velocity of the frames in flight, (B, M * C, P, h, w)."""
        count = self.counted.shape[1]
        return (noise - self.clean)[:, :, -count:]


class Windows:
    """Draws training windows.

    Args:
        config: settings of the windows.
        schedule: noise levels of a rollout of a flow model, on the CPU.
        frames: latent frames of a clip.

    Raises:
        UserError: a schedule with another number of steps, or clips that are too short for a window with one frame of
            memory.
    """

    def __init__(self, config: WindowConfig, schedule: Schedule, frames: int) -> None:
        self.config, self.schedule, self.frames = config, schedule, frames
        self.segments = config.segments
        self.segments.check(schedule)
        self.policy = policy_of(config.memory_policy)
        self.memory = sum(config.history_sizes)
        least = config.groups * config.causal_block_size + (1 if self.memory else 0)
        if frames < least:
            raise UserError(
                f"clips of {frames} latent frames are too short for {config.groups} groups of"
                f" {config.causal_block_size} and memory: give clips of {least} or more latent frames"
            )
        self._chosen: dict[int, tuple[Tensor, Tensor]] = {}

    def layout(self, generator: torch.Generator) -> Layout:
        """Draw a layout; `generator` is a CPU generator."""
        config = self.config
        ages = self.segments.draw_ages(generator, config.fill_share, config.drain_share)
        latest = self.frames - len(ages) * config.causal_block_size
        start = int(torch.randint(1, max(2, latest + 1), (), generator=generator))
        draw = float(torch.rand((), generator=generator))
        fills = ages[0] < self.segments.groups - 1
        none, first = _FILL if fills else (config.no_memory_share, config.first_frame_share)
        if not self.memory or draw < none:
            start = 0
        elif draw < none + first:
            start = 1
        return Layout(ages=ages, start=start)

    def draw(
        self,
        layout: Layout,
        latents: Tensor,
        generator: torch.Generator,
        *,
        corrupted: Tensor | None = None,
        poses: Tensor | None = None,
        sights: Tensor | None = None,
    ) -> Window:
        """Return a window for each clip.

        Args:
            layout: groups in flight, and where the window begins.
            latents: (B, M * C, T, h, w) of the clips.
            generator: CPU generator of the noise levels.
            corrupted: (B, C, T, h, w) RGB with wrong colours, for memory frames.
            poses: (B, T, 3, 4) cameras, for policies that need cameras.
            sights: (B, T, P, 3, h, w) of the clips, for placed memory (`placed_clips.sights_of`).
        """
        rows, made = len(latents), len(layout.ages) * self.config.causal_block_size
        draw = torch.rand(rows, 6, generator=generator)
        # Noise levels of the frames in flight, and memory frames with their levels.
        sigma, counted = self._levels(layout, draw, generator)
        index, role = self.remembered(layout, latents, poses)
        told = self._memory_levels(role, draw)
        dark = draw[:, 0] < self.config.drop_share
        if layout.start == 1 and len(role):
            dark = dark | (draw[:, 4] < _UNKNOWN)
        told[dark, :, 1:] = 1
        levels = FrameLevels(sigma=torch.cat([told, sigma], 1), role=torch.cat([role, _roles(made)]))
        # Some rows see corrupted RGB in their memory.
        seen = latents
        if corrupted is not None and len(role):
            wrong = to_device(draw[:, 5] < self.config.corrupt_share, latents.device)[:, None, None, None, None]
            channels = corrupted.shape[1]
            seen = torch.cat([torch.where(wrong, corrupted, latents[:, :channels]), latents[:, channels:]], 1)
        past = _taken(seen, index)
        placed = self._placed(layout, seen, sights, draw[:, 3] * self.config.mem_noise_max)
        if placed is not None:
            placed = replace(placed, clean=placed.clean * self._kept(dark, placed.clean, generator))
        coming = latents[:, :, layout.start : layout.start + made]
        return Window(
            clean=torch.cat([past, coming], 2).float(),
            levels=_on(levels, latents.device),
            counted=to_device(counted, latents.device),
            placed=placed,
        )

    def at(
        self,
        layout: Layout,
        latents: Tensor,
        phase: float,
        mem_noise: Tensor,
        poses: Tensor | None,
        sights: Tensor | None = None,
    ) -> Window:
        """Return the window of a rollout at a phase of its shift, with the given clean latents.

        Args:
            layout: groups in flight, and where the window begins.
            latents: as for `draw`.
            phase: completed share of the segments, the same for all groups.
            mem_noise: (B,) noise levels of RGB in long memory, on the CPU.
            poses: as for `draw`.
            sights: as for `draw`.
        """
        rows, count = len(latents), len(layout.ages)
        level = self.segments.levels(
            self.schedule, layout.ages, torch.full((rows, count), phase, dtype=torch.float64)
        ).float()
        sigma = self._spread(level)
        index, role = self.remembered(layout, latents, poses)
        told = self._told(role, mem_noise, torch.zeros(rows))
        levels = FrameLevels(sigma=torch.cat([told, sigma], 1), role=torch.cat([role, _roles(sigma.shape[1])]))
        coming = latents[:, :, layout.start : layout.start + sigma.shape[1]]
        return Window(
            clean=torch.cat([_taken(latents, index), coming], 2).float(),
            levels=_on(levels, latents.device),
            counted=torch.ones(sigma.shape, dtype=torch.bool, device=latents.device),
            placed=self._placed(layout, latents, sights, mem_noise),
        )

    def remembered(self, layout: Layout, latents: Tensor, poses: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the selected memory: frame numbers in the clip (1, m) or (B, m), and roles (m,), on the CPU."""
        if not layout.start or not self.memory:
            return torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        if self.policy.per_row:
            return self._asked(latents[:, :, : layout.start], layout, poses)
        # Such a policy depends only on the frame numbers, so its choice is cached for each start.
        if layout.start not in self._chosen:
            stand_in = torch.zeros(1, len(self.config.modalities), layout.start, 1, 1)
            self._chosen[layout.start] = self._asked(stand_in, layout, None)
        return self._chosen[layout.start]

    def _placed(self, layout: Layout, latents: Tensor, sights: Tensor | None, level: Tensor) -> Placed | None:
        """Return the placed memory of a rollout at this layout, which sees only the frames before the window."""
        if sights is None or not layout.start:
            return None
        made = len(layout.ages) * self.config.causal_block_size
        clean = gathered(latents, sights[:, layout.start, :made])
        return Placed(clean, to_device(level, latents.device), len(self.config.modalities))

    def _kept(self, dark: Tensor, like: Tensor, generator: torch.Generator) -> Tensor:
        """Return a mask (B, 1, 1, h, w): 0 in holes of placed memory and in rows without placed memory, else 1."""
        config, rows = self.config, len(dark)
        share = torch.rand(rows, generator=generator) * config.placed_holes
        blocks = torch.rand(rows, 1, _BLOCKS, _BLOCKS, generator=generator) >= share.view(-1, 1, 1, 1)
        none = dark | (torch.rand(rows, generator=generator) < config.placed_drop_share)
        kept = interpolate(blocks.float(), like.shape[-2:], mode="nearest") * ~none.view(-1, 1, 1, 1)
        return to_device(kept[:, :, None], like.device)

    def _asked(self, past: Tensor, layout: Layout, poses: Tensor | None) -> tuple[Tensor, Tensor]:
        config, bank = self.config, self.config.bank(len(past))
        end = layout.start + len(layout.ages) * config.causal_block_size
        before, coming = (None, None) if poses is None else (poses[:, : layout.start], poses[:, layout.start : end])
        bank.add(past, 0, poses=before)
        shown = bank.select(Query(group=config.causal_block_size, poses=coming))
        assert shown is not None
        return shown.frame_index, shown.levels.role.cpu()

    def _levels(self, layout: Layout, draw: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the noise levels (B, P, M) of the frames in flight, and which of them count in the loss."""
        config, rows, count = self.config, len(draw), len(layout.ages)
        phase = self.segments.draw_phase(rows, layout.ages, generator, config.independent_share)
        sigma = self._spread(self.segments.levels(self.schedule, layout.ages, phase).float())
        whole = Segments(steps=self.segments.steps, groups=1)
        other = torch.rand(rows, count, generator=generator, dtype=torch.float64)
        kind, still = draw[:, 0], draw[:, 1] < _STILL
        dropped = kind < config.drop_share
        split = ~dropped & (kind < config.drop_share + config.split_share)
        if not config.aux:
            return sigma, torch.ones_like(sigma, dtype=torch.bool)
        # With clean RGB (a given video) all depth frames have the same level, as in `SelfDepth`.
        other = torch.where(still[:, None], other[:, :1], other)
        alone = self._spread(whole.levels(self.schedule, (0,) * count, other).float())
        sigma[split, :, 1:] = alone[split, :, 1:]
        sigma[split & still, :, 0] = 0
        sigma[dropped, :, 1:] = 1
        counted = sigma > 0  # a clean latent has no noise, so its velocity cannot be predicted
        counted[dropped, :, 1:] = False
        return sigma, counted

    def _spread(self, level: Tensor) -> Tensor:
        """Expand the levels of groups (B, K) to frames and modalities, (B, K * F, M)."""
        level = level.repeat_interleave(self.config.causal_block_size, 1)
        return level[..., None].repeat(1, 1, len(self.config.modalities))

    def _memory_levels(self, role: Tensor, draw: Tensor) -> Tensor:
        config = self.config
        short = torch.where(draw[:, 2] < 0.5, 2 * draw[:, 2] * config.short_noise_max, 0)
        return self._told(role, draw[:, 3] * config.mem_noise_max, short)

    def _told(self, role: Tensor, long: Tensor, short: Tensor) -> Tensor:
        """Return the noise levels of memory (B, m, M) for RGB levels (B,) of long and of short memory."""
        config = self.config
        is_long = role == Role.LONG
        told = torch.zeros(len(long), len(role), len(config.modalities))
        told[..., 0] = torch.where(is_long, long[:, None], short[:, None])
        if "flow" in config.aux:
            told[..., 2] = torch.where(is_long, config.flow_noise, 0.0)
        if not config.depth_in_memory:
            told[..., 1:] = 1
        return told


def _on(levels: FrameLevels, device: torch.device) -> FrameLevels:
    return FrameLevels(sigma=to_device(levels.sigma, device), role=to_device(levels.role, device))


def _roles(count: int) -> Tensor:
    return torch.full((count,), int(Role.PREDICT))


def _taken(latents: Tensor, index: Tensor) -> Tensor:
    """Take the frames (B, m) from latents (B, c, T, h, w)."""
    places = to_device(index, latents.device)[:, None, :, None, None]
    return latents.take_along_dim(places.expand(len(latents), latents.shape[1], -1, *latents.shape[3:]), 2)
