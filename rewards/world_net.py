"""The networks of `world_clip` and `world_judge`: a small video encoder, a small text encoder, and their folders.

A folder contains `config.json` (the arguments of the network), `model.safetensors` (float16) and, for a text encoder,
a tokenizer. Suffixes: B clips, T frames, C channels, N tokens, D width, L text length.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from postgen import assets
from postgen.errors import UserError
from postgen.rewards.base import Clip
from postgen.rewards.frames import uniform_frames
from postgen.rewards.weights import read_state


class VideoTower(nn.Module):
    """Encodes each clip as one vector: convolutions on frames and their differences, then a transformer.

    Args:
        channels: channels of the stages; each stage halves the resolution.
        width: width of the transformer.
        layers: number of layers of the transformer.
        grid: tokens per row and column of a frame.
        frames: largest number of frames of a clip.
    """

    def __init__(self, *, channels: list[int], width: int, layers: int, grid: int, frames: int) -> None:
        super().__init__()
        sizes = [6, *channels]
        self.stages = nn.Sequential(*(_stage(a, b) for a, b in zip(sizes[:-1], channels, strict=True)))
        self.grid, self.frames = grid, frames
        self.project = nn.Linear(channels[-1], width)
        self.place = nn.Parameter(torch.randn(grid * grid, width) * 0.02)
        self.time = nn.Parameter(torch.randn(frames, width) * 0.02)
        self.summary = nn.Parameter(torch.randn(width) * 0.02)
        self.transformer = _transformer(width, layers)
        self.norm = nn.LayerNorm(width)

    def forward(self, clips_BT3HW: Tensor) -> Tensor:
        """Return (B,D) for clips in [0,1] with at most `frames` frames."""
        batch, time = clips_BT3HW.shape[:2]
        x = 4 * (clips_BT3HW - 0.5)
        change = functional.pad(4 * x.diff(dim=1), (0, 0, 0, 0, 0, 0, 1, 0))
        # With TF32 convolutions on a GPU a score would depend on the other clips of its batch, by about 5e-4.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            y = self.stages(torch.cat((x, change), 2).flatten(0, 1))
        y = functional.adaptive_avg_pool2d(y, self.grid).flatten(2).mT
        y = self.project(y).unflatten(0, (batch, time)) + self.place + self.time[:time, None]
        tokens_BND = torch.cat((self.summary.expand(batch, 1, -1), y.flatten(1, 2)), 1)
        return self.norm(self.transformer(tokens_BND)[:, 0])  # type: ignore[no-any-return]


class TextTower(nn.Module):
    """Encodes each text as one vector: a transformer, then the mean over the tokens that are not padding (0).

    Args:
        vocabulary: number of token ids.
        width: width of the transformer.
        layers: number of layers of the transformer.
        length: largest number of tokens of a text.
    """

    def __init__(self, *, vocabulary: int, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width, padding_idx=0)
        self.order = nn.Parameter(torch.randn(length, width) * 0.02)
        self.transformer = _transformer(width, layers)
        self.norm = nn.LayerNorm(width)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Return (B,D) for token ids (B,L)."""
        empty = ids_BL == 0
        x = self.words(ids_BL) + self.order[: ids_BL.shape[1]]
        x = self.norm(self.transformer(x, src_key_padding_mask=empty))
        known = (~empty)[..., None].to(x.dtype)
        return (x * known).sum(1) / known.sum(1).clamp_min(1)  # type: ignore[no-any-return]


def _stage(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
        nn.GroupNorm(4, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.GroupNorm(4, outputs),
        nn.SiLU(),
    )


def _transformer(width: int, layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        width, width // 32, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def prepare(clip: Clip, frames: int, size: int, device: torch.device | str | None = None) -> Tensor:
    """Return up to `frames` equally spaced frames, (T,3,size,size): whole pictures, resized with antialiasing.

    Args:
        clip: (F,3,H,W), or a long video whose frames are read when they are needed.
        frames, size: number and side of the frames of the result.
        device: device of the result; None keeps that of the clip.
    """
    picked = uniform_frames(clip, frames).to(device).float()
    if picked.shape[-2:] == (size, size):
        return picked
    small = functional.interpolate(picked, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return small.clamp(0, 1)


def save_net(net: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Write a network (float16) and its configuration into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {name: value.detach().cpu().half().contiguous() for name, value in net.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def read_config(folder: Path, keys: set[str]) -> dict[str, Any]:
    """Read the configuration of a folder.

    Raises:
        UserError: the folder does not contain such a network.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} does not contain a reward: {error}") from error
    if not isinstance(config, dict) or not keys <= config.keys():
        raise UserError(f"{folder}/config.json is of another model: it lacks {', '.join(sorted(keys - set(config)))}")
    return config


def load_weights(net: nn.Module, folder: Path) -> None:
    """Load the weights of a folder into a network.

    Raises:
        UserError: the weights are missing, damaged, or do not fit.
    """
    try:
        net.load_state_dict(read_state(folder / "model.safetensors"))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{folder}/model.safetensors does not fit: {' '.join(str(error).split())[:200]}") from error


def reward_folder(model: str | Path | None, name: str) -> Path:
    """Return the folder of a reward's weights: the given folder, or the one in the package.

    Raises:
        UserError: the folder has no weights.
    """
    folder = Path(model) if model is not None else Path(assets.__file__).resolve().parent / name
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder} has no weights: train them with recipes/{name}.yaml and give model='.../export'")
    return folder
