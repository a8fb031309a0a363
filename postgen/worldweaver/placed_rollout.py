"""Placed memory in a rollout: finished groups are stored with the depth that their latents decode to.

    placed = PlacedRollout(model, poses, limits, mem_noise=0.12)
    run = Rollout(model, schedule, segments, extras=placed.extras)
    placed.store(given, 0)                                  # latents at the beginning of the video, if given
    for group in run.groups(state, on_group=placed.on_group): ...

Only the model's own depth and the cameras are used. Keep `state_dict` in `RolloutState.extra`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families import Condition
from postgen.families.streaming import StreamingDecoder, denormalised
from postgen.families.streams import way_of

from .depth import DisparityRange
from .model import WorldWeaverModel
from .placed import PlacedMemory
from .rollout import Group, Poses

_PREFIX = "placed.decoder."


def check_streams(vae: Any) -> None:
    """Check that an autoencoder can decode the depth of a group as soon as the group is finished.

    Raises:
        UserError: the decoder looks ahead.
    """
    if (kind := way_of(vae).kind) != "exact":
        raise UserError(
            f"placed memory needs the depth of a group as soon as the group is finished, but {type(vae).__name__} is"
            f" decoded in {kind}: omit placed_memory"
        )


class PlacedRollout:
    """Connects placed memory to a rollout.

    Args:
        model: model with depth and with inputs for placed memory.
        poses: returns the cameras of latent frames.
        limits: disparity range of each row.
        mem_noise: noise level of the placed RGB.
        warp: as in `PlacedMemory`.
        seeds: as in `PlacedMemory`.

    Raises:
        UserError: a model without these inputs, without depth, or with a decoder that looks ahead.
    """

    def __init__(
        self,
        model: WorldWeaverModel,
        poses: Poses,
        limits: DisparityRange,
        *,
        mem_noise: float = 0.12,
        warp: bool = True,
        seeds: Sequence[int] | None = None,
    ) -> None:
        if not model.shown or "depth" not in model.modalities:
            raise UserError(
                "the model has no inputs for placed memory, or no depth: train it with placed_memory: true"
            )
        self.model, self.poses, self.limits = model, poses, limits
        pipe: Any = getattr(model.denoiser, "pipe", None)
        self.vae = pipe.vae
        check_streams(self.vae)
        self.decoder = StreamingDecoder(self.vae)
        self.memory = PlacedMemory(mem_noise=mem_noise, modalities=len(model.modalities), warp=warp, seeds=seeds)

    def extras(self, start: int, stop: int) -> Condition:
        """Return the condition of the frames in flight, for `Rollout(extras=...)`."""
        seen = self.memory.read(self.poses(start, stop), start)
        return {} if seen is None else {"placed": seen}

    def on_group(self, group: Group) -> None:
        """Store a finished group, for `Rollout.groups(on_group=...)`."""
        self.store(group.latents, group.start_frame)

    @torch.no_grad()
    def store(self, latents: Tensor, start: int) -> None:
        """Store clean latents (B, M * C, f, h, w) from frame `start` on, with the depth that they decode to.

        Store all frames of a video in order. If an error occurs, nothing is stored, and the call can be repeated.
        """
        count, before = latents.shape[2], self.decoder.state_dict()
        poses = self.poses(start, start + count)
        depth = self.model.unscaled(self.model.split(latents)["depth"], "depth")
        picture = self.decoder.push(denormalised(self.vae, depth.to(self.vae.device, self.vae.dtype)))
        # Take the last picture of each latent frame. The first latent frame of a video is a single picture.
        step = picture.shape[1] // count if start else (picture.shape[1] - 1) // max(1, count - 1)
        ends = picture[:, (picture.shape[1] - 1) % max(1, step) :: max(1, step)]
        try:
            self.memory.add(latents, self.limits.distance(ends), poses, start)
        except BaseException:
            self.decoder.load_state_dict(before)
            raise

    def state_dict(self) -> dict[str, Tensor]:
        """Return the stored frames and the decoder cache as named tensors for `RolloutState.extra`."""
        kept = {f"{_PREFIX}{name}": value for name, value in self.decoder.state_dict().items()}
        return self.memory.state_dict() | kept

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from `state_dict`. Other entries are ignored."""
        self.memory.load_state_dict(state)
        own = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
        if own:
            self.decoder.load_state_dict(own)
