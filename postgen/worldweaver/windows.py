"""Windows that training shows the network: memory and groups in flight, at noise levels that a rollout visits.

A window is cut out of a clip at a latent frame, where memory ends and groups begin. What a micro-batch shares, so that
its rows have equal shapes, is its `Layout`: which groups are in flight, and where. Memory is chosen by the bank of the
rollout with its policy, so training sees the frames that a rollout would be shown there.

Levels of the groups are tied by one phase, as `segments` draws them. Some rows differ: groups with a phase each
(diffusion forcing, arXiv:2407.01392); levels of depth and flow that are not those of RGB, half of them with clean RGB,
so that the model gives the depth of a given video; depth and flow that are not there at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.sampling.schedule import Schedule
from postgen.settings import Part

from .levels import MODALITIES, FrameLevels, Modality, Role
from .memory import MemoryBank
from .segments import Segments
from .selection import POLICIES, Query, policy_of
from .widen import AUX

_FILL = (0.5, 0.25)
"""Shares of windows that fill with no memory, and with one frame: a video begins from nothing, from a picture, or from
a video. In the others these shares are settings."""
_UNKNOWN = 0.5
"""Share of first frames without depth and flow, as a picture that a user gives."""
_STILL = 0.5
"""Share of clean RGB among the rows whose depth has levels of its own."""


@dataclass(kw_only=True)
class WindowConfig(Part):
    """What a window holds, in training and in rollouts, and how often training shows which kind.

    Raises:
        UserError: a value outside its range, or two that do not go together.
    """

    part: ClassVar[str] = "window"

    aux: list[str] = field(default_factory=lambda: ["depth"])
    """Modalities beside RGB: [], [depth] or [depth, flow]."""

    causal_block_size: int = 3
    """F, latent frames of a group."""

    groups: int = 3
    """K, groups in flight; 1 is one chunk after the other."""

    num_inference_steps: int = 30
    """N, steps of a rollout from noise to clean, a multiple of `groups`."""

    history_sizes: list[int] = field(default_factory=lambda: [4, 2])
    """Frames of long and of short memory."""

    keep_first_frame: bool = True
    """Whether the first frame of the video is always in long memory."""

    memory_policy: str = "logspace"
    """How long memory is chosen, a key of `postgen.worldweaver.selection.POLICIES`."""

    mem_noise: float = 0.12
    """Noise level of the RGB of long memory in rollouts, which the adapter says."""

    mem_noise_max: float = 0.3
    """In training that level is drawn from 0 to this, for each row."""

    flow_noise: float = 0.5
    """Noise level of the flow of long memory."""

    short_noise_max: float = 0.05
    """The RGB of short memory has a level up to this in half of the rows; in rollouts it is clean."""

    depth_in_memory: bool = True
    """False shows noise in the place of the depth and flow of memory."""

    fill_share: float = 0.1
    """Windows with groups in the segments of most noise only, as at the beginning of a rollout."""

    drain_share: float = 0.1
    """Windows with groups in the segments of least noise only, as at the end."""

    no_memory_share: float = 0.1
    """Windows at the beginning of the clip, without memory, of those that do not fill."""

    first_frame_share: float = 0.1
    """Windows whose memory is the first frame, of those that do not fill."""

    independent_share: float = 0.25
    """Rows whose groups have a phase each; 1 is diffusion forcing."""

    split_share: float = 0.1
    """Rows whose depth and flow have other levels than RGB."""

    drop_share: float = 0.1
    """Rows without depth and flow: noise, and no loss."""

    corrupt_share: float = 0.3
    """Rows whose memory is blurred and has wrong colours."""

    loss_weights: list[float] = field(default_factory=lambda: [1.0, 0.5, 0.25])
    """Of RGB, depth and flow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(tuple(self.aux) in ((), *AUX), "aux", "[], [depth] or [depth, flow]")
        for name in ("causal_block_size", "groups"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        self.require(self.num_inference_steps >= 2, "num_inference_steps", "at least 2")
        self.require(self.num_inference_steps % self.groups == 0, "num_inference_steps", f"n * groups ({self.groups})")
        sizes = self.history_sizes
        self.require(len(sizes) == 2 and min(sizes) >= 0, "history_sizes", "two numbers from 0 on: long, short")
        self.require(self.memory_policy in POLICIES, "memory_policy", f"one of {', '.join(POLICIES)}")
        shares = ("fill", "drain", "no_memory", "first_frame", "independent", "split", "drop", "corrupt")
        for name in (*(f"{share}_share" for share in shares), "mem_noise", "mem_noise_max", "flow_noise"):
            self.require(0 <= getattr(self, name) <= 1, name, "from 0 to 1")
        self.require(0 <= self.short_noise_max <= 1, "short_noise_max", "from 0 to 1")
        for one, other in (("fill", "drain"), ("no_memory", "first_frame"), ("split", "drop")):
            both = getattr(self, f"{one}_share") + getattr(self, f"{other}_share")
            self.require(both <= 1, f"{other}_share", f"at most 1 together with {one}_share")
        weights = self.loss_weights
        self.require(
            len(weights) == 3 and min(weights) >= 0 < weights[0], "loss_weights", "three numbers, RGB above 0"
        )
        self._check_depth()

    def _check_depth(self) -> None:
        """Refuse settings of depth where there is none."""
        self.require(bool(self.aux) or self.depth_in_memory, "depth_in_memory", "true with aux: []")
        needs = self.memory_policy != "depth_sim" or (self.aux and self.depth_in_memory)
        self.require(bool(needs), "memory_policy", "another one than depth_sim without depth in memory")

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """RGB and what is beside it."""
        return MODALITIES[: 1 + len(self.aux)]

    @property
    def segments(self) -> Segments:
        """N steps in K segments."""
        return Segments(steps=self.num_inference_steps, groups=self.groups)

    def bank(self) -> MemoryBank:
        """Return the empty memory of a rollout."""
        long, short = self.history_sizes
        return MemoryBank(
            long,
            short,
            min(1, long) if self.keep_first_frame else 0,
            policy=self.memory_policy,
            mem_noise=self.mem_noise,
            flow_noise=self.flow_noise,
            modalities=len(self.modalities),
        )

    def rollout_settings(self) -> dict[str, object]:
        """Return what whoever uses the adapter must know, by the names of the arguments of the pipeline."""
        names = ("causal_block_size", "num_inference_steps", "history_sizes", "keep_first_frame", "memory_policy")
        return {name: getattr(self, name) for name in (*names, "flow_noise", "depth_in_memory")} | {
            "ar_step": self.num_inference_steps // self.groups,
            "addnoise_condition": 1000 * self.mem_noise,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What the rows of a micro-batch share."""

    ages: tuple[int, ...]
    """Of the groups in flight, oldest first."""
    start: int
    """Latent frame of the clip at which the oldest begins; all before it is the past."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """B rows of T latent frames, memory in front."""

    clean: Tensor
    """(B, M * C, T, h, w) float32 latents, without noise."""
    levels: FrameLevels
    """Of the noise that is put on them."""
    counted: Tensor
    """(B, P, M) bool: which of the P frames in flight count in the loss, by modality."""

    def noised(self, noise: Tensor) -> Tensor:
        """Return the latents with noise of their levels, (1 - sigma) z + sigma e."""
        each = self.clean.shape[1] // self.levels.sigma.shape[2]
        sigma = self.levels.sigma.movedim(2, 1).repeat_interleave(each, 1)[..., None, None]
        return (1 - sigma) * self.clean + sigma * noise

    def target(self, noise: Tensor) -> Tensor:
        """Return (B, M * C, P, h, w), the velocity of the frames in flight."""
        count = self.counted.shape[1]
        return (noise - self.clean)[:, :, -count:]


class Windows:
    """Draws windows.

    Args:
        config: their kinds.
        schedule: noise levels of a rollout of a flow, on the CPU.
        frames: latent frames of a clip.

    Raises:
        UserError: a schedule of another number of steps, or clips too short for a window with one frame before it.
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
                f" {config.causal_block_size} and a memory: give clips of {least} or more"
            )
        self._chosen: dict[int, tuple[Tensor, Tensor]] = {}

    def layout(self, generator: torch.Generator) -> Layout:
        """Draw a layout; `generator` is on the CPU."""
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
    ) -> Window:
        """Return a window of each clip.

        Args:
            layout: where.
            latents: (B, M * C, T, h, w) of the clips.
            generator: on the CPU, of the levels.
            corrupted: (B, C, T, h, w) RGB with wrong colours, for memory.
            poses: (B, T, 3, 4) cameras, for policies that look at them.
        """
        rows, made = len(latents), len(layout.ages) * self.config.causal_block_size
        draw = torch.rand(rows, 6, generator=generator)
        sigma, counted = self._levels(layout, draw, generator)
        index, role = self.remembered(layout, latents, poses)
        told = self._memory_levels(role, draw)
        if layout.start == 1 and len(role):
            told[draw[:, 4] < _UNKNOWN, :, 1:] = 1
        kind = draw[:, 0]
        told[kind < self.config.drop_share, :, 1:] = 1
        levels = FrameLevels(sigma=torch.cat([told, sigma], 1), role=torch.cat([role, _roles(made)]))
        past = _taken(latents, index)
        if corrupted is not None and len(role):
            wrong = (draw[:, 5] < self.config.corrupt_share).to(latents.device)[:, None, None, None, None]
            channels = corrupted.shape[1]
            rgb = torch.where(wrong, _taken(corrupted, index), past[:, :channels])
            past = torch.cat([rgb, past[:, channels:]], 1)
        coming = latents[:, :, layout.start : layout.start + made]
        return Window(
            clean=torch.cat([past, coming], 2).float(),
            levels=FrameLevels(sigma=levels.sigma.to(latents.device), role=levels.role.to(latents.device)),
            counted=counted.to(latents.device),
        )

    def at(self, layout: Layout, latents: Tensor, phase: float, mem_noise: Tensor, poses: Tensor | None) -> Window:
        """Return the window that a rollout has at a phase of its shift, with these clean latents in it.

        Args:
            layout: where.
            latents: as for `draw`.
            phase: share of the segments that is done, the same for all groups.
            mem_noise: (B,) levels of the RGB of long memory, on the CPU.
            poses: as for `draw`.
        """
        rows, count = len(latents), len(layout.ages)
        level = self.segments.levels(
            self.schedule, layout.ages, torch.full((rows, count), phase, dtype=torch.float64)
        ).float()
        sigma = self._spread(level)
        index, role = self.remembered(layout, latents, poses)
        told = self._told(role, mem_noise, torch.zeros(rows))
        coming = latents[:, :, layout.start : layout.start + sigma.shape[1]]
        return Window(
            clean=torch.cat([_taken(latents, index), coming], 2).float(),
            levels=FrameLevels(
                sigma=torch.cat([told, sigma], 1).to(latents.device),
                role=torch.cat([role, _roles(sigma.shape[1])]).to(latents.device),
            ),
            counted=torch.ones_like(sigma, dtype=torch.bool).to(latents.device),
        )

    def remembered(self, layout: Layout, latents: Tensor, poses: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return what the bank shows there: (1, m) or (B, m) frames of the clip, and their roles (m,), on the CPU."""
        if not layout.start or not self.memory:
            return torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        if self.policy.per_row:
            return self._asked(latents[:, :, : layout.start], layout, poses)
        # What is the same for all rows depends on the numbers of the frames alone.
        if layout.start not in self._chosen:
            stand_in = torch.zeros(1, len(self.config.modalities), layout.start, 1, 1)
            self._chosen[layout.start] = self._asked(stand_in, layout, None)
        return self._chosen[layout.start]

    def _asked(self, past: Tensor, layout: Layout, poses: Tensor | None) -> tuple[Tensor, Tensor]:
        config, bank = self.config, self.config.bank()
        end = layout.start + len(layout.ages) * config.causal_block_size
        before, coming = (None, None) if poses is None else (poses[:, : layout.start], poses[:, layout.start : end])
        bank.add(past, 0, poses=before)
        shown = bank.select(Query(group=config.causal_block_size, poses=coming))
        assert shown is not None
        return shown.frame_index, shown.levels.role.cpu()

    def _levels(self, layout: Layout, draw: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return levels (B, P, M) of the frames in flight, and which of them count."""
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
        # A given video is clean, and all of its depth has one level.
        other = torch.where(still[:, None], other[:, :1], other)
        alone = self._spread(whole.levels(self.schedule, (0,) * count, other).float())
        sigma[split, :, 1:] = alone[split, :, 1:]
        sigma[split & still, :, 0] = 0
        sigma[dropped, :, 1:] = 1
        counted = sigma > 0  # without noise there is nothing to predict it from
        counted[dropped, :, 1:] = False
        return sigma, counted

    def _spread(self, level: Tensor) -> Tensor:
        """Return (B, K * F, M) of levels of groups (B, K)."""
        level = level.repeat_interleave(self.config.causal_block_size, 1)
        return level[..., None].repeat(1, 1, len(self.config.modalities))

    def _memory_levels(self, role: Tensor, draw: Tensor) -> Tensor:
        config = self.config
        short = torch.where(draw[:, 2] < 0.5, 2 * draw[:, 2] * config.short_noise_max, 0)
        return self._told(role, draw[:, 3] * config.mem_noise_max, short)

    def _told(self, role: Tensor, long: Tensor, short: Tensor) -> Tensor:
        """Return (B, m, M) levels of memory, of RGB levels (B,) of its two parts."""
        config = self.config
        is_long = role == Role.LONG
        told = torch.zeros(len(long), len(role), len(config.modalities))
        told[..., 0] = torch.where(is_long, long[:, None], short[:, None])
        if "flow" in config.aux:
            told[..., 2] = torch.where(is_long, config.flow_noise, 0.0)
        if not config.depth_in_memory:
            told[..., 1:] = 1
        return told


def _roles(count: int) -> Tensor:
    return torch.full((count,), int(Role.PREDICT))


def _taken(latents: Tensor, index: Tensor) -> Tensor:
    """Return the frames (B, m) of latents (B, c, T, h, w)."""
    places = index.to(latents.device)[:, None, :, None, None]
    return latents.take_along_dim(places.expand(len(latents), latents.shape[1], -1, *latents.shape[3:]), 2)
