"""Settings of windows, in training and in rollouts, and the shares of the kinds of training windows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from postgen.settings import Part

from .levels import MODALITIES, Modality
from .memory import MemoryBank, capacity_for
from .placed_clips import Placing
from .segments import Segments
from .selection import POLICIES
from .widen import AUX


@dataclass(kw_only=True)
class WindowConfig(Part):
    """Settings of windows, in training and in rollouts, and the shares of the kinds of training windows.

    Raises:
        UserError: a value outside its range, or values that contradict each other.
    """

    part: ClassVar[str] = "window"

    aux: list[str] = field(default_factory=lambda: ["depth"])
    """Modalities in addition to RGB: [], [depth] or [depth, flow]."""

    causal_block_size: int = 3
    """F, latent frames of a group."""

    groups: int = 3
    """K, number of groups in flight; with 1, groups are generated one after the other."""

    num_inference_steps: int = 30
    """N, number of steps of a rollout from noise to clean, a multiple of `groups`."""

    history_sizes: list[int] = field(default_factory=lambda: [4, 2])
    """Number of latent frames of long and of short memory."""

    keep_first_frame: bool = True
    """Whether the first frame of the video is always in long memory."""

    memory_policy: str = "logspace"
    """Selection policy of long memory, a key of `postgen.worldweaver.selection.POLICIES`."""

    mem_noise: float = 0.12
    """Noise level of RGB in long memory during rollouts. It is saved with the adapter."""

    mem_noise_max: float = 0.3
    """Largest noise level of RGB in long memory during training. Each row draws its level from 0 to this value."""

    flow_noise: float = 0.5
    """Noise level of flow in long memory."""

    short_noise_max: float = 0.05
    """Largest noise level of RGB in short memory, in half of the training rows. In rollouts short memory is clean."""

    depth_in_memory: bool = True
    """Whether memory includes depth and flow. If false, noise replaces them."""

    fill_share: float = 0.1
    """Share of windows that fill: their groups are in the segments with the most noise, as at the start of a video."""

    drain_share: float = 0.1
    """Share of windows that drain: their groups are in the segments with the least noise, as at the end of a video."""

    no_memory_share: float = 0.1
    """Share of windows at the start of the clip, without memory. Windows that fill have their own share."""

    first_frame_share: float = 0.1
    """Share of windows whose memory is the first frame only. Windows that fill have their own share."""

    independent_share: float = 0.25
    """Share of rows in which each group has its own phase; 1 is diffusion forcing."""

    split_share: float = 0.1
    """Share of rows in which depth and flow have other noise levels than RGB."""

    drop_share: float = 0.1
    """Share of rows without depth and flow: pure noise, and no loss on them."""

    corrupt_share: float = 0.3
    """Share of rows whose memory is blurred and has wrong colours."""

    placed_memory: bool = False
    """Whether the network receives placed memory: past latents, placed by depth and camera (`placed`)."""

    placed_warp: bool = True
    """False: use the stored frame that shows most of the coming frame, without warping (a baseline)."""

    placed_depth_noise: float = 0.1
    """Largest relative error of the depth with which memory is placed in training, see `placed_clips`."""

    placed_drop_share: float = 0.2
    """Share of rows without placed memory."""

    placed_holes: float = 0.5
    """Largest share of placed cells that are removed in blocks. Each row draws its share from 0 to this value."""

    loss_weights: list[float] = field(default_factory=lambda: [1.0, 0.5, 0.25])
    """Loss weights of RGB, depth and flow."""

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
        shares = (
            "fill",
            "drain",
            "no_memory",
            "first_frame",
            "independent",
            "split",
            "drop",
            "corrupt",
            "placed_drop",
        )
        levels = ("mem_noise", "mem_noise_max", "flow_noise", "short_noise_max", "placed_holes", "placed_depth_noise")
        for name in (*(f"{share}_share" for share in shares), *levels):
            self.require(0 <= getattr(self, name) <= 1, name, "from 0 to 1")
        for one, other in (("fill", "drain"), ("no_memory", "first_frame"), ("split", "drop")):
            both = getattr(self, f"{one}_share") + getattr(self, f"{other}_share")
            self.require(both <= 1, f"{other}_share", f"at most 1 together with {one}_share")
        weights = self.loss_weights
        self.require(
            len(weights) == 3 and min(weights) >= 0 < weights[0], "loss_weights", "three numbers, RGB above 0"
        )
        self._check_depth()

    def _check_depth(self) -> None:
        """Check settings that need depth or placed memory."""
        self.require(bool(self.aux) or self.depth_in_memory, "depth_in_memory", "true with aux: []")
        needs = self.memory_policy != "depth_sim" or (self.aux and self.depth_in_memory)
        self.require(bool(needs), "memory_policy", "another policy than depth_sim without depth in memory")
        needs = bool(self.aux) and self.depth_in_memory
        self.require(needs or not self.placed_memory, "placed_memory", "false without depth in memory")
        self.require(
            sum(self.history_sizes) > 0 or not self.placed_memory, "history_sizes", "above 0 with placed_memory"
        )
        self.require(self.placed_warp or self.placed_memory, "placed_warp", "true without placed_memory")

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """RGB and the modalities of `aux`."""
        return MODALITIES[: 1 + len(self.aux)]

    @property
    def segments(self) -> Segments:
        """N steps in K segments."""
        return Segments(steps=self.num_inference_steps, groups=self.groups)

    def bank(self, rows: int = 1) -> MemoryBank:
        """Return an empty memory bank for a rollout of `rows` videos with these settings."""
        long, short = self.history_sizes
        sink = min(1, long) if self.keep_first_frame else 0
        return MemoryBank(
            long,
            short,
            sink,
            capacity_for(self.memory_policy, rows, long=long, short=short, sink=sink),
            self.memory_policy,
            mem_noise=self.mem_noise,
            flow_noise=self.flow_noise,
            modalities=len(self.modalities),
        )

    def placing(self) -> Placing | None:
        """Return the settings of the sights that training needs; None: no placed memory."""
        if not self.placed_memory:
            return None
        ahead = self.groups * self.causal_block_size
        return Placing(ahead=ahead, warp=self.placed_warp, depth_noise=self.placed_depth_noise)

    def rollout_settings(self) -> dict[str, object]:
        """Return the settings that a rollout with the adapter needs, by the argument names of the pipeline."""
        names = ["causal_block_size", "num_inference_steps", "history_sizes", "keep_first_frame", "memory_policy"]
        names += ["flow_noise", "depth_in_memory", "placed_memory", "placed_warp"]
        return {name: getattr(self, name) for name in names} | {
            "ar_step": self.num_inference_steps // self.groups,
            "addnoise_condition": 1000 * self.mem_noise,
        }
