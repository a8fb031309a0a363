"""Measures on bodies: whether they are visible in the frames in which they should be, above all after an absence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.metrics.colour import check_frames, lab
from postgen.world.check.segment import label

_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Permanence:
    """Shares of (frame, body) pairs, or of frames; NaN where nothing counts."""

    after_absence: float
    """Share of bodies present in their place, over frames in which a body is visible again after an absence."""
    after_absence_anywhere: float
    """The same at any place: some component of its colour has half to twice its area."""
    always: float
    """Share of bodies present in their place, over all frames in which a body is visible."""
    always_anywhere: float
    """The same at any place."""
    wrong_count: float
    """Share of frames with more or fewer components of some colour than in the true clip."""
    spurious: float
    """Number of surplus components per frame."""
    swapped: float
    """Share of frames, over all frames in which a body is visible, in which most of its place has another colour."""
    last: float
    """`always` over the last part of the clip."""
    returns: int
    """Number of pairs that `after_absence` is a share of."""
    present_FJ: Tensor
    """1 where a body is present in its place, 0 where it is missing, NaN where it is not visible in the true clip."""


def detect(frames: Tensor, palette: Tensor, threshold: float = 20.0, *, others: Tensor | None = None) -> Tensor:
    """Return the palette row whose colour each pixel has, or -1, int64 (F, H, W).

    The row is that of the nearest shade (CIELAB, CIE 1976), if the shade is nearer than `threshold` and nearer than
    all `others`.

    Args:
        frames: (F, 3, H, W) in [0, 1].
        palette: (C, 3), or (C, S, 3) with S shades of each colour if light changes how bodies look.
        threshold: distance from which a pixel matches no row.
        others: (N, 3) colours of no body, for example of ground whose shadows are similar to a dark shade.

    Raises:
        UserError: a wrong shape.
    """
    check_frames(frames, 1, "frames")
    if palette.dim() not in (2, 3) or palette.shape[-1] != 3 or not palette.numel():
        raise UserError(f"palette has shape {tuple(palette.shape)}: give (C, 3) or (C, S, 3)")
    shades = palette if palette.dim() == 3 else palette[:, None]
    table = lab(shades.to(frames), dim=-1)
    if others is not None and (others.dim() != 2 or others.shape[-1] != 3):
        raise UserError(f"others has shape {tuple(others.shape)}: give (N, 3)")
    ground = None if others is None else lab(others.to(frames), dim=-1)
    kinds = []
    for low in range(0, len(frames), _AT_ONCE):
        pixels = lab(frames[low : low + _AT_ONCE]).movedim(1, -1).flatten(0, 2)
        distance, kind = _distance(pixels, table).min(1)
        taken = distance < threshold
        if ground is not None:
            taken = taken & (distance < _distance(pixels, ground[None])[:, 0])
        kinds.append(torch.where(taken, kind, -1))
    return torch.cat(kinds).reshape(len(frames), *frames.shape[-2:])


def _distance(pixels: Tensor, table: Tensor) -> Tensor:
    """Return the distance of each of (N, 3) colours to the nearest shade of each row of (C, S, 3), (N, C)."""
    shades = table.flatten(0, 1)
    # One matrix product instead of a difference per shade. Its error is below 0.05; colours are 20 apart.
    square = pixels.square().sum(1, keepdim=True) + shades.square().sum(1) - 2 * pixels @ shades.T
    nearest: Tensor = square.unflatten(1, table.shape[:2]).amin(2)
    return nearest.clamp_min(0).sqrt()


def object_permanence(
    kinds: Tensor, ids: Tensor, *, gap: int = 8, least: float = 0.002, overlap: float = 0.3, share: float = 0.15
) -> Permanence:
    """Return whether bodies are present, from connected components (4 neighbours) of their colours.

    A body is present in its place if one component of its colour has an intersection over union of at least `overlap`
    with the true mask. It is present anywhere if one component has 0.5 to 2 times the true area.

    Args:
        kinds: int64 (F, H, W), colour of each pixel, or -1 (`detect`).
        ids: int (F, H, W), true body of each pixel plus 1; 0 for none. Body j has the colour of palette row j.
        gap: smallest number of frames without a body before its return counts.
        least: smallest share of the picture for a body to count as visible, and for a component to count.
        overlap: smallest intersection over union, see above.
        share: share of the frames that count for `Permanence.last`.

    Raises:
        UserError: shapes that do not match, or a number outside its range.
    """
    if kinds.shape != ids.shape or kinds.dim() != 3 or not len(kinds):
        raise UserError(f"kinds has shape {tuple(kinds.shape)} and ids {tuple(ids.shape)}: give (F, H, W) for both")
    if gap < 1 or not 0 < least < 1 or not 0 < overlap <= 1 or not 0 < share <= 1:
        raise UserError(
            f"{gap=}, {least=}, {overlap=}, {share=}: give gap from 1 on, least in (0, 1), the others in (0, 1]"
        )
    bodies = int(ids.max())
    parts = [_measure(kinds[low : low + _AT_ONCE], ids[low : low + _AT_ONCE].long(), bodies, least, overlap)
             for low in range(0, len(kinds), _AT_ONCE)]  # fmt: skip
    seen, here, anywhere, swapped, extra, wrong = (torch.cat(column) for column in zip(*parts, strict=True))
    back = _after_absence(seen, gap)
    last = seen.clone()
    last[: len(seen) - max(1, int(share * len(seen)))] = False
    return Permanence(
        after_absence=_share(here, back),
        after_absence_anywhere=_share(anywhere, back),
        always=_share(here, seen),
        always_anywhere=_share(anywhere, seen),
        wrong_count=float(wrong.double().mean()),
        spurious=float(extra.double().mean()),
        swapped=_share(swapped, seen),
        last=_share(here, last),
        returns=int(back.sum()),
        present_FJ=torch.where(seen, here.double(), math.nan),
    )


def _share(what: Tensor, where: Tensor) -> float:
    return float(what[where].double().mean())


def _after_absence(seen_FJ: Tensor, gap: int) -> Tensor:
    """Return where a body is visible after it was visible and then not visible for `gap` consecutive frames."""
    columns = []
    for column in seen_FJ.T.tolist():
        run, known, returned, row = 0, False, False, []
        for seen in column:
            returned = returned or (seen and known and run >= gap)
            known, run = known or seen, 0 if seen else run + 1
            row.append(seen and returned)
        columns.append(row)
    return torch.tensor(columns, dtype=torch.bool, device=seen_FJ.device).reshape(seen_FJ.T.shape).T


def _measure(kinds: Tensor, ids: Tensor, bodies: int, least: float, overlap: float) -> tuple[Tensor, ...]:
    """Return for some frames: visible, in place, anywhere, swapped (F, J); surplus components, wrong count (F,)."""
    pixels = kinds[0].numel()
    rows: list[Tensor] = []
    kind, true = kinds.flatten(1), ids.flatten(1)
    piece, true_piece = label(kinds).flatten(1), label(torch.where(ids > 0, ids, -1)).flatten(1)
    area, true_area = _areas(piece, kind >= 0), _areas(true_piece, true > 0)
    for body in range(bodies):
        mask = true == body + 1
        size = mask.sum(1, keepdim=True)
        of_colour = area * (_areas(piece, kind == body) > 0)
        shared = _areas(piece, mask & (kind == body))
        here = (shared / (of_colour + size - shared).clamp_min(1)).amax(1) >= overlap
        near = (of_colour >= 0.5 * size) & (of_colour <= 2 * size) & (of_colour > 0)
        wrong = mask & (kind >= 0) & (kind != body)
        # Most of the place must have a single other colour: several other colours are an artefact and not a swap.
        other = torch.stack([(wrong & (kind == k)).sum(1) for k in range(int(kind.max()) + 1 or 1)]).amax(0)
        seen = size[:, 0] >= least * pixels
        rows.append(torch.stack((seen, here, near.any(1), 2 * other > size[:, 0]), 1))
    columns = torch.stack(rows, -1).unbind(1) if rows else (kinds.new_zeros(len(kinds), 0).bool(),) * 4
    extra, lacking = torch.zeros(len(kinds)), torch.zeros(len(kinds))
    for colour in range(max(bodies, int(kind.max()) + 1)):
        found = _count(area, piece, kind == colour, least * pixels)
        # A true component near the smallest size may be found or not, so it must not count as an error.
        most = _count(true_area, true_piece, true == colour + 1, 0.5 * least * pixels)
        fewest = _count(true_area, true_piece, true == colour + 1, 2 * least * pixels)
        extra += (found - most).clamp_min(0).cpu()
        lacking += (fewest - found).clamp_min(0).cpu()
    return (*columns, extra, extra + lacking > 0)


def _areas(piece: Tensor, mask: Tensor) -> Tensor:
    """Return the number of pixels of a mask in each component, (F, P), by the number of the component."""
    zeros = torch.zeros(piece.shape, device=piece.device)
    return zeros.scatter_add_(1, piece.clamp_min(0), (mask & (piece >= 0)).float())


def _count(area: Tensor, piece: Tensor, mask: Tensor, least: float) -> Tensor:
    return ((_areas(piece, mask) > 0) & (area >= least)).sum(1)
