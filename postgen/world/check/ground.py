"""Everything that is not a coloured body: the colour of the ground, and spots on it.

Spots are shadows or grey objects. Ground and sky are smooth along a row, and all light is white. So each row of a
picture is a cubic polynomial in x, except for bodies and shadows. A shadow darkens all three channels equally, to
between a third and nine tenths.

Suffixes: M pictures, S spots per picture, G rows and columns of a coarse picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from postgen.world.check.segment import label

#: Columns of a spot, relative to the picture; `odd` is the area that no shadow explains.
SPOT_COLUMNS = ("area", "odd", "x", "y", "x0", "y0", "x1", "y1")
SPOTS = 8
_GRID = 48
#: Smallest relative differences between a spot and the ground, in brightness and in colour.
_LEVEL, _TINT = 0.10, 0.055
_SHADOW = (0.28, 0.92)
#: Saturation at which the ground's own colour starts to be removed before the search for bodies, and is fully removed.
_COLOURED = (0.22, 0.30)
#: Numbers of bits of a value in [0,2) that the first and the second pass count.
_HIGH, _LOW = 16, 15


def balance(pictures_M3HW: Tensor, frames: int) -> Tensor | None:
    """Return gains (M,3,1,1) that turn a strongly coloured ground grey; None if no clip has such a ground."""
    tone = edges(pictures_M3HW).unflatten(0, (-1, frames)).movedim(1, 2).flatten(2).median(-1).values
    gain = _gain(tone)
    return None if gain is None else gain.repeat_interleave(frames, 0)[:, :, None, None]


def edges(pictures_M3HW: Tensor) -> Tensor:
    """Return the pixels (M,3,E) at the sides and the bottom of pictures, which most likely show only ground."""
    height, width = pictures_M3HW.shape[-2:]
    side = max(2, width // 12)
    low = pictures_M3HW[:, :, height // 3 :]
    return torch.cat((low[..., :side].flatten(2), low[..., -side:].flatten(2), low[:, :, -side:].flatten(2)), 2)


def balance_along(windows: Callable[[], Iterator[Tensor]]) -> Tensor | None:
    """Return the gain (3,1,1) of one clip as `balance` does, from windows (F,3,H,W).

    The median is exact: a first pass counts the upper half of the values' bits, a second pass the lower half. The
    second pass is skipped for a ground without a strong colour.

    Args:
        windows: function that returns the windows of the clip from its start, at each call.
    """
    counts = torch.zeros(3, 2**_HIGH, dtype=torch.long)
    for pictures in windows():
        counts += _counted(_bits(edges(pictures)) >> _LOW, _HIGH)
    place = (counts.sum(1) - 1) // 2
    below = counts.cumsum(1)
    high = (below <= place[:, None]).sum(1)
    least, most = (_floats(bits) for bits in (high << _LOW, (high << _LOW) + 2**_LOW - 1))
    if float((most.amax() - least.amin()) / least.amax().clamp_min(1e-3)) <= _COLOURED[0]:
        return None  # a second pass would not change that
    inner = torch.zeros(3, 2**_LOW, dtype=torch.long)
    for pictures in windows():
        bits = _bits(edges(pictures))
        own = torch.where(bits >> _LOW == high[:, None], bits & (2**_LOW - 1), 2**_LOW)
        inner += _counted(own, _LOW, spare=1)[:, :-1]
    place = place - torch.where(high > 0, below.gather(1, (high - 1).clamp_min(0)[:, None])[:, 0], 0)
    gain = _gain(_floats((high << _LOW) + (inner.cumsum(1) <= place[:, None]).sum(1))[None])
    return None if gain is None else gain[0, :, None, None]


def _bits(edges_F3E: Tensor) -> Tensor:
    """Return the bits (3,N) of non-negative values; as integers they have the order of the values."""
    flat = (edges_F3E.movedim(1, 0).flatten(1) + 0.0).contiguous().cpu()  # + 0.0 as -0.0 has other bits
    return flat.view(torch.int32).long()


def _floats(bits: Tensor) -> Tensor:
    return bits.int().view(torch.float32)


def _counted(bins_3N: Tensor, power: int, spare: int = 0) -> Tensor:
    return torch.stack([one.bincount(minlength=2**power + spare) for one in bins_3N])


def _gain(tone_B3: Tensor) -> Tensor | None:
    saturation = (tone_B3.amax(1) - tone_B3.amin(1)) / tone_B3.amax(1).clamp_min(1e-3)
    weight = ((saturation - _COLOURED[0]) / (_COLOURED[1] - _COLOURED[0])).clamp(0, 1)
    if not bool((weight > 0).any()):
        return None
    gain: Tensor = (tone_B3.mean(1, keepdim=True) / tone_B3.clamp_min(0.02)) ** weight[:, None]
    return gain


def find_spots(pictures_M3HW: Tensor, body_MHW: Tensor) -> Tensor:
    """Return the spots (M,SPOTS,8) outside the bodies, the largest first.

    The columns are `SPOT_COLUMNS`. Unused entries have area 0.
    """
    reach = 2 * round(2 * pictures_M3HW.shape[-1] / 96) + 1
    body = functional.max_pool2d(body_MHW.float()[:, None], reach, 1, reach // 2)
    body = functional.adaptive_max_pool2d(body, _GRID)[:, 0] > 0
    small = functional.adaptive_avg_pool2d(pictures_M3HW, _GRID)
    ratio = small / _ground(small, ~body).clamp_min(0.05)
    level = ratio.mean(1)
    tint = (ratio - level[:, None]).abs().amax(1)
    spot = (((level - 1).abs() > _LEVEL) | (tint > _TINT)) & ~body
    shadow = (level > _SHADOW[0]) & (level < _SHADOW[1]) & (tint < _TINT)
    labels = label(torch.where(spot, 0, -1)).flatten(1)
    return _measured(labels, (spot & ~shadow).flatten(1).float())


def _ground(small_M3GG: Tensor, free_MGG: Tensor) -> Tensor:
    """Return the ground without objects: one cubic in x per row, fitted robustly so that objects get little weight."""
    x = torch.linspace(-1, 1, _GRID, device=small_M3GG.device)
    basis = torch.stack((torch.ones_like(x), x, 1.5 * x**2 - 0.5, 2.5 * x**3 - 1.5 * x))
    products = (basis[:, None] * basis[None]).flatten(0, 1)
    rows = small_M3GG.movedim(1, 2)
    masked = torch.where(free_MGG[:, :, None], rows, torch.nan)
    # Objects on a row mostly darken it, so the start value is well above the median.
    middle = masked.nanquantile(0.8, -1, keepdim=True).nan_to_num(0.5)
    fitted = middle.expand_as(rows)
    ridge = torch.diag(torch.tensor([1e-2, 0.5, 1.0, 1.0], device=x.device))
    for width in (0.12, 0.06, 0.04):
        far = ((rows - fitted) / fitted.clamp_min(0.05)).abs().amax(2)
        weight = free_MGG / (1 + (far / width) ** 2) ** 2
        normal = _with_neighbours((weight @ products.T).unflatten(-1, (4, 4))) + ridge
        # Fit the difference from the row's start value, so that the small ridge pulls towards a row of one colour.
        right = _with_neighbours(torch.einsum("mgcx,mgx,kx->mgkc", rows - middle, weight, basis))
        fitted = middle + torch.einsum("mgkc,kx->mgcx", torch.linalg.solve(normal, right), basis)
    ground: Tensor = fitted.movedim(2, 1)
    return ground


def _with_neighbours(x_MGKL: Tensor) -> Tensor:
    """Sum each row with two rows above and two below, so that a row that is mostly covered uses its neighbours."""
    rows = x_MGKL.flatten(2).mT
    summed: Tensor = (5 * functional.avg_pool1d(rows, 5, 1, 2)).mT.unflatten(2, x_MGKL.shape[2:])
    return summed


def _measured(labels_MP: Tensor, odd_MP: Tensor) -> Tensor:
    pictures, pixels = labels_MP.shape
    inside = labels_MP >= 0
    count = torch.zeros(pictures, pixels, device=labels_MP.device)
    count.scatter_add_(1, labels_MP.clamp_min(0), inside.float())
    area, top = count.topk(SPOTS, dim=1)
    slot_of = torch.full((pictures, pixels), -1, device=labels_MP.device)
    slot_of.scatter_(1, top, torch.arange(SPOTS, device=labels_MP.device).expand(pictures, -1))
    slot = torch.where(inside, slot_of.gather(1, labels_MP.clamp_min(0)), -1)
    slot = torch.where(slot >= 0, slot, SPOTS)
    place = torch.arange(pixels, device=labels_MP.device).expand(pictures, -1)
    y, x = (place // _GRID).float(), (place % _GRID).float()

    def add(value: Tensor) -> Tensor:
        return value.new_zeros(pictures, SPOTS + 1).scatter_add_(1, slot, value)[:, :-1]

    def least(value: Tensor) -> Tensor:
        return value.new_zeros(pictures, SPOTS + 1).scatter_reduce_(1, slot, value, "amin", include_self=False)[:, :-1]

    size = area.clamp_min(1)
    columns = [area / pixels, add(odd_MP) / pixels, (add(x) / size + 0.5) / _GRID, (add(y) / size + 0.5) / _GRID]
    columns += [least(x) / _GRID, least(y) / _GRID, (1 - least(-x)) / _GRID, (1 - least(-y)) / _GRID]
    return torch.stack(columns, -1)
