"""Pixels to blobs: which pixels belong to a coloured body, which of them hang together, and where each piece lies.

Everything but the bodies is nearly grey and all light is white, so a body's pixel is `a` times its albedo and an edge
pixel a mix of that and grey: p = a * albedo + b * (1, 1, 1). The colour share a / (a + b) tells body from floor
whatever the light.

Suffixes: M pictures, K blob slots of a picture, P pixels.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from postgen.world.check.stains import stained
from postgen.world.spec import COLOURS

SLOTS = 10
#: Colour share above which a pixel belongs to a body; the floor stays below 0.2, bodies lie above 0.8.
SHARE = 0.45
_MIN_CHROMA = 0.06
#: Areas as parts of the picture: a fragment that is still looked at, and the largest thing that can be a body.
_FRAGMENT, _LARGEST = 0.0012, 0.6
_NEAR = 2
#: Rounds of `label` that nearly any picture needs: not asking whether they were the last saves waiting for the device.
_BLIND_ROUNDS = 4


@dataclass(slots=True)
class Blobs:
    """Connected one-coloured pieces of M pictures, the largest first.

    `valid`, `touch` (other blob within 2 px), `border` (cut by the picture's edge) are bool (M,K); `colour` and
    `group` (pieces that hang together whatever their colour) int64 (M,K); `area` in pixels, `x`, `y` centroid, `box`
    (x0, y0, x1, y1) in pixels, `sharp` mean slope of the colour share at the rim per pixel, `pure` mean colour share
    within the rim, `light` the greatest brightness there, `tint` and `mixed` mean and standard deviation of how far
    the hue there, of 6, is from its colour's, `stain` the `stains.stained` pixels of its group, `kind` the colour by
    which it was cut out (it differs from `colour` on a ground of full colour). Maps: `slot_MP` blob of a pixel or -1;
    `share_MHW` colour share; `soft_M2HW` that as a soft mask, and brightness; `hue_MHW` nearest colour.
    """

    valid: Tensor
    touch: Tensor
    border: Tensor
    colour: Tensor
    kind: Tensor
    group: Tensor
    area: Tensor
    x: Tensor
    y: Tensor
    box: Tensor
    sharp: Tensor
    pure: Tensor
    light: Tensor
    stain: Tensor
    tint: Tensor
    mixed: Tensor
    slot_MP: Tensor
    share_MHW: Tensor
    soft_M2HW: Tensor
    hue_MHW: Tensor


def smooth(rgb_M3HW: Tensor) -> Tensor:
    """Binomial 3x3 filter: takes most of the pixel noise, costs half a pixel of sharpness."""
    x = functional.pad(rgb_M3HW, (1, 1, 1, 1), mode="replicate")
    x = (x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]) / 4
    return (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4


def colour_share(rgb_M3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Colour share in [0,1], index of the nearest colour by hue, brightness relative to that albedo; each (M,H,W)."""
    table = rgb_M3HW.new_tensor(list(COLOURS.values()))
    high, low = rgb_M3HW.amax(1), rgb_M3HW.amin(1)
    angle = hue_of(rgb_M3HW)
    own = hue_of(table[:, :, None, None])[:, 0, 0]
    gap = (angle[..., None] - own).abs()
    nearest = torch.minimum(gap, 6 - gap).argmin(-1)
    albedo = table[nearest].movedim(-1, 1)
    mean_p, mean_c = rgb_M3HW.mean(1), albedo.mean(1)
    centred = albedo - mean_c[:, None]
    part = ((rgb_M3HW - mean_p[:, None]) * centred).sum(1) / (centred * centred).sum(1)
    part = part.clamp_min(0)
    white = (mean_p - part * mean_c).clamp_min(0)
    share = torch.where(high - low > _MIN_CHROMA, part / (part + white).clamp_min(1e-6), 0.0)
    return share, nearest, high / albedo.amax(1)


def hue_of(rgb: Tensor) -> Tensor:
    """Hue in [0,6) of (M,3,H,W)."""
    red, green, blue = rgb.unbind(1)
    high, low = rgb.amax(1), rgb.amin(1)
    chroma = (high - low).clamp_min(1e-6)
    hue = torch.where(
        high == red,
        (green - blue) / chroma,
        torch.where(high == green, (blue - red) / chroma + 2, (red - green) / chroma + 4),
    )
    return hue % 6


def label(kind_MHW: Tensor) -> Tensor:
    """Connected pieces of equal kind (4 neighbours): a pixel gets the least number of its piece, -1 where kind < 0.

    Minimum over the neighbours, then twice the label's own label, until nothing changes: about ten rounds.
    """
    pictures, height, width = kind_MHW.shape
    number = torch.arange(height * width, dtype=torch.int32, device=kind_MHW.device).reshape(1, height, width)
    labels = number.expand(pictures, -1, -1).clone()
    inside = kind_MHW >= 0
    apart_down = (kind_MHW[:, 1:] != kind_MHW[:, :-1]) | ~inside[:, 1:]
    apart_right = (kind_MHW[..., 1:] != kind_MHW[..., :-1]) | ~inside[..., 1:]
    for done in itertools.count(1):
        old = labels.clone() if done > _BLIND_ROUNDS else None
        _lower(labels[:, 1:], labels[:, :-1], apart_down)
        _lower(labels[..., 1:], labels[..., :-1], apart_right)
        flat = labels.flatten(1)
        flat = flat.gather(1, flat.long())
        labels = flat.gather(1, flat.long()).reshape(kind_MHW.shape)
        if old is not None and torch.equal(labels, old):
            break
    return torch.where(inside, labels, -1).long()


def _lower(one: Tensor, two: Tensor, apart: Tensor) -> None:
    """Bring neighbours down to the lesser of the two, in place, except where they are apart."""
    least = torch.minimum(one, two).masked_fill_(apart, torch.iinfo(one.dtype).max)
    torch.minimum(one, least, out=one)
    torch.minimum(two, least, out=two)


def find_blobs(smooth_M3HW: Tensor, gain_M311: Tensor | None = None) -> Blobs:
    """Pieces of saturated colour in smoothed pictures; they are cut out of the pictures times `gain_M311`."""
    share, hue, named, purity, bright = _coloured(smooth_M3HW, gain_M311)
    kind = torch.where(share > SHARE, hue, -1)
    pictures, height, width = kind.shape
    pixels = height * width
    labels, groups = (label(one).flatten(1) for one in (kind, torch.where(kind >= 0, 0, -1)))
    inside = labels >= 0
    index = labels.clamp_min(0)
    count = torch.zeros(pictures, pixels, device=kind.device).scatter_add_(1, index, inside.float())
    area, top = count.topk(SLOTS, dim=1)
    slot_of = torch.full((pictures, pixels), -1, device=kind.device).scatter_(
        1, top, torch.arange(SLOTS, device=kind.device).expand(pictures, -1)
    )
    slot = torch.where(inside, slot_of.gather(1, index), -1)
    slot = torch.where(area.gather(1, slot.clamp_min(0)) >= _FRAGMENT * pixels, slot, -1)
    core = _same_around(slot.reshape(kind.shape))
    sums = _Sums(slot, SLOTS)
    core_area = sums.add(core.flatten(1).float())
    slot = torch.where((core_area.gather(1, slot.clamp_min(0)) >= 4) & (slot >= 0), slot, -1)
    sums = _Sums(slot, SLOTS)
    x, y = _places(kind)
    inner = (core.flatten(1) & (slot >= 0)).float()
    size = area.clamp_min(1)
    touch = sums.add(_touching(slot.reshape(kind.shape)).flatten(1).float())
    box = torch.stack((sums.least(x, width), sums.least(y, height), -sums.least(-x, 1), -sums.least(-y, 1)), -1)
    valid = (area >= _FRAGMENT * pixels) & (area <= _LARGEST * pixels) & (core_area >= 4)
    edge = (box[..., :2] <= 0).any(-1) | (box[..., 2] >= width - 1) | (box[..., 3] >= height - 1)
    stain, tint, mixed = _hues(smooth_M3HW, named, groups, sums, inner)
    return Blobs(
        valid=valid,
        touch=touch > 2,
        border=edge,
        colour=_named(named.flatten(1), slot, inner),
        kind=kind.flatten(1).gather(1, top),
        group=groups.gather(1, top),
        area=area,
        x=sums.add(x) / size,
        y=sums.add(y) / size,
        box=box,
        sharp=_sharpness(share, slot, sums),
        pure=sums.add(_exact(purity.flatten(1)) * inner) / core_area.clamp_min(1),
        light=-sums.least(-bright.flatten(1) * inner, 0.0),
        stain=stain.gather(1, groups.gather(1, top).clamp_min(0)),
        tint=tint,
        mixed=mixed,
        slot_MP=slot,
        share_MHW=share,
        soft_M2HW=torch.stack((((share - 0.2) / 0.5).clamp(0, 1), bright), 1),
        hue_MHW=hue,
    )


def _places(maps_MHW: Tensor) -> tuple[Tensor, Tensor]:
    """Column and row of each pixel, (M,P) each."""
    pictures, height, width = maps_MHW.shape
    y, x = torch.meshgrid(*(torch.arange(n, device=maps_MHW.device).float() for n in (height, width)), indexing="ij")
    return x.reshape(1, -1).expand(pictures, -1), y.reshape(1, -1).expand(pictures, -1)


def _sharpness(share_MHW: Tensor, slot_MP: Tensor, sums: _Sums) -> Tensor:
    """Mean slope of the colour share at the rim of each blob (M,K)."""
    rim = _rim(slot_MP.reshape(share_MHW.shape)).flatten(1)
    return sums.add(_slope(share_MHW).flatten(1) * rim) / sums.add(rim.float()).clamp_min(1)


def _hues(
    smooth_M3HW: Tensor, named_MHW: Tensor, groups_MP: Tensor, sums: _Sums, inner_MP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Stained pixels of each group, under the number of the group (M,P); `tint` and `mixed` of each blob (M,K)."""
    hue, own = hue_of(smooth_M3HW), hue_of(smooth_M3HW.new_tensor(list(COLOURS.values()))[:, :, None, None])[:, 0, 0]
    body = (groups_MP >= 0).reshape(named_MHW.shape)
    strange = stained(hue, named_MHW, body, own).flatten(1).float()
    stain = torch.zeros_like(strange).scatter_add_(1, groups_MP.clamp_min(0), strange)
    gap = _exact((hue - own[named_MHW] + 3) % 6 - 3).flatten(1)
    count = sums.add(inner_MP).clamp_min(1)
    tint = sums.add(gap * inner_MP) / count
    square = sums.add(_exact(gap * gap) * inner_MP) / count
    return stain, tint, (square - tint * tint).clamp_min(0).sqrt()


def _coloured(smooth_M3HW: Tensor, gain_M311: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Colour share and colour by which bodies are cut out; colour, share and brightness of the picture itself."""
    purity, named, bright = colour_share(smooth_M3HW)
    share, hue = purity, named
    if gain_M311 is not None:
        share, hue, _ = colour_share((smooth_M3HW * gain_M311).clamp(0, 1))
        # What is grey itself, as the sky, or fog before it, is no body although the gain gives it a colour.
        apart = (hue - named).abs()
        alike = torch.minimum(apart, len(COLOURS) - apart) <= 1
        mixed = torch.minimum(share, 1.5 * purity) * alike
        share = torch.where((gain_M311 == 1).all(1), share, mixed)
    return share, hue, named, purity, bright


class _Sums:
    """Sums and minima over the pixels of each slot."""

    def __init__(self, slot_MP: Tensor, slots: int) -> None:
        self.index = torch.where(slot_MP >= 0, slot_MP, slots)
        self.slots = slots

    def add(self, value_MP: Tensor) -> Tensor:
        """(M,P) -> (M,K). Sums of pixel numbers are exact in float32, so the order of adding does not matter there."""
        out = value_MP.new_zeros(len(value_MP), self.slots + 1)
        return out.scatter_add_(1, self.index, value_MP)[:, :-1]

    def least(self, value_MP: Tensor, empty: float) -> Tensor:
        """Minimum per slot, `empty` where a slot has no pixel."""
        out = value_MP.new_full((len(value_MP), self.slots + 1), float(empty))
        return out.scatter_reduce_(1, self.index, value_MP, "amin", include_self=False)[:, :-1]


def _same_around(slot_MHW: Tensor) -> Tensor:
    """Pixels whose 3x3 neighbourhood is of one blob: thin seams of mixed colour have none."""
    value = slot_MHW[:, None].float()
    high = functional.max_pool2d(value, 3, 1, 1)
    low = -functional.max_pool2d(-value, 3, 1, 1)
    return ((high == low) & (value >= 0))[:, 0]


def _touching(slot_MHW: Tensor) -> Tensor:
    """Pixels of a blob with another blob within `_NEAR` pixels."""
    window = 2 * _NEAR + 1
    value = slot_MHW[:, None].float()
    high = functional.max_pool2d(value, window, 1, _NEAR)
    low = -functional.max_pool2d(-torch.where(value >= 0, value, 1e3), window, 1, _NEAR)
    return ((high > value) | (low < value))[:, 0] & (slot_MHW >= 0)


def _rim(slot_MHW: Tensor) -> Tensor:
    """Pixels of a blob next to the background."""
    value = slot_MHW[:, None].float()
    low = -functional.max_pool2d(-value, 3, 1, 1)
    return (low < 0)[:, 0] & (slot_MHW >= 0)


def _slope(share_MHW: Tensor) -> Tensor:
    """Length of the gradient by central differences, per pixel."""
    x = functional.pad(share_MHW[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    dx, dy = (x[:, 1:-1, 2:] - x[:, 1:-1, :-2]) / 2, (x[:, 2:, 1:-1] - x[:, :-2, 1:-1]) / 2
    return _exact((dx * dx + dy * dy).sqrt())


def _exact(value: Tensor) -> Tensor:
    """In steps of 1/1024, so that sums over a blob are exact in whatever order a device adds them."""
    exact: Tensor = (value * 1024).round() / 1024
    return exact


def _named(hue_MP: Tensor, slot_MP: Tensor, inner_MP: Tensor) -> Tensor:
    """The colour of most of the inner pixels of each blob (M,K)."""
    names = len(COLOURS)
    index = torch.where(slot_MP >= 0, slot_MP * names + hue_MP, SLOTS * names)
    votes = inner_MP.new_zeros(len(inner_MP), SLOTS * names + 1).scatter_add_(1, index, inner_MP)
    name: Tensor = votes[:, :-1].unflatten(1, (SLOTS, names)).argmax(-1)
    return name
