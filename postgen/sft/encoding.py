"""Encoding of clips and captions through the cache, and the digests of what their encodings depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families import Denoiser
from postgen.sampling.seeds import normal
from postgen.training.digests import digest, weights_digest
from postgen.training.transfer import to_device

from .cache import Cache, Make
from .clips import Clip, read_clip

_VERSION = 1
"""Version of the stored tensors; another version makes all entries again."""


class Encoder:
    """Encodes clips, first frames and captions. Each entry of the cache depends on one of them alone.

    A changed caption encodes only this caption again; a changed autoencoder only the clips; changed text encoders only
    the captions.

    Args:
        pipe: the pipeline.
        denoiser: its denoiser.
        folder: folder of the cache.
        dtype: name of the dtype of stored latents.
    """

    def __init__(self, pipe: Any, denoiser: Denoiser, folder: Path, dtype: str = "float32") -> None:
        self.denoiser, self._pipe, self._dtype = denoiser, pipe, dtype
        self.takes_image = bool(getattr(denoiser, "takes_image", False))
        self._clips, self._frames, self._texts = (
            Cache(folder / name) for name in ("latents", "first_frames", "captions")
        )
        self._vae = [_VERSION, type(denoiser).__name__, *_part_key(pipe.vae), dtype]
        image = getattr(pipe, "image_encoder", None)
        self._image = [*_kinds(denoiser), *(_part_key(image) if isinstance(image, nn.Module) else ())]
        self._text = [_VERSION, type(denoiser).__name__, denoiser.max_sequence_length, *_text_key(pipe, denoiser)]

    def clip_key(self, clip: Clip) -> str:
        """Return the digest of a clip's latents: content, frames, bucket, autoencoder."""
        return digest([clip.content, clip.item.kind, list(clip.frames), str(clip.bucket), *self._vae])

    def text_key(self, caption: str) -> str:
        """Return the digest of a caption's encoding."""
        return digest([caption, *self._text])

    def settings(self) -> dict[str, Any]:
        """Return JSON values of all that entries depend on besides clips and captions, by name."""
        parts = {"autoencoder": self._vae[2:-1], "image encoder": self._image, "text encoders": self._text[3:]}
        plain = {"max_sequence_length": self.denoiser.max_sequence_length, "cache_dtype": self._dtype}
        return {**plain, **{name: digest(value) for name, value in parts.items()}}

    def encode(self, clips: Sequence[Clip], *, part: int = 0, parts: int = 1, shown: bool = False) -> dict[str, int]:
        """Encode what is missing in the cache for clips and for the empty caption; return the numbers of new entries.

        Args:
            clips: the clips.
            part: number of this process.
            parts: number of processes that call this method with the same clips.
            shown: whether to show progress bars.

        Raises:
            UserError: a file cannot be read, latents are not finite, or the cache cannot be written.
        """
        captions = dict.fromkeys(["", *(clip.item.caption for clip in clips)])
        texts: list[tuple[str, Make]] = [(self.text_key(text), partial(self._text_of, text)) for text in captions]
        videos: list[tuple[str, Make]] = [(self.clip_key(clip), partial(self._clip_of, clip)) for clip in clips]
        jobs = [(self._texts, texts, "captions"), (self._clips, videos, "clips")]
        if self.takes_image:
            frames: list[tuple[str, Make]] = [(self._frame_key(clip), partial(self._frame_of, clip)) for clip in clips]
            jobs.append((self._frames, frames, "first frames"))
        return {
            what: cache.fill(entries, part=part, parts=parts, bar=f"encode {what}" if shown else "")
            for cache, entries, what in jobs
        }

    def latents(self, clips: Sequence[Clip], seeds: Sequence[int] | None, device: torch.device) -> Tensor:
        """Return the normalised latents of clips of one bucket, (B, ...), float32.

        Args:
            clips: the clips.
            seeds: seed of each clip, to sample from the distribution of the autoencoder; None: its mode.
            device: device of the latents.
        """
        found = [self._clips.get(self.clip_key(clip), partial(self._clip_of, clip)) for clip in clips]
        if "latents" in found[0]:
            return to_device(torch.cat([each["latents"] for each in found]).float(), device)
        raw = torch.cat([each["mean"] for each in found]).float()
        if seeds is not None and "std" in found[0]:
            std = torch.cat([each["std"] for each in found]).float()
            # The noise is drawn on the CPU, so that it does not depend on the device.
            raw = raw + std * normal(std.shape[1:], seeds, std.device)
        denoiser: Any = self.denoiser
        latents: Tensor = denoiser.from_raw(to_device(raw, device))
        return latents

    def conditions(self, clips: Sequence[Clip], device: torch.device) -> dict[str, Tensor]:
        """Return the condition entries of clips, (B, ...), on a device."""
        rows = [self._known_text(clip.item.caption) for clip in clips]
        if self.takes_image:
            more = [self._frames.get(self._frame_key(clip), partial(self._frame_of, clip)) for clip in clips]
            rows = [{**row, **extra} for row, extra in zip(rows, more, strict=True)]
        return {name: torch.cat([row[name] for row in rows]).to(device) for name in rows[0]}

    def caption(self, text: str, device: torch.device) -> dict[str, Tensor]:
        """Return the condition entries of a caption, batch size 1, on a device."""
        return {name: value.to(device) for name, value in self._known_text(text).items()}

    def _known_text(self, text: str) -> dict[str, Tensor]:
        return self._texts.get(self.text_key(text), partial(self._text_of, text))

    def _frame_key(self, clip: Clip) -> str:
        return digest([clip.content, clip.item.kind, clip.frames[0], str(clip.bucket), *self._vae, *self._image])

    @torch.no_grad()
    def _clip_of(self, clip: Clip) -> dict[str, Tensor]:
        denoiser: Any = self.denoiser
        pixels = read_clip(clip)[None]
        if hasattr(denoiser, "posterior"):
            mean, std = denoiser.posterior(pixels)
            made = {"mean": mean} if std is None else {"mean": mean, "std": std}
        else:  # a denoiser that is not a `PipelineDenoiser`
            made = {"latents": denoiser.encode_video(pixels)}
        made = {name: value.to(getattr(torch, self._dtype)) for name, value in made.items()}
        for name, value in made.items():
            if not value.isfinite().all():
                raise UserError(
                    f"{clip.item.path}: the {name} of its latents is not finite in {self._dtype}: the autoencoder"
                    " overflows in its dtype; set dtype: bfloat16 or float32, and cache_dtype: float32"
                )
        return made

    @torch.no_grad()
    def _frame_of(self, clip: Clip) -> dict[str, Tensor]:
        first = replace(clip, frames=clip.frames[:1])
        return self.denoiser.encode_image(read_clip(first), clip.bucket.num_frames)

    @torch.no_grad()
    def _text_of(self, text: str) -> dict[str, Tensor]:
        return self.denoiser.encode_prompt([text], guidance=False)


