"""Decode a long video piece by piece; the memory use does not grow with its length.

    decoder = StreamingDecoder(pipe.vae)
    for latents in pieces:                # any number of latent frames, at least one
        clip = decoder.push(latents)      # (B, F, 3, H, W): the frames that these latents complete
    rest = decoder.finish()

Decoding is exact for causal autoencoders, which depend on past latent frames only: the decoder keeps their caches
between pieces, so the frames equal those of decoding the whole clip at once. Other autoencoders are decoded in
overlapping windows whose frames are blended, as in the framewise decoding of diffusers. HunyuanVideo decodes in this
way by default; for others the caller must request it. `postgen.families.streams.DECODERS` lists the autoencoders.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families.streams import State, named, way_of


class StreamingDecoder:
    """Decoder of one video (or a batch of videos of equal length), without gradients.

    The autoencoder is used in place and stores nothing of the stream. So several streams, and calls of `vae.decode`
    between two pieces, do not affect each other. `use_slicing` has no effect on exact decoding: to save memory, push
    one video at a time.

    Args:
        vae: the autoencoder.
        num_latents: latent frames of the whole video, or None. If given, exactly this number must be pushed. CogVideoX
            requires it: it decodes in pairs, and the first group has the odd latent frame.
        windows: allow overlapping windows even if `vae.decode` uses none (`use_framewise_decoding` is off). The clip
            then differs from that of `vae.decode`. The autoencoder's `tile_sample_min_num_frames` and
            `tile_sample_stride_num_frames` are the length and the stride of a window, in frames.

    Raises:
        UserError: the autoencoder is unknown, is not causal and `windows` is False, or has spatial tiling enabled,
            which exact decoding does not support; or `num_latents` is missing.
    """

    def __init__(self, vae: Any, *, num_latents: int | None = None, windows: bool = False) -> None:
        self.vae = vae
        self.way = way_of(vae)
        self.exact = self.way.kind == "exact" or bool(vae.use_framewise_decoding)
        """Whether the frames equal those of one call of `vae.decode` on all latents."""
        if not (self.exact or windows):
            raise UserError(
                f"{type(vae).__name__} is not causal, so it cannot be decoded exactly in pieces: windows=True decodes"
                f" overlapping windows and blends them. Exact in pieces: {named('exact')}, and autoencoders with"
                " use_framewise_decoding on"
            )
        if self.way.kind == "exact" and vae.use_tiling:
            raise UserError(
                "the autoencoder has tiling enabled, which a stream does not support: call vae.disable_tiling() (a"
                " stream needs memory for a few frames only)"
            )
        if num_latents is not None and num_latents < 1:
            raise UserError(f"num_latents is {num_latents}: a video has at least 1 latent frame")
        self._stream = self.way.stream(vae, num_latents)
        self._pushed, self._finished = 0, False
        self._size: tuple[int, ...] | None = None

    @property
    def finished(self) -> bool:
        """Whether `finish` has been called, after which nothing can be pushed."""
        return self._finished

    @property
    def num_latents(self) -> int | None:
        """Latent frames of the whole video, from the constructor or from a loaded state; None if unknown."""
        return self._stream.num_latents

    @property
    def reach(self) -> int | None:
        """Number of latent frames whose repeated decoding restores the cache exactly; None if that is impossible."""
        return self._stream.reach

    @property
    def state_bytes(self) -> int:
        """Size in bytes of the state that is kept between pieces."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())

    def push(self, latents: Tensor) -> Tensor:
        """Decode the next piece.

        Args:
            latents: (B, C, t, h, w) with t >= 1, as `vae.decode` takes them.

        Returns:
            Clips (B, F, 3, H, W), float32 in [0, 1]. F may be 0, because some frames need later pieces.
            A push that fails (out of memory) does not change the decoder: the caller can push smaller pieces.

        Raises:
            UserError: the video is finished, it would be longer than `num_latents`, or the shape of the piece does not
                match the first one.
        """
        size = (latents.shape[0], *latents.shape[3:]) if latents.dim() == 5 else None
        if size is None or not latents.shape[2] or size != (self._size or size):
            raise UserError(
                "a piece must have the shape (B, C, t, h, w) with t >= 1 and B, h, w of the first piece, got"
                f" {tuple(latents.shape)}"
            )
        if latents.shape[1] != self._channels:
            raise UserError(
                f"{type(self.vae).__name__} takes latents of {self._channels} channels, got {latents.shape[1]}"
            )
        if self._finished:
            raise UserError("the video is finished: make a new StreamingDecoder for the next video")
        whole = self._stream.num_latents
        if whole is not None and self._pushed + latents.shape[2] > whole:
            raise UserError(f"more than num_latents={whole} latent frames were pushed: give that of the whole video")
        with self._all_or_nothing():
            frames = self._decode(self._stream.push, latents)
        self._size = size
        self._pushed += latents.shape[2]
        return self._clips(frames)

    def finish(self) -> Tensor:
        """Return the remaining frames, which waited for later pieces: (B, F, 3, H, W), where F is often 0.

        A call that fails (out of memory) can be repeated.

        Raises:
            UserError: nothing was pushed, fewer latent frames than `num_latents` were pushed, or the video is
                finished.
        """
        if self._size is None or self._finished:
            raise UserError("there is nothing to finish: push latents first, and call finish once")
        whole = self._stream.num_latents
        if whole is not None and self._pushed != whole:
            raise UserError(f"{self._pushed} of num_latents={whole} latent frames were pushed: push all before finish")
        with self._all_or_nothing():
            frames = self._decode(self._stream.finish)
        self._finished = True
        return self._clips(frames)

    def state_dict(self) -> State:
        """Return the decoder's state as tensors, to continue later or in another process; safetensors can save it."""
        size = torch.tensor(self._size or (), dtype=torch.int64)
        counts = torch.tensor([self._pushed, self._finished], dtype=torch.int64)
        return {"autoencoder": self._autoencoder, "size": size, "counts": counts, **self._stream.state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the state of another decoder of the same autoencoder.

        Raises:
            UserError: this is not a state of a `StreamingDecoder`, or the state is that of an autoencoder of another
                class or configuration. The decoder is not changed in these cases.
        """
        pushed, finished = self._check_state(state)
        with self._all_or_nothing():
            self._stream.load({name: each.to(self.vae.device) for name, each in state.items()}, pushed)
        self._size = tuple(state["size"].tolist()) or None
        self._pushed, self._finished = pushed, finished

    def prime(self, state: Mapping[str, Tensor], pieces: Sequence[Tensor]) -> None:
        """Continue from a state without its cache, by decoding the last pushed pieces again.

        If the pieces have at least `reach` latent frames, or all that were pushed, the frames after them equal those
        after `load_state_dict`. With fewer latent frames they are approximate; the error is larger the fewer there
        are, and decays quickly in later frames.

        Args:
            state: state of a causal autoencoder's decoder. Only `autoencoder`, `size` and `counts` are read.
            pieces: the last pieces, (B, C, t, h, w), divided as in their first push. With other divisions, kernels may
                round differently.

        Raises:
            UserError: see `load_state_dict` and `push`; or `reach` of the autoencoder is None.
        """
        pushed, finished = self._check_state(state)
        if self.reach is None or self._pushed:
            raise UserError(
                f"a decoder of {type(self.vae).__name__} that has decoded {self._pushed} latent frames cannot be"
                " primed: prime a new decoder; autoencoders other than Wan's need load_state_dict with a whole state"
            )
        with self._all_or_nothing():
            for piece in pieces:
                self.push(piece)
        self._pushed, self._finished = pushed, finished

    def _check_state(self, state: Mapping[str, Tensor]) -> tuple[int, bool]:
        """Return the number of pushed latent frames of a state, and whether its video is finished.

        Raises:
            UserError: see `load_state_dict`.
        """
        if missing := {"autoencoder", "size", "counts"} - state.keys():
            raise UserError(f"this is not a state of a StreamingDecoder: it lacks {' and '.join(sorted(missing))}")
        if not torch.equal(state["autoencoder"].cpu(), self._autoencoder):
            raise UserError(
                f"this state is of another autoencoder than this {type(self.vae).__name__}: continue with the one that"
                " began the video"
            )
        pushed, finished = state["counts"].tolist()
        return pushed, bool(finished)

    @property
    def _channels(self) -> int:
        config = self.vae.config
        return int(config.get("z_dim") or config["latent_channels"])

    @property
    def _autoencoder(self) -> Tensor:
        """Checksum of the autoencoder's class and configuration, by which a state is checked."""
        config = {name: value for name, value in self.vae.config.items() if not name.startswith("_")}
        words = json.dumps([type(self.vae).__name__, config], sort_keys=True, default=str)
        return torch.tensor([zlib.crc32(words.encode())], dtype=torch.int64)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        before = self._stream.snapshot()
        try:
            yield
        except BaseException:
            vars(self._stream).update(before)
            raise

    def _decode(self, function: Any, *latents: Tensor) -> Tensor | None:
        from diffusers.utils.accelerate_utils import apply_forward_hook

        def run(vae: Any) -> Tensor | None:
            with torch.no_grad():
                frames: Tensor | None = function(*(each.to(vae.device, vae.dtype) for each in latents))
            return frames

        # This hook moves an offloaded autoencoder to its device, as in `vae.decode`.
        decoded: Tensor | None = apply_forward_hook(run)(self.vae)
        return decoded

    def _clips(self, frames: Tensor | None) -> Tensor:
        if frames is None:
            assert self._size is not None
            batch, height, width = self._size
            space = getattr(self.vae, "spatial_compression_ratio", None)
            space = space or 2 ** (len(self.vae.config.block_out_channels) - 1)
            return torch.zeros(batch, 0, 3, height * space, width * space, device=self.vae.device)
        return (frames.float() * 0.5 + 0.5).clamp(0, 1).transpose(1, 2)


def stream_decode(source: Any, pieces: Iterable[Tensor], **options: Any) -> Iterator[Tensor]:
    """Decode pieces of normalised latents, the latents of the transformer.

    Args:
        source: a `Denoiser`, or a diffusers pipeline.
        pieces: latents in order, with the axes of the `Denoiser`'s latents.
        options: keyword arguments of `StreamingDecoder`.

    Yields:
        Clips (B, F, 3, H, W), float32 in [0, 1], F >= 1. Joined, they equal `Denoiser.decode` of all pieces.

    Raises:
        UserError: see `StreamingDecoder`.
    """
    vae = getattr(source, "pipe", source).vae
    decoder = StreamingDecoder(vae, **options)
    for piece in pieces:
        latents = piece.transpose(1, 2) if decoder.way.time_first else piece
        if (clip := decoder.push(denormalised(vae, latents))).shape[1]:
            yield clip
    if (clip := decoder.finish()).shape[1]:
        yield clip


def denormalised(vae: Any, latents: Tensor) -> Tensor:
    """Convert normalised latents (B, C, t, h, w) of the transformer to the latents that `vae.decode` takes."""
    factor = vae.config.get("scaling_factor") or 1.0
    mean, std = (_statistic(vae, name, latents) for name in ("latents_mean", "latents_std"))
    return latents / factor if mean is None else latents * std / factor + mean


def _statistic(vae: Any, name: str, like: Tensor) -> Any:
    # LTX has the statistics as buffers, other autoencoders have them in the config.
    value = dict(vae.named_buffers(recurse=False)).get(name)
    value = vae.config.get(name) if value is None else value
    return None if value is None else torch.as_tensor(value).to(like).view(1, -1, 1, 1, 1)
