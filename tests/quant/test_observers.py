"""Observers: ranges, Hessians in which bins count equally, samples of inputs."""

from __future__ import annotations

import pytest
import torch

from postgen.errors import UserError
from postgen.quant.hessian import Hessian
from postgen.quant.observers import AbsMax, HessianObserver, InputSample
from postgen.quant.visits import Bin, Visit
from tests.quant.calibrated import calibrated
from tests.quant.test_calibration import Inputs

HIGH, LOW = Bin(level=0), Bin(level=1)
LAYER = "blocks.1.attn1.to_k"


def visit(bin: Bin, *prompts: int, weight: float = 1.0) -> Visit:
    return Visit(bin=bin, prompts=prompts or (0,), weight=weight)


@pytest.fixture(scope="module")
def seen() -> tuple[Inputs, AbsMax, HessianObserver, InputSample]:
    pipe, calibration = calibrated("Wan")
    found = Inputs(), AbsMax(), HessianObserver(), InputSample(rows=5)
    calibration.stream(pipe.transformer, found)
    return found


def test_ranges(seen: tuple[Inputs, AbsMax, HessianObserver, InputSample]) -> None:
    inputs, ranges, _, _ = seen
    rows = inputs.seen[LAYER]
    whole = torch.cat([row for _, row in rows])
    least, largest = ranges.range(LAYER)
    assert torch.equal(least, whole.amin(0))
    assert torch.equal(largest, whole.amax(0))
    assert torch.equal(ranges.channels(LAYER), whole.abs().amax(0))
    levels = ranges.levels(LAYER, 2)
    for level in (0, 1):
        part = torch.cat([row for bin, row in rows if bin.level == level])
        assert torch.equal(levels[level], part.abs().amax(0))
    with pytest.raises(
        UserError, match=r"no inputs of 'blocks\.9' were observed\. Observed: blocks\.0\.attn1\.to_q, "
    ):
        ranges.range("blocks.9")


def test_a_bin_without_points_takes_the_nearest_range() -> None:
    ranges = AbsMax(memory=0.5)
    ranges.see("a", torch.tensor([[[1.0, -2.0]]]), visit(Bin(level=1)))
    ranges.see("a", torch.tensor([[[-5.0, 0.0]]]), visit(Bin(level=3, branch="negative")))
    assert ranges.levels("a", 5).tolist() == [[1, 2], [1, 2], [1, 2], [5, 0], [5, 0]]
    assert ranges.middle("a").tolist() == [-2.0, -1.0]


def test_hessians(seen: tuple[Inputs, AbsMax, HessianObserver, InputSample]) -> None:
    inputs, _, hessians, _ = seen
    sums = torch.zeros(4, 24, 24, dtype=torch.float64)
    for row, bin in enumerate(sorted({bin for bin, _ in inputs.seen[LAYER]})):
        # A pass has two points.
        each = torch.stack([x for other, x in inputs.seen[LAYER] if other == bin]).double().reshape(2, -1, 24)
        sums[row] = sum(x.T @ x / x.square().sum() for x in each)
    expected = Hessian.of(sums.sum(0))
    torch.testing.assert_close(hessians.finish(LAYER).matrix, expected.matrix)
    # Queries, keys and values have one input; the text of cross-attention is another.
    shared = hessians._shared.owners
    assert shared[LAYER] == shared["blocks.1.attn1.to_v"] == "blocks.1.attn1.to_q"
    assert shared["blocks.1.attn2.to_k"] == shared["blocks.1.attn2.to_v"] != shared["blocks.1.attn2.to_q"]
    with pytest.raises(UserError, match=r"no inputs of 'proj_out' were observed"):
        hessians.finish("proj_out")


def test_bins_count_equally() -> None:
    """Small and few inputs weigh as much as large and many."""
    hessians, generator = HessianObserver(), torch.Generator().manual_seed(0)
    small = torch.zeros(1, 8, 4)
    small[..., :2] = torch.randn(1, 8, 2, generator=generator)
    large = torch.zeros(1, 8, 4)
    large[..., 2:4] = 100 * torch.randn(1, 8, 2, generator=generator)
    for _ in range(4):
        hessians.see("a", large.clone(), visit(HIGH, weight=0.25))
    hessians.see("a", small, visit(LOW, weight=1.0))
    diagonal = hessians.finish("a", damping=0).matrix.diagonal()
    assert float(diagonal[:2].sum()) == pytest.approx(float(diagonal[2:4].sum()), rel=1e-3)


def test_layers_that_share_an_input_in_some_passes_only() -> None:
    hessians, x = HessianObserver(), torch.ones(1, 2, 3)
    hessians.see("a", x, visit(HIGH))
    hessians.see("b", x, visit(HIGH))
    hessians.see("a", x + 1, visit(HIGH))
    with pytest.raises(UserError, match="b and a receive the same input in some passes only"):
        hessians.see("b", x + 1, visit(HIGH))
    # A change in place between two layers makes another input.
    other, x = HessianObserver(), torch.ones(1, 2, 3)
    other.see("a", x, visit(HIGH))
    other.see("b", x.mul_(2), visit(HIGH))
    assert other._shared.owners == {"a": "a", "b": "b"}


def test_samples_of_inputs(seen: tuple[Inputs, AbsMax, HessianObserver, InputSample]) -> None:
    inputs, _, _, sample = seen
    rows = inputs.seen[LAYER]
    assert sample.of(LAYER).shape == (5 * 4, 24)
    for bin in {bin for bin, _ in rows}:
        part = torch.cat([row for each, row in rows if each == bin])
        kept = sample.of(LAYER, [bin])
        assert all((part == row).all(1).any() for row in kept)
    # Every row has the same chance, whatever the number of rows of its pass.
    counts = torch.zeros(30)
    for seed in range(300):
        each = InputSample(rows=3, seed=seed)
        numbers = torch.arange(30.0)[:, None]
        for part in (numbers[:4], numbers[4:20], numbers[20:]):
            each.see("a", part, visit(HIGH))
        counts[each.of("a")[:, 0].long()] += 1
    assert counts.sum() == 900
    assert counts.min() > 10
    assert counts.max() < 55