def _part_key(module: nn.Module) -> list[Any]:
    """Return JSON values that identify a model: class, weights, dtype, and its configuration."""
    config: Any = getattr(module, "config", {})
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    told = {key: value for key, value in values.items() if not key.startswith("_")}
    kind = next((str(weight.dtype) for weight in module.parameters()), "")
    tiled = bool(getattr(module, "use_tiling", False))  # tiles of an autoencoder are blended
    return [type(module).__name__, weights_digest(module), kind, tiled, json.dumps(told, default=str, sort_keys=True)]


def _text_key(pipe: Any, denoiser: Denoiser) -> list[Any]:
    """Return JSON values that identify the text encoders, the tokenizers, and the dtype of the encodings."""
    parts = sorted(pipe.components.items())
    encoders = [[name, *_part_key(part)] for name, part in _modules(parts) if name.startswith("text_encoder")]
    tokenizers = [[name, *_tokenizer_key(part)] for name, part in parts if name.startswith("tokenizer") and part]
    return [type(pipe).__name__, encoders, tokenizers, _kinds(denoiser)]


def _kinds(denoiser: Denoiser) -> list[str]:
    """Return the dtypes of the networks, which are those of encodings."""
    return [str(getattr(module, "dtype", "")) for module in denoiser.transformers.values()]


def _modules(parts: Iterable[tuple[str, Any]]) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in parts if isinstance(part, nn.Module)]


def _tokenizer_key(tokenizer: Any) -> list[Any]:
    words = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else []
    return [type(tokenizer).__name__, hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]]
