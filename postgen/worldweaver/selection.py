"""Which stored frames are shown: the policies of the memory bank.

A policy is a frozen dataclass with a `name` and one method, `choose`. `register_policy` makes another one known by its
name, so that a state that was saved with it can be loaded. Of a video without end a bank keeps log-spaced frames
(`spacing_loss` says which one goes), whatever the policy.
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

_NO_DEPTH = "depth_sim compares depth latents, and frames of this memory have none: take logspace"
_NO_POSES = "the policy camera needs the camera of every frame: give poses to the rollout, or take logspace"


@dataclass(frozen=True, slots=True)
class StoredFrame:
    """One latent frame of the past, clean."""

    index: int
    """Its number in the video, in latent frames."""
    z: Tensor
    """(B, M * C, h, w) latents, modalities one after the other."""
    pose: Tensor | None
    """(B, 3, 4) camera at its last pixel frame: world-to-camera rotation (right, down, forward), position."""
    known: tuple[bool, ...]
    """Of each modality, whether it is there at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """What a policy may know of the frames that are going to be made."""

    group: int = 1
    """Latent frames of a group."""
    poses: Tensor | None = None
    """(B, T, 3, 4) their cameras, as `StoredFrame.pose`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """What is chosen from."""

    frames: Sequence[StoredFrame]
    """Old to new, without sink and short memory."""
    recent: Sequence[StoredFrame]
    """The short memory; the newest candidate where there is none."""
    modalities: int
    """M."""

    @property
    def ages(self) -> list[int]:
        """Latent frames from each candidate to the first frame of the short memory, at least 1."""
        first = self.recent[0].index
        return [max(1, first - frame.index) for frame in self.frames]

    def relative_ages(self) -> Tensor:
        """(n,) float32 ages as shares of the greatest."""
        ages = torch.tensor(self.ages, dtype=torch.float32)
        return ages / ages.max()


@runtime_checkable
class Policy(Protocol):
    """A rule for long memory. One that cannot do without depth or cameras says so: `needs`, "depth" or "poses"."""

    name: ClassVar[str]
    """By which it is asked for."""
    per_row: ClassVar[bool]
    """Whether rows of a batch may get different frames."""

    def choose(self, candidates: Candidates, count: int, query: Query) -> Tensor:
        """Return (1, count) or (B, count) different positions in `candidates.frames`, in any order.

        Args:
            candidates: at least `count` frames.
            count: how many are wanted.
            query: what is going to be made.
        """


def _nearest(count: int, targets: Sequence[float], distance: Callable[[int, float], float]) -> Tensor:
    """Return for each target the nearest of `count` things that no earlier target has taken; the newest of equals."""
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
        """Return the newest."""
        total = len(candidates.frames)
        return torch.arange(total - count, total)[None]


@dataclass(frozen=True, kw_only=True, slots=True)
class LogSpace:
    """Frames about 1, 2, 4, 8, ... groups old: much of the near past, a little of the far one.

    FramePack (arXiv:2504.12626) gives older frames fewer tokens in such a row; here the row says which frames.
    """

    name: ClassVar[str] = "logspace"
    per_row: ClassVar[bool] = False

    def choose(self, candidates: Candidates, count: int, query: Query) -> Tensor:
        """Return the frames whose ages are nearest by their logarithm."""
        ages = candidates.ages
        targets = [math.log(query.group * 2.0**power) for power in range(count)]
        return _nearest(len(ages), targets, lambda place, target: abs(math.log(ages[place]) - target))


@dataclass(frozen=True, kw_only=True, slots=True)
class Uniform:
    """Frames at equal distances over all of the past that is stored."""

    name: ClassVar[str] = "uniform"
    per_row: ClassVar[bool] = False

    def choose(self, candidates: Candidates, count: int, query: Query) -> Tensor:
        """Return the frames nearest to `count` equal parts of the past; of one frame the middle."""
        indices = [frame.index for frame in candidates.frames]
        first, last = indices[0], indices[-1]
        steps = [(place + 0.5) / count if count == 1 else place / (count - 1) for place in range(count)]
        targets = [first + (last - first) * step for step in steps]
        return _nearest(len(indices), targets, lambda place, target: abs(indices[place] - target))


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthSimilarity:
    """Frames whose depth looks like that of the short memory: places that are seen again.

    Depth drifts less than colour, so it is what is compared: cosine of the depth latents, averaged over a grid of
    cells, less a share of the relative age. Frames near a chosen one in time come last.
    """

    name: ClassVar[str] = "depth_sim"
    per_row: ClassVar[bool] = True
    needs: ClassVar[str] = "depth"

    cells: int = 8
    """Cells of the grid, in each direction."""
    age_weight: float = 0.2
    """What the oldest candidate loses."""
    apart: int | None = None
    """Latent frames between two choices; None is a group."""

    def __post_init__(self) -> None:
        check_number("cells", self.cells, 1, whole=True)
        check_number("age_weight", self.age_weight, 0, 2)
        if self.apart is not None:
            check_number("apart", self.apart, 0, whole=True)

    def choose(self, candidates: Candidates, count: int, query: Query) -> Tensor:
        """Return the best for each row, one after the other.

        Raises:
            UserError: latents without depth, or frames whose depth is unknown.
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
            # A near one may still be taken, after all others: no cosine and age differ by so much.
            score = torch.where(near, score - 8, score).scatter(1, best, -torch.inf)
        return torch.cat(chosen, 1)

    def _pooled(self, candidates: Candidates, frames: Sequence[StoredFrame]) -> Tensor:
        """Return (n, B, features) of length 1."""
        channels = frames[0].z.shape[1] // candidates.modalities
        depth = torch.stack([frame.z[:, channels : 2 * channels] for frame in frames]).float()
        cells = min(self.cells, depth.shape[-2]), min(self.cells, depth.shape[-1])
        pooled = functional.adaptive_avg_pool2d(depth.flatten(0, 1), cells).unflatten(0, depth.shape[:2])
        return functional.normalize(pooled.flatten(2), dim=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class CameraOverlap:
    """Frames that saw most of what is going to be seen, chosen one after the other (WorldMem, arXiv:2504.12369).

    Points in the view of the coming frames are counted; the frame that saw most of them, less a share of its relative
    age, is taken, and what it saw counts no more. WorldMem draws its points, these stand on a grid.
    """

    name: ClassVar[str] = "camera"
    per_row: ClassVar[bool] = True
    needs: ClassVar[str] = "poses"

    focal: float = 2.77
    """Focal length in half picture heights; the world's own."""
    aspect: float = 1.0
    """Width of the picture in heights."""
    near: float = 2.0
    """Where the view begins, in metres along the optical axis."""
    far: float = 16.0
    """Where it ends."""
    age_weight: float = 0.2
    """What the oldest candidate loses."""

    def __post_init__(self) -> None:
        for name in ("focal", "aspect", "near"):
            check_number(name, getattr(self, name), 1e-6)
        check_number("far", self.far, self.near)
        check_number("age_weight", self.age_weight, 0, 2)

    def choose(self, candidates: Candidates, count: int, query: Query) -> Tensor:
        """Return the best for each row, one after the other.

        Raises:
            UserError: a frame, or the query, without a camera.
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
        """Return (3, P) points of the view in the camera's own axes."""
        side = (torch.arange(8, dtype=torch.float64) + 0.5) / 4 - 1
        depth = torch.logspace(math.log10(self.near), math.log10(self.far), 6, dtype=torch.float64)[1:-1]
        z, v, u = torch.meshgrid(depth, side, side * self.aspect, indexing="ij")
        return torch.stack([u * z / self.focal, v * z / self.focal, z]).flatten(1)

    def _sees(self, pose: Tensor, points: Tensor) -> Tensor:
        """Return (B, P) which of the points (B, P, 3) a camera (B, 3, 4) has in view."""
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
    """Make a policy known by its name.

    Raises:
        UserError: another one has that name.
    """
    if POLICIES.setdefault(policy.name, policy) is not policy:
        raise UserError(f"a policy {policy.name!r} is there already: give yours another name")


def policy_of(given: str | Policy | Mapping[str, Any]) -> Policy:
    """Return a policy by its name, by what `policy_state` says of it, or as it is.

    Raises:
        UserError: names those that are known.
    """
    if isinstance(given, Policy) and not isinstance(given, type):
        return given
    if not isinstance(given, str | Mapping):
        raise UserError(f"memory policy {shown(given)}: give a policy, or a name of {', '.join(POLICIES)}")
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
    """Refuse a policy that needs what frames will not have.

    Raises:
        UserError: it needs cameras or depth latents, and there are none.
    """
    needs = getattr(policy, "needs", None)
    if needs == "depth" and not depth:
        raise UserError(_NO_DEPTH)
    if needs == "poses" and not posed:
        raise UserError(_NO_POSES)


def policy_state(policy: Policy) -> dict[str, Any]:
    """Return the name and settings of a policy, as JSON has them.

    Raises:
        UserError: the policy is not registered, so that it could not be made again.
    """
    if POLICIES.get(policy.name) is not type(policy):
        raise UserError(f"{type(policy).__name__} is not registered: call register_policy before a state is saved")
    settings: dict[str, Any] = asdict(policy)  # type: ignore[call-overload]  # a policy is a dataclass
    return {"name": policy.name, **settings}


def spacing_loss(older: int, newer: int) -> float:
    """Return the gap in the logarithm of the age that is left when the frame between two is dropped.

    The frame with the smallest one is evicted, so that what stays is spaced evenly by the logarithm of its age.

    Args:
        older: age of the neighbour before it, in latent frames.
        newer: age of the neighbour after it, at least 1.
    """
    return math.log(older / newer)
