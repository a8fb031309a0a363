"""Each trainer of a process has its own precision, and bfloat16 is bitwise that of accelerate."""

import copy
import functools

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from postgen.errors import UserError
from postgen.training.launch import make_accelerator
from postgen.training.precision import OwnPrecision, fast_matmul
from tests.training.tiny import TinyConfig, TinyTrainer


@pytest.fixture(autouse=True)
def fresh():
    """Reset accelerate before and after a test, because it keeps the settings of the first accelerator."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Two(nn.Module):
    """A network with outputs in a dictionary and a tuple, which records the dtypes of its computation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.types = []

    def forward(self, x, *, scale=1.0):
        first = self.one(x)
        second = self.other(first.tanh() * scale)
        self.types.append(second.dtype)
        return {"first": first, "rest": (second, None)}


def passed(net):
    """Return the outputs and gradients of a forward and backward pass."""
    torch.manual_seed(1)
    found = net(torch.randn(4, 8), scale=2.0)
    outputs = [found["first"], found["rest"][0]]
    sum(out.square().sum() for out in outputs).backward()
    gradients = [parameter.grad for parameter in net.parameters()]
    net.zero_grad()
    return [out.detach() for out in outputs], gradients


def equal(left, right):
    return all(a.dtype == b.dtype and torch.equal(a, b) for one, two in zip(left, right, strict=True)
               for a, b in zip(one, two, strict=True))  # fmt: skip


def trainer(folder, **settings):
    values = {"output_dir": str(folder), "device": "cpu", "report_to": [], "disable_tqdm": True, "max_steps": 2}
    return TinyTrainer(TinyConfig(**values, **settings))


def weights(trained):
    return {name: value.detach().clone() for name, value in trained.trained().items()}


def test_bfloat16_is_accelerates():
    expected = passed(Accelerator(mixed_precision="bf16", cpu=True).prepare_model(Two()))
    AcceleratorState._reset_state(reset_partial_state=True)
    ours = OwnPrecision(bf16=True, cpu=True)
    net = ours.prepare_model(Two())
    assert equal(passed(net), expected)
    assert net.types == [torch.bfloat16]
    assert {out.dtype for out in expected[0]} == {torch.float32}
    plain = passed(OwnPrecision(bf16=False, cpu=True).prepare_model(Two()))
    assert equal(plain, passed(Two()))
    assert not equal(plain, expected)


def test_two_precisions_in_one_process_learn_what_each_does_alone(tmp_path):
    alone = {}
    for bf16 in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        one = trainer(tmp_path / f"alone-{bf16}", bf16=bf16)
        one.train()
        alone[bf16] = weights(one)
    AcceleratorState._reset_state(reset_partial_state=True)
    # Both trainers exist before either trains, and the older one trains after the newer one.
    older, newer = (trainer(tmp_path / str(bf16), bf16=bf16) for bf16 in (True, False))
    newer.train()
    older.train()
    for each, bf16 in ((older, True), (newer, False)):
        assert all(torch.equal(value, alone[bf16][name]) for name, value in weights(each).items()), bf16
    assert any(not torch.equal(value, alone[False][name]) for name, value in alone[True].items())
    x = torch.randn(3, 4)
    for each, dtype in ((newer, torch.float32), (older, torch.bfloat16), (newer, torch.float32)):
        with each.accelerator.autocast():
            assert nn.functional.linear(x, torch.ones(2, 4)).dtype is dtype
        seen = []
        each.models["net"][3].register_forward_hook(lambda *call, seen=seen: seen.append(call[2].dtype))
        assert each.models["net"](x).dtype is torch.float32
        assert seen[-1] is dtype


def test_a_module_computes_as_its_last_trainer_says():
    half, whole = (OwnPrecision(bf16=bf16, cpu=True) for bf16 in (True, False))
    net, expected = Two(), passed(Two())
    for _ in range(2):
        rounded = passed(half.prepare_model(net))
        assert not equal(rounded, expected)
        copied = copy.deepcopy(net)
        with torch.no_grad():
            copied.one.weight.zero_()
        assert equal(passed(net), rounded)
        assert not equal(passed(copied), rounded)
        assert net.types[-1] is torch.bfloat16
        assert copied.types[-1] is torch.bfloat16
        assert equal(passed(whole.prepare_model(net)), expected)
        assert "forward" not in vars(net)


def test_what_others_have_put_around_a_forward_stays():
    net = OwnPrecision(bf16=True, cpu=True).prepare_model(Two())
    inner, calls = net.forward, []

    @functools.wraps(inner)
    def counted(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    net.forward = counted
    passed(OwnPrecision(bf16=False, cpu=True).prepare_model(net))
    assert calls == [1]


def test_beside_an_accelerator_of_ones_own():
    theirs = Accelerator(mixed_precision="bf16", cpu=True)
    ours = OwnPrecision(bf16=False, cpu=True)
    assert equal(passed(ours.prepare_model(Two())), passed(Two()))
    assert equal(passed(OwnPrecision(bf16=True, cpu=True).prepare_model(Two())), passed(theirs.prepare_model(Two())))


@pytest.mark.parametrize(
    ("before", "now"),
    [({"mixed_precision": "fp16"}, {}), ({"mixed_precision": "fp16"}, {"bf16": True}), ({}, {"device": "cpu"})],
)
def test_what_accelerate_keeps_for_a_whole_process_is_refused(tmp_path, monkeypatch, before, now):
    if now.get("device"):
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    Accelerator(**before)
    with pytest.raises(UserError, match="another device, fp16 or fp8, and accelerate uses the same") as caught:
        make_accelerator(TinyConfig(output_dir=str(tmp_path), report_to=[], **now))
    assert "\n" not in str(caught.value)


def test_fast_products_end_with_the_training():
    """The setting belongs to the process: models that run afterwards compute as before, also after an error."""
    before, seen = torch.get_float32_matmul_precision(), []

    def train(device):
        with fast_matmul(torch.device(device)):
            seen.append(torch.get_float32_matmul_precision())
            raise KeyError(device)

    for device in ("cpu", "cuda"):
        with pytest.raises(KeyError):
            train(device)
        assert torch.get_float32_matmul_precision() == before
    assert seen == [before, "high"]
