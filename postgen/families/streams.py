"""Decoding in pieces for each autoencoder class, with the state between two pieces.

Use these classes through `postgen.families.streaming`.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from postgen.errors import UserError

State = dict[str, Tensor]
"""Tensors of a state, by name."""


class Stream(ABC):
    """Decoding of one video in pieces, with the state between two pieces."""

    def __init__(self, vae: Any, num_latents: int | None) -> None:
        self.vae = vae
        self.num_latents = num_latents

    @property
    def reach(self) -> int | None:
        """Number of past latent frames that determine the state.

        None if all past frames do, or if the state also depends on the division into pieces.
        """
        return None

    @abstractmethod
    def push(self, latents: Tensor) -> Tensor | None:
        """Return the frames (B, 3, F, H, W) in [-1, 1] that these latents complete; None if there are none."""

    def finish(self) -> Tensor | None:
        """Return the remaining frames; None if there are none."""
        return None

    def snapshot(self) -> dict[str, Any]:
        """Return the attributes, to undo a failed push. Tensors are not copied: a push never changes them in place."""
        return {name: list(value) if isinstance(value, list) else value for name, value in vars(self).items()}

    @abstractmethod
    def state(self) -> State:
        """Return the state between two pieces."""

    @abstractmethod
    def load(self, state: State, pushed: int) -> None:
        """Restore a state from after `pushed` latent frames."""


class _Wan(Stream):
    """Wan: its decoder takes one latent frame at a time, and a list with the last two inputs of every convolution."""

    def __init__(self, vae: Any, num_latents: int | None) -> None:
        super().__init__(vae, num_latents)
        # The decoder uses one entry per causal convolution; the number of modules is an upper bound.
        self.cache: list[Any] = [None] * sum(1 for _ in vae.decoder.modules())
        self.started = False

    @property
    def reach(self) -> int:
        config = {name: value for name, value in self.vae.config.items() if not name.startswith("_")}
        return _reach_of_wan(cast(Hashable, type(self.vae)), json.dumps(config))

    def push(self, latents: Tensor) -> Tensor:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        made = []
        for latent in self.vae.post_quant_conv(latents).split(1, dim=2):
            first = {} if self.started else {"first_chunk": True}
            made.append(self.vae.decoder(latent, feat_cache=self.cache, feat_idx=[0], **first))
            self.started = True
        frames = torch.cat(made, 2)
        if self.vae.config.patch_size is not None:
            frames = unpatchify(frames, patch_size=self.vae.config.patch_size)
        return frames.clamp(-1, 1)

    def state(self) -> State:
        # The decoder writes the string "Rep" for a temporal upsampling that has processed one frame.
        words = [place for place, entry in enumerate(self.cache) if isinstance(entry, str)]
        tensors = {
            f"cache.{place}": entry.contiguous() for place, entry in enumerate(self.cache) if isinstance(entry, Tensor)
        }
        return {"repeated": torch.tensor(words, dtype=torch.int64), **tensors}

    def load(self, state: State, pushed: int) -> None:
        words = state["repeated"].tolist()
        self.started = pushed > 0
        self.cache = [state.get(f"cache.{place}") for place in range(len(self.cache))]
        for place in words:
            self.cache[place] = "Rep"


@cache
def _reach_of_wan(kind: Any, config: str) -> int:
    """Return the receptive field of Wan's decoder in past latent frames.

    It is the sum over the convolutions; norms and attention process one frame at a time.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(), torch.no_grad():
        vae = kind.from_config(json.loads(config))
        stream, latent = _Wan(vae, None), torch.empty(1, vae.config.z_dim, 1, 1, 1, device="meta")
        stream.push(latent)
        stream.push(latent)
        reached: list[Fraction] = []

        def note(layer: Any, _: Any, output: Tensor) -> None:
            # After an upsampling, one latent frame is several frames, so a frame is a fraction of a latent frame.
            reached.append(Fraction(layer.kernel_size[0] - 1, output.shape[2]))

        for layer in vae.decoder.modules():
            if isinstance(layer, nn.Conv3d):
                layer.register_forward_hook(note)
        stream.push(latent)  # measured on the third latent frame: the decoder treats the first two differently
    return math.ceil(sum(reached))


