"""What each autoencoder remembers while a video is decoded in pieces; used through `postgen.families.streaming`."""

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
"""What is kept, by name."""


class Stream(ABC):
    """What is kept of one video between two pieces."""

    def __init__(self, vae: Any, num_latents: int | None) -> None:
        self.vae = vae
        self.num_latents = num_latents

    @property
    def reach(self) -> int | None:
        """Latent frames of the past that what is kept follows from; None: all, or where pieces began matters too."""
        return None

    @abstractmethod
    def push(self, latents: Tensor) -> Tensor | None:
        """Return the (B, 3, F, H, W) frames in [-1, 1] that are known by now; None: none."""

    def finish(self) -> Tensor | None:
        """Return the frames that are left."""
        return None

    def snapshot(self) -> dict[str, Any]:
        """Return the attributes as they are; tensors in them are replaced by a push, never written to."""
        return {name: list(value) if isinstance(value, list) else value for name, value in vars(self).items()}

    @abstractmethod
    def state(self) -> State:
        """Return what is kept."""

    @abstractmethod
    def load(self, state: State, pushed: int) -> None:
        """Take it over after `pushed` latents."""


class _Wan(Stream):
    """Wan's decoder takes one latent frame at a time and a list with the last two inputs of every convolution."""

    def __init__(self, vae: Any, num_latents: int | None) -> None:
        super().__init__(vae, num_latents)
        # One entry a causal convolution is used; there are not more of them than modules.
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
        # The word "Rep" stands where an upsampling in time has seen one frame.
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
    """Add up how far each convolution of a decoder looks back; norms and attention see one frame."""
    from accelerate import init_empty_weights

    with init_empty_weights(), torch.no_grad():
        vae = kind.from_config(json.loads(config))
        stream, latent = _Wan(vae, None), torch.empty(1, vae.config.z_dim, 1, 1, 1, device="meta")
        stream.push(latent)
        stream.push(latent)
        reached: list[Fraction] = []

        def note(layer: Any, _: Any, output: Tensor) -> None:
            # Behind an upsampling a latent frame is several, and a convolution reaches back by shares of it.
            reached.append(Fraction(layer.kernel_size[0] - 1, output.shape[2]))

        for layer in vae.decoder.modules():
            if isinstance(layer, nn.Conv3d):
                layer.register_forward_hook(note)
        stream.push(latent)  # the first two are not decoded as all others are
    return math.ceil(sum(reached))


class _CogVideoX(Stream):
    """Its norms take statistics over the frames that are decoded together: the groups must be those of its decode."""

    def __init__(self, vae: Any, num_latents: int | None) -> None:
        super().__init__(vae, num_latents)
        if num_latents is None:
            raise UserError(
                f"{type(vae).__name__} decodes in pairs and the odd latent frame first: give num_latents, the latent"
                " frames of the whole video (of a pipeline, num_frames)"
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
        self.waiting = waiting.clone()  # not a view of everything pushed
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
    """Windows of latents that overlap, their frames blended, to the bit as the autoencoder's framewise decoding."""

    lost_end = False
    """A window after the first has a frame too many: whether it loses the last one instead of the first."""

    def __init__(self, vae: Any, num_latents: int | None) -> None:
        super().__init__(vae, num_latents)
        self.time = vae.temporal_compression_ratio
        self.length = vae.tile_sample_min_num_frames // self.time + 1
        self.stride = vae.tile_sample_stride_num_frames // self.time
        if not 1 <= self.stride <= self.length:
            raise UserError(
                f"windows of {vae.tile_sample_min_num_frames} frames every {vae.tile_sample_stride_num_frames}: the"
                f" stride must be at least {self.time} (one latent frame) and no longer than the window"
                " (tile_sample_stride_num_frames and tile_sample_min_num_frames of the autoencoder)"
            )
        self.waiting: Tensor | None = None
        self.before: Tensor | None = None
        """Last frames of the window before."""
        self.pushed = self.emitted = 0

    def push(self, latents: Tensor) -> Tensor | None:
        self.pushed += latents.shape[2]
        self.waiting = latents.clone() if self.waiting is None else torch.cat([self.waiting, latents], 2)
        made = []
        # The window after this one must not be empty, or this one would have been the last.
        while self.waiting.shape[2] >= self.length:
            made.append(self._window())
        return torch.cat(made, 2) if made else None

    def finish(self) -> Tensor | None:
        if self.waiting is not None and self.pushed < self.length:
            return self._decode(self.waiting)  # a short video is one window, whatever the stride
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
        """Return further arguments of decode."""
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
        # Clean latents: the noise that the pipeline can add before decoding is not ours.
        return (latents.new_zeros(len(latents)) if self.vae.config.timestep_conditioning else None,)


@dataclass(frozen=True, kw_only=True)
class Way:
    """How an autoencoder is decoded in pieces."""

    kind: Literal["exact", "windows"]
    stream: type[Stream]
    time_first: bool = False
    """Whether its `Denoiser` keeps latents as (B, t, C, h, w)."""


DECODERS = {
    "AutoencoderKLCogVideoX": Way(kind="exact", stream=_CogVideoX, time_first=True),
    "AutoencoderKLHunyuanVideo": Way(kind="windows", stream=_Windows),
    "AutoencoderKLLTXVideo": Way(kind="windows", stream=_WindowsOfLTX),
    "AutoencoderKLWan": Way(kind="exact", stream=_Wan),
}
"""Class of the autoencoder -> how. HunyuanVideo takes statistics over all frames, LTX looks ahead."""


def named(kind: str) -> str:
    """Return the autoencoders of a kind, for a message."""
    return ", ".join(name for name, way in DECODERS.items() if way.kind == kind)


def way_of(vae: Any) -> Way:
    """Return how an autoencoder is decoded in pieces.

    Raises:
        UserError: it is not known.
    """
    for parent in type(vae).__mro__:
        if parent.__name__ in DECODERS:
            return DECODERS[parent.__name__]
    raise UserError(
        f"it is not known how {type(vae).__name__} is decoded in pieces. Known: {named('exact')} (exact),"
        f" {named('windows')} (in windows)"
    )
