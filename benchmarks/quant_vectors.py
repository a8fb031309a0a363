"""Reference numbers of number formats, and the check that ours are the same.

The numbers were computed with torchao's `to_mx` and `nvfp4_quantize`, and with the NVFP4 code of diffusers.
"""

from __future__ import annotations

import torch

from postgen.quant import format_of, quantize_tensor
from postgen.quant.rounding import qsnr

X = (((7 * torch.arange(32) + 3) % 32) - 15.5) / 3
OUTLIER = torch.where(torch.arange(32) == 5, 8 * X, X)
"""X with one number that is 8 times as large."""
EXPECTED = {
    "mxint8": (([-67, -29, 8, 45, 83, -51, -13, 24], 45.0166), ([-17, -7, 2, 11, 21, -101, -3, 6], 37.8669)),
    "mxfp8": (([-256, -120, 32, 176, 320, -208, -52, 96], 31.1971), ([-64, -30, 8, 44, 80, -416, -13, 24], 31.4624)),
    "mxfp6": (
        ([-4, -1.875, 0.5, 2.75, 5, -3.25, -0.875, 1.5], 31.0849),
        ([-1, -0.5, 0.125, 0.75, 1.25, -6.5, -0.25, 0.375], 29.5885),
    ),
    "mxint6": (([-17, -7, 2, 11, 21, -13, -3, 6], 32.9754), ([-4, -2, 0, 3, 5, -25, -1, 2], 24.6635)),
    "mxfp4": (([-4, -2, 0.5, 3, 6, -3, -1, 1.5], 18.0238), ([-0.5, 0, 0, 0.5, 0.5, -3, 0, 0], 13.9639)),
    "mxfp4:floor": (([-4, -2, 0.5, 3, 6, -3, -1, 1.5], 18.0238), ([-1, -0.5, 0, 0.5, 1.5, -6, 0, 0.5], 18.8459)),
    "mxint4": (([-4, -2, 0, 3, 5, -3, -1, 2], 19.8869), ([-1, 0, 0, 1, 1, -6, 0, 0], 13.9639)),
    "nvfp4": (([-4, -2, 0.5, 3, 6, -4, -1, 1.5], 19.6140), ([-1, -0.5, 0, 0.5, 1, -6, 0, 0.5], 21.5189)),
    "nvint4": (([-6, -2, 1, 4, 7, -4, -1, 2], 23.3365), ([-1, -1, 0, 1, 1, -7, 0, 0], 17.2943)),
}
"""Format -> for X and for OUTLIER: the first eight numbers on the grid, and the QSNR in dB."""
SCALES = {
    "mxint8": ([123], [125]), "mxfp8": ([121], [123]), "mxfp6": ([127], [129]), "mxint6": ([125], [127]),
    "mxfp4": ([127], [130]), "mxfp4:floor": ([127], [129]), "mxint4": ([127], [129]),
    "nvfp4": ([448, 448], [448, 88]), "nvint4": ([448, 448], [448, 88]),
}  # fmt: skip
"""Format -> for X and for OUTLIER: the E8M0 bytes, or the E4M3 scales of the two blocks."""
PACKED = ([206, 81, 231, 58], [154, 16, 242, 24])
"""The first bytes of X and of OUTLIER in NVFP4, two codes each, the even element in the low bits."""
DECIBELS = 6e-5
"""Largest allowed difference of a QSNR: the reference has four digits after the point."""


def inputs(which: int) -> torch.Tensor:
    """Return X (0) or OUTLIER (1) as a row (1, 32)."""
    return (X, OUTLIER)[which][None]


def ours(text: str, which: int) -> tuple[list[float], list[float], float]:
    """Return what our format gives for a reference input: first eight numbers, scales, and QSNR in dB."""
    format, x = format_of(text), inputs(which)
    made = quantize_tensor(x, format)
    scale = made.scales.scale.flatten()
    said = scale.log2() + 127 if format.scale == "e8m0" else scale
    return made.values.flatten()[:8].tolist(), said.tolist(), qsnr(x, made.numbers())


def packed(which: int) -> list[int]:
    """Return the first bytes of a reference input in our NVFP4."""
    format = format_of("nvfp4")
    codes = format.grid.encode(quantize_tensor(inputs(which), format).values).flatten()
    bytes_: list[int] = (codes[0::2] | (codes[1::2] << 4))[:4].tolist()
    return bytes_


def wrong() -> list[str]:
    """Return the reference inputs, as FORMAT.NUMBER, for which our numbers differ; empty if all are the same."""
    named = []
    for text, rows in EXPECTED.items():
        for which, (values, noise) in enumerate(rows):
            numbers, scales, decibels = ours(text, which)
            same = numbers == values and scales == SCALES[text][which] and abs(decibels - noise) <= DECIBELS
            named += [] if same else [f"{text}.{which}"]
    return named + [f"packed.{which}" for which, expected in enumerate(PACKED) if packed(which) != expected]
