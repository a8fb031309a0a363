"""FDDA for models without batch norms (arXiv:2109.04186): statistics of the exact model guide the quantised one.

The original generates images whose statistics match those of the calibration set in the inputs of batch norms. A
diffusion model samples its own calibration data, so the statistics (`postgen.quant.statistics`) have three uses here:

- `StatPenalty`: a term of the loss of block-wise training. With mean m and variance v of the quantised block over the
  tokens of a sample, the centre m_k, v_k of its bin, and C channels with mean variance a,

      centre      |m - m_k|^2 / (C a) + |v - v_k|^2 / (C a^2)
      distorted   the same against m_k + s_m e, v_k + s_v e', with spreads s between points and normal e, e'

- `correct_`: each output channel of a quantised layer gets the mean and the variance of the exact layer, without
  training.
- `choose_prompts`: a few prompts whose statistics are those of many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from postgen.errors import UserError, check_number
from postgen.families import Block
from postgen.families.linear import find_linears
from postgen.quant.calibration import Calibration
from postgen.quant.linear import QLinear
from postgen.quant.observers import SharedInputs
from postgen.quant.rounding import Quantized
from postgen.quant.statistics import Centre, NormStats, OutputStats, PromptStats, block_taps, moments
from postgen.quant.visits import Bin, EndPass, Observer, Tap, Visit, input_taps, tapped
from postgen.training.logging import Progress

_TINY = 1e-12
_MOST_GAIN = 2.0
"""Largest factor of a row, and the inverse of the smallest: a larger one would follow noise of few tokens."""


class StatPenalty:
    """The penalty on statistics of the blocks of a model.

    Args:
        stats: statistics of the exact model.
        blocks: all blocks in the order in which they run; only the deeper half has a penalty, as in the paper.
        centre: weight of the centre term, at least 0.
        distorted: weight of the distorted term, at least 0.
        seed: seed of the distortion.
    """

    def __init__(
        self,
        stats: NormStats,
        blocks: Sequence[Block],
        *,
        centre: float = 0.01,
        distorted: float = 0.01,
        seed: int = 0,
    ) -> None:
        check_number("centre", centre, 0)
        check_number("distorted", distorted, 0)
        self.stats, self.weights = stats, (centre, distorted)
        self.blocks = {block.name: block for block in blocks[len(blocks) // 2 :]}
        self.generator = torch.Generator().manual_seed(seed)
        """Source of the distortion; its state belongs to checkpoints."""
        self._centres: dict[tuple[str, Bin], Centre] = {}

    @contextmanager
    def watching(self, name: str, student: nn.Module, bins: Sequence[Bin]) -> Iterator[Penalty]:
        """Compute the penalty of a block that runs once in this context.

        Args:
            name: name of the block.
            student: the quantised block.
            bins: bin of each row of its input.

        Returns:
            The penalty, whose `total` can be read after the block has run. It is 0 in the first half of the blocks.
        """
        found = Penalty()
        taps = block_taps(self.blocks[name], student) if name in self.blocks else []
        with tapped(taps, lambda tap, x: found.terms.append(self._term(tap.name, x, bins))):
            yield found

    def _term(self, name: str, x: Tensor, bins: Sequence[Bin]) -> Tensor:
        means, variances = moments(x, len(bins))
        rows = []
        for bin, mean, var in zip(bins, means, variances, strict=True):
            if (name, bin) not in self._centres:
                self._centres[name, bin] = self.stats.centre(name, bin)
            centre = self._centres[name, bin]
            size = centre.var.mean().clamp_min(_TINY).to(mean)
            targets = [(centre.mean, centre.var)]
            if self.weights[1]:
                targets.append(self._distorted(centre))
            far = [
                (mean - m.to(mean)).square().mean() / size + (var - v.to(var)).square().mean() / size.square()
                for m, v in targets
            ]
            rows.append(sum(weight * each for weight, each in zip(self.weights, far, strict=False)))
        return torch.stack([torch.as_tensor(row) for row in rows]).mean()

    def _distorted(self, centre: Centre) -> tuple[Tensor, Tensor]:
        noise = torch.randn(2, len(centre.mean), generator=self.generator).to(centre.mean)
        var = centre.var + centre.var_spread * noise[1]
        return centre.mean + centre.mean_spread * noise[0], var.clamp_min(0)


class Penalty:
    """The penalty of one run of a block."""

    def __init__(self) -> None:
        self.terms: list[Tensor] = []

    @property
    def total(self) -> Tensor:
        """The mean over the places in the block, a scalar with a gradient; 0 without places."""
        return torch.stack(self.terms).mean() if self.terms else torch.zeros(())


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """y -> gain y + shift for the outputs of a linear layer, both (N,) float32."""

    gain: Tensor
    shift: Tensor


def correction(exact: tuple[Tensor, Tensor], quantised: tuple[Tensor, Tensor], *, gain: bool = True) -> Correction:
    """Return the correction that gives a quantised layer the output statistics of the exact one.

    gain = (v / v_q)^.5, within [1/2, 2], and shift = m - gain m_q.

    Args:
        exact: mean m and variance v of each output channel of the exact layer, both (N,).
        quantised: m_q and v_q of the quantised layer.
        gain: False keeps the gain 1 and corrects the mean only.
    """
    (mean, var), (mean_q, var_q) = exact, quantised
    ratio = torch.where((var_q > _TINY) & (var > _TINY), var / var_q.clamp_min(_TINY), 1.0).sqrt()
    factor = ratio.clamp(1 / _MOST_GAIN, _MOST_GAIN) if gain else torch.ones_like(ratio)
    return Correction(gain=factor, shift=mean - factor * mean_q)


def takes_gain(quantized: Quantized) -> bool:
    """Whether each row of a quantised weight can be multiplied by a number: its scales are float32, per row."""
    format = quantized.format
    return format.scale == "float32" and format.share not in ("tensor", "block")


def with_gain(quantized: Quantized, gain: Tensor) -> Quantized:
    """Return a quantised weight (N, K) with each row multiplied by a number, gain (N,). The codes stay the same."""
    scales = quantized.scales
    return replace(quantized, scales=replace(scales, scale=scales.scale * gain.to(scales.scale)[:, None, None]))


@torch.no_grad()
def fold_(layer: QLinear, found: Correction) -> None:
    """Fold a correction into a quantised layer: into its bias, and unless the gain is 1 into its scales.

    Raises:
        UserError: the layer has no bias, or its weight cannot be multiplied row by row.
    """
    if layer.bias is None:
        raise UserError("a layer without a bias cannot be corrected, because its checkpoint has no place for one")
    if (found.gain != 1).any():
        quantized = layer.quantized()
        if not takes_gain(quantized):
            raise UserError(f"a {quantized.format.text} weight has no scales per row: correct the mean only")
        layer.store_(with_gain(quantized, found.gain))
        if layer.branch_up is not None:
            layer.branch_up.mul_(found.gain.to(layer.branch_up)[:, None])
    gain, shift = found.gain.to(layer.bias.device), found.shift.to(layer.bias.device)
    layer.bias.copy_(layer.bias.float() * gain + shift)


def correct_(
    model: nn.Module,
    calibration: Calibration,
    exact: OutputStats,
    *,
    gain: bool = True,
    expert: str | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Correct the quantised layers of a model in the order in which they run, so that each sees corrected inputs.

    Layers with the same input are corrected together. For each such group the model runs over the points up to the
    group: for a transformer with n blocks of six groups that costs as much as 3 n runs over the points.

    Args:
        model: the quantised transformer.
        calibration: the points.
        exact: statistics of the exact model at the same points, measured after transformations were folded into it: a
            fold into value projections changes their outputs.
        gain: whether to correct the variances as well as the means.
        expert: see `Calibration.stream`.
        progress: whether to show a progress bar, which counts groups of layers.

    Returns:
        Name of each corrected layer -> mean of |m - m_q| over its channels before, relative to the standard deviation
        of its output. Layers without a bias are left as they are.

    Raises:
        UserError: the model has no quantised layers with a bias, or `exact` lacks one of them.
    """
    layers = {name: each for name, each in find_linears(model).items() if isinstance(each, QLinear)}
    layers = {name: each for name, each in layers.items() if each.bias is not None}
    if not layers:
        raise UserError(f"this {type(model).__name__} has no quantised layers with a bias: quantise it first")
    order = _Order(len(layers))
    calibration.stream(model, order, layers=layers, expert=expert)
    found: dict[str, float] = {}
    groups = order.groups()
    bar = Progress(step=0, max_steps=len(groups), shown=progress, name="correct groups of layers")
    for names in groups:
        stats = _GroupStats(len(names))
        calibration.stream(model, stats, layers=names, expert=expert)
        for name in names:
            layer, before, now = layers[name], exact.pooled(name), stats.pooled(name)
            scaled = gain and layer.spec.weight is not None and takes_gain(layer.quantized())
            spread = before[1].mean().sqrt().clamp_min(_TINY)
            found[name] = float((before[0] - now[0]).abs().mean() / spread)
            fold_(layer, correction(before, now, gain=scaled))
        bar.step()
    bar.close()
    return found


