"""Bins of noise levels: edges, the bin of a forward pass, entries of tables for rows."""

from __future__ import annotations

import copy

import pytest
import torch

from postgen.errors import UserError
from postgen.families.timesteps import timestep_of
from postgen.quant.step_bins import StepBins
from tests.families.tiny_models import tiny_model

STEPS = [1000.0, 960.0, 900.0, 700.0, 300.0]


def test_bins_share_the_steps() -> None:
    for count in (1, 2, 3, 5, 9):
        bins = StepBins.of(STEPS, count)
        found = bins.index(torch.tensor(STEPS)).tolist()
        assert found == sorted(found)
        assert found[0] == 0
        assert found[-1] == bins.count - 1 == min(count, 5) - 1
        sizes = [found.count(bin) for bin in range(bins.count)]
        assert max(sizes) - min(sizes) <= 1
        # A pipeline in half precision rounds the timestep.
        assert bins.index(torch.tensor(STEPS).bfloat16()).tolist() == found
    assert StepBins.of([*STEPS, *STEPS], 2).edges == StepBins.of(STEPS, 2).edges == (930.0,)


def test_an_edge_and_timesteps_per_token() -> None:
    bins = StepBins([500.0, 100.0])
    assert bins.index(torch.tensor([501, 500, 499, 100, 99, 0, 2000])).tolist() == [0, 0, 1, 1, 2, 2, 0]
    # Given frames have timestep 0: the noisy ones decide.
    assert bins.index(torch.tensor([[0, 0, 300], [0, 0, 900]])).tolist() == [1, 0]
    assert bins.index(torch.tensor(300)).tolist() == [1]


def test_entries_for_the_rows() -> None:
    bins, table = StepBins([500.0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    x = torch.zeros(4, 5, 2)
    assert torch.equal(bins.pick(table, x), torch.tensor([[[1.0, 2.0]]]))
    bins.current = torch.tensor([1, 0])
    assert torch.equal(bins.pick(table[:, 0], x).flatten(), torch.tensor([3.0, 3, 1, 1]))  # two rows for each sample
    picked = bins.pick(table, x[:2])
    assert picked.shape == (2, 1, 2)
    assert torch.equal(picked[:, 0], table[[1, 0]])
    with pytest.raises(UserError, match="an activation with 3 rows does not fit a forward pass of 2 samples"):
        bins.pick(table, x[:3])


@torch.no_grad()
def test_a_forward_pass_sets_the_bin() -> None:
    tiny = tiny_model("Wan", batch=2)
    model, bins = tiny.transformer, StepBins([500.0])
    model.bins = bins
    handle = bins.attach(model)
    twin = copy.deepcopy(model)
    tiny.arguments["timestep"] = torch.tensor([900, 100])
    model(**tiny.arguments)
    assert bins.current.tolist() == [0, 1]
    assert twin.bins.current.tolist() == [0]
    twin(**{**tiny.arguments, "timestep": torch.tensor([100, 100])})
    assert twin.bins.current.tolist() == [1, 1]
    assert bins.current.tolist() == [0, 1]
    handle.remove()
    model(**{**tiny.arguments, "timestep": torch.tensor([100, 100])})
    assert bins.current.tolist() == [0, 1]


def test_where_the_timestep_is() -> None:
    model, t = tiny_model("Wan").transformer, torch.tensor([3])
    assert timestep_of(model, (torch.zeros(1), t), {}) is t
    assert timestep_of(model, (), {"timestep": t}) is t
    with pytest.raises(UserError, match="WanTransformer3DModel was called without a timestep"):
        timestep_of(model, (torch.zeros(1),), {})


def test_wrong_edges() -> None:
    for edges in ([1, 2], [2, 2], [float("nan")], ["1"]):
        with pytest.raises(UserError, match="must be falling timesteps, got"):
            StepBins(edges)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="0 timesteps cannot be split into 2 bins"):
        StepBins.of([], 2)
