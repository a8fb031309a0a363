"""Prompts of a long video: a single prompt, or a schedule of prompts with start frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from postgen.errors import UserError, check_text, shown
from postgen.families import Condition
from postgen.families.registry import layout_of
from postgen.worldweaver.state import Prompts

Prompt = str | Sequence[str] | Sequence[tuple[int, str | Sequence[str]]]
"""A text; a list of B texts; or (frame, text or B texts) in rising order, with frames of the video."""


def timed(prompt: Prompt) -> list[tuple[int, list[str]]]:
    """Return a prompt as a list of (frame, B texts), with the same B in every entry.

    Raises:
        UserError: a wrong type, an empty prompt, a schedule that does not begin with frame 0, or frames that do not
            rise.
    """
    if not isinstance(prompt, str | list | tuple):
        raise UserError(f"the prompt must be a text, texts, or a schedule [(frame, text), ...], got {shown(prompt)}")
    entries: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    if not entries:
        raise UserError("the prompt schedule is empty: give a text, or (0, text) as its first entry")
    if all(isinstance(entry, str) for entry in entries):
        entries = [(0, entries)]
    told: list[tuple[int, list[str]]] = []
    for entry in entries:
        if not isinstance(entry, tuple | list) or len(entry) != 2 or type(entry[0]) is not int:
            raise UserError(f"an entry of the prompt schedule must be (frame, text), got {shown(entry)}")
        frame, text = entry
        texts = _texts(f"the prompt from frame {frame} on", text)
        if told and frame <= told[-1][0]:
            raise UserError(
                f"the prompt schedule goes from frame {told[-1][0]} to {frame}: give frames in rising order"
            )
        told.append((frame, texts))
    if told[0][0] != 0:
        raise UserError(f"the prompt schedule begins at frame {told[0][0]}: give a prompt for frame 0")
    rows = max(len(texts) for _, texts in told)
    if wrong := [frame for frame, texts in told if len(texts) not in (1, rows)]:
        raise UserError(
            f"the prompt from frame {wrong[0]} on has a wrong number of texts: give one text, or {rows} texts as in"
            " other entries"
        )
    return [(frame, texts * rows if len(texts) == 1 else texts) for frame, texts in told]


def encoded(
    denoiser: Any, told: Sequence[tuple[int, list[str]]], negative: str | Sequence[str] | None, *, guided: bool,
    time: int
) -> Prompts:  # fmt: skip
    """Encode the texts of a schedule.

    Args:
        denoiser: the model.
        told: schedule from `timed`.
        negative: negative prompt: a text, or one text for each video.
        guided: whether guidance is enabled, so that a negative prompt is used.
        time: number of video frames of a latent frame.

    Raises:
        UserError: a wrong number of negative prompts, a negative prompt without guidance, two prompts that begin in
            the same latent frame, or a pipeline without a text encoder or with the text encoder of another model.
    """
    rows = len(told[0][1])
    if denoiser.pipe.text_encoder is None or denoiser.pipe.tokenizer is None:
        raise UserError("the pipeline has no text encoder: give prompt_embeds, or load the pipeline with text encoder")
    negatives = None if negative is None else _texts("the negative prompt", negative)
    negatives = negatives * rows if isinstance(negative, str) and negatives else negatives
    if negatives is not None and not guided:
        raise UserError("negative_prompt needs guidance_scale above 1: raise guidance_scale, or omit negative_prompt")
    prompts: list[tuple[int, Condition]] = []
    for frame, texts in told:
        begins = latent_of(frame, time)
        if prompts and begins == prompts[-1][0]:
            raise UserError(
                f"the prompt from frame {frame} on begins in the same latent frame as the prompt before it: give a"
                " later frame"
            )
        condition = denoiser.encode_prompt(texts, negatives, guidance=guided)
        _check_width(denoiser, f"the output of {type(denoiser.pipe.text_encoder).__name__}", condition["prompt"])
        prompts.append((begins, condition))
    return prompts


def embedded(denoiser: Any, positive: Tensor, negative: Tensor | None, *, guided: bool) -> Prompts:
    """Return a schedule with one prompt, given as encodings (B, L, D) instead of texts.

    Raises:
        UserError: a tensor of wrong shape or with values that are not finite; a width that the model does not take;
            a model whose encoding is more than one tensor; guidance without a negative encoding, or the reverse.
    """
    given = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    for name, value in given.items():
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        fits = isinstance(value, Tensor) and value.dim() == 3 and value.numel() > 0 and bool(value.isfinite().all())
        if value is not None and not fits:
            raise UserError(f"{name} is {shape}: give a finite tensor of shape (videos, tokens, features)")
    if denoiser.per_row:
        raise UserError(
            f"{type(denoiser.pipe).__name__} encodes a prompt as more than one tensor: give prompt as a text"
        )
    for name, value in given.items():
        if value is not None:
            _check_width(denoiser, name, value)
    if guided != (negative is not None):
        raise UserError("prompt_embeds: give negative_prompt_embeds if, and only if, guidance_scale is above 1")
    parts = {"prompt": positive} if negative is None else {"prompt": positive, "negative": negative}
    return [(0, {name: value.to(denoiser.model.device, denoiser.model.dtype) for name, value in parts.items()})]


def _check_width(denoiser: Any, what: str, encoding: Tensor) -> None:
    """Check that encodings (B, L, D) have the width that the network takes."""
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
    """Return the first latent frame that begins at the given video frame or later.

    >>> [latent_of(frame, 4) for frame in (0, 1, 2, 5, 6)]
    [0, 1, 2, 2, 3]
    """
    return 0 if frame <= 0 else (frame - 1 + time - 1) // time + 1
