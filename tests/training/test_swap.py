"""Swapping other values in for trained weights: the trained weights come back bit by bit, also after errors."""

import pytest
import torch

from postgen.training import swap
from postgen.training.ema import Ema
from postgen.training.swap import WeightsCopy


def values(net):
    return [parameter.detach().clone() for parameter in net.parameters()]


def same(left, right):
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def test_copies_and_averages_stand_in_for_one_another():
    net = torch.nn.Linear(3, 2)
    old, average = WeightsCopy({"net": net}), Ema({"net": net}, 0.5, warmup=False)
    first = values(net)
    for _ in range(3):
        for parameter in net.parameters():
            parameter.data.add_(1)
        average.update()
    trained, mean = values(net), [value.clone() for value in average.values]
    assert not same(trained, mean)
    with average.swapped_in():
        assert same(values(net), mean)
        with old.swapped_in():
            assert same(values(net), first)
            with average.swapped_in():
                assert same(values(net), mean)
            assert same(values(net), first)
        assert same(values(net), mean)
    assert same(values(net), trained)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_a_swap_that_is_stopped_half_way_is_undone(monkeypatch, kind):
    net = torch.nn.Linear(3, 2)
    old = WeightsCopy({"net": net})
    for parameter in net.parameters():
        parameter.data.add_(1)
    trained, whole = values(net), torch._foreach_copy_
    written = []

    def stopped(targets, sources):
        monkeypatch.setattr(swap.torch, "_foreach_copy_", whole)
        targets[0].copy_(sources[0])
        written.append(not torch.equal(net.weight, trained[0]))
        raise kind

    monkeypatch.setattr(swap.torch, "_foreach_copy_", stopped)
    with pytest.raises(kind), old.swapped_in():
        pytest.fail("it went on")
    assert written == [True]
    assert same(values(net), trained)
