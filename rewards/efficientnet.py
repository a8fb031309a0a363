"""EfficientNet-Lite0 (arXiv 1905.11946, without squeeze-and-excitation), compatible with the published weights.

TensorFlow's "SAME" padding puts the extra pixel on the right and at the bottom.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import pad

_STAGES = (
    # repeats, kernel, stride, widening, out
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

SIDE = 224


class SameConv(nn.Conv2d):
    """Convolution whose output has ceil(size / stride) px per side."""

    def forward(self, input: Tensor) -> Tensor:
        """Pad the input and convolve it."""
        margins: list[int] = []
        for axis in (-1, -2):
            kernel, stride, size = self.kernel_size[axis], self.stride[axis], input.shape[axis]
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            margins += [total // 2, total - total // 2]
        return super().forward(pad(input, margins))


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


class Block(nn.Module):
    """Inverted residual block: expand, depthwise convolution, project; with a skip connection if the sizes agree."""

    def __init__(self, into: int, out: int, kernel: int, stride: int, widening: int) -> None:
        super().__init__()
        wide = into * widening
        if widening > 1:
            self._expand_conv, self._bn0 = SameConv(into, wide, 1, bias=False), _norm(wide)
        self._depthwise_conv, self._bn1 = SameConv(wide, wide, kernel, stride, groups=wide, bias=False), _norm(wide)
        self._project_conv, self._bn2 = SameConv(wide, out, 1, bias=False), _norm(out)
        self.widens, self.adds = widening > 1, stride == 1 and into == out
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.act(self._bn0(self._expand_conv(x))) if self.widens else x
        y = self.act(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        out: Tensor = y + x if self.adds else y
        return out


class EfficientNetLite0(nn.Module):
    """The ImageNet-1k classifier; its module names are those of the published file."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, 2, bias=False), _norm(32)
        self._blocks = nn.ModuleList()
        into = 32
        for repeats, kernel, stride, widening, out in _STAGES:
            for k in range(repeats):
                self._blocks.append(Block(into, out, kernel, stride if k == 0 else 1, widening))
                into = out
        self._conv_head, self._bn1 = SameConv(into, 1280, 1, bias=False), _norm(1280)
        self._fc = nn.Linear(1280, 1000)
        self.act = nn.ReLU6()

    def features(self, frames_N3HW: Tensor) -> Tensor:
        """Return the spatial mean (N,320) of the last block's output, the features for Frechet distances."""
        return self._seen(frames_N3HW).mean((2, 3))

    def _seen(self, frames_N3HW: Tensor) -> Tensor:
        x: Tensor = self.act(self._bn0(self._conv_stem((frames_N3HW * 255 - 127) / 128)))
        for block in self._blocks:
            x = block(x)
        return x

    def forward(self, frames_N3HW: Tensor) -> Tensor:
        """Return the logits (N,1000) of frames in [0,1], 224 px."""
        x = self.act(self._bn1(self._conv_head(self._seen(frames_N3HW))))
        logits: Tensor = self._fc(x.mean((2, 3)))
        return logits