class _CogVideoX(Stream):
    """CogVideoX: its norms compute statistics over the frames of a group, so groups must equal those of `decode`."""

    def __init__(self, vae: Any, num_latents: int | None) -> None:
        super().__init__(vae, num_latents)
        if num_latents is None:
            raise UserError(
                f"{type(vae).__name__} decodes in pairs with the odd latent frame first: give num_latents, the number"
                " of latent frames of the whole video"
            )
        self.waiting: Tensor | None = None
        self.cache: Any = None
        self.decoded = 0

    def push(self, latents: Tensor) -> Tensor | None:
        waiting = latents if self.waiting is None else torch.cat([self.waiting, latents], 2)
        made = []
        while (size := self._next_group()) and waiting.shape[2] >= size:
            group, waiting = waiting[:, :, :size], waiting[:, :, size:]
            if self.vae.post_quant_conv is not None:
                group = self.vae.post_quant_conv(group)
            frames, self.cache = self.vae.decoder(group, conv_cache=self.cache)
            made.append(frames)
            self.decoded += size
        self.waiting = waiting.clone()  # a view would keep all pushed latents in memory
        return torch.cat(made, 2) if made else None

    def _next_group(self) -> int:
        assert self.num_latents is not None
        together: int = self.vae.num_latent_frames_batch_size
        if self.decoded:
            return together if self.decoded < self.num_latents else 0
        return min(self.num_latents, together + self.num_latents % together)

    def state(self) -> State:
        waiting = {} if self.waiting is None else {"waiting": self.waiting.contiguous()}
        counts = torch.tensor([self.num_latents, self.decoded], dtype=torch.int64)
        return {"groups": counts, **waiting, **dict(_flat("cache", self.cache))}

    def load(self, state: State, pushed: int) -> None:
        self.num_latents, self.decoded = state["groups"].tolist()
        self.waiting = state.get("waiting")
        nested: Any = {}
        for name in [name for name in state if name.startswith("cache.")]:
            *parents, last = name.split(".")[1:]
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = state[name]
        self.cache = nested or None


