"""A single FP8 linear layer: results, stored codes, state dict, shared quantisation."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from postgen.families import shared_rows
from postgen.fp8_linear import sharing
from postgen.fp8_linear.layer import FP8Linear
from postgen.kernels.fp8_rows import naive
from tests.kernels.launches import relative_error


def layer(inputs: int = 64, outputs: int = 32, *, bias: bool = True, seed: int = 0, **words: Any) -> FP8Linear:
    torch.manual_seed(seed)
    return FP8Linear(nn.Linear(inputs, outputs, bias), **words)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64,), (7, 64), (2, 3, 64), (2, 1, 5, 64), (0, 64)])
@torch.no_grad()
def test_it_computes_the_rounded_product(shape: tuple[int, ...], bias: bool) -> None:
    made, x = layer(bias=bias), tokens(*shape)
    codes, scale = naive.quantize_rows(x)
    weight = naive.quantize_rows(made.weight)
    assert torch.equal(made(x), naive.rows_matmul(codes, scale, *weight, made.bias, x.dtype))
    assert made(x).shape == (*shape[:-1], 32)


@torch.no_grad()
def test_the_error_is_that_of_e4m3() -> None:
    made, x = layer(512, 256, bias=False), tokens(128, 512)
    assert 0.02 < relative_error(made(x), x.double() @ made.weight.double().mT) < 0.04


def test_it_has_the_parameters_of_the_layer() -> None:
    linear = nn.Linear(32, 16)
    made = FP8Linear(linear)
    assert made.weight is linear.weight
    assert made.bias is linear.bias
    assert list(made.state_dict()) == ["weight", "bias"]
    assert [name for name, _ in made.named_buffers()] == ["codes", "scales"]
    assert (made.in_features, made.out_features) == (32, 16)


@torch.no_grad()
def test_another_dtype_leaves_the_codes() -> None:
    made, x = layer(), tokens(5, 64)
    codes, scales, out = made.codes.clone(), made.scales.clone(), made(x)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        made.to(dtype)
        assert torch.equal(made.codes, codes)
        assert torch.equal(made.scales, scales)
        assert made(x.to(dtype)).dtype == dtype
        assert relative_error(made(x.to(dtype)), out) < 0.03
    made.to("meta").to_empty(device="cpu")


@torch.no_grad()
def test_copies_and_pickles() -> None:
    made, x = layer(), tokens(5, 64)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(x), made(x))
        assert other.weight is not made.weight


@torch.no_grad()
def test_mixed_precision_is_heeded() -> None:
    made, x = layer(), tokens(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = made(x)
    assert out.dtype == torch.bfloat16
    codes, scale = naive.quantize_rows(x.bfloat16())
    weight = naive.quantize_rows(made.weight)
    assert torch.equal(out, naive.rows_matmul(codes, scale, *weight, made.bias, torch.bfloat16))


@torch.no_grad()
def test_a_weight_that_changed_is_rounded_again() -> None:
    made, x = layer(), tokens(5, 64)
    memory, before = made.codes.data_ptr(), made(x)
    made.refresh()
    assert torch.equal(made(x), before)
    made.load_state_dict({"weight": made.weight * 2, "bias": made.bias})  # type: ignore[operator]
    made.refresh()
    torch.testing.assert_close(made(x) - made.bias, 2 * (before - made.bias))
    made.weight.data += 1  # like peft, without a change of the tensor's version counter
    made.refresh(merged=("style",))
    assert relative_error(made(x), nn.functional.linear(x, made.weight, made.bias)) < 0.05
    assert made.codes.data_ptr() == memory


def test_gradients() -> None:
    made, x = layer(), tokens(5, 64).requires_grad_()
    made(x).sum().backward()
    weight = naive.weight_of(*naive.quantize_rows(made.weight.detach()), torch.float32)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 64))
    torch.testing.assert_close(made.weight.grad, x.detach().sum(0).expand(32, 64))
    torch.testing.assert_close(made.bias.grad, torch.full((32,), 5.0))


class Counted:
    """Counts the quantisations of calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, real = 0, sharing.quantize_rows

        def quantize_rows(x: Tensor) -> Any:
            self.count += 1
            return real(x)

        monkeypatch.setattr(sharing, "quantize_rows", quantize_rows)
        shared_rows._last.kept = None

    def of(self, *calls: Any) -> int:
        before = self.count
        for call in calls:
            call()
        return self.count - before


@torch.no_grad()
def test_queries_keys_and_values_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, x = Counted(monkeypatch), tokens(5, 64)
    q, k, v = (layer(seed=seed, shared=True) for seed in range(3))
    assert counted.of(lambda: q(x), lambda: k(x), lambda: v(x)) == 1
    expected = layer(seed=1)(x)
    assert torch.equal(k(x), expected)
    # A copy with the same values is quantised again, and so are a tensor after another one and a changed tensor.
    assert counted.of(lambda: q(x.clone()), lambda: k(x)) == 2
    x.mul_(2)
    assert counted.of(lambda: k(x)) == 1
    assert not torch.equal(k(x), expected)
    x[1] = 0
    assert torch.equal(k(x)[1], k.bias)
    assert counted.of(lambda: k(x[:3]), lambda: k(x[:3])) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert counted.of(lambda: q(x), lambda: k(x)) == 1


def test_nothing_is_shared_where_writing_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, made = Counted(monkeypatch), layer(shared=True)
    with torch.inference_mode():
        x = tokens(5, 64)
        first = made(x).clone()
        x.zero_()
        assert not torch.equal(made(x), first)
        assert torch.equal(made(x), made.bias.expand(5, 32))
    assert counted.count == 3
    alone = layer()
    x = tokens(5, 64)
    assert counted.of(lambda: alone(x), lambda: alone(x)) == 2


@torch.no_grad()
def test_the_codes_die_with_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    Counted(monkeypatch)
    made, x = layer(shared=True), tokens(5, 64)
    made(x)
    kept = shared_rows._last.kept
    assert kept is not None
    assert kept.result is not None
    gc.disable()
    try:
        del x
        assert kept.result is None
    finally:
        gc.enable()
    # A new tensor at the same address is quantised again.
    other = tokens(5, 64, seed=2)
    assert torch.equal(made(other), layer()(other))
