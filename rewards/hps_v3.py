"""HPSv3: human preference for a picture and its prompt, predicted by Qwen2-VL-7B (arXiv 2508.03789).

The input is the picture, a rubric, the prompt and a special token. The head reads the state of this token and predicts
mean and log deviation of the preference; the mean is the score. The weights of body and head are in one safetensors
file.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from postgen.errors import UserError
from postgen.rewards.frames import FrameReward
from postgen.rewards.qwen import Asker, assemble_score, fitting_size, plain, split_state
from postgen.rewards.weights import fill, find_file, read_state

MARK = "<|Reward|>"
PIXELS = 256 * 28 * 28
"""Area of the resized frame in px, both minimum and maximum: 448x448 for a square frame."""


@functools.cache
def rubric() -> str:
    """Return the question of the network's training; `{text_prompt}` is replaced by the prompt.

    It must equal the text of the published code character for character (MIT; licence notice in `data/NOTICE.md`).
    """
    return (Path(__file__).parent / "data" / "hps_v3_prompt.txt").read_text(encoding="utf-8")


def rank_head(width: int) -> nn.Sequential:
    """Return the published head: linear layers of sizes width-1024-16-2 with ReLU between them."""
    layers = nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    return nn.Sequential(*layers)


class HPSv3(FrameReward):
    """Predicted human preference for frames and their prompt, about -5 to 15.

    The network takes 16 GB in bfloat16: set `dtype="bfloat16"`, or serve the reward from another machine. The head
    then runs in bfloat16 too, whereas the published code keeps it in float32.

    Args:
        model: Hub id, local folder or file.
        file: the checkpoint in `model`.
        base: Hub id or local folder of Qwen2-VL, for its configuration and tokenizer.
        frames, reduce, device, dtype: see `FrameReward`.
    """

    name = "hps_v3"

    def __init__(
        self,
        model: str = "MizzenAI/HPSv3",
        file: str = "HPSv3.safetensors",
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.model, self.file, self.base = model, file, base
        self.asker: Asker | None = None

    def needed(self) -> Sequence[tuple[str, str]]:
        """Return the places of the checkpoint and the configuration."""
        return ((self.model, self.file), (self.base, "config.json"))

    def build(self) -> nn.Module:
        """Load the checkpoint.

        Raises:
            UserError: a file cannot be found, or its weights do not fit.
        """
        path = find_file(self.model, self.file)
        parts = split_state(read_state(path))
        first = parts["head"].get("0.weight")
        if first is None or first.ndim != 2:
            raise UserError(f"the weights of {path} are those of another model: they lack rm_head.0.weight")
        head = fill(rank_head(first.shape[1]), parts["head"], path)
        self.asker = Asker(self.base, [MARK], "image")
        return assemble_score(self.base, parts, head, "image", path)

    def frame_scores(self, frames_BK3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the predicted mean preference (B,K)."""
        assert self.asker is not None
        count = frames_BK3HW.shape[1]
        size = fitting_size(frames_BK3HW.shape[-2:], PIXELS, PIXELS)
        pictures = [frame[None] for frame in frames_BK3HW.flatten(0, 1)]
        texts = [rubric().format(text_prompt=plain(prompt)) for prompt in prompts for _ in range(count)]
        tokens, mask, patches, grids, marks = self.asker(pictures, texts, size)
        scores: Tensor = self.net(tokens, mask, patches.to(self.dtype), grids, marks)
        return scores[:, 0, 0].view(frames_BK3HW.shape[:2])
