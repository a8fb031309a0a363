"""Prompts of a long video: one, or a schedule of them, each from a frame on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from postgen.errors import UserError, check_text, shown
from postgen.families import Condition
from postgen.families.registry import layout_of
from postgen.worldweaver.state import Prompts

Prompt = str | Sequence[str] | Sequence[tuple[int, str | Sequence[str]]]
"""A text; one for each of B videos; or (frame, text or B texts) in rising order, frames of the video."""


def timed(prompt: Prompt) -> list[tuple[int, list[str]]]:
    """Return a prompt as (frame, B texts), B the same everywhere.

    Raises:
        UserError: it is none, empty, does not begin with frame 0, or its frames do not rise.
    """
    if not isinstance(prompt, str | list | tuple):
        raise UserError(f"the prompt is a text, texts, or a schedule [(frame, text), ...], got {shown(prompt)}")
    entries: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    if not entries:
        raise UserError("the prompt schedule is empty: give a text, or (0, text) as its first entry")
    if all(isinstance(entry, str) for entry in entries):
        entries = [(0, entries)]
    told: list[tuple[int, list[str]]] = []
    for entry in entries:
        if not isinstance(entry, tuple | list) or len(entry) != 2 or type(entry[0]) is not int:
            raise UserError(f"an entry of the prompt schedule is (frame, text), got {shown(entry)}")
        frame, text = entry
        texts = _texts(f"the prompt from frame {frame} on", text)
        if told and frame <= told[-1][0]:
            raise UserError(f"the prompt schedule goes from frame {told[-1][0]} to {frame}: frames must rise")
        told.append((frame, texts))
    if told[0][0] != 0:
        raise UserError(f"the prompt schedule begins at frame {told[0][0]}: give a prompt for frame 0")
    rows = max(len(texts) for _, texts in told)
    if wrong := [frame for frame, texts in told if len(texts) not in (1, rows)]:
        raise UserError(f"the prompt from frame {wrong[0]} on is not one text, nor {rows} as elsewhere")
    return [(frame, texts * rows if len(texts) == 1 else texts) for frame, texts in told]


def encoded(
    denoiser: Any, told: Sequence[tuple[int, list[str]]], negative: str | Sequence[str] | None, *, guided: bool,
    time: int
) -> Prompts:  # fmt: skip
    """Encode a schedule; each of its texts once.

    Args:
        denoiser: the model.
        told: from `timed`.
        negative: what no video should show: a text, or one for each.
        guided: whether the negative prompt is wanted.
        time: frames of a latent frame.

    Raises:
        UserError: another number of negative prompts, two prompts that begin within one latent frame, or a pipeline
            without text encoder, or with that of another model.
    """
    rows = len(told[0][1])
    if denoiser.pipe.text_encoder is None or denoiser.pipe.tokenizer is None:
        raise UserError("the pipeline has no text encoder: give prompt_embeds, or load it with one")
    negatives = None if negative is None else _texts("the negative prompt", negative)
    negatives = negatives * rows if isinstance(negative, str) and negatives else negatives
    if negatives is not None and not guided:
        raise UserError("a negative prompt needs guidance_scale above 1: change one of the two")
    prompts: list[tuple[int, Condition]] = []
    for frame, texts in told:
        begins = latent_of(frame, time)
        if prompts and begins == prompts[-1][0]:
            raise UserError(f"the prompt from frame {frame} on begins in the latent frame of the one before: later")
        condition = denoiser.encode_prompt(texts, negatives, guidance=guided)
        _check_width(denoiser, f"what {type(denoiser.pipe.text_encoder).__name__} says", condition["prompt"])
        prompts.append((begins, condition))
    return prompts


def embedded(denoiser: Any, positive: Tensor, negative: Tensor | None, *, guided: bool) -> Prompts:
    """Take encodings (B, L, D) instead of texts.

    Raises:
        UserError: no encodings, or those of another text encoder; the model's encodings are more than one tensor;
            guidance without a negative one, or the reverse.
    """
    given = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    for name, value in given.items():
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        fits = isinstance(value, Tensor) and value.dim() == 3 and value.numel() > 0 and bool(value.isfinite().all())
        if value is not None and not fits:
            raise UserError(f"{name} is {shape}: give a tensor (videos, tokens, features) of finite numbers")
    if denoiser.per_row:
        raise UserError(f"{type(denoiser.pipe).__name__} encodes a prompt as more than one tensor: give the text")
    for name, value in given.items():
        if value is not None:
            _check_width(denoiser, name, value)
    if guided != (negative is not None):
        raise UserError("prompt_embeds: give negative_prompt_embeds if, and only if, guidance_scale is above 1")
    parts = {"prompt": positive} if negative is None else {"prompt": positive, "negative": negative}
    return [(0, {name: value.to(denoiser.model.device, denoiser.model.dtype) for name, value in parts.items()})]


def _check_width(denoiser: Any, what: str, encoding: Tensor) -> None:
    """Refuse encodings (B, L, D) of another width than the network takes."""
    call = layout_of(denoiser.model).call
    if call is None or call.text_width is None:
        return
    if encoding.shape[-1] != (width := denoiser.model.config[call.text_width]):
        raise UserError(
            f"{what} has {encoding.shape[-1]} features, {type(denoiser.model).__name__} takes {width}: encode the"
            " prompt with the text encoder of this model"
        )


def _texts(what: str, given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given) if isinstance(given, list | tuple) else []
    if not texts or not all(isinstance(each, str) for each in texts):
        raise UserError(f"{what} must be a text or texts, got {shown(given)}")
    for each in texts:
        check_text(what, each)
    return texts


def latent_of(frame: int, time: int) -> int:
    """Return the first latent frame that begins at a frame of the video or later.

    >>> [latent_of(frame, 4) for frame in (0, 1, 2, 5, 6)]
    [0, 1, 2, 2, 3]
    """
    return 0 if frame <= 0 else (frame - 1 + time - 1) // time + 1
