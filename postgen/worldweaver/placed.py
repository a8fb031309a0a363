"""Placed memory: latents of past frames, placed where coming frames will see them, by stored depth and cameras.

The lookup for a coming frame has three steps:

1. Splat the depths of all stored frames into the view of the coming frame; the nearest depth wins. The depth of a
   latent cell is the median over its pixels.
2. The centre of the cell at that depth is a point of the world. Find the newest stored frame that shows this point and
   not something else in front of it.
3. Interpolate the latents of that stored frame bilinearly at the position of the point.

A cell that no stored frame shows is 0, and the mask marks it. Latents are gathered at fractional positions, because
splatting latents would round positions to whole cells.

Storage does not grow with the video. In each voxel of the world only the cells of the newest few frames are active; a
frame without active cells is dropped. Pixels of moving bodies are not placed: a pixel is removed if another frame has
seen something farther through its position.

Cameras are those of `world.Frames.pose_BF34`: world-to-camera rotation (right, down, forward) and position. The camera
of a latent frame is that of its last pixel frame, which best matches what the latent shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from postgen.errors import UserError, check_number
from postgen.sampling.seeds import normal, seed_of

from .pinhole import Pinhole
from .sights import gathered, rounded, snapped, with_noise


@dataclass(frozen=True, slots=True)
class _Placed:
    """A stored latent frame."""

    index: int
    z: Tensor
    """(B, M * C, h, w)"""
    depth: Tensor
    """(B, H, W), infinite where unknown."""
    pose: Tensor
    """(B, 3, 4) float64"""
    cell_depth: Tensor
    """(B, h, w), infinite where unknown."""
    voxel: Tensor
    """(B, h, w) int64 number of the voxel of each cell, -1 where unknown."""
    newer: Tensor
    """(B, h, w) number of newer frames with cells in the voxel of each cell."""


class PlacedMemory:
    """Stores frames with depth and camera, and returns the latents that coming frames will see.

    Args:
        camera: intrinsics of all frames.
        newest: number of frames whose cells are active in a voxel.
        voxel: edge of a voxel, in the unit of depth and positions.
        capacity: largest number of stored frames. If it is exceeded, the frame with the fewest active cells, over all
            rows together, is dropped.
        tolerance: largest relative difference in depth at which a stored surface counts as the same point.
        coverage: smallest share of a cell's pixels that must have depth.
        mem_noise: noise level of the gathered RGB.
        warp: False returns the stored frame that shows most of a coming frame, without warping. It is the baseline to
            which warping is compared.
        modalities: M, number of modalities in the latents. Modalities other than RGB stay clean.
        seeds: seed of the noise of each row; None: the row numbers.

    Raises:
        UserError: numbers out of range.
    """

    def __init__(
        self,
        camera: Pinhole | None = None,
        *,
        newest: int = 2,
        voxel: float = 0.25,
        capacity: int = 64,
        tolerance: float = 0.08,
        coverage: float = 0.4,
        mem_noise: float = 0.12,
        modalities: int = 2,
        warp: bool = True,
        seeds: Sequence[int] | None = None,
    ) -> None:
        check_number("newest", newest, 1, whole=True)
        check_number("voxel", voxel, 1e-6)
        check_number("capacity", capacity, 1, whole=True)
        check_number("tolerance", tolerance, 0, 1)
        check_number("coverage", coverage, 0, 1)
        check_number("mem_noise", mem_noise, 0, 1)
        check_number("modalities", modalities, 1, 3, whole=True)
        self.camera = Pinhole() if camera is None else camera
        self.newest, self.voxel, self.capacity = newest, voxel, capacity
        self.tolerance, self.coverage, self.mem_noise, self.modalities = tolerance, coverage, mem_noise, modalities
        self.seeds, self.warp = seeds, warp
        self._frames: list[_Placed] = []

    def __len__(self) -> int:
        return len(self._frames)

    def add(self, z: Tensor, depth: Tensor, poses: Tensor, start_frame: int) -> None:
        """Store finished frames. If an error occurs, no frame is stored.

        Args:
            z: (B, M * C, F, h, w) clean latents.
            depth: (B, F, H, W) distance along the optical axis of the last pixel frame of each latent frame. Infinite
                or NaN where unknown, for example at a backdrop or where a disparity was clamped.
            poses: (B, F, 3, 4) cameras.
            start_frame: index in the video of the first frame.

        Raises:
            UserError: shapes that do not match, or a pixel grid that is not a multiple of the latent grid.
        """
        self._check(z, depth, poses)
        before = list(self._frames)
        try:
            for place in range(z.shape[2]):
                pose = poses[:, place].to(z.device, torch.float64)
                self._add(z[:, :, place], depth[:, place].to(z.device, torch.float32), pose, start_frame + place)
        except BaseException:
            self._frames = before
            raise

    def _add(self, z: Tensor, depth: Tensor, pose: Tensor, index: int) -> None:
        # Clone: views would keep the latents of the whole group in memory.
        pixels = torch.where(depth.isfinite() & (depth > 0), depth, torch.inf)
        cell_depth = self._cell_depth(pixels, z.shape[-2:])
        voxel = self._voxels(pose, cell_depth)
        kept = (z.detach().clone(), pixels, pose.clone(), cell_depth, voxel, torch.zeros_like(voxel))
        frame = self._supersede(_Placed(index, *kept))
        self._frames.append(frame)
        if len(self._frames) > self.capacity:
            counts = [int(self._counts(frame).sum()) for frame in self._frames[:-1]]
            del self._frames[counts.index(min(counts))]

    def read(self, poses: Tensor, start_frame: int) -> Tensor | None:
        """Return the known latents of coming frames, (B, M * C + 1, T, h, w) float32; None: nothing is stored.

        The last channel is the mask: 1 where a stored frame shows what will be seen there. The noise of RGB depends
        only on the seed of the row and on the frame number.

        Args:
            poses: (B, T, 3, 4) cameras of the coming frames.
            start_frame: index in the video of the first coming frame.

        Raises:
            UserError: poses of a wrong shape or number of rows.
        """
        sight = self._sight(poses)
        if sight is None:
            return None
        seen = gathered(torch.stack([frame.z for frame in self._frames], 2), sight)
        return self._noised(seen, start_frame)

    def find(self, poses: Tensor) -> Tensor | None:
        """Return the sight of coming frames (see `sights`), with frame numbers of the video; None: nothing is stored.

        Args:
            poses: (B, T, 3, 4) cameras of the coming frames.

        Raises:
            UserError: as in `read`.
        """
        sight = self._sight(poses)
        if sight is None:
            return None
        numbers = sight.new_tensor([frame.index for frame in self._frames])
        source = sight[:, :, :1]
        return torch.cat([torch.where(source >= 0, numbers[source.clamp_min(0).long()], source), sight[:, :, 1:]], 2)

    def _cell_depth(self, pixels: Tensor, grid: tuple[int, ...] | torch.Size) -> Tensor:
        """Return the median depth of each cell's pixels, (..., h, w); infinite where too few pixels have depth."""
        height, width = grid
        tall, broad = pixels.shape[-2] // height, pixels.shape[-1] // width
        blocks = pixels.unflatten(-1, (width, broad)).unflatten(-3, (height, tall)).transpose(-3, -2).flatten(-2)
        ordered = blocks.sort(-1).values
        count = ordered.isfinite().sum(-1, keepdim=True)
        # For an even count take the lower middle value: it is a depth that occurs, not a mean across an edge.
        median = ordered.gather(-1, ((count - 1) // 2).clamp_min(0))
        return torch.where(count >= max(1, self.coverage * blocks.shape[-1]), median, torch.inf)[..., 0]

    def _voxels(self, pose: Tensor, cell_depth: Tensor) -> Tensor:
        finite = cell_depth.isfinite()
        points = self.camera.points(pose, torch.where(finite, cell_depth, 1).double())
        place = (points / self.voxel).floor().long().clamp(-(2**20), 2**20 - 1) + 2**20
        x, y, z = place.unbind(1)
        number = ((x << 42) | (y << 21) | z).view(finite.shape)
        return torch.where(finite, number, -1)

    def _supersede(self, new: _Placed) -> _Placed:
        """Update the stored frames for a new frame, and return the new frame without pixels that have moved.

        The update counts the new frame in the voxels of stored frames, removes pixels that have moved, and drops
        frames without active cells.
        """
        kept, moved = [], torch.zeros_like(new.depth, dtype=torch.bool)
        for frame in self._frames:
            # Skip rows without active cells: for such a row alone the frame would already have been dropped.
            tells = self._counts(frame).flatten(1).any(1)[:, None, None]
            frame = replace(frame, newer=frame.newer + _among(frame.voxel, new.voxel))
            moved |= self._seen_through(new, frame) & tells
            frame = self._without(frame, self._seen_through(frame, new))
            if bool(self._counts(frame).any()):
                kept.append(frame)
        self._frames = kept
        return self._without(new, moved)

    def _without(self, frame: _Placed, moved: Tensor) -> _Placed:
        """Return a frame without the depth of the pixels `moved` (B, H, W)."""
        if not bool(moved.any()):
            return frame
        depth = torch.where(moved, torch.inf, frame.depth)
        cell_depth = self._cell_depth(depth, frame.cell_depth.shape[-2:])
        voxel = torch.where(cell_depth.isfinite(), frame.voxel, -1)
        return replace(frame, depth=depth, cell_depth=cell_depth, voxel=voxel)

    def _seen_through(self, here: _Placed, there: _Placed) -> Tensor:
        """Return the pixels (B, H, W) of `here` through whose position `there` saw something farther.

        At the time of `there` nothing was at these positions.
        """
        height, width = there.depth.shape[-2:]
        finite = here.depth.isfinite()
        points = self.camera.points(here.pose, torch.where(finite, here.depth, 1).double())
        rows, columns, distance = self.camera.project(there.pose, points, height, width)
        place, inside = rounded(rows, columns, height, width)
        # Compare with the nearest depth of the 3 x 3 pixels, because at an edge sub-pixel offsets change the depth.
        around = -functional.max_pool2d(-there.depth, 3, 1, 1)
        behind = around.flatten(1).gather(1, place)
        through = inside & (distance > 0) & behind.isfinite() & (behind > (1 + self.tolerance) * distance)
        return through.view(finite.shape) & finite

    def _counts(self, frame: _Placed) -> Tensor:
        """Return the active cells, (B, h, w) bool."""
        return (frame.newer < self.newest) & (frame.voxel >= 0)

    def _sight(self, poses: Tensor) -> Tensor | None:
        """Return the sight of coming frames, with frame numbers of the store; None: nothing is stored."""
        if not self._frames:
            return None
        rows, (height, width) = len(self._frames[0].z), self._frames[0].z.shape[-2:]
        if poses.dim() != 4 or poses.shape[0] != rows or poses.shape[2:] != (3, 4):
            raise UserError(f"poses have shape {tuple(poses.shape)}: give ({rows}, frames, 3, 4)")
        poses = poses.to(self._frames[0].z.device, torch.float64)
        # The point of the world that each cell of a coming frame shows.
        depth = self._cell_depth(self._splat(poses), (height, width))  # (B, T, h, w)
        finite = depth.isfinite()
        points = self.camera.points(poses, torch.where(finite, depth, 1).double())
        # The position of each point in every stored frame, and whether the stored frame shows the point there.
        stored = torch.stack([frame.pose for frame in self._frames])[:, :, None]
        row, column, distance = self.camera.project(stored, points, height, width)  # (n, B, T, P) each
        cell, inside = rounded(row, column, height, width)
        own = torch.stack([frame.cell_depth for frame in self._frames]).flatten(2)
        counts = torch.stack([self._counts(frame) for frame in self._frames]).flatten(2)
        own, counts = (each.gather(2, cell.flatten(2)).view_as(cell) for each in (own, counts))
        valid = inside & (distance > 0) & finite.flatten(2) & counts
        valid &= (own - distance).abs() <= self.tolerance * distance
        order = torch.arange(1, len(valid) + 1, device=valid.device)[:, None, None, None]
        if not self.warp:
            return self._whole(valid.sum(-1, keepdim=True), order)
        # Choose the newest of these frames.
        newest = (valid * order).argmax(0, keepdim=True)
        source = torch.where(valid.any(0), newest[0], -1)
        parts = [source, *(snapped(each.gather(0, newest)[0]) for each in (row, column))]
        sight: Tensor = torch.stack([part.float() for part in parts], 2).unflatten(3, (height, width))
        return sight

    def _whole(self, seen: Tensor, order: Tensor) -> Tensor:
        """Return the sight of the stored frame that shows most cells, unwarped. `seen` counts cells, (n, B, T, 1)."""
        height, width = self._frames[0].z.shape[-2:]
        best = (seen * len(seen) + order).argmax(0)[..., None]  # of equal counts, the newest frame
        source = torch.where(seen.any(0)[..., None], best, -1).float().expand(-1, -1, height, width)
        y, x = (torch.arange(size, device=seen.device).float() for size in (height, width))
        rows, columns = (each.expand_as(source) for each in torch.meshgrid(y, x, indexing="ij"))
        return torch.stack([source, rows, columns], 2)

    def _splat(self, poses: Tensor) -> Tensor:
        """Return the nearest depth at each pixel of coming frames, (B, T, H, W); infinite where unknown."""
        height, width = self._frames[0].depth.shape[-2:]
        target = torch.full((*poses.shape[:2], height * width), torch.inf, device=poses.device)
        for frame in self._frames:
            shape = frame.voxel.shape[-2:]
            counts = self._counts(frame)
            counts = counts.repeat_interleave(height // shape[0], 1).repeat_interleave(width // shape[1], 2)
            finite = frame.depth.isfinite()
            points = self.camera.points(frame.pose, torch.where(finite, frame.depth, 1).double())[:, None]
            rows, columns, distance = self.camera.project(poses, points, height, width)
            place, inside = rounded(rows, columns, height, width)
            known = inside & (distance > 0) & (finite & counts).flatten(1)[:, None]
            # The minimum over all points at a pixel does not depend on the order of writes.
            target = target.scatter_reduce(2, place, torch.where(known, distance, torch.inf).to(target), "amin")
        nearest: Tensor = target.unflatten(2, (height, width))
        return nearest

    def _noised(self, seen: Tensor, start: int) -> Tensor:
        """Add noise to the RGB channels of (B, M * C + 1, T, h, w) where cells are known."""
        if not self.mem_noise:
            return seen
        channels = (seen.shape[1] - 1) // self.modalities
        rows = range(len(seen)) if self.seeds is None else self.seeds
        shape = (channels, *seen.shape[3:])
        noise = [
            normal(shape, [seed_of(row, "step", start + place) for row in rows], seen.device)
            for place in range(seen.shape[2])
        ]
        return with_noise(seen, self.mem_noise, torch.stack(noise, 2))

    def _check(self, z: Tensor, depth: Tensor, poses: Tensor) -> None:
        rows, frames = z.shape[0], z.shape[2] if z.dim() == 5 else 0
        if z.dim() != 5 or depth.dim() != 4 or depth.shape[:2] != (rows, frames):
            raise UserError(
                f"latents have shape {tuple(z.shape)} and depth has {tuple(depth.shape)}: give (batch, channels,"
                " frames, h, w) and (batch, frames, H, W)"
            )
        if poses.shape != (rows, frames, 3, 4):
            raise UserError(f"poses have shape {tuple(poses.shape)}: give ({rows}, {frames}, 3, 4)")
        if depth.shape[2] % z.shape[3] or depth.shape[3] % z.shape[4] or z.shape[1] % self.modalities:
            raise UserError(
                f"depth has {tuple(depth.shape[2:])} pixels for {tuple(z.shape[3:])} cells and {z.shape[1]} channels:"
                f" give a multiple of the cells, and channels of {self.modalities} equal modalities"
            )
        if self.seeds is not None and len(self.seeds) != rows:
            raise UserError(f"{len(self.seeds)} seeds for {rows} rows: give one seed for each row")
        if self._frames and (z.shape[3:], rows) != (self._frames[0].z.shape[2:], len(self._frames[0].z)):
            raise UserError(
                f"latents have shape {tuple(z.shape)}, stored frames have {tuple(self._frames[0].z.shape)}: give the"
                " same rows and size"
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Return the stored frames as named tensors for `RolloutState.extra`; empty if nothing is stored."""
        if not self._frames:
            return {}
        names = ("z", "depth", "pose", "cell_depth", "voxel", "newer")
        tensors = {f"placed.{name}": torch.stack([getattr(frame, name) for frame in self._frames]) for name in names}
        return tensors | {"placed.index": torch.tensor([frame.index for frame in self._frames])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the frames from `state_dict`. Other entries are ignored; tensors are copied."""
        self._frames = []
        for place, index in enumerate(state["placed.index"].tolist() if "placed.index" in state else ()):
            parts = [state[f"placed.{name}"][place].clone() for name in ("z", "depth", "pose")]
            kept = [state[f"placed.{name}"][place].clone() for name in ("cell_depth", "voxel", "newer")]
            self._frames.append(_Placed(index, *parts, *kept))


def _among(voxels: Tensor, others: Tensor) -> Tensor:
    """Return which voxels (B, h, w) also occur in `others` of the same row, (B, h, w) bool."""
    ordered, wanted = others.flatten(1).sort(1).values, voxels.flatten(1)
    place = torch.searchsorted(ordered, wanted).clamp_max(ordered.shape[1] - 1)
    return (ordered.gather(1, place) == wanted).view_as(voxels)
