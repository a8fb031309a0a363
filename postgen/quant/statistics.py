"""Means and variances of activations over tokens, for each channel and bin.

Norms of transformers keep no running statistics, unlike batch norms. These observers measure them, for FDDA
(arXiv:2109.04186) in `postgen.quant.fdda`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError, shown
from postgen.families import Block, blocks_of
from postgen.quant.visits import Bin, Observer, Tap, Visit, input_taps


@dataclass(frozen=True, kw_only=True, slots=True)
class Centre:
    """Statistics of one place in one bin, each (C,) float32."""

    mean: Tensor
    """Mean over tokens, averaged over the points."""
    var: Tensor
    """Variance over the tokens of a point, averaged over the points."""
    mean_spread: Tensor
    """Standard deviation of the mean between points."""
    var_spread: Tensor
    """Standard deviation of the variance between points."""
    points: int


@dataclass(slots=True)
class _Sums:
    """Sums of the means and variances of points, and of their squares, float64."""

    points: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(4, 1, dtype=torch.float64))

    def add(self, mean: Tensor, var: Tensor) -> None:
        """Add the mean and variance over the tokens of points, both (B, C)."""
        parts = torch.stack([mean, mean.square(), var, var.square()]).double().sum(1)
        self.sums = parts if not self.points else self.sums + parts
        self.points += len(mean)

    def centre(self) -> Centre:
        mean, mean_square, var, var_square = self.sums / self.points
        return Centre(
            mean=mean.float(),
            var=var.float(),
            mean_spread=(mean_square - mean.square()).clamp_min(0).sqrt().float(),
            var_spread=(var_square - var.square()).clamp_min(0).sqrt().float(),
            points=self.points,
        )


def moments(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance over the tokens of each sample, both (rows, C) float32.

    Args:
        x: activation (rows, ..., C), or with a first axis that joins the samples with tokens or frames.
        rows: number of samples.

    Raises:
        UserError: the first axis is not a multiple of the number of samples.
    """
    if len(x) % rows:
        raise UserError(f"an activation with {len(x)} rows does not fit a forward pass of {rows} samples")
    var, mean = torch.var_mean(x.float().reshape(rows, -1, x.shape[-1]), dim=1, correction=0)
    return mean, var


