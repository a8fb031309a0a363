"""The memory bank: clean latent frames of the past, from which a fixed number is put in front of the frames in flight.

Long memory has clean depth and noise on its RGB; the noise hides colour errors that accumulate over the video. Short
memory, the frames just before the frames in flight, is clean in every modality (WorldWeaver, arXiv:2508.15720). The
first frames of the video may be a sink, which is always part of long memory. The number of selected frames and the
number of stored frames do not grow with the length of the video.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError, check_number, shown
from postgen.sampling.seeds import seed_of

from .levels import MODALITIES, FrameLevels, Modality, Role
from .selection import Candidates, Policy, Query, StoredFrame, check_needs, policy_of, policy_state, spacing_loss

AlphaBar = Callable[[Tensor], Tensor]
"""Function from noise levels to alpha-bar, `Denoiser.alpha_bar`, for models that are not flow models."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryWindow:
    """The T selected frames in this order: sink, long memory from old to new, short memory."""

    z: Tensor
    """(B, M * C, T, h, w) float32 latents, with noise."""
    levels: FrameLevels
    """Noise level of each frame and modality."""
    frame_index: Tensor
    """(B, T) int64 index in the video of each frame."""


CAPACITY = 64
"""Usual number of stored frames."""


def capacity_for(policy: str | Policy, rows: int, *, long: int, short: int, sink: int) -> int:
    """Return a capacity that can hold the selections of a whole batch: `CAPACITY`, or more if they may need more.

    Policies that choose other frames for each row need more stored frames the more rows there are.

    Args:
        policy: the selection policy, or its name.
        rows: B, number of rows of the batch.
        long: as in `MemoryBank`.
        short: as in `MemoryBank`.
        sink: as in `MemoryBank`.
    """
    return max(CAPACITY, _least(policy_of(policy), rows, long, short, sink))


def _least(policy: Policy, rows: int, long: int, short: int, sink: int) -> int:
    # The new frame is stored before a frame is dropped, so one stored frame must be free to drop.
    return sink + (long - sink) * (rows if policy.per_row else 1) + max(1, short)


