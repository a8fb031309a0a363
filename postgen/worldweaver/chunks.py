"""Decode finished groups to frames piece by piece. Decoding is exact where the autoencoder allows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families.streaming import StreamingDecoder, denormalised
from postgen.worldweaver.levels import Modality
from postgen.worldweaver.model import WorldWeaverModel
from postgen.worldweaver.state import COUNTS, DECODER, LATENTS, PIECES, REACH, RolloutState

OUTPUTS = ("np", "pt", "pil", "latent")
OutputType = Literal["np", "pt", "pil", "latent"]
_COUNT = f"{DECODER}frames"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldWeaverChunk:
    """The finished part of a long video after one group, in the format of `output_type`."""

    frames: Any
    """np: (B, F, H, W, 3) float32 in [0, 1]; pt: (B, F, 3, H, W); pil: B lists of F pictures; latent: as `latents`,
    RGB only."""
    depth: Any
    """Disparity images, near is bright. np and pt: (B, F, H, W) in [0, 1]; pil: as above; latent: depth latents. None
    if depth was not requested."""
    latents: Tensor
    """(B, M * C, f, h, w) float32 clean latents of the group; the channels of the modalities are concatenated."""
    start_frame: int
    """Index in the video of the first of `frames`."""
    state: RolloutState
    """State after this chunk, from which the video continues. Save or branch it before you request the next chunk."""


class ChunkDecoder:
    """Decodes the groups of one video. `RolloutState.extra` holds the decoder caches between two groups.

    Args:
        model: the model.
        depth: whether to decode depth too.
        output_type: one of `OUTPUTS`; with "latent" nothing is decoded.
        time: number of video frames of a latent frame.
        num_latents: number of latent frames of the whole video; None: the video has no end.

    Raises:
        UserError: an unknown output type, a model without depth, or an autoencoder that cannot decode in pieces.
    """

    def __init__(
        self, model: WorldWeaverModel, *, depth: bool, output_type: str, time: int, num_latents: int | None
    ) -> None:
        if output_type not in OUTPUTS:
            raise UserError(f"output_type must be one of {', '.join(OUTPUTS)}, got {output_type!r}")
        if depth and "depth" not in model.modalities:
            raise UserError(
                "this model has no depth: load a model that was widened with aux=('depth',), or omit return_depth"
            )
        self.model, self.output_type, self.time = model, output_type, time
        self.modalities: tuple[Modality, ...] = ("rgb", "depth") if depth else ("rgb",)
        pipe: Any = getattr(model.denoiser, "pipe", None)
        self.vae = pipe.vae
        self.decoders: dict[Modality, StreamingDecoder] = {}
        if output_type != "latent":
            self.decoders = {
                # A decoder that looks ahead needs blended windows: there is no other way to stream such a decoder.
                name: StreamingDecoder(self.vae, num_latents=num_latents, windows=True)
                for name in self.modalities
            }
        self.count = 0
        """Number of frames that were returned so far."""
        self.reach = next((decoder.reach for decoder in self.decoders.values()), None)
        self.pieces: list[Tensor] = []
        """The last decoded latents, (B, M * C, t, h, w) each. A decoder can rebuild its cache from them."""

    def push(self, latents: Tensor, *, last: bool) -> dict[Modality, Tensor]:
        """Decode the next latents (B, M * C, f, h, w). If one modality fails, no decoder advances."""
        before = {name: decoder.state_dict() for name, decoder in self.decoders.items()}
        parts = self.model.split(latents)
        try:
            clips = {
                name: self._decoded(decoder, self.model.unscaled(parts[name], name), last)
                for name, decoder in self.decoders.items()
            }
            self._keep(latents)
        except BaseException:
            for name, decoder in self.decoders.items():
                decoder.load_state_dict(before[name])
            raise
        return clips

    def chunk(self, latents: Tensor, clips: Mapping[Modality, Tensor], state: RolloutState) -> WorldWeaverChunk:
        """Return the chunk for latents and for the clips that `push` decoded from them."""
        start = self.count
        parts = self.model.split(latents) if self.output_type == "latent" else clips
        frames = parts["rgb"]
        self.count += frames.shape[1] if self.decoders else self._frames(latents.shape[2])
        depth = parts["depth"] if "depth" in self.modalities else None
        if depth is not None and self.decoders:
            depth = depth.mean(2)
        return WorldWeaverChunk(
            frames=_output(frames, self.output_type),
            depth=None if depth is None else _output(depth, self.output_type),
            latents=latents,
            start_frame=start,
            state=state,
        )

    def remembered(self, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the new `RolloutState.extra` after the last push. Entries that are not of decoders stay."""
        kept = {name: value for name, value in extra.items() if not name.startswith(DECODER)}
        for name, decoder in self.decoders.items():
            kept |= {f"{DECODER}{name}.{key}": value for key, value in decoder.state_dict().items()}
        if self.pieces:
            lengths = torch.tensor([piece.shape[2] for piece in self.pieces])
            kept |= {LATENTS: torch.cat(self.pieces, 2), PIECES: lengths, REACH: torch.tensor(self.reach)}
        return {**kept, _COUNT: torch.tensor(self.count)}

    def resume(self, state: RolloutState, end: int | None) -> None:
        """Continue decoding at a state.

        Args:
            state: state whose `extra` has the decoder caches.
            end: new number of latent frames of the whole video; None: the video has no end.

        Raises:
            UserError: the state was made without this modality, with another autoencoder, or for a video with
                another end where the autoencoder depends on the end.
        """
        if self.reach is not None and LATENTS in state.extra:
            kept = state.extra[LATENTS]
            # States of older versions have no lengths of pieces.
            self.pieces = list(kept.split(state.extra.get(PIECES, torch.tensor([kept.shape[2]])).tolist(), 2))
        for name, decoder in self.decoders.items():
            prefix = f"{DECODER}{name}."
            own = {key.removeprefix(prefix): value for key, value in state.extra.items() if key.startswith(prefix)}
            if not own and state.finished:
                raise UserError(
                    f"the state was made without decoding {name}, and a decoder cannot start in the middle of a video:"
                    " request the same output as before"
                )
            if own.keys() == {*COUNTS}:  # a state from `RolloutState.light`
                parts = [self.model.split(piece)[name] for piece in self.pieces]
                decoder.prime(own, [self._latents(self.model.unscaled(part, name)) for part in parts])
            elif own:
                decoder.load_state_dict(own)
                self._check_end(decoder, state, end)
        if _COUNT in state.extra:
            self.count = int(state.extra[_COUNT])

    def _keep(self, latents: Tensor) -> None:
        """Remember the decoded latents, as far back as the decoders depend on them."""
        if self.reach is None:
            return
        pieces, count = [*self.pieces, latents.clone()], 0
        for place in reversed(range(len(pieces))):
            if count >= self.reach:
                pieces = pieces[place + 1 :]
                break
            count += pieces[place].shape[2]
        self.pieces = pieces

    def _check_end(self, decoder: StreamingDecoder, state: RolloutState, end: int | None) -> None:
        """Check that the video does not continue past an end that the autoencoder depended on."""
        more = end is None or end > state.finished
        if (decoder.finished and more) or decoder.num_latents not in (None, end):
            raise UserError(
                f"{type(self.vae).__name__} depends on the length of the video, which was to end after latent frame"
                f" {state.end}: the length cannot be changed; begin a new video of the desired length"
            )

    def _decoded(self, decoder: StreamingDecoder, latents: Tensor, last: bool) -> Tensor:
        clip = decoder.push(self._latents(latents))
        # An exact decoder has no pending frames, so finish() is needed only for blended windows.
        return torch.cat([clip, decoder.finish()], 1) if last and decoder.way.kind == "windows" else clip

    def _latents(self, latents: Tensor) -> Tensor:
        return denormalised(self.vae, latents.to(self.vae.device, self.vae.dtype))

    def _frames(self, latents: int) -> int:
        return latents * self.time if self.count else (latents - 1) * self.time + 1


def collected(parts: Sequence[Any], output_type: str) -> Any:
    """Concatenate the frames, or the depth images, of all chunks."""
    if output_type == "np":
        return np.concatenate(parts, axis=1)
    if output_type == "pil":
        return [[picture for part in parts for picture in part[row]] for row in range(len(parts[0]))]
    return torch.cat(list(parts), dim=2 if output_type == "latent" else 1)


def _output(clips: Tensor, output_type: str) -> Any:
    """Convert clips (B, F, 3, H, W), or depth (B, F, H, W), to the format of `output_type`."""
    if output_type in ("pt", "latent"):
        return clips
    array = clips.movedim(2, -1) if clips.dim() == 5 else clips
    numbers = array.float().cpu().numpy()
    if output_type == "np":
        return numbers
    from PIL import Image

    return [[Image.fromarray((picture * 255).round().astype("uint8")) for picture in row] for row in numbers]
