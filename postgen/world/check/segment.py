"""From pixels to blobs: which pixels belong to a coloured body, which of them are connected, and where each blob lies.

Everything except the bodies is nearly grey, and all light is white. So a pixel of a body is `a` times its albedo, and
a pixel at an edge is a mix of that and grey: p = a * albedo + b * (1, 1, 1). The colour share a / (a + b) separates
bodies from the floor under any light.

Suffixes: M pictures, K blob slots per picture, P pixels.
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
#: Colour share above which a pixel belongs to a body; the floor is below 0.2, bodies are above 0.8.
SHARE = 0.45
_MIN_CHROMA = 0.06
#: Areas relative to the picture: the smallest fragment that counts, and the largest possible body.
_FRAGMENT, _LARGEST = 0.0012, 0.6
_NEAR = 2
#: Number of rounds of `label` without a test for changes: nearly every picture needs them, and each test waits for the
#: device.
_BLIND_ROUNDS = 4


@dataclass(slots=True)
class Blobs:
    """Connected regions of one colour in M pictures, the largest first.

    Bool (M,K): `valid`; `touch`: another blob lies within 2 px; `border`: the edge of the picture cuts the blob. Int64
    (M,K): `colour`; `group`: regions that are connected if colours are ignored; `kind`: the colour by which the blob
    was cut out, which differs from `colour` on a strongly coloured ground. Float (M,K), in pixels: `area`, centroid
    `x` and `y`; `box` (x0, y0, x1, y1). `sharp`: mean slope of the colour share at the rim, per pixel. Inside the rim:
    `pure`, mean colour share; `light`, greatest brightness; `tint` and `mixed`, mean and standard deviation of the
    distance between the hue and the hue of the blob's colour, on a hue circle of length 6. `stain`: number of
    `stains.stained` pixels in its group. Maps: `slot_MP`: blob of each pixel, or -1; `share_MHW`: colour share;
    `soft_M2HW`: the share as a soft mask, and brightness; `hue_MHW`: nearest colour.
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
    """Apply a binomial 3x3 filter, which removes most of the pixel noise and costs half a pixel of sharpness."""
    x = functional.pad(rgb_M3HW, (1, 1, 1, 1), mode="replicate")
    x = (x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]) / 4
    return (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4


def colour_share(rgb_M3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return colour share, nearest colour and brightness of each pixel, each (M,H,W).

    The share is in [0,1]. The nearest colour is an index, chosen by hue. The brightness is relative to the albedo of
    that colour.
    """
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
    """Return the hue in [0,6) of (M,3,H,W)."""
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
    """Label connected regions of equal kind (4 neighbours).

    Each pixel gets the smallest pixel number of its region, or -1 where kind < 0. A round takes the minimum over the
    neighbours and then, twice, replaces each label by the label of the pixel with that number. Rounds repeat until
    nothing changes, about ten times.
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
    """Set each pair of neighbours to the smaller of their labels, in place, unless the pair is separated."""
    least = torch.minimum(one, two).masked_fill_(apart, torch.iinfo(one.dtype).max)
    torch.minimum(one, least, out=one)
    torch.minimum(two, least, out=two)


def find_blobs(smooth_M3HW: Tensor, gain_M311: Tensor | None = None) -> Blobs:
    """Find regions of saturated colour in smoothed pictures.

    Args:
        smooth_M3HW: smoothed pictures in [0,1].
        gain_M311: gains of `ground.balance`; the regions are cut out of the pictures times these gains. None: no gain.
    """
    share, hue, named, purity, bright = _coloured(smooth_M3HW, gain_M311)
    kind = torch.where(share > SHARE, hue, -1)
    pictures, height, width = kind.shape
    pixels = height * width
    labels, groups = (label(one).flatten(1) for one in (kind, torch.where(kind >= 0, 0, -1)))
    inside = labels >= 0
    index = labels.clamp_min(0)
    count = torch.zeros(pictures, pixels, device=kind.device).scatter_add_(1, index, inside.float())
    area, top = count.topk(SLOTS, dim=1)  # the largest regions get the slots
    slot_of = torch.full((pictures, pixels), -1, device=kind.device).scatter_(
        1, top, torch.arange(SLOTS, device=kind.device).expand(pictures, -1)
    )
    slot = torch.where(inside, slot_of.gather(1, index), -1)
    slot = torch.where(area.gather(1, slot.clamp_min(0)) >= _FRAGMENT * pixels, slot, -1)
    core = _same_around(slot.reshape(kind.shape))
    sums = _Sums(slot, SLOTS)  # to find the regions that are more than a thin seam
    core_area = sums.add(core.flatten(1).float())
    slot = torch.where((core_area.gather(1, slot.clamp_min(0)) >= 4) & (slot >= 0), slot, -1)
    sums = _Sums(slot, SLOTS)  # over the regions that remain
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
    """Return the column and the row of each pixel, (M,P) each."""
    pictures, height, width = maps_MHW.shape
    y, x = torch.meshgrid(*(torch.arange(n, device=maps_MHW.device).float() for n in (height, width)), indexing="ij")
    return x.reshape(1, -1).expand(pictures, -1), y.reshape(1, -1).expand(pictures, -1)


def _sharpness(share_MHW: Tensor, slot_MP: Tensor, sums: _Sums) -> Tensor:
    """Return the mean slope of the colour share at the rim of each blob (M,K)."""
    rim = _rim(slot_MP.reshape(share_MHW.shape)).flatten(1)
    return sums.add(_slope(share_MHW).flatten(1) * rim) / sums.add(rim.float()).clamp_min(1)


def _hues(
    smooth_M3HW: Tensor, named_MHW: Tensor, groups_MP: Tensor, sums: _Sums, inner_MP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number of stained pixels of each group, and `tint` and `mixed` of each blob (M,K).

    The first result (M,P) is indexed by the number of the group.
    """
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
    """Return the maps that `find_blobs` needs, from the balanced and the original pictures.

    The colour share and the colour by which bodies are cut out come from the balanced pictures; the colour, the share
    and the brightness after them come from the original pictures.
    """
    purity, named, bright = colour_share(smooth_M3HW)
    share, hue = purity, named
    if gain_M311 is not None:
        share, hue, _ = colour_share((smooth_M3HW * gain_M311).clamp(0, 1))
        # Pixels that are grey themselves, such as the sky or fog in front of it, belong to no body, although the gain
        # colours them.
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
        """Sum values (M,P) per slot to (M,K).

        Sums of pixel numbers are exact in float32, so their order of addition does not matter.
        """
        out = value_MP.new_zeros(len(value_MP), self.slots + 1)
        return out.scatter_add_(1, self.index, value_MP)[:, :-1]

    def least(self, value_MP: Tensor, empty: float) -> Tensor:
        """Return the minimum per slot; `empty` for a slot without pixels."""
        out = value_MP.new_full((len(value_MP), self.slots + 1), float(empty))
        return out.scatter_reduce_(1, self.index, value_MP, "amin", include_self=False)[:, :-1]


def _same_around(slot_MHW: Tensor) -> Tensor:
    """Return the pixels whose 3x3 neighbourhood belongs to one blob; thin seams of mixed colour have none."""
    value = slot_MHW[:, None].float()
    high = functional.max_pool2d(value, 3, 1, 1)
    low = -functional.max_pool2d(-value, 3, 1, 1)
    return ((high == low) & (value >= 0))[:, 0]


def _touching(slot_MHW: Tensor) -> Tensor:
    """Return the pixels of a blob that have another blob within `_NEAR` pixels."""
    window = 2 * _NEAR + 1
    value = slot_MHW[:, None].float()
    high = functional.max_pool2d(value, window, 1, _NEAR)
    low = -functional.max_pool2d(-torch.where(value >= 0, value, 1e3), window, 1, _NEAR)
    return ((high > value) | (low < value))[:, 0] & (slot_MHW >= 0)


def _rim(slot_MHW: Tensor) -> Tensor:
    """Return the pixels of a blob next to the background."""
    value = slot_MHW[:, None].float()
    low = -functional.max_pool2d(-value, 3, 1, 1)
    return (low < 0)[:, 0] & (slot_MHW >= 0)


def _slope(share_MHW: Tensor) -> Tensor:
    """Return the length of the gradient of each pixel, by central differences."""
    x = functional.pad(share_MHW[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    dx, dy = (x[:, 1:-1, 2:] - x[:, 1:-1, :-2]) / 2, (x[:, 2:, 1:-1] - x[:, :-2, 1:-1]) / 2
    return _exact((dx * dx + dy * dy).sqrt())


def _exact(value: Tensor) -> Tensor:
    """Round to steps of 1/1024, so that sums over a blob are exact for any order of addition on a device."""
    exact: Tensor = (value * 1024).round() / 1024
    return exact


def _named(hue_MP: Tensor, slot_MP: Tensor, inner_MP: Tensor) -> Tensor:
    """Return the most frequent colour among the inner pixels of each blob (M,K)."""
    names = len(COLOURS)
    index = torch.where(slot_MP >= 0, slot_MP * names + hue_MP, SLOTS * names)
    votes = inner_MP.new_zeros(len(inner_MP), SLOTS * names + 1).scatter_add_(1, index, inner_MP)
    name: Tensor = votes[:, :-1].unflatten(1, (SLOTS, names)).argmax(-1)
    return name
