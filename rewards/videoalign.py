"""VideoAlign's VideoReward: visual quality, motion quality and text alignment of a video (arXiv 2501.13918).

The input of Qwen2-VL-2B is two frames per second and a rubric with one special token per axis; a linear layer reads
the states of the three tokens. The prompt is last in the text, so the first two axes do not depend on it. Scores are
standardised with the constants in the checkpoint's `model_config.json`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.rewards.base import Clip, RewardModel, streaming
from postgen.rewards.frames import uniform_frames
from postgen.rewards.qwen import Asker, QwenScore, assemble_score, fitting_size, merge_lora, plain, split_state
from postgen.rewards.weights import State, fill, find_file, read_state

MARKS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
AXES = ("vq", "mq", "ta")

LEAST_PIXELS = 128 * 28 * 28
MOST_PIXELS = 448 * 448
LEAST_FRAMES, MOST_FRAMES = 4, 768

CONSTANTS = {
    "VQ_mean": 3.6757,
    "VQ_std": 2.2476,
    "MQ_mean": 1.1646,
    "MQ_std": 1.3811,
    "TA_mean": 2.8105,
    "TA_std": 2.5121,
}
"""The published `inference_config`; used if the checkpoint's `model_config.json` has none."""


@functools.cache
def rubric() -> str:
    """Return the question of the network's training; `{text_prompt}` is replaced by the prompt.

    It must equal the text of the published code character for character (MIT; licence notice in `data/NOTICE.md`).
    """
    return (Path(__file__).parent / "data" / "videoalign_prompt.txt").read_text(encoding="utf-8")


def sampled(clip: Clip, fps: float, rate: float = 2.0) -> Tensor:
    """Return `rate` equally spaced frames per second, including the first and the last frame of the clip.

    The number of frames is even and between 4 and 768, as far as the clip has enough frames.
    """
    most = min(MOST_FRAMES, len(clip)) // 2 * 2
    count = round(min(max(len(clip) / fps * rate, LEAST_FRAMES), most) / 2) * 2
    return uniform_frames(clip, count)


@streaming
class VideoAlign(RewardModel):
    """The three axes and their sum; each axis is about -2 to 2 with mean 0 over the training set.

    The network runs in float32, or in bfloat16 as in training (5 GB). The frame rate is the only additional input; a
    clip of one frame gets None. The first axis alone drives a policy towards over-exposure.

    Args:
        model: Hub id, local folder, or path of the checkpoint file.
        file: the checkpoint in `model`, with `model_config.json` two folders up or next to it.
        base: Hub id or local folder of Qwen2-VL, for its configuration and tokenizer.
        device, dtype: see `RewardModel`.
    """

    name = "videoalign"
    outputs = (*AXES, "overall")

    def __init__(
        self,
        model: str = "KwaiVGI/VideoReward",
        file: str = "checkpoint-11352/model.pth",
        base: str = "Qwen/Qwen2-VL-2B-Instruct",
        **place: Any,
    ) -> None:
        super().__init__(**place)
        self.model, self.file, self.base = model, file, base
        self.settings: dict[str, Any] = {}
        self.asker: Asker | None = None

    def needed(self) -> Sequence[tuple[str, str]]:
        """Return the places of the checkpoint and the configuration."""
        return ((self.model, self.file), (self.base, "config.json"))

    def build(self) -> nn.Module:
        """Load the checkpoint, merge its LoRA adapters, and build the network.

        Raises:
            UserError: a file cannot be found, or its weights do not fit.
        """
        path = find_file(self.model, self.file)
        self.settings = _settings(self.model, path)
        self.asker = Asker(self.base, MARKS, "video")
        return video_score(self.base, read_state(path), self.settings["peft_lora_config"], path)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[Clip], *, fps: float | None = None
    ) -> dict[str, list[float | None]]:
        """Score clips.

        Args:
            prompts: one per clip.
            completions: clips of any size.
            fps: frames per second of all clips.

        Raises:
            UserError: the frame rate is missing or not above 0.
        """
        if not fps or fps <= 0:
            raise UserError(f"videoalign samples 2 frames per second: give fps above 0, got {fps}")
        self.load()
        scores: dict[str, list[float | None]] = {name: [None] * len(completions) for name in self.outputs}
        for rows in _alike(completions):
            clips = [sampled(completions[row], fps).to(self.device, torch.float32) for row in rows]
            axes_B3 = self.axes(clips, [prompts[row] for row in rows])
            for row, axes in zip(rows, axes_B3.tolist(), strict=True):
                for name, value in zip(self.outputs, (*axes, sum(axes)), strict=True):
                    scores[name][row] = value
        return scores

    def axes(self, clips: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Return the standardised axes (B,3) of clips of one size, after sampling."""
        assert self.asker is not None
        config = self.settings["data_config"]
        size = fitting_size(clips[0].shape[-2:], LEAST_PIXELS, config.get("max_frame_pixels", MOST_PIXELS))
        texts = [rubric().format(text_prompt=plain(prompt)) for prompt in prompts]
        tokens, mask, patches, grids, marks = self.asker(clips, texts, size)
        raw_BM = self.net(tokens, mask, patches.to(self.dtype), grids, marks)
        # The head has one output for all axes, or one per axis, of which only the axis's own token counts.
        raw_B3 = raw_BM[..., 0] if raw_BM.shape[-1] == 1 else raw_BM.diagonal(dim1=1, dim2=2)
        shift = self.settings.get("inference_config") or CONSTANTS
        means, stds = (raw_B3.new_tensor([shift[f"{a.upper()}_{kind}"] for a in AXES]) for kind in ("mean", "std"))
        axes: Tensor = (raw_B3 - means) / stds
        return axes


def _settings(model: str, path: Path) -> dict[str, Any]:
    """Read `model_config.json`, which is in the parent of the checkpoint's folder or next to the checkpoint."""
    near = [place / "model_config.json" for place in (path.parent.parent, path.parent)]
    found = next((file for file in near if file.is_file()), None)
    if found is None and path == Path(model).expanduser():
        raise UserError(f"{path} needs its model_config.json: put the file one folder up or next to it")
    settings: dict[str, Any] = json.loads((found or find_file(model, "model_config.json")).read_text(encoding="utf-8"))
    if missing := [part for part in ("data_config", "peft_lora_config") if part not in settings]:
        raise UserError(f"the model_config.json of {model} has no {' and no '.join(missing)}: it is another model's")
    return settings


def _alike(completions: Sequence[Clip]) -> list[list[int]]:
    """Group the rows that can be scored by frame size."""
    groups: dict[torch.Size, list[int]] = {}
    for row, clip in enumerate(completions):
        if len(clip) > 1:
            groups.setdefault(clip.shape[-2:], []).append(row)
    return list(groups.values())


def video_score(base: str, state: State, lora: dict[str, Any], source: object) -> QwenScore:
    """Build the network of a published checkpoint, with LoRA adapters merged or separate.

    Raises:
        UserError: the base model cannot be found, or the weights do not fit.
    """
    rank = lora.get("lora_r") or 1
    scale = (lora.get("lora_alpha") or rank) / (rank**0.5 if lora.get("use_rslora") else rank)
    parts = split_state(merge_lora(state, scale))
    return assemble_score(base, parts, _linear_head(parts["head"], source), "video", source)


def _linear_head(state: State, source: object) -> nn.Module:
    weight = state.get("weight")
    if weight is None or weight.ndim != 2:
        raise UserError(f"the weights of {source} are those of another model: they lack rm_head.weight")
    return fill(nn.Linear(weight.shape[1], weight.shape[0], bias=False), state, source)
