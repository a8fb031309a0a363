"""Layers with trained scales: values, gradients, and the packed weight that training leaves; the decay of a branch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.quant import quantize_tensor
from postgen.quant.branch_decay import decay_, periods, ranks
from postgen.quant.formats import format_of
from postgen.quant.linear import QLinear
from postgen.quant.rotation import rotated
from postgen.quant.spec import LayerSpec
from postgen.quant.trained_scales import SCALE, ScaleLinear, train_scales_, trained_weight

WEIGHTS = ("int4:g16", "int2:g16:asym", "int3", "fp8", "fp8:tensor", "nvfp4", "bp2:g32")


def layer_of(
    weight: str | None = "int4:g16", act: str | None = None, *, rotate: int = 0, bias: bool = True
) -> QLinear:
    """Return a quantised layer with 32 input and 24 output channels."""
    torch.manual_seed(0)
    linear = nn.Linear(32, 24)
    spec = LayerSpec(
        weight=None if weight is None else format_of(weight),
        act=None if act is None else format_of(act),
        rotate=rotate,
    )
    turned = rotated(linear.weight.detach(), rotate) if rotate else linear.weight.detach()
    return QLinear.of(linear, None if spec.weight is None else quantize_tensor(turned, spec.weight), spec)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("act", [None, "int8:token"])
def test_the_same_output_as_the_quantised_layer(weight: str, act: str | None) -> None:
    """Also after training: the packed weight with the trained scales gives the trained layer's output, bitwise."""
    layer = layer_of(weight, act, rotate=16)
    trained, x = ScaleLinear(layer), torch.randn(5, 32)
    assert torch.equal(trained(x), layer(x))
    with torch.no_grad():
        trained.trained_scale.mul_(1 + 0.1 * torch.rand_like(trained.trained_scale))  # type: ignore[union-attr]
    assert not torch.equal(trained(x), layer(x))
    state = trained_weight(trained, trained.state_dict())
    layer.load_state_dict({**layer.state_dict(), **state})
    assert torch.equal(trained(x), layer(x))
    assert torch.equal(trained.quantized().numbers(), layer.quantized().numbers())


@pytest.mark.parametrize("weight", WEIGHTS)
def test_gradients(weight: str) -> None:
    """Gradients of scales and input are those of a plain product with the expanded weight."""
    trained, x = ScaleLinear(layer_of(weight)), torch.randn(5, 32, requires_grad=True)
    scale = trained.trained_scale
    assert scale is not None
    toward = torch.randn(5, 24)
    found = torch.autograd.grad((trained(x) * toward).sum(), (x, scale))
    plain = x @ trained.weight_with(scale).T + trained.bias
    wanted = torch.autograd.grad((plain * toward).sum(), (x, scale))
    torch.testing.assert_close(found, wanted)
    assert float(found[1].abs().max()) > 0


def test_only_scales_are_trained_and_nothing_is_copied() -> None:
    layer = layer_of("int2:g16:asym")
    trained = ScaleLinear(layer)
    assert [name for name, each in trained.named_parameters() if each.requires_grad] == [SCALE]
    assert trained.weight is layer.weight
    assert trained.weight_zero is layer.weight_zero


def test_one_scale_by_hand() -> None:
    """With one group, dL/ds is the sum of dL/dW times the codes."""
    linear = nn.Linear(4, 1, bias=False)
    linear.weight.data = torch.tensor([[0.7, -0.3, 0.1, 0.2]])
    spec = LayerSpec(weight=format_of("int4"))
    trained = ScaleLinear(QLinear.of(linear, quantize_tensor(linear.weight.detach(), spec.weight), spec))  # type: ignore[arg-type]
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    trained(x).sum().backward()
    assert trained.trained_scale is not None
    torch.testing.assert_close(trained.trained_scale.grad, torch.full((1, 1, 1), 7.0 - 3 * 2 + 1 * 3 + 2 * 4))


def test_powers_of_two_are_refused() -> None:
    model = nn.Sequential(layer_of("mxint8"))
    with pytest.raises(UserError, match=r"0 has a weight in mxint8, whose scales are powers of two"):
        train_scales_(model)
    with pytest.raises(UserError, match="no layer has a quantised weight"):
        train_scales_(nn.Sequential(layer_of(None, "int8:token")))
    model = nn.Sequential(layer_of("int4:g16"), layer_of(None, "int8:token"))
    assert [*train_scales_(model)] == ["0", "1"]
    assert [name for name, each in model.named_parameters() if each.requires_grad] == ["0.trained_scale"]


def test_autocast() -> None:
    trained, x = ScaleLinear(layer_of("int4:g16", "fp8:token")), torch.randn(5, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = trained(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert trained.trained_scale is not None
    assert trained.trained_scale.grad is not None
    assert trained.trained_scale.grad.dtype == torch.float32


def test_a_branch_adds_what_rounding_lost() -> None:
    layer = layer_of("int2:g16", rotate=16)
    exact = layer_of("int8", rotate=16)
    trained, x = ScaleLinear(layer), torch.randn(64, 32)
    lost = exact.effective_weight() - layer.effective_weight()
    u, s, v = torch.linalg.svd(lost, full_matrices=False)
    trained.add_branch_(u * s, v)
    torch.testing.assert_close(trained(x), exact(x), rtol=1e-4, atol=1e-4)
    assert trained.aux_gain is not None
    trained.aux_gain.zero_()
    assert torch.equal(trained(x), layer(x))


def test_ranks_fall_to_0() -> None:
    assert ranks(32) == [32, 16, 8, 4, 2, 1, 0]
    assert [periods(rank) for rank in (1, 3, 32)] == [1, 2, 6]
    torch.manual_seed(0)
    up, down, gain = torch.randn(6, 4), torch.randn(4, 8), torch.ones(4)
    strength = up.norm(dim=0) * down.norm(dim=1)
    order = strength.argsort(descending=True).tolist()
    found: list[Tensor] = []
    for step in range(1, 31):
        decay_(gain, up, down, step, 30)
        found.append(gain.clone())
    gains = torch.stack(found)[:, order]
    assert bool((gains[1:] <= gains[:-1]).all())
    assert [int((row == 1).sum()) for row in gains[[4, 14, 24]]] == [2, 1, 0]
    assert [int((row > 0).sum()) for row in gains[[4, 14, 24, 28, 29]]] == [4, 2, 1, 1, 0]
    torch.testing.assert_close(gains[4], torch.tensor([1, 1, 0.5, 0.5]))
    torch.testing.assert_close(gains[24], torch.tensor([0.5, 0, 0, 0]))


def test_the_choice_of_a_period_stays() -> None:
    """Components that begin to fall go on falling, even if they have become the strongest."""
    up, down, gain = torch.eye(2, 2), torch.diag(torch.tensor([2.0, 1.0])), torch.ones(2)
    decay_(gain, up, down, 1, 20)
    first = gain.clone()
    assert first[0] == 1
    assert 0 < first[1] < 1
    decay_(gain, up, down.flip(0).flip(1) * 5, 2, 20)
    assert gain[0] == 1
    assert 0 < gain[1] < first[1]
