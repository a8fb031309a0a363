"""Can a text that the prompt quotes be read in the clip? By PP-OCRv4, as Flow-GRPO's reward (arXiv 2505.05470)."""

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

_NO_TEXT = "no text is asked for: it stands in double quotes in the prompt, or in the column `text`"
_QUOTED = re.compile(r'"([^"]+)"|\u201c([^\u201d]+)\u201d')

Reader = Callable[[Tensor], list[str]]
"""Returns the texts in one frame (3,H,W) in [0,1]."""


def quoted(prompt: str) -> str | None:
    """Return what stands in the first pair of double quotes, None without any.

    >>> quoted('a sign that says "Hello World"')
    'Hello World'
    """
    match = _QUOTED.search(prompt)
    return None if match is None else match[1] or match[2]


def edits(a: str, b: str) -> int:
    """Return the least number of insertions, deletions and replacements from one text to the other (Levenshtein).

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
    """Return 1 - edits / length, at least 0, and 1 where the wanted text occurs; spaces and case do not count."""
    found, wanted = ("".join(text.lower().split()) for text in (found, wanted))
    if wanted in found:
        return 1.0
    return 1 - min(edits(found, wanted), len(wanted)) / len(wanted)


def rapid_reader() -> Reader:
    """Return a reader on the models of RapidOCR (PP-OCRv4, Apache-2.0), which run on the CPU.

    Raises:
        UserError: its package or what it needs is not installed.
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
        lines, _ = engine(levels[:, :, ::-1])  # it takes the channels of OpenCV, blue first
        return [text for _, text, _ in lines or []]

    return read


@streaming
@prompted_by("text")
class OCR:
    """How much of the wanted text is read, in [0,1].

    Args:
        frames: how many frames of a clip are read; their scores are joined.
        reduce: how, a name from `postgen.rewards.frames.REDUCTIONS`.
        reader: reads a frame; None takes `rapid_reader()`.

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
            prompts: the wanted text stands in double quotes.
            completions: clips of any sizes.
            text: column of wanted texts, instead.
            log_reasons: gets why a clip has no score.

        Returns:
            One score a clip; None where no text is wanted.

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
        """Say which package of the reader is not here; a reader of one's own has all that it needs."""
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
