"""`WorldDepthNet`, a small network from frames to disparity, and `WorldDepth`, the depth source that uses it.

The network is a U-Net of ConvNeXt blocks (arXiv:2201.03545) on each frame. At the coarser levels every position also
sees the two preceding frames, so that depth does not flicker. It never sees later frames, so a clip can be extended.
Method `world_depth` trains the network. Suffixes: B clips, F frames, N pictures (B * F), C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn
from torch.nn import functional

from postgen import assets
from postgen.errors import UserError, cut, first_line

ASSET = "world-depth"
WEIGHTS = "diffusion_pytorch_model.safetensors"
_UNIT = 0.1
"""Disparity in 1/m for an output of 1 of the last layer. Objects of the world are 5 to 12 m away."""
_PAST = 2
"""Number of preceding frames that one `CausalMix` sees."""


class ConvBlock(nn.Module):
    """A ConvNeXt block: a depthwise 7x7 convolution, then two linear layers at each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.around = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.wide = nn.Linear(channels, 3 * channels)
        self.narrow = nn.Linear(3 * channels, channels)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        z = self.norm(self.around(x_NCHW).movedim(1, -1))
        y: Tensor = self.narrow(functional.gelu(self.wide(z)))
        return x_NCHW + y.movedim(-1, 1)


def _normed(norm: nn.Module, x_NCHW: Tensor) -> Tensor:
    y: Tensor = norm(x_NCHW.movedim(1, -1))
    return y.movedim(-1, 1)


class CausalMix(nn.Module):
    """Mixes each position with itself in the two preceding frames. Copies of the first frame stand before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.taps = nn.Parameter(torch.eye(_PAST + 1)[-1][:, None].repeat(1, channels))
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_NCHW: Tensor, frames: int) -> Tensor:
        """Return a tensor of the same shape; N is a multiple of `frames`."""
        y = self.norm(x_NCHW.movedim(1, -1)).unflatten(0, (-1, frames))
        y = torch.cat((*[y[:, :1]] * _PAST, y), 1)
        mixed = sum(self.taps[k] * y[:, k : k + frames] for k in range(_PAST + 1))
        out: Tensor = self.out(functional.gelu(cast(Tensor, mixed)))
        return x_NCHW + out.flatten(0, 1).movedim(-1, 1)


class WorldDepthNet(ModelMixin, ConfigMixin):
    """Predicts disparity of frames: 1/Z in 1/m for the camera of `postgen.world`, up to scale and shift otherwise.

    For a picture with another angle of view, the network returns the disparity for a world camera that would see the
    same picture, as in Metric3D (arXiv:2307.10984): half the angle of view doubles the disparity.

    Args:
        channels: channels of the levels at 1/2, 1/4, 1/8, ... of the picture's size.
        blocks: number of ConvNeXt blocks of each level of the encoder; each level of the decoder has one.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, channels: Sequence[int] = (24, 48, 72, 104), blocks: Sequence[int] = (1, 2, 2, 3)) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stem = nn.Conv2d(4, channels[0], 4, stride=2, padding=1)
        stages = zip(channels, blocks, strict=True)
        self.down = nn.ModuleList(nn.Sequential(*(ConvBlock(c) for _ in range(n))) for c, n in stages)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(channels))
        self.grow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(channels))
        self.up = nn.ModuleList(ConvBlock(c) for c in channels[:-1])
        # No mixing at half size: there objects move too far between two frames for a position to be the same place.
        self.mix_down = nn.ModuleList(CausalMix(c) for c in channels[1:])
        self.mix_up = nn.ModuleList(CausalMix(c) for c in channels[1:-1])
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels)
        self.last = nn.Conv2d(channels[0], 16, 3, padding=1)
        self.fine = nn.Conv2d(19, 12, 3, padding=1)
        self.out = nn.Conv2d(12, 1, 3, padding=1)

    @property
    def multiple(self) -> int:
        """Height and width are padded to a multiple of this number."""
        return int(2 ** len(self.config["channels"]))

    @property
    def history(self) -> int:
        """Number of preceding frames on which the disparity of a frame depends."""
        return _PAST * (len(self.mix_down) + len(self.mix_up))

    def forward(self, clips_BF3HW: Tensor) -> Tensor:
        """Return disparity (B,F,H,W), float32, of clips in [0,1] of any size. The network is made for 64 to 192 px."""
        frames, height, width = clips_BF3HW.shape[1], *clips_BF3HW.shape[-2:]
        x = 2 * clips_BF3HW.flatten(0, 1) - 1
        rows = torch.linspace(-1, 1, height, device=x.device, dtype=x.dtype)
        x = torch.cat((x, rows[:, None].expand(len(x), 1, height, width)), 1)
        right, below = -width % self.multiple, -height % self.multiple
        x = functional.pad(x, (0, right, 0, below), mode="replicate")
        y, levels = self.stem(x), []
        for k, stage in enumerate(self.down):
            y = stage(self.shrink[k - 1](y) if k else y)
            y = self.mix_down[k - 1](y, frames) if k else y
            levels.append(y)
        for k in reversed(range(len(self.up))):
            y = self.grow[k](_normed(self.norms[k + 1], y))
            y = levels[k] + functional.interpolate(y, scale_factor=2.0, mode="bilinear")
            y = self.up[k](y)
            y = self.mix_up[k - 1](y, frames) if k else y
        y = functional.interpolate(
            functional.gelu(self.last(_normed(self.norms[0], y))), scale_factor=2.0, mode="bilinear"
        )
        y = self.out(functional.gelu(self.fine(torch.cat((y, x[:, :3]), 1))))
        disparity: Tensor = (_UNIT * y[:, 0, :height, :width].float()).unflatten(0, (-1, frames))
        return disparity


