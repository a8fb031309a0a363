"""OCR reward: whether the text quoted in the prompt can be read in the clip, as in Flow-GRPO (arXiv 2505.05470)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from postgen.assets import locate
from postgen.errors import UserError
from postgen.rewards.base import Clip, prompted_by, streaming
from postgen.rewards.frames import REDUCTIONS, check_frames, uniform_frames

_NO_TEXT = "no text is wanted: put it into double quotes in the prompt, or into the column `text`"
_QUOTED = re.compile(r'"([^"]+)"|\u201c([^\u201d]+)\u201d')

Reader = Callable[[Tensor], list[str]]
"""Function that returns the texts found in one frame (3,H,W) in [0,1]."""


def quoted(prompt: str) -> str | None:
    """Return the text in the first pair of double quotes, or None if there is none.

    >>> quoted('a sign that says "Hello World"')
    'Hello World'
    """
    match = _QUOTED.search(prompt)
    return None if match is None else match[1] or match[2]


def edits(a: str, b: str) -> int:
    """Return the Levenshtein distance of two texts: the least number of insertions, deletions and replacements.

    >>> edits("kitten", "sitting")
    3
    """
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def readability(found: str, wanted: str) -> float:
    """Return 1 - edits / length, at least 0, or 1 if the wanted text occurs; spaces and case are ignored."""
    found, wanted = ("".join(text.lower().split()) for text in (found, wanted))
    if wanted in found:
        return 1.0
    return 1 - min(edits(found, wanted), len(wanted)) / len(wanted)


def rapid_reader() -> Reader:
    """Return a reader that uses the models of RapidOCR (PP-OCRv4, Apache-2.0) on the CPU.

    Raises:
        UserError: RapidOCR or one of its dependencies is not installed.
    """
    locate("ocr-detection")
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:
        raise UserError(
            f"ocr needs {error.name}: pip install onnxruntime opencv-python-headless pyclipper shapely"
        ) from error
    threads = torch.get_num_threads()
    engine: Any = RapidOCR(intra_op_num_threads=threads, inter_op_num_threads=1)

    def read(frame_3HW: Tensor) -> list[str]:
        levels = (frame_3HW.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        lines, _ = engine(levels[:, :, ::-1])  # RapidOCR expects OpenCV's channel order, blue first
        return [text for _, text, _ in lines or []]

    return read


@streaming
@prompted_by("text")
class OCR:
    """Return how much of the wanted text can be read, in [0,1].

    Args:
        frames: number of frames per clip that are read.
        reduce: how their scores are joined, a name from `postgen.rewards.frames.REDUCTIONS`.
        reader: function that reads a frame; None uses `rapid_reader()`.

    Raises:
        UserError: fewer than one frame, or an unknown `reduce`.
    """

    name = "ocr"

    def __init__(self, frames: int = 4, reduce: str = "mean", reader: Reader | None = None) -> None:
        check_frames(frames, reduce)
        self.frames, self.reduce, self.reader = frames, reduce, reader

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[Clip],
        *,
        text: Sequence[str | None] | None = None,
        log_reasons: Any = None,
    ) -> list[float | None]:
        """Score clips.

        Args:
            prompts: prompts with the wanted text in double quotes.
            completions: clips of any size.
            text: column of the wanted texts; replaces the quotes in the prompts.
            log_reasons: receives the reasons of missing scores.

        Returns:
            One score per clip; None if no text is wanted.

        Raises:
            UserError: the reader is not installed.
        """
        wanted = [quoted(prompt) for prompt in prompts] if text is None else list(text)
        if log_reasons is not None:
            log_reasons([None if words and words.strip() else _NO_TEXT for words in wanted])
        return [
            self._score(clip, words) if words and words.strip() else None
            for clip, words in zip(completions, wanted, strict=True)
        ]

    def lacking(self) -> str | None:
        """Return a message that names a missing package of the default reader; None if nothing is missing."""
        if self.reader is not None:
            return None
        try:
            locate("ocr-detection")
        except UserError as error:
            return str(error)
        lost = [name for name in ("onnxruntime", "cv2", "pyclipper", "shapely") if find_spec(name) is None]
        return f"it needs {lost[0]}: pip install 'postgen[rewards]'" if lost else None

    def _score(self, clip: Clip, wanted: str) -> float:
        self.reader = self.reader or rapid_reader()
        scores = [readability("".join(self.reader(frame)), wanted) for frame in uniform_frames(clip, self.frames)]
        return float(REDUCTIONS[self.reduce](torch.tensor(scores)))
