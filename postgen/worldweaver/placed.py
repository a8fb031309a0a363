"""Memory that is placed: latents of the past where coming frames will see them, by stored depth and camera.

For a coming frame the depths of all stored frames are splatted into its view, and the nearest wins; the median over
the pixels of a latent cell is the cell's depth. The centre of the cell, so deep, is a point of the world. The newest
stored frame that shows this point, and not something else in front of it, gives its latents there, bilinearly between
its cells. A cell that no frame shows is 0, and the mask says so. So latents are gathered at fractional positions;
splatting them would round to whole cells.

Storage does not grow with the video: in each voxel of the world only the newest few frames count, and a frame none of
whose cells count any more goes. Pixels of a body that moves are not placed: those through whose place another frame
has looked at something farther.

Cameras are those of `world.Frames.pose_BF34`: world-to-camera rotation (right, down, forward), position. The camera of
a latent frame is that of its last pixel frame, which of all it is nearest to what the latent shows.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Pinhole:
    """A camera's lens. Pixel centres are whole numbers, from (0, 0) in the upper left corner."""

    focal: float = 2.77
    """Focal length in half picture heights; the world's own."""
    aspect: float = 1.0
    """Width of the picture in heights."""

    def __post_init__(self) -> None:
        check_number("focal", self.focal, 1e-6)
        check_number("aspect", self.aspect, 1e-6)

    def points(self, pose: Tensor, depth: Tensor) -> Tensor:
        """Return the points of the world (..., 3, h * w) at the centres of h x w cells, depth (..., h, w) deep.

        Args:
            pose: (..., 3, 4) float64.
            depth: along the optical axis.
        """
        height, width = depth.shape[-2:]
        down = (torch.arange(height, device=pose.device, dtype=pose.dtype) * 2 + 1) / height - 1
        right = ((torch.arange(width, device=pose.device, dtype=pose.dtype) * 2 + 1) / width - 1) * self.aspect
        v, u = torch.meshgrid(down / self.focal, right / self.focal, indexing="ij")
        rays = torch.stack([u, v, torch.ones_like(u)]).flatten(1)
        rotation, position = pose.split((3, 1), -1)
        points: Tensor = rotation.mT @ (rays * depth.flatten(-2)[..., None, :]) + position
        return points

    def project(self, pose: Tensor, points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (row, column, depth) of points (..., 3, P) in a grid of cells; behind the camera the depth is < 0."""
        rotation, position = pose.split((3, 1), -1)
        x, y, z = (rotation @ (points - position)).unbind(-2)
        safe = torch.where(z > 1e-6, z, 1)
        column = ((x * self.focal / safe / self.aspect + 1) * width - 1) / 2
        row = ((y * self.focal / safe + 1) * height - 1) / 2
        return row, column, torch.where(z > 1e-6, z, -1)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A stored frame."""

    index: int
    z: Tensor
    """(B, M * C, h, w)"""
    depth: Tensor
    """(B, H, W), infinite where there is none."""
    pose: Tensor
    """(B, 3, 4) float64"""
    cell_depth: Tensor
    """(B, h, w), infinite where there is none."""
    voxel: Tensor
    """(B, h, w) int64 number of the voxel of each cell, -1 where there is none."""
    newer: Tensor
    """(B, h, w) how many newer frames have cells in that voxel."""


class PlacedMemory:
    """Stored frames with depth and camera, and what of them a coming frame will see.

    Args:
        camera: lens of all frames.
        newest: frames that count in a voxel.
        voxel: edge of a voxel, in the unit of depth and positions.
        capacity: frames that are stored at most; of more, the one goes that has the fewest cells that count.
        tolerance: share of the depth by which a stored surface may miss a point and still be it.
        coverage: share of a cell's pixels that must have depth.
        mem_noise: noise level of the gathered RGB.
        modalities: M, of the latents; what is not RGB stays clean.
        seeds: of each row's noise; None are the numbers of the rows.

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
        self.seeds = seeds
        self._frames: list[_Placed] = []

    def __len__(self) -> int:
        return len(self._frames)

    def add(self, z: Tensor, depth: Tensor, poses: Tensor, start_frame: int) -> None:
        """Store finished frames.

        Args:
            z: (B, M * C, F, h, w) clean latents.
            depth: (B, F, H, W) distance along the optical axis of the pixels that the latents show; infinite or not
                a number where there is none, as at a backdrop or where a disparity was cut.
            poses: (B, F, 3, 4) cameras.
            start_frame: number of the first frame in the video.

        Raises:
            UserError: shapes that do not fit, or a grid of pixels that is no multiple of that of the latents.
        """
        self._check(z, depth, poses)
        for place in range(z.shape[2]):
            pose = poses[:, place].to(z.device, torch.float64)
            pixels = depth[:, place].to(z.device, torch.float32)
            # Copies: views would keep the whole group.
            pixels = torch.where(pixels.isfinite() & (pixels > 0), pixels, torch.inf)
            cell_depth = self._cell_depth(pixels, z.shape[-2:])
            voxel = self._voxels(pose, cell_depth)
            frame = _Placed(
                start_frame + place, z[:, :, place].detach().clone(), pixels, pose.clone(), cell_depth, voxel,
                torch.zeros_like(voxel),
            )  # fmt: skip
            frame = self._supersede(frame)
            self._frames.append(frame)
            if len(self._frames) > self.capacity:
                counts = [int(self._counts(frame).sum()) for frame in self._frames[:-1]]
                del self._frames[counts.index(min(counts))]

    def read(self, poses: Tensor, start_frame: int) -> Tensor | None:
        """Return what is known of coming frames, (B, M * C + 1, T, h, w) float32; None where nothing is stored.

        The last channel is the mask: 1 where a stored frame shows what will be seen there. The noise of RGB depends
        on the seed of the row and on the number of the frame alone.

        Args:
            poses: (B, T, 3, 4) cameras of the coming frames.
            start_frame: number of the first of them.

        Raises:
            UserError: poses of another shape or number of rows.
        """
        if not self._frames:
            return None
        rows = len(self._frames[0].z)
        if poses.dim() != 4 or poses.shape[0] != rows or poses.shape[2:] != (3, 4):
            raise UserError(f"poses of shape {tuple(poses.shape)}: give ({rows}, frames, 3, 4)")
        poses = poses.to(self._frames[0].z.device, torch.float64)
        columns = []
        for place in range(poses.shape[1]):
            seen = torch.stack([self._seen(row, poses[row, place]) for row in range(rows)])
            columns.append(self._noised(seen, start_frame + place))
        return torch.stack(columns, 2)

    def _cell_depth(self, pixels: Tensor, grid: tuple[int, ...] | torch.Size) -> Tensor:
        """Return (..., h, w): the median depth of each cell's pixels, infinite where too few have one."""
        height, width = grid
        tall, broad = pixels.shape[-2] // height, pixels.shape[-1] // width
        blocks = pixels.unflatten(-1, (width, broad)).unflatten(-3, (height, tall)).transpose(-3, -2).flatten(-2)
        ordered = blocks.sort(-1).values
        count = ordered.isfinite().sum(-1, keepdim=True)
        # The lower one of two in the middle: a depth that is there, and never a mean over an edge.
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
        """Count a new frame in the voxels of those before it, take out what has moved, drop what counts no more."""
        kept, moved = [], torch.zeros_like(new.depth, dtype=torch.bool)
        for frame in self._frames:
            again = torch.stack([torch.isin(*pair) for pair in zip(frame.voxel, new.voxel, strict=True)])
            frame = replace(frame, newer=frame.newer + again)
            moved |= self._seen_through(new, frame)
            frame = self._without(frame, self._seen_through(frame, new))
            if bool(self._counts(frame).any()):
                kept.append(frame)
        self._frames = kept
        return self._without(new, moved)

    def _without(self, frame: _Placed, moved: Tensor) -> _Placed:
        """Return a frame some of whose pixels (B, H, W) have no depth any more."""
        if not bool(moved.any()):
            return frame
        depth = torch.where(moved, torch.inf, frame.depth)
        cell_depth = self._cell_depth(depth, frame.cell_depth.shape[-2:])
        voxel = torch.where(cell_depth.isfinite(), frame.voxel, -1)
        return replace(frame, depth=depth, cell_depth=cell_depth, voxel=voxel)

    def _seen_through(self, here: _Placed, there: _Placed) -> Tensor:
        """Return (B, H, W) the pixels of a frame behind which another one saw something: not there at its time."""
        height, width = there.depth.shape[-2:]
        finite = here.depth.isfinite()
        points = self.camera.points(here.pose, torch.where(finite, here.depth, 1).double())
        rows, columns, distance = self.camera.project(there.pose, points, height, width)
        y, x = rows.round().long(), columns.round().long()
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (distance > 0)
        # The nearest of the pixels around: at an edge a fraction of one decides what is seen.
        around = -functional.max_pool2d(-there.depth, 3, 1, 1)
        behind = around.flatten(1).gather(1, y.clamp(0, height - 1) * width + x.clamp(0, width - 1))
        through = inside & behind.isfinite() & (behind > (1 + self.tolerance) * distance)
        return through.view(finite.shape) & finite

    def _counts(self, frame: _Placed) -> Tensor:
        """Return (B, h, w) which cells count."""
        return (frame.newer < self.newest) & (frame.voxel >= 0)

    def _seen(self, row: int, pose: Tensor) -> Tensor:
        """Return (M * C + 1, h, w) of one row and camera."""
        latents = torch.stack([frame.z[row] for frame in self._frames])  # (n, M * C, h, w)
        total, channels, height, width = latents.shape
        depth = self._cell_depth(self._splat(row, pose), (height, width))
        finite = depth.isfinite()
        points = self.camera.points(pose, torch.where(finite, depth, 1).double())
        stored = torch.stack([frame.pose[row] for frame in self._frames])
        rows, columns, distance = self.camera.project(stored, points, height, width)  # (n, P) each
        y, x = rows.round().long(), columns.round().long()
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (distance > 0) & finite.flatten()
        cell = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
        own = torch.stack([frame.cell_depth[row] for frame in self._frames]).flatten(1).gather(1, cell)
        counts = torch.stack([self._counts(frame)[row] for frame in self._frames]).flatten(1).gather(1, cell)
        valid = inside & counts & ((own - distance).abs() <= self.tolerance * distance)
        order = torch.arange(1, total + 1, device=valid.device)[:, None]
        newest = (valid * order).argmax(0, keepdim=True)
        mask = valid.any(0)
        found = self._gather(latents, newest[0], rows.gather(0, newest)[0], columns.gather(0, newest)[0])
        found = torch.where(mask, found, 0)
        return torch.cat([found, mask[None].to(found.dtype)]).view(channels + 1, height, width)

    def _splat(self, row: int, pose: Tensor) -> Tensor:
        """Return (H, W) the nearest depth that falls on each pixel of a coming frame, infinite where none does."""
        height, width = self._frames[0].depth.shape[-2:]
        target = torch.full((height * width,), torch.inf, device=pose.device)
        for frame in self._frames:
            shape = frame.voxel.shape[-2:]
            counts = self._counts(frame)[row]
            counts = counts.repeat_interleave(height // shape[0], 0).repeat_interleave(width // shape[1], 1)
            depth = frame.depth[row]
            known = (depth.isfinite() & counts).flatten()
            points = self.camera.points(frame.pose[row], torch.where(depth.isfinite(), depth, 1).double())
            rows, columns, distance = self.camera.project(pose, points[:, known], height, width)
            y, x = rows.round().long(), columns.round().long()
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (distance > 0)
            # The least of all that fall there: no order of writes.
            place, value = (y * width + x)[inside], distance[inside].to(target)
            target = target.scatter_reduce(0, place, value, "amin")
        return target.view(height, width)

    def _gather(self, latents: Tensor, source: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return (M * C, P) latents of the frames (P,) at fractional cells; beyond the edge the edge goes on."""
        height, width = latents.shape[-2:]
        rows, columns = _snapped(rows), _snapped(columns)
        top, left = rows.floor(), columns.floor()
        down, right = (rows - top).float(), (columns - left).float()
        found = torch.zeros(latents.shape[1], len(source), device=latents.device)
        for y, x, weight in (
            (top, left, (1 - down) * (1 - right)),
            (top, left + 1, (1 - down) * right),
            (top + 1, left, down * (1 - right)),
            (top + 1, left + 1, down * right),
        ):
            corner = latents[source, :, y.long().clamp(0, height - 1), x.long().clamp(0, width - 1)].T.float()
            found = found + weight * corner
        return found

    def _noised(self, seen: Tensor, frame: int) -> Tensor:
        """Put noise on the RGB (B, M * C + 1, h, w) of a coming frame where there is something."""
        if not self.mem_noise:
            return seen
        channels = (seen.shape[1] - 1) // self.modalities
        rgb, mask = seen[:, :channels], seen[:, -1:]
        rows = range(len(seen)) if self.seeds is None else self.seeds
        seeds = [seed_of(row, "step", frame) for row in rows]
        noise = normal(rgb.shape[1:], seeds, seen.device)
        rgb = mask * ((1 - self.mem_noise) * rgb + self.mem_noise * noise)
        return torch.cat([rgb, seen[:, channels:]], 1)

    def _check(self, z: Tensor, depth: Tensor, poses: Tensor) -> None:
        rows, frames = z.shape[0], z.shape[2] if z.dim() == 5 else 0
        if z.dim() != 5 or depth.dim() != 4 or depth.shape[:2] != (rows, frames):
            raise UserError(
                f"latents of shape {tuple(z.shape)} and depth of {tuple(depth.shape)}: give (batch, channels, frames,"
                " h, w) and (batch, frames, H, W)"
            )
        if poses.shape != (rows, frames, 3, 4):
            raise UserError(f"poses of shape {tuple(poses.shape)}: give ({rows}, {frames}, 3, 4)")
        if depth.shape[2] % z.shape[3] or depth.shape[3] % z.shape[4] or z.shape[1] % self.modalities:
            raise UserError(
                f"depth of {tuple(depth.shape[2:])} pixels for {tuple(z.shape[3:])} cells and {z.shape[1]} channels:"
                f" give whole cells and {self.modalities} equal modalities"
            )
        if self.seeds is not None and len(self.seeds) != rows:
            raise UserError(f"{len(self.seeds)} seeds for {rows} rows: give one for each")
        if self._frames and (z.shape[3:], rows) != (self._frames[0].z.shape[2:], len(self._frames[0].z)):
            raise UserError(f"latents of shape {tuple(z.shape)} for a memory of {tuple(self._frames[0].z.shape)}")

    def state_dict(self) -> dict[str, Tensor]:
        """Return the stored frames as tensors by name, for `RolloutState.extra`; empty where there are none."""
        if not self._frames:
            return {}
        names = ("z", "depth", "pose", "cell_depth", "voxel", "newer")
        tensors = {f"placed.{name}": torch.stack([getattr(frame, name) for frame in self._frames]) for name in names}
        return tensors | {"placed.index": torch.tensor([frame.index for frame in self._frames])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the frames that `state_dict` returned; other names are left alone, tensors are copied."""
        self._frames = []
        for place, index in enumerate(state["placed.index"].tolist() if "placed.index" in state else ()):
            parts = [state[f"placed.{name}"][place].clone() for name in ("z", "depth", "pose")]
            kept = [state[f"placed.{name}"][place].clone() for name in ("cell_depth", "voxel", "newer")]
            self._frames.append(_Placed(index, *parts, *kept))


def _snapped(positions: Tensor) -> Tensor:
    """Return positions in cells, those next to a whole number as that: the same view gives the same bits."""
    whole = positions.round()
    return torch.where((positions - whole).abs() < 1e-6, whole, positions)