class WorldDepth:
    """Computes the disparity of frames with `WorldDepthNet` in pieces, so that the network's memory does not grow.

    Each piece also reads the preceding frames on which its result depends, so the result equals that of the whole clip
    up to rounding. The frames and the result are held whole, in float32.

    Args:
        model: folder that `WorldDepthNet.save_pretrained` wrote; None: the shipped network.
        device: device of the network.
        largest: longer side in pixels at which the network runs, at least 32. Larger frames are downsampled, and
            their disparity is upsampled.
        piece: number of frames per forward pass, at least 1.

    Raises:
        UserError: the folder has no network, or a setting is below its bound.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        largest: int = 192,
        piece: int = 32,
    ) -> None:
        if largest < 32 or piece < 1:
            raise UserError(f"largest={largest}, piece={piece}: give at least 32 pixels and 1 frame")
        self.net = load_depth_net(model).to(device).eval()
        self.largest, self.piece = largest, piece

    @torch.no_grad()
    def __call__(self, frames: Any) -> Tensor:
        """Return disparity (T,H,W), float32, on the device of the network.

        Args:
            frames: (T,H,W,3) or (T,3,H,W), float in [0,1] or uint8; a tensor or an array.

        Raises:
            UserError: a wrong shape or dtype.
        """
        clip = self._clip(frames)
        height, width = clip.shape[-2:]
        shrink = self.largest / max(height, width)
        if shrink < 1:
            small = [max(1, round(shrink * side)) for side in (height, width)]
            clip = functional.interpolate(clip, small, mode="bilinear", antialias=True).clamp(0, 1)
        parts = []
        for low in range(0, len(clip), self.piece):
            begin = max(0, low - self.net.history)
            parts.append(self.net(clip[None, begin : low + self.piece])[0, low - begin :])
        disparity = torch.cat(parts)
        if shrink < 1:
            disparity = functional.interpolate(disparity[:, None], (height, width), mode="bilinear")[:, 0]
        return disparity

    def _clip(self, frames: Any) -> Tensor:
        given = torch.as_tensor(frames)
        last = given.ndim == 4 and given.shape[-1] == 3
        if given.ndim != 4 or not len(given) or not (last or given.shape[1] == 3) or min(given.shape) < 1:
            raise UserError(f"frames have shape {tuple(given.shape)}: give (T,H,W,3) or (T,3,H,W), T at least 1")
        if not (given.is_floating_point() or given.dtype == torch.uint8):
            raise UserError(f"frames are {given.dtype}: give uint8, or a float type with values in [0,1]")
        device = next(self.net.parameters()).device
        clip = (given.movedim(-1, 1) if last else given).to(device)
        return clip.float() / 255 if given.dtype == torch.uint8 else clip.float()


def depth_folder(model: str | Path | None = None) -> Path:
    """Return the folder of a network: the given one, or the shipped one.

    Raises:
        UserError: the folder has no network.
    """
    folder = Path(model) if model is not None else Path(assets.__file__).resolve().parent / ASSET
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"no depth network in {folder}: train one with recipes/world-depth.yaml and give its folder, .../export"
        )
    return folder


def load_depth_net(model: str | Path | None = None) -> WorldDepthNet:
    """Load a network from a folder in float32; None: the shipped network.

    Raises:
        UserError: as in `depth_folder`, or the folder is damaged or has another network.
    """
    folder = depth_folder(model)
    try:
        net, told = WorldDepthNet.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
    except (OSError, RuntimeError, TypeError, ValueError, LookupError) as error:
        raise UserError(f"{folder} holds no depth network: {cut(first_line(error), 200)}") from error
    # diffusers only warns about missing weights (which it leaves random) and about unexpected weights.
    if odd := [*told["missing_keys"], *told["unexpected_keys"]]:
        raise UserError(f"{folder} holds no depth network: {odd[0]} and {len(odd) - 1} more weights do not fit")
    return cast(WorldDepthNet, net)