def _flat(name: str, cache: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(cache, Tensor):
        yield name, cache.contiguous()
    for key, inner in cache.items() if isinstance(cache, dict) else ():
        yield from _flat(f"{name}.{key}", inner)


class _Windows(Stream):
    """Overlapping windows with blended frames, bitwise equal to the autoencoder's framewise decoding."""

    lost_end = False
    """Every window after the first has one surplus frame: True drops its last frame, False its first."""

    def __init__(self, vae: Any, num_latents: int | None) -> None:
        super().__init__(vae, num_latents)
        self.time = vae.temporal_compression_ratio
        self.length = vae.tile_sample_min_num_frames // self.time + 1
        self.stride = vae.tile_sample_stride_num_frames // self.time
        if not 1 <= self.stride <= self.length:
            raise UserError(
                f"the autoencoder has windows of {vae.tile_sample_min_num_frames} frames"
                f" (tile_sample_min_num_frames) with a stride of {vae.tile_sample_stride_num_frames}"
                f" (tile_sample_stride_num_frames): set a stride of at least {self.time} frames (one latent frame)"
                " that is not longer than the window"
            )
        self.waiting: Tensor | None = None
        self.before: Tensor | None = None
        """Last frames of the previous window, for blending."""
        self.pushed = self.emitted = 0

    def push(self, latents: Tensor) -> Tensor | None:
        self.pushed += latents.shape[2]
        self.waiting = latents.clone() if self.waiting is None else torch.cat([self.waiting, latents], 2)
        made = []
        # A full window is decoded at once; the last, shorter windows are decoded by `finish`.
        while self.waiting.shape[2] >= self.length:
            made.append(self._window())
        return torch.cat(made, 2) if made else None

    def finish(self) -> Tensor | None:
        if self.waiting is not None and self.pushed < self.length:
            return self._decode(self.waiting)  # a video shorter than a window is decoded at once, whatever the stride
        made = []
        while self.waiting is not None and self.waiting.shape[2]:
            made.append(self._window())
        if not made:
            return None
        left = (self.pushed - 1) * self.time + 1 - (self.emitted - sum(each.shape[2] for each in made))
        return torch.cat(made, 2)[:, :, :left]

    def _window(self) -> Tensor:
        assert self.waiting is not None
        frames = self._decode(self.waiting[:, :, : self.length])
        self.waiting = self.waiting[:, :, self.stride :].clone()
        blend = self.vae.tile_sample_min_num_frames - self.vae.tile_sample_stride_num_frames
        first = self.before is None
        if not first:
            frames = frames[:, :, :-1] if self.lost_end else frames[:, :, 1:]
            frames = self.vae.blend_t(self.before, frames, blend)
        self.before = frames[:, :, max(0, frames.shape[2] - blend) :].clone()
        told = frames[:, :, : self.vae.tile_sample_stride_num_frames + first]
        self.emitted += told.shape[2]
        return told

    def _decode(self, latents: Tensor) -> Tensor:
        framewise, self.vae.use_framewise_decoding = self.vae.use_framewise_decoding, False
        try:
            frames: Tensor = self.vae.decode(latents, *self._told(latents), return_dict=False)[0]
        finally:
            self.vae.use_framewise_decoding = framewise
        return frames

    def _told(self, latents: Tensor) -> tuple[Any, ...]:
        """Return further positional arguments of `vae.decode`."""
        return ()

    def state(self) -> State:
        kept = {"waiting": self.waiting, "before": self.before}
        counts = torch.tensor([self.emitted], dtype=torch.int64)
        return {"emitted": counts, **{name: each.contiguous() for name, each in kept.items() if each is not None}}

    def load(self, state: State, pushed: int) -> None:
        self.pushed = pushed
        (self.emitted,) = state["emitted"].tolist()
        self.waiting, self.before = state.get("waiting"), state.get("before")


class _WindowsOfLTX(_Windows):
    lost_end = True

    def _told(self, latents: Tensor) -> tuple[Any, ...]:
        # Timestep 0: the latents are clean. The pipeline's option to add noise before decoding is not supported.
        return (latents.new_zeros(len(latents)) if self.vae.config.timestep_conditioning else None,)


@dataclass(frozen=True, kw_only=True)
class Way:
    """How an autoencoder class is decoded in pieces."""

    kind: Literal["exact", "windows"]
    stream: type[Stream]
    time_first: bool = False
    """Whether its `Denoiser` has latents of shape (B, t, C, h, w)."""


DECODERS = {
    "AutoencoderKLCogVideoX": Way(kind="exact", stream=_CogVideoX, time_first=True),
    "AutoencoderKLHunyuanVideo": Way(kind="windows", stream=_Windows),
    "AutoencoderKLLTXVideo": Way(kind="windows", stream=_WindowsOfLTX),
    "AutoencoderKLWan": Way(kind="exact", stream=_Wan),
}
"""How autoencoders are decoded in pieces, by class name.

Windows are needed because HunyuanVideo computes statistics over all frames, and LTX depends on later latent frames.
"""


def named(kind: str) -> str:
    """Return the autoencoder classes of a `Way.kind` ("exact" or "windows"), separated by commas, for a message."""
    return ", ".join(name for name, way in DECODERS.items() if way.kind == kind)


def way_of(vae: Any) -> Way:
    """Return how an autoencoder is decoded in pieces.

    Raises:
        UserError: the class is unknown.
    """
    for parent in type(vae).__mro__:
        if parent.__name__ in DECODERS:
            return DECODERS[parent.__name__]
    raise UserError(
        f"{type(vae).__name__} cannot be decoded in pieces: use one of {named('exact')} (exact),"
        f" {named('windows')} (in windows)"
    )