class _Statistics(Observer):
    def __init__(self) -> None:
        self._sums: dict[str, dict[Bin, _Sums]] = {}

    def see(self, name: str, x: Tensor, visit: Visit) -> None:
        """Take an activation."""
        mean, var = moments(x, len(visit.prompts))
        self._sums.setdefault(name, {}).setdefault(visit.bin, _Sums()).add(mean, var)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the observed places."""
        return tuple(self._sums)

    def bins(self, name: str) -> tuple[Bin, ...]:
        """Return the bins of a place, sorted."""
        return tuple(sorted(self._of(name)))

    def centre(self, name: str, bin: Bin) -> Centre:
        """Return the statistics of a place in a bin.

        Raises:
            UserError: the place was not observed in this bin.
        """
        found = self._of(name)
        if bin not in found:
            raise UserError(f"{name} was not observed in {bin}")
        return found[bin].centre()

    def pooled(self, name: str) -> tuple[Tensor, Tensor]:
        """Return mean and variance over the tokens of all points, both (C,) float32. All bins count equally.

        Raises:
            UserError: the place was not observed.
        """
        centres = [self.centre(name, bin) for bin in self.bins(name)]
        means = torch.stack([each.mean for each in centres]).double()
        mean = means.mean(0)
        within = torch.stack([each.var.double() + each.mean_spread.double().square() for each in centres])
        return mean.float(), (within + (means - mean).square()).mean(0).float()

    def _of(self, name: str) -> dict[Bin, _Sums]:
        if name not in self._sums:
            raise UserError(f"{shown(name)} was not observed. Observed: {', '.join(self._sums) or 'nothing'}")
        return self._sums[name]


class NormStats(_Statistics):
    """Statistics of the inputs of the norms in the blocks of a model, and of the latents that the blocks return.

    A norm has the name of its module, and the output of a block that of the block. The norms of queries and keys see
    the channels of a head.
    """

    def taps(self, linears: Mapping[str, nn.Module], model: nn.Module) -> Sequence[Tap]:
        """Return taps on norms and block outputs."""
        return [tap for block in blocks_of(model) for tap in block_taps(block, block.module)]


class OutputStats(_Statistics):
    """Statistics of the outputs of linear layers."""

    def taps(self, linears: Mapping[str, nn.Module], model: nn.Module) -> Sequence[Tap]:
        """Return taps on the outputs of the linear layers."""
        return [
            Tap(name=name, module=module, read=lambda args, kwargs, output: output, after=True)
            for name, module in linears.items()
        ]


class PromptStats(NormStats):
    """Statistics of the latents that some blocks return, for each prompt.

    Args:
        blocks: number of blocks, evenly spaced from the first to the last.
    """

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.blocks = blocks
        self._prompts: dict[tuple[str, Bin], dict[int, _Sums]] = {}

    def taps(self, linears: Mapping[str, nn.Module], model: nn.Module) -> Sequence[Tap]:
        """Return taps on block outputs."""
        every = blocks_of(model)
        places = torch.linspace(0, len(every) - 1, min(self.blocks, len(every))).round().long().tolist()
        return [_output_tap(every[place], every[place].module) for place in places]

    def see(self, name: str, x: Tensor, visit: Visit) -> None:
        """Take an activation."""
        mean, var = moments(x, len(visit.prompts))
        self._sums.setdefault(name, {}).setdefault(visit.bin, _Sums()).add(mean, var)
        found = self._prompts.setdefault((name, visit.bin), {})
        for row, prompt in enumerate(visit.prompts):
            found.setdefault(prompt, _Sums()).add(mean[row : row + 1], var[row : row + 1])

    def prompts(self) -> tuple[int, ...]:
        """Return the numbers of the observed prompts, sorted."""
        return tuple(sorted({prompt for found in self._prompts.values() for prompt in found}))

    def deviations(self) -> tuple[Tensor, Tensor]:
        """Return how far each prompt lies from the centre of each place and bin, in units of the spread.

        Returns:
            (prompts, cells, 2 C) deviations of mean and variance, 0 where a prompt has no point, and (prompts, cells)
            whether it has one. A cell is a place in a bin.
        """
        numbers = self.prompts()
        cells = list(self._prompts)
        parts = [self._deviations(name, bin, numbers) for name, bin in cells]
        seen = [[prompt in self._prompts[cell] for cell in cells] for prompt in numbers]
        return torch.stack(parts, 1), torch.tensor(seen)

    def _deviations(self, name: str, bin: Bin, numbers: Sequence[int]) -> Tensor:
        centre, found = self.centre(name, bin), self._prompts[name, bin]
        rows = []
        for prompt in numbers:
            own = found[prompt].centre() if prompt in found else centre
            pairs = ((own.mean - centre.mean, centre.mean_spread), (own.var - centre.var, centre.var_spread))
            # A channel that is the same for all prompts has no spread, and no deviation.
            rows.append(torch.cat([far / torch.where(spread > 0, spread, 1) for far, spread in pairs]))
        return torch.stack(rows).cpu()


def block_taps(block: Block, module: nn.Module) -> list[Tap]:
    """Return taps on the norms and the output of a block.

    Args:
        block: the block.
        module: the module that runs: that of the block, or a changed copy of it.
    """
    norms = {f"{block.name}.{name}": each for name, each in module.named_modules() if _is_norm(each)}
    return [*input_taps(norms), _output_tap(block, module)]


def _output_tap(block: Block, module: nn.Module) -> Tap:
    return Tap(name=block.name, module=module, read=partial(_latents, block), after=True)


def _latents(block: Block, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor:
    found: Tensor = block.outputs(output)[0]
    return found


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm over the last axis. Norms of diffusers have no common class; some contain others."""
    by_channel = isinstance(module, nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    return "Norm" in type(module).__name__ and not by_channel and not any(module.children())