class MemoryBank:
    """Stores clean latent frames, from which `select` chooses `long + short`.

    Args:
        long: number of selected frames of long memory, including the sink.
        short: number of frames of short memory.
        sink: number of first frames of the video that are always in long memory.
        capacity: largest number of stored frames.
        policy: selection policy of long memory, or its name.
        mem_noise: noise level of RGB in long memory.
        flow_noise: noise level of optical flow in long memory, if the model has flow.
        modalities: M, number of modalities in the latents.
        hidden: modalities that are replaced by pure noise in every selected frame.
        device: device of the stored frames; None: the device of the added frames.
        dtype: dtype of the stored frames, or its name such as "bfloat16"; None: the dtype of the added frames.

    Raises:
        UserError: numbers out of range, a sink longer than long memory, or a capacity below `long + short`.
    """

    def __init__(
        self,
        long: int = 4,
        short: int = 2,
        sink: int = 1,
        capacity: int = CAPACITY,
        policy: str | Policy | Mapping[str, Any] = "logspace",
        mem_noise: float = 0.12,
        *,
        flow_noise: float = 0.5,
        modalities: int = 2,
        hidden: Sequence[Modality] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        check_number("long", long, 0, whole=True)
        check_number("short", short, 0, whole=True)
        check_number("sink", sink, 0, long, whole=True)
        check_number("capacity", capacity, long + max(1, short), whole=True)
        check_number("mem_noise", mem_noise, 0, 1)
        check_number("flow_noise", flow_noise, 0, 1)
        check_number("modalities", modalities, 1, len(MODALITIES), whole=True)
        self.long, self.short, self.sink, self.capacity = long, short, sink, capacity
        self.policy = policy_of(policy)
        self._check_modalities("hidden", hidden, modalities)
        self.hidden = tuple(name for name in MODALITIES if name in hidden)
        self.mem_noise, self.flow_noise, self.modalities = mem_noise, flow_noise, modalities
        self.device = None if device is None else torch.device(device)
        self.dtype: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.generators: list[torch.Generator] = []
        self._frames: list[StoredFrame] = []
        self._selected: set[int] = set()

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def frame_index(self) -> tuple[int, ...]:
        """Indices in the video of the stored frames, old to new."""
        return tuple(frame.index for frame in self._frames)

    def seed(self, seeds: Sequence[int]) -> None:
        """Seed the noise generator of each row. Without this call, row b has a seed derived from b."""
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def reset(self) -> None:
        """Delete all frames, the selection and the seeds."""
        self.generators, self._frames, self._selected = [], [], set()

    def check_rows(self, rows: int, *, posed: bool, unknown: Collection[Modality] = ()) -> None:
        """Check before a rollout that the bank can serve it to the end of the video.

        Args:
            rows: B.
            posed: whether frames have cameras.
            unknown: modalities that some of the stored frames do not have.

        Raises:
            UserError: the policy needs depth or cameras that the frames do not have, or the capacity is too small for
                the selections of all rows.
        """
        self._check_capacity(rows)
        depthless = self.modalities < 2 or "depth" in {*unknown, *self.hidden}
        if self.long > self.sink:
            check_needs(self.policy, posed=posed, depth=not depthless)

    def add(
        self, z: Tensor, start_frame: int, *, poses: Tensor | None = None, unknown: Collection[Modality] = ()
    ) -> None:
        """Store finished frames.

        If the capacity is exceeded, other frames are dropped, but never the sink, the short memory, or the current
        selection of long memory.

        Args:
            z: (B, M * C, F, h, w) clean latents.
            start_frame: index in the video of the first of the frames, in latent frames.
            poses: (B, F, 3, 4) cameras of the frames, see `StoredFrame.pose`.
            unknown: modalities that the frames do not have, for example the depth of a given picture. `select`
                returns pure noise for these modalities.

        Raises:
            UserError: frames that are not later than the stored frames, latents of another size, unknown RGB, or a
                batch whose selections exceed the capacity.
        """
        if not self.long + self.short:
            return
        self._check(z, start_frame, poses, unknown)
        noise = {*unknown, *self.hidden}
        known = tuple(modality not in noise for modality in MODALITIES[: self.modalities])
        for place in range(z.shape[2]):
            # Clone: a view would keep the latents of the whole group in memory.
            frame = z[:, :, place].detach().clone().to(device=self.device, dtype=self.dtype)
            pose = None if poses is None else poses[:, place].detach().clone().to(self.device)
            self._frames.append(StoredFrame(start_frame + place, frame, pose, known))
            if len(self._frames) > self.capacity:
                self._evict()

    def select(
        self,
        query: Query | None = None,
        *,
        device: torch.device | str | None = None,
        alpha_bar: AlphaBar | None = None,
    ) -> MemoryWindow | None:
        """Return the memory window for the next shift, with new noise. Call it once per shift, not once per step.

        The window has `long + short` frames, or all stored frames while there are fewer. An empty bank returns None.
        Every row draws its noise from its own generator, so its noise does not depend on the other rows.

        Args:
            query: description of the frames to generate.
            device: device of the window; None: the device of the stored frames.
            alpha_bar: required for models that are not flow models.
        """
        if not self._frames:
            return None
        rows = len(self._frames[0].z)
        order = self._order(query or Query()).expand(rows, -1)
        long = max(0, order.shape[1] - self.short)
        self._selected = {self._frames[place].index for place in order[:, :long].flatten().tolist()}
        clean = torch.stack(
            [torch.stack([self._frames[place].z[row] for place in line], 1) for row, line in enumerate(order.tolist())]
        ).to(device=device or self._frames[0].z.device, dtype=torch.float32)
        levels = self._levels(order, clean.device)
        index = torch.tensor(self.frame_index)[order]
        return MemoryWindow(z=self._noised(clean, levels, alpha_bar), levels=levels, frame_index=index)

    def _order(self, query: Query) -> Tensor:
        """Return the positions of the selected frames among the stored ones, (1, T) or (B, T)."""
        total = len(self._frames)
        if total <= self.long + self.short:
            return torch.arange(total)[None]
        end = total - self.short
        middle = self._frames[self.sink : end]
        recent = self._frames[end:] or middle[-1:]
        candidates = Candidates(frames=middle, recent=recent, modalities=self.modalities)
        count = self.long - self.sink
        chosen = self.policy.choose(candidates, count, query) if count else torch.empty(1, 0, dtype=torch.long)
        chosen = chosen.sort(1).values + self.sink
        ends = [torch.arange(self.sink), torch.arange(end, total)]
        first, last = (part.expand(len(chosen), -1) for part in ends)
        return torch.cat([first, chosen, last], 1)

    def _levels(self, order: Tensor, device: torch.device) -> FrameLevels:
        long = max(0, order.shape[1] - self.short)
        role = torch.full((order.shape[1],), Role.SHORT)
        role[:long] = Role.LONG
        sigma = torch.zeros(*order.shape, self.modalities)
        noise = (self.mem_noise, 0.0, self.flow_noise)[: self.modalities]
        sigma[:, :long] = torch.tensor(noise)
        known = torch.tensor([frame.known for frame in self._frames])[order]
        sigma = torch.where(known, sigma, 1.0)
        return FrameLevels(sigma=sigma.to(device), role=role.to(device))

    def _noised(self, clean: Tensor, levels: FrameLevels, alpha_bar: AlphaBar | None) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        if not bool(levels.sigma.any()):
            return clean
        if not self.generators:
            self.seed([seed_of(0, "step", row) for row in range(len(clean))])
        noise = randn_tensor(clean.shape, generator=self.generators, device=clean.device, dtype=clean.dtype)
        sigma = levels.sigma.double()
        if alpha_bar is None:
            a, b = 1 - sigma, sigma
        else:
            bar = torch.where(sigma > 0, alpha_bar(sigma).to(sigma), 1.0)
            a, b = bar.sqrt(), (1 - bar).sqrt()
        a, b = (self._wide(factor, clean) for factor in (a, b))
        # Exact where the level is 0: 1 z + 0 e is z, bit by bit.
        noised: Tensor = a * clean + b * noise
        return noised

    def _wide(self, factor: Tensor, like: Tensor) -> Tensor:
        """Expand factors (B, T, M) to (B, M * C, T, 1, 1)."""
        each = like.shape[1] // self.modalities
        return factor.to(like.dtype).movedim(2, 1).repeat_interleave(each, 1)[..., None, None]

    def _evict(self) -> None:
        """Drop the frame whose removal leaves the logarithms of the ages most evenly spaced."""
        newest = self._frames[-1].index
        total = len(self._frames)
        losses = []
        for place in range(self.sink, total - max(1, self.short)):
            if self._frames[place].index not in self._selected:
                older = self._frames[place - 1].index if place else -1
                newer = self._frames[place + 1].index
                losses.append((spacing_loss(newest - older + 1, newest - newer + 1), place))
        del self._frames[min(losses)[1]]

    def _check(self, z: Tensor, start_frame: int, poses: Tensor | None, unknown: Collection[Modality]) -> None:
        if z.dim() != 5 or z.shape[1] % self.modalities or not z.shape[2]:
            raise UserError(
                f"latents for the memory have shape {tuple(z.shape)}: give (batch, channels of {self.modalities}"
                " modalities, frames, height, width) with at least one frame"
            )
        self._check_modalities("unknown", unknown, self.modalities)
        if poses is not None and poses.shape != (z.shape[0], z.shape[2], 3, 4):
            raise UserError(f"poses have shape {tuple(poses.shape)}: give ({z.shape[0]}, {z.shape[2]}, 3, 4)")
        last = self._frames[-1] if self._frames else None
        if start_frame < 0 or (last and start_frame <= last.index):
            newest = last.index if last else -1
            raise UserError(
                f"frames from {start_frame} on cannot be added after frame {newest} of the memory: add them in order"
            )
        if last and z[:, :, 0].shape != last.z.shape:
            raise UserError(
                f"frames have shape {tuple(z[:, :, 0].shape)}, stored frames have {tuple(last.z.shape)}: add frames of"
                " the same shape"
            )
        self._check_capacity(len(z))

    def _check_capacity(self, rows: int) -> None:
        if (least := _least(self.policy, rows, self.long, self.short, self.sink)) > self.capacity:
            raise UserError(
                f"a memory of {self.capacity} frames cannot hold the selections of {rows} rows, which may need"
                f" {least}: raise capacity"
            )

    @staticmethod
    def _check_modalities(what: str, names: Collection[str], count: int) -> None:
        if wrong := [name for name in names if name == "rgb" or name not in MODALITIES[:count]]:
            raise UserError(
                f"{what} modalities {wrong} are not allowed: choose from {', '.join(MODALITIES[1:count]) or 'none'}"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments as JSON values, without the device: `MemoryBank(**settings)` makes an equal bank."""
        names = ("long", "short", "sink", "capacity", "mem_noise", "flow_noise", "modalities")
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        told = {"policy": policy_state(self.policy), "dtype": dtype, "hidden": list(self.hidden)}
        return {name: getattr(self, name) for name in names} | told

    def state_dict(self) -> dict[str, Any]:
        """Return the full state: `settings` and other JSON values, and tensors by name."""
        place = None if self.device is None else str(self.device)
        state: dict[str, Any] = {"settings": self.settings, "device": place, "selected": sorted(self._selected)}
        if self.generators:
            state["generators"] = torch.stack([generator.get_state() for generator in self.generators])
        if self._frames:
            state["index"] = torch.tensor(self.frame_index)
            state["z"] = torch.stack([frame.z for frame in self._frames])
            state["known"] = torch.tensor([frame.known for frame in self._frames])
            posed = [frame.index for frame in self._frames if frame.pose is not None]
            state["posed"] = torch.tensor(posed, dtype=torch.long)
            if posed:
                state["poses"] = torch.stack([frame.pose for frame in self._frames if frame.pose is not None])
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `state_dict`; tensors are copied.

        Raises:
            UserError: the state is of a bank with other settings. The message names the first difference.
        """
        for name, own in self.settings.items():
            if state["settings"].get(name) != own:
                raise UserError(
                    f"a state with {name}={shown(state['settings'].get(name))} does not fit a memory bank with"
                    f" {name}={shown(own)}: create the bank with the same value"
                )
        self.reset()
        self._selected = set(state["selected"])
        for row in state.get("generators", ()):
            generator = torch.Generator()
            generator.set_state(row.cpu().clone())  # clone: for a view, set_state reads the storage from its beginning
            self.generators.append(generator)
        posed = dict(zip(state.get("posed", torch.empty(0)).tolist(), state.get("poses", ()), strict=True))
        if "index" in state:
            for index, z, known in zip(state["index"].tolist(), state["z"], state["known"].tolist(), strict=True):
                pose = posed.get(index)
                frame = z.clone().to(device=self.device, dtype=self.dtype)
                pose = None if pose is None else pose.clone().to(self.device)
                self._frames.append(StoredFrame(index, frame, pose, tuple(known)))
