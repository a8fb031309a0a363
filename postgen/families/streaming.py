"""Decode a long video piece by piece, in memory that does not grow with it.

    decoder = StreamingDecoder(pipe.vae)
    for latents in pieces:                # as many latent frames as there are, one is enough
        clip = decoder.push(latents)      # (B, F, 3, H, W): the frames that are known by now
    rest = decoder.finish()

Exact where an autoencoder looks back only: what it remembers is kept between pieces, so the frames are those of
decoding the whole clip at once. Autoencoders that look ahead are decoded in windows that overlap and are blended, the
rule that diffusers calls framewise decoding. HunyuanVideo decodes so by itself; for the others it has to be asked for.
`postgen.families.streams.DECODERS` says which is which.
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
    """Decoder of one video (or a batch of equally long ones). Gradients are not kept.

    The autoencoder is used in place and holds nothing of the stream: several streams, and whole decodes between two
    pieces, do not disturb each other. Its `use_slicing` is not needed: push one video at a time to save memory.

    Args:
        vae: the autoencoder.
        num_latents: latent frames of the whole video, where that is known: another number is refused then. CogVideoX
            needs it: it decodes in pairs, and an odd one goes to the first.
        windows: accept windows where the autoencoder's own decode uses none (`use_framewise_decoding`): the clip is
            another one then. Length and stride of a window are its `tile_sample_min_num_frames` and
            `tile_sample_stride_num_frames`.

    Raises:
        UserError: an unknown autoencoder, one that looks ahead without `windows`, tiling in space that the exact way
            does not do, or a missing `num_latents`.
    """

    def __init__(self, vae: Any, *, num_latents: int | None = None, windows: bool = False) -> None:
        self.vae = vae
        self.way = way_of(vae)
        self.exact = self.way.kind == "exact" or bool(vae.use_framewise_decoding)
        """Whether the frames are those of `vae.decode` of everything at once."""
        if not (self.exact or windows):
            raise UserError(
                f"{type(vae).__name__} is not causal, so it cannot be decoded exactly in pieces: windows=True decodes"
                f" overlapping windows and blends them. Exact are {named('exact')}, and what decodes framewise anyway"
            )
        if self.way.kind == "exact" and vae.use_tiling:
            raise UserError(
                "the autoencoder decodes in tiles, which a stream does not: vae.disable_tiling() (a stream needs"
                " memory for a few frames only)"
            )
        if num_latents is not None and num_latents < 1:
            raise UserError(f"num_latents is {num_latents}: a video has at least 1 latent frame")
        self._stream = self.way.stream(vae, num_latents)
        self._pushed, self._finished = 0, False
        self._size: tuple[int, ...] | None = None

    @property
    def finished(self) -> bool:
        """Whether `finish` has been called: nothing can be pushed any more."""
        return self._finished

    @property
    def num_latents(self) -> int | None:
        """Latent frames of the whole video, where that is known; those of a state that was loaded."""
        return self._stream.num_latents

    @property
    def reach(self) -> int | None:
        """Latent frames that have to be decoded again to remember exactly what is kept; None: that cannot be done."""
        return self._stream.reach

    @property
    def state_bytes(self) -> int:
        """Memory of what is kept between pieces."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())

    def push(self, latents: Tensor) -> Tensor:
        """Decode the next piece.

        Args:
            latents: (B, C, t, h, w), t >= 1, as `vae.decode` takes them.

        Returns:
            Clips (B, F, 3, H, W), float32 in [0, 1]. F may be 0: some frames need later pieces.
            A push that fails (out of memory) leaves everything as it was: push again, in smaller pieces.

        Raises:
            UserError: the video is finished, longer than `num_latents`, or the piece does not fit the ones before.
        """
        size = (latents.shape[0], *latents.shape[3:]) if latents.dim() == 5 else None
        if size is None or not latents.shape[2] or size != (self._size or size):
            raise UserError(
                f"a piece is (B, C, t, h, w) with t >= 1 and the sizes of the first, got {tuple(latents.shape)}"
            )
        if latents.shape[1] != self._channels:
            raise UserError(
                f"{type(self.vae).__name__} takes latents of {self._channels} channels, got {latents.shape[1]}"
            )
        if self._finished:
            raise UserError("the video is finished: make a new StreamingDecoder for the next")
        whole = self._stream.num_latents
        if whole is not None and self._pushed + latents.shape[2] > whole:
            raise UserError(f"more than num_latents={whole} latent frames were pushed")
        with self._all_or_nothing():
            frames = self._decode(self._stream.push, latents)
        self._size = size
        self._pushed += latents.shape[2]
        return self._clips(frames)

    def finish(self) -> Tensor:
        """Return the frames that waited for later pieces, (B, F, 3, H, W); F is often 0. It can be repeated as a push.

        Raises:
            UserError: nothing was pushed, fewer latents than `num_latents` were, or the video is finished.
        """
        if self._size is None or self._finished:
            raise UserError("there is nothing to finish: push latents first, and finish once")
        whole = self._stream.num_latents
        if whole is not None and self._pushed != whole:
            raise UserError(f"{self._pushed} of num_latents={whole} latent frames were pushed")
        with self._all_or_nothing():
            frames = self._decode(self._stream.finish)
        self._finished = True
        return self._clips(frames)

    def state_dict(self) -> State:
        """Return what is kept, as tensors (safetensors takes them), to go on later or elsewhere."""
        size = torch.tensor(self._size or (), dtype=torch.int64)
        counts = torch.tensor([self._pushed, self._finished], dtype=torch.int64)
        return {"autoencoder": self._autoencoder, "size": size, "counts": counts, **self._stream.state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another decoder of the same autoencoder stopped.

        Raises:
            UserError: not such a state, or that of another class or configuration; nothing changes then.
        """
        pushed, finished = self._check_state(state)
        with self._all_or_nothing():
            self._stream.load({name: each.to(self.vae.device) for name, each in state.items()}, pushed)
        self._size = tuple(state["size"].tolist()) or None
        self._pushed, self._finished = pushed, finished

    def prime(self, state: Mapping[str, Tensor], pieces: Sequence[Tensor]) -> None:
        """Go on from a state that has only sizes and counts left, by decoding again what was pushed last.

        With `reach` latent frames, or all that were pushed, frames after it are those of `load_state_dict`. With fewer
        they are approximate, the more so the fewer there are, and soon less.

        Args:
            state: of a decoder whose autoencoder looks back; what is remembered in it is not read.
            pieces: (B, C, t, h, w) as they were pushed last; cut in other places, kernels may round in another way.

        Raises:
            UserError: as `load_state_dict` and `push`, or an autoencoder whose `reach` is None.
        """
        pushed, finished = self._check_state(state)
        if self.reach is None or self._pushed:
            raise UserError(
                f"a decoder of {type(self.vae).__name__} that has decoded {self._pushed} latent frames is not primed:"
                " make a new one, and keep the whole state of any autoencoder but Wan's"
            )
        with self._all_or_nothing():
            for piece in pieces:
                self.push(piece)
        self._pushed, self._finished = pushed, finished

    def _check_state(self, state: Mapping[str, Tensor]) -> tuple[int, bool]:
        """Return how many latents were pushed, and whether the video is finished."""
        if missing := {"autoencoder", "size", "counts"} - state.keys():
            raise UserError(f"this is no state of a StreamingDecoder: {' and '.join(sorted(missing))} not in it")
        if not torch.equal(state["autoencoder"].cpu(), self._autoencoder):
            raise UserError(
                f"this state is of another autoencoder than this {type(self.vae).__name__}: go on with the one that"
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
        """A number for class and configuration, to know a state by."""
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

        # An autoencoder that is offloaded comes to its device by this, as in its own decode.
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
    """Decode pieces of normalised latents, as the transformer sees them.

    Args:
        source: a `Denoiser`, or a diffusers pipeline.
        pieces: latents in the axes that the `Denoiser` keeps them in, in order.
        options: of `StreamingDecoder`.

    Yields:
        Clips (B, F, 3, H, W), float32 in [0, 1], F >= 1. Together they are `Denoiser.decode` of all pieces.

    Raises:
        UserError: as `StreamingDecoder`.
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
    """Turn latents (B, C, t, h, w) as the transformer sees them into those that `vae.decode` takes."""
    factor = vae.config.get("scaling_factor") or 1.0
    mean, std = (_statistic(vae, name, latents) for name in ("latents_mean", "latents_std"))
    return latents / factor if mean is None else latents * std / factor + mean


def _statistic(vae: Any, name: str, like: Tensor) -> Any:
    # LTX keeps them as buffers, the others in the config.
    value = dict(vae.named_buffers(recurse=False)).get(name)
    value = vae.config.get(name) if value is None else value
    return None if value is None else torch.as_tensor(value).to(like).view(1, -1, 1, 1, 1)
