"""Policies of the memory bank, which choose the stored frames for long memory.

A policy is a frozen dataclass with a `name` and one method, `choose`. `register_policy` registers a policy under its
name, so that states that were saved with the policy can be loaded. The policy does not affect which frames are stored:
for a video without end the bank keeps frames whose ages are evenly spaced on a logarithmic scale (`spacing_loss`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from postgen.errors import UserError, check_number, did_you_mean, first_line, shown

_NO_DEPTH = "depth_sim compares depth latents, but frames of this memory have no depth: choose logspace"
_NO_POSES = "the policy camera needs the camera of every frame: give poses to the rollout, or choose logspace"


@dataclass(frozen=True, slots=True)
class StoredFrame:
    """A clean latent frame of the past."""

    index: int
    """Index in the video, in latent frames."""
    z: Tensor
    """(B, M * C, h, w) latents; the channels of the modalities are concatenated."""
    pose: Tensor | None
    """(B, 3, 4) camera of its last pixel frame: world-to-camera rotation (right, down, forward) and position."""
    known: tuple[bool, ...]
    """For each modality, whether the frame has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """Description of the frames to generate, for a policy."""

    group: int = 1
    """Latent frames of a group."""
    poses: Tensor | None = None
    """(B, T, 3, 4) cameras of the frames to generate, in the format of `StoredFrame.pose`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """The frames from which a policy chooses."""

    frames: Sequence[StoredFrame]
    """Old to new, without the sink and the short memory."""
    recent: Sequence[StoredFrame]
    """Frames of short memory; without short memory, the newest candidate."""
    modalities: int
    """M, number of modalities."""

    @property
    def ages(self) -> list[int]:
        """Age of each candidate: latent frames to the first frame of short memory, at least 1."""
        first = self.recent[0].index
        return [max(1, first - frame.index) for frame in self.frames]

    def relative_ages(self) -> Tensor:
        """Return the ages divided by the greatest age, (n,) float32."""
        ages = torch.tensor(self.ages, dtype=torch.float32)
        return ages / ages.max()


@runtime_checkable
class Policy(Protocol):
    """A selection policy for long memory.

    A policy that needs depth or cameras has the class attribute `needs`, "depth" or "poses".
    """

    name: ClassVar[str]
    """Name in options and in saved states."""
    per_row: ClassVar[bool]
    """Whether the rows of a batch may get different frames."""

    def choose(self, candidates: Candidates, count: int, query: Query) -> Tensor:
        """Return different positions in `candidates.frames`, (1, count) or (B, count), in any order.

        Args:
            candidates: at least `count` frames.
            count: number of frames to choose.
            query: description of the frames to generate.
        """


def _nearest(count: int, targets: Sequence[float], distance: Callable[[int, float], float]) -> Tensor:
    """Return for each target the nearest of `count` items that is still free; of equally near items, the newest."""
    left = list(range(count))
    chosen = []
    for target in targets:
        best = min(reversed(left), key=lambda place: distance(place, target))
        left.remove(best)
        chosen.append(best)
    return torch.tensor([chosen], dtype=torch.long)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recent:
    """The frames just before the short memory."""

    name: ClassVar[str] = "recent"
    per_row: ClassVar[bool] = False

    def choose(self, candidates: Candidates, count: int, query: Query) -> Tensor:
        """Return the newest `count` frames."""
        total = len(candidates.frames)
        return torch.arange(total - count, total)[None]


@dataclass(frozen=True, kw_only=True, slots=True)
class LogSpace:
    """Frames about 1, 2, 4, 8, ... groups old: many of the near past, few of the distant past.

    FramePack (arXiv:2504.12626) gives older frames fewer tokens in such a geometric series. Here the series determines
    which frames are chosen.
    """

    name: ClassVar[str] = "logspace"
    per_row: ClassVar[bool] = False

    def choose(self, candidates: Candidates, count: int, query: Query) -> Tensor:
        """Return the frames whose ages are nearest to the targets on a logarithmic scale."""
        ages = candidates.ages
        targets = [math.log(query.group * 2.0**power) for power in range(count)]
        return _nearest(len(ages), targets, lambda place, target: abs(math.log(ages[place]) - target))


@dataclass(frozen=True, kw_only=True, slots=True)
class Uniform:
    """Frames at equal distances over the stored past."""

    name: ClassVar[str] = "uniform"
    per_row: ClassVar[bool] = False

    def choose(self, candidates: Candidates, count: int, query: Query) -> Tensor:
        """Return the frames nearest to `count` equally spaced positions; a single frame from the middle."""
        indices = [frame.index for frame in candidates.frames]
        first, last = indices[0], indices[-1]
        steps = [(place + 0.5) / count if count == 1 else place / (count - 1) for place in range(count)]
        targets = [first + (last - first) * step for step in steps]
        return _nearest(len(indices), targets, lambda place, target: abs(indices[place] - target))


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthSimilarity:
    """Frames whose depth resembles that of short memory, which finds places that the camera sees again.

    The policy compares depth because depth drifts less than colour. The score of a frame is the cosine similarity of
    the depth latents, averaged over a grid of cells, minus `age_weight` times the relative age. Frames that are close
    in time to a chosen frame are chosen last.
    """

    name: ClassVar[str] = "depth_sim"
    per_row: ClassVar[bool] = True
    needs: ClassVar[str] = "depth"

    cells: int = 8
    """Number of cells of the grid in each direction."""
    age_weight: float = 0.2
    """Amount subtracted from the score of the oldest candidate."""
    apart: int | None = None
    """Smallest distance between two chosen frames, in latent frames; None: the length of a group."""

    def __post_init__(self) -> None:
        check_number("cells", self.cells, 1, whole=True)
        check_number("age_weight", self.age_weight, 0, 2)
        if self.apart is not None:
            check_number("apart", self.apart, 0, whole=True)

    def choose(self, candidates: Candidates, count: int, query: Query) -> Tensor:
        """Choose greedily the frames with the best scores, for each row.

        Raises:
            UserError: latents without depth, or frames with unknown depth.
        """
        frames = (*candidates.frames, *candidates.recent)
        if candidates.modalities < 2 or not all(frame.known[1] for frame in frames):
            raise UserError(_NO_DEPTH)
        seen = self._pooled(candidates, candidates.frames)
        now = self._pooled(candidates, candidates.recent)
        score = torch.einsum("nbf,mbf->bnm", seen, now).mean(-1).cpu()
        score = score - self.age_weight * candidates.relative_ages()
        apart = query.group if self.apart is None else self.apart
        indices = torch.tensor([frame.index for frame in candidates.frames])
        chosen = []
        for _ in range(count):
            best = score.argmax(1, keepdim=True)
            chosen.append(best)
            near = (indices - indices[best]).abs() < apart
            # Subtract 8, more than any difference of scores, so that close frames come after all others.
            score = torch.where(near, score - 8, score).scatter(1, best, -torch.inf)
        return torch.cat(chosen, 1)

    def _pooled(self, candidates: Candidates, frames: Sequence[StoredFrame]) -> Tensor:
        """Return pooled depth features (n, B, features), normalised to length 1."""
        channels = frames[0].z.shape[1] // candidates.modalities
        depth = torch.stack([frame.z[:, channels : 2 * channels] for frame in frames]).float()
        cells = min(self.cells, depth.shape[-2]), min(self.cells, depth.shape[-1])
        pooled = functional.adaptive_avg_pool2d(depth.flatten(0, 1), cells).unflatten(0, depth.shape[:2])
        return functional.normalize(pooled.flatten(2), dim=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class CameraOverlap:
    """Frames that saw most of the coming view, chosen greedily (WorldMem, arXiv:2504.12369).

    The policy places points in the view of the coming frames. It chooses the frame that saw the largest share of the
    points, minus `age_weight` times its relative age, and then removes the points that this frame saw. WorldMem draws
    points at random; here the points are on a grid.
    """

    name: ClassVar[str] = "camera"
    per_row: ClassVar[bool] = True
    needs: ClassVar[str] = "poses"

    focal: float = 2.77
    """Focal length in units of half the picture height; the default is that of `postgen.world`."""
    aspect: float = 1.0
    """Width of the picture divided by its height."""
    near: float = 2.0
    """Distance at which the view begins, in metres along the optical axis."""
    far: float = 16.0
    """Distance at which the view ends, in metres along the optical axis."""
    age_weight: float = 0.2
    """Amount subtracted from the score of the oldest candidate."""

    def __post_init__(self) -> None:
        for name in ("focal", "aspect", "near"):
            check_number(name, getattr(self, name), 1e-6)
        check_number("far", self.far, self.near)
        check_number("age_weight", self.age_weight, 0, 2)

    def choose(self, candidates: Candidates, count: int, query: Query) -> Tensor:
        """Choose greedily the frames with the best scores, for each row.

        Raises:
            UserError: a stored frame or the query has no camera.
        """
        poses = [frame.pose for frame in candidates.frames if frame.pose is not None]
        if query.poses is None or len(poses) != len(candidates.frames):
            raise UserError(_NO_POSES)
        rotation, position = query.poses.double().cpu().split((3, 1), -1)
        points = (rotation.mT @ self._grid() + position).movedim(2, -1).flatten(1, 2)  # (B, T * P, 3)
        seen = torch.stack([self._sees(pose.double().cpu(), points) for pose in poses], 1)
        chosen = []
        left = torch.ones_like(points[..., 0], dtype=torch.bool)
        taken = torch.zeros(seen.shape[:2], dtype=torch.bool)
        for _ in range(count):
            share = (seen & left[:, None]).double().mean(-1)
            score = (share - self.age_weight * candidates.relative_ages()).masked_fill(taken, -torch.inf)
            best = score.argmax(1, keepdim=True)
            chosen.append(best)
            taken = taken.scatter(1, best, True)
            left = left & ~seen.gather(1, best[..., None].expand(-1, -1, seen.shape[-1]))[:, 0]
        return torch.cat(chosen, 1)

    def _grid(self) -> Tensor:
        """Return (3, P) points of the view in camera coordinates."""
        side = (torch.arange(8, dtype=torch.float64) + 0.5) / 4 - 1
        depth = torch.logspace(math.log10(self.near), math.log10(self.far), 6, dtype=torch.float64)[1:-1]
        z, v, u = torch.meshgrid(depth, side, side * self.aspect, indexing="ij")
        return torch.stack([u * z / self.focal, v * z / self.focal, z]).flatten(1)

    def _sees(self, pose: Tensor, points: Tensor) -> Tensor:
        """Return (B, P) bool: whether a camera (B, 3, 4) has each point of (B, P, 3) in view."""
        rotation, position = pose.split((3, 1), -1)
        x, y, z = (rotation @ (points.mT - position)).unbind(1)
        inside = (self.focal * x.abs() <= self.aspect * z) & (self.focal * y.abs() <= z)
        seen: Tensor = inside & (z >= self.near) & (z <= self.far)
        return seen


POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Recent, LogSpace, Uniform, DepthSimilarity, CameraOverlap)
}
"""Known policies by name."""


def register_policy(policy: type[Policy]) -> None:
    """Register a policy under its name.

    Raises:
        UserError: another policy has that name.
    """
    if POLICIES.setdefault(policy.name, policy) is not policy:
        raise UserError(f"a policy {policy.name!r} is already registered: choose another name")


def policy_of(given: str | Policy | Mapping[str, Any]) -> Policy:
    """Return a policy from its name, from the result of `policy_state`, or from the policy itself.

    Raises:
        UserError: an unknown name or wrong settings; the message lists the known names.
    """
    if isinstance(given, Policy) and not isinstance(given, type):
        return given
    if not isinstance(given, str | Mapping):
        raise UserError(f"memory policy {shown(given)} is not valid: give a policy, or one of {', '.join(POLICIES)}")
    settings = {"name": given} if isinstance(given, str) else dict(given)
    name = settings.pop("name", None)
    if name not in POLICIES:
        near = did_you_mean(str(name), POLICIES)
        raise UserError(f"memory policy {shown(name)} is not known: choose from {', '.join(POLICIES)}.{near}")
    try:
        return POLICIES[name](**settings)
    except TypeError as error:
        raise UserError(f"memory policy {name}: {first_line(error)}") from error


def check_needs(policy: Policy, *, posed: bool, depth: bool) -> None:
    """Check that frames will have what a policy needs.

    Raises:
        UserError: the policy needs cameras or depth latents, and the frames have none.
    """
    needs = getattr(policy, "needs", None)
    if needs == "depth" and not depth:
        raise UserError(_NO_DEPTH)
    if needs == "poses" and not posed:
        raise UserError(_NO_POSES)


def policy_state(policy: Policy) -> dict[str, Any]:
    """Return the name and settings of a policy as JSON values.

    Raises:
        UserError: the policy is not registered, so a saved state could not restore it.
    """
    if POLICIES.get(policy.name) is not type(policy):
        raise UserError(f"{type(policy).__name__} is not registered: call register_policy before saving a state")
    settings: dict[str, Any] = asdict(policy)  # type: ignore[call-overload]  # a policy is a dataclass
    return {"name": policy.name, **settings}


def spacing_loss(older: int, newer: int) -> float:
    """Return the gap between the logarithms of two ages if the frame between them is dropped.

    The bank drops the frame with the smallest gap, so that the other ages stay evenly spaced on a logarithmic scale.

    Args:
        older: age of the preceding neighbour, in latent frames.
        newer: age of the following neighbour, at least 1.
    """
    return math.log(older / newer)
