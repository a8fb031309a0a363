"""Observers of calibration: ranges, Hessians, means and variances, and samples of activations.

    amax, hessian = AbsMax(), HessianObserver()
    calibration.stream(model, [amax, hessian])
    amax.channels("blocks.0.attn1.to_q"), hessian.finish("blocks.0.attn1.to_q")

What an observer keeps does not depend on the number of points.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from postgen.errors import UserError, shown
from postgen.quant.hessian import Hessian, HessianSum
from postgen.quant.visits import Bin, Observer, Tap, Visit, input_taps
from postgen.sampling.seeds import seed_of

_HEAVIEST = 1e9
"""Largest weight that `HessianSum` accepts."""


T = TypeVar("T")


class _InputObserver(Observer):
    """An observer of the inputs of the linear layers."""

    def taps(self, linears: Mapping[str, nn.Module], model: nn.Module) -> Sequence[Tap]:
        """Return taps on the inputs of the linear layers."""
        return input_taps(linears)


class _Range(NamedTuple):
    least: Tensor
    largest: Tensor


class AbsMax(_InputObserver):
    """Ranges of the inputs of linear layers, for each channel and bin.

    Args:
        memory: weight of the earlier points in the running mean of `middle`, 0 to 1 (OmniQuant uses .99).
    """

    def __init__(self, memory: float = 0.99) -> None:
        self.memory = memory
        self._ranges: dict[str, dict[Bin, _Range]] = {}
        self._middles: dict[str, Tensor] = {}

    def see(self, name: str, x: Tensor, visit: Visit) -> None:
        """Take the input of a layer."""
        rows = x.reshape(-1, x.shape[-1])
        least, largest = (each.float() for each in rows.aminmax(dim=0))
        found = self._ranges.setdefault(name, {})
        before = found.get(visit.bin)
        if before is not None:
            found[visit.bin] = _Range(torch.minimum(before.least, least), torch.maximum(before.largest, largest))
        else:
            found[visit.bin] = _Range(least, largest)
        middle = (least + largest) / 2
        known = self._middles.get(name)
        self._middles[name] = middle if known is None else known.lerp(middle, 1 - self.memory)

    def bins(self, name: str) -> tuple[Bin, ...]:
        """Return the bins in which a layer ran, sorted."""
        return tuple(sorted(_known(self._ranges, name)))

    def range(self, name: str, bins: Sequence[Bin] | None = None) -> tuple[Tensor, Tensor]:
        """Return the least and the largest input of each channel, both (K,) float32.

        Args:
            name: name of the layer.
            bins: bins to join; None for all.

        Raises:
            UserError: the layer was not observed.
        """
        found = [_known(self._ranges, name)[bin] for bin in (self.bins(name) if bins is None else bins)]
        return torch.stack([each.least for each in found]).amin(0), torch.stack([each.largest for each in found]).amax(
            0
        )

    def channels(self, name: str, bins: Sequence[Bin] | None = None) -> Tensor:
        """Return the largest absolute input of each channel, (K,) float32. Arguments and errors as `range`."""
        least, largest = self.range(name, bins)
        return torch.maximum(-least, largest)

    def levels(self, name: str, count: int) -> Tensor:
        """Return the largest absolute input for each bin of the noise level, (count, K) float32.

        Guidance branches are joined, because an inference step does not know its branch. A bin in which the layer did
        not run has the values of the nearest one.

        Args:
            name: name of the layer.
            count: number of bins of the noise level, `StepBins.count`.

        Raises:
            UserError: the layer was not observed.
        """
        bins = self.bins(name)
        seen = sorted({bin.level for bin in bins})
        each = {level: self.channels(name, [bin for bin in bins if bin.level == level]) for level in seen}
        return torch.stack([each[min(seen, key=lambda known: abs(known - level))] for level in range(count)])

    def middle(self, name: str) -> Tensor:
        """Return the running mean of (largest + least) / 2 of each channel over the points, (K,) float32.

        OmniQuant (arXiv:2308.13137) begins its shifts there. Errors as `range`.
        """
        return _known(self._middles, name)


class SharedInputs:
    """Finds layers that receive the same tensor, such as the projections to q, k and v."""

    def __init__(self) -> None:
        self.owners: dict[str, str] = {}
        """Name of a layer -> name of the first layer with its input, in the order in which the layers run."""
        self._last: tuple[weakref.ref[Tensor], int, str] | None = None

    def owner(self, name: str, x: Tensor) -> str:
        """Return the first layer with this input: the layer itself, or one that has received it just before.

        Raises:
            UserError: the layer shared its input in earlier passes, but does not in this one.
        """
        # Inference tensors do not count changes.
        version, owner = -1 if x.is_inference() else x._version, name
        if self._last is not None and self._last[0]() is x and self._last[1] == version:
            owner = self._last[2]
        known = self.owners.setdefault(name, owner)
        if known not in (owner, name):
            raise UserError(f"{name} and {known} receive the same input in some passes only: observe them separately")
        self._last = weakref.ref(x), version, known
        return known


class HessianObserver(_InputObserver):
    """Hessians of the inputs of linear layers, in which all bins count equally.

    Each pass is divided by its mean square, and all passes of a bin together have the weight 1. So neither the noise
    levels with large activations nor those with many points dominate. A layer with K channels takes 4 K^2 bytes (8 K^2
    up to 2048 channels) on the device of the model; layers that receive the same tensor, such as the projections to q,
    k and v, share one sum. Where all layers together need too much memory, stream over the layers of some blocks at a
    time.
    """

    def __init__(self) -> None:
        self._sums: dict[str, HessianSum] = {}
        self._shared = SharedInputs()

    def see(self, name: str, x: Tensor, visit: Visit) -> None:
        """Take the input of a layer."""
        if self._shared.owner(name, x) != name:
            return
        size = float(x.float().square().mean())
        weight = visit.weight * len(visit.prompts) / size if size > 0 else 0.0
        self._sums.setdefault(name, HessianSum(x.shape[-1])).add(x, min(weight, _HEAVIEST))

    def finish(self, name: str, damping: float = 0.01) -> Hessian:
        """Return the Hessian of a layer.

        Args:
            name: name of the layer.
            damping: see `HessianSum.finish`.

        Raises:
            UserError: the layer was not observed, or its inputs are 0 or not finite.
        """
        return self._sums[_known(self._shared.owners, name)].finish(damping)


class InputSample(_InputObserver):
    """Random rows (tokens) of the inputs of linear layers, equally many from each bin, on the CPU.

    Args:
        rows: number of rows of each layer and bin.
        seed: seed of the choice.
    """

    def __init__(self, rows: int = 64, seed: int = 0) -> None:
        self.rows, self.seed = rows, seed
        self._kept: dict[str, dict[Bin, tuple[Tensor, Tensor]]] = {}
        self._generators: dict[tuple[str, Bin], torch.Generator] = {}

    def see(self, name: str, x: Tensor, visit: Visit) -> None:
        """Take the input of a layer. All rows of a bin are kept with the same probability."""
        rows = x.reshape(-1, x.shape[-1])
        draws = torch.rand(len(rows), generator=self._generator(name, visit.bin))
        ranks, places = draws.topk(min(self.rows, len(rows)))
        kept, found = rows[places.to(rows.device)].cpu(), self._kept.setdefault(name, {})
        if visit.bin in found:
            earlier, before = found[visit.bin]
            ranks, kept = torch.cat([earlier, ranks]), torch.cat([before, kept])
            ranks, places = ranks.topk(min(self.rows, len(ranks)))
            kept = kept[places]
        found[visit.bin] = ranks, kept

    def _generator(self, name: str, bin: Bin) -> torch.Generator:
        if (name, bin) not in self._generators:
            stream = zlib.crc32(f"{name} {bin}".encode())
            self._generators[name, bin] = torch.Generator().manual_seed(seed_of(self.seed, "kept", stream))
        return self._generators[name, bin]

    def of(self, name: str, bins: Sequence[Bin] | None = None) -> Tensor:
        """Return the kept rows of a layer, (rows, K) in the dtype of the model.

        Args:
            name: name of the layer.
            bins: bins to join; None for all.

        Raises:
            UserError: the layer was not observed.
        """
        found = _known(self._kept, name)
        return torch.cat([found[bin][1] for bin in (sorted(found) if bins is None else bins)])


def _known(found: Mapping[str, T], name: str) -> T:
    if name not in found:
        raise UserError(f"no inputs of {shown(name)} were observed. Observed: {', '.join(found) or 'nothing'}")
    return found[name]