class _Order(Observer):
    """Groups of layers with the same input, in the order in which they run. One pass is enough."""

    def __init__(self, count: int) -> None:
        self.inputs, self.count = SharedInputs(), count

    def taps(self, linears: Mapping[str, nn.Module], model: nn.Module) -> Sequence[Tap]:
        return input_taps(linears)

    def see(self, name: str, x: Tensor, visit: Visit) -> None:
        if len(self.inputs.owners) == self.count:
            raise EndPass
        self.inputs.owner(name, x)

    def groups(self) -> list[list[str]]:
        found: dict[str, list[str]] = {}
        for name, owner in self.inputs.owners.items():
            found.setdefault(owner, []).append(name)
        return list(found.values())


class _GroupStats(OutputStats):
    """Statistics of the outputs of some layers, after which a pass ends."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.left = count, count

    def see(self, name: str, x: Tensor, visit: Visit) -> None:
        super().see(name, x, visit)
        self.left -= 1
        if not self.left:
            self.left = self.count
            raise EndPass


def choose_prompts(stats: PromptStats, count: int) -> list[int]:
    """Choose prompts whose statistics together are closest to those of all prompts.

    Greedy: each choice minimises the squared distance between the mean of the chosen prompts and the centre, summed
    over places and bins, in units of the spread between points. A bin without a point counts as a distance of 1.

    Args:
        stats: statistics of each prompt.
        count: number of prompts to choose.

    Returns:
        Numbers of the prompts, best first.

    Raises:
        UserError: there are fewer prompts.
    """
    numbers = stats.prompts()
    check_number("count", count, 1, len(numbers), whole=True)
    far, seen = stats.deviations()
    total, points, chosen = torch.zeros_like(far[0]), torch.zeros(seen.shape[1]), list[int]()
    for _ in range(count):
        costs = []
        for row in range(len(numbers)):
            now = points + seen[row]
            mean = (total + far[row]) / now.clamp_min(1)[:, None]
            cost = torch.where(now > 0, mean.square().mean(1), 1).sum()
            costs.append(float("inf") if row in chosen else float(cost))
        best = costs.index(min(costs))
        chosen.append(best)
        total, points = total + far[best], points + seen[best]
    return [numbers[row] for row in chosen]
