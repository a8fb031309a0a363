"""FP8 attention on a CPU: the exact preparations, the reference for cuDNN, and the fallback to exact attention."""

from __future__ import annotations

import warnings
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.lowp_inputs import KINDS, drawn
from postgen.kernels.attention import naive as exact
from postgen.kernels.attention.backends import ASKED_FOR, CUDNN_FP8, TIMED, Call
from postgen.kernels.attention.ops import attention, backend_names
from postgen.kernels.attention.router import Router
from postgen.kernels.attention_fp8 import graphs, naive
from postgen.kernels.attention_fp8.ops import attention_fp8, not_finite, quantised
from postgen.kernels.attention_fp8.preparation import CANDIDATES, Preparation, rotation, signs
from postgen.kernels.dispatch import TOLD
from postgen.kernels.fp8 import E4M3
from tests.kernels import attention_fp8_cases as cases
from tests.kernels.launches import relative_error

EVERY = [Preparation(**dict(zip(Preparation.__slots__, each, strict=True))) for each in product([0, 1], repeat=5)]


def run(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return attention_fp8(query, key, value, return_lse=True, simulate=True, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [64, 128])
def test_the_error_is_that_of_the_format(kind: str, channels: int) -> None:
    cases.error_is_bounded(run, kind, channels)


@pytest.mark.parametrize("tokens", cases.SIZES)
@pytest.mark.parametrize("channels", [64, 112, 128])
def test_sizes(tokens: int, channels: int) -> None:
    cases.size_is_borne(run, tokens, channels)


@pytest.mark.parametrize("name", cases.EXTREMES)
def test_extremes(name: str) -> None:
    cases.extreme_is_borne(run, name)


def test_parts_and_lengths() -> None:
    cases.halves_make_the_whole(run)
    cases.lengths_are_kept(run)


@pytest.mark.parametrize("channels", [64, 96, 128])
def test_every_preparation_is_exact(channels: int) -> None:
    query, key, value = drawn("hard", 65, 2, channels, batch=2, dtype=torch.float64)
    key[:, :, 1, 3] = 0  # channels and heads of zeros
    value[:, :, 0, 5] = 0
    query[0, :, 1] = 0
    expected, divisor = exact.attention(query, key, value, scale=0.07)
    for preparation in EVERY:
        plan = naive.planned_for(query, key, value, preparation)
        changed = naive.changed(query, key, value, plan)
        assert max(float(x.abs().max()) for x in changed) <= 448 * (1 + 1e-6)
        q, k, v = (x * scale for x, scale in zip(changed, plan[4:7], strict=True))
        out, lse = exact.attention(q, k, v, scale=0.07)
        assert relative_error(plan.undo.output(out), expected) < 1e-12, str(preparation)
        assert (plan.undo.lse(lse, query, 0.07) - divisor).abs().max() < 1e-12


def test_what_each_preparation_is_for() -> None:
    def error(kind: str, text: str) -> float:
        rows = torch.arange(0, 2048, 32)
        query, key, value = drawn(kind, 2048, 2, 128)
        out, _ = naive.attention_fp8(query, key, value, preparation=Preparation.parsed(text), rows=rows)
        expected, _ = exact.attention(query[:, rows].double(), key.double(), value.double())
        return relative_error(out, expected)

    assert error("hard", "key_mean+rotation") < 0.75 * error("hard", "key_mean")
    assert error("hard", "key_mean+balance+rotation") < 0.85 * error("hard", "key_mean+rotation")
    assert error("clustered", "key_mean+value_mean") < 0.95 * error("clustered", "key_mean")


@pytest.mark.parametrize("channels", [64, 80, 96, 112, 128, 12])
def test_the_rotation_is_one(channels: int) -> None:
    matrix = rotation(channels, torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(channels, dtype=torch.float64))
    # The rotation must not concentrate a vector of equal channels in one channel.
    assert (torch.ones(channels, dtype=torch.float64) @ matrix).abs().max() < channels**0.5 * 0.9
    assert signs(channels).abs().sum(0).unique().tolist() == [channels & -channels]


def test_the_output_scale_costs_little_and_never_overflows() -> None:
    # The output, a mean of many values, is far smaller than the largest value.
    query, key, value = drawn("normal", 4096, 1, 64, dtype=torch.float32)
    value[0, 0] = 100.0
    rows = torch.arange(0, 4096, 64)
    plain = Preparation.parsed("plain")
    safe, _ = naive.attention_fp8(query, key, value, preparation=plain, rows=rows)
    free, _ = naive.attention_fp8(query, key, value, preparation=plain, rows=rows, rounds_output=False)
    assert relative_error(safe, free) < 0.03
    # Each query attends to one key, so the output contains the largest value.
    rows = torch.eye(64).view(1, 64, 1, 64) * 100
    out, _ = naive.attention_fp8(rows, rows, rows, preparation=plain)
    assert relative_error(out, rows) < 0.05


@pytest.mark.parametrize("lse", [False, True])
def test_a_chunk_is_a_part(lse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = drawn("normal", 129, 2, 64, dtype=torch.float32)
    whole = naive.attention_fp8(*tensors)[lse]
    monkeypatch.setattr(naive, "_BUDGET", 129 * 2 * 10)
    torch.testing.assert_close(naive.attention_fp8(*tensors)[lse], whole, rtol=1e-4, atol=1e-4)
    rows = torch.tensor([3, 77])
    some = naive.attention_fp8(*tensors, rows=rows)[lse]
    torch.testing.assert_close(some, whole[:, :, rows] if lse else whole[:, rows], rtol=1e-4, atol=1e-4)


def test_what_cudnn_would_be_given() -> None:
    query, key, value = drawn("normal", 65, 2, 64, batch=2)
    plan, tensors = quantised(*torch.stack([query, key, value], 2).unbind(2), Preparation())
    changed = naive.changed(query, key, value, plan)
    for found, wanted in zip(tensors, changed, strict=True):
        assert found.dtype == E4M3
        assert found.is_contiguous()
        assert torch.equal(found.float(), naive.rounded(wanted))


def test_texts_of_preparations() -> None:
    assert len({str(each) for each in EVERY}) == 32
    assert all(Preparation.parsed(str(each)) == each for each in (*EVERY, *CANDIDATES))
    with pytest.raises(ValueError, match="unknown preparation 'turn'"):
        Preparation.parsed("key_mean+turn")


def test_it_is_exact_where_cudnn_is_not() -> None:
    query, key, value = drawn("normal", 65, 2, 64)
    TOLD.clear()
    with pytest.warns(UserWarning, match="attention runs on sdpa, not on cudnn_fp8: needs a CUDA GPU"):
        found = attention_fp8(query, key, value)
    assert torch.equal(found, attention(query, key, value))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert torch.equal(attention(query, key, value, backend="cudnn_fp8"), found)


def test_the_router_never_takes_it_itself() -> None:
    call = Call(*drawn("normal", 65, 2, 64), 0.1, None, False)
    assert "cudnn_fp8" in backend_names()
    assert CUDNN_FP8 in ASKED_FOR
    assert CUDNN_FP8 not in TIMED
    assert Router().choose(call) not in ASKED_FOR
    assert CUDNN_FP8.refusal(call._replace(key_lengths=torch.tensor([65]))) == "needs a CUDA GPU"


def test_why_there_is_none() -> None:
    assert graphs.refusal(torch.device("cpu"), 64) == "needs an NVIDIA GPU"
    reason = graphs.missing()
    assert reason is None or "pip install 'postgen[fp8]'" in reason


def test_gradients_are_those_of_exact_attention() -> None:
    tensors = [x.requires_grad_() for x in drawn("normal", 9, 2, 16, dtype=torch.float32)]
    for computes in (attention_fp8, lambda *x: attention(*x, backend="cudnn_fp8")):
        TOLD.clear()
        with pytest.warns(UserWarning, match="exact"):
            out = computes(*tensors)
        found = torch.autograd.grad(out.square().sum(), tensors)
        wanted = torch.autograd.grad(attention(*tensors).square().sum(), tensors)
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_a_guarded_call_is_computed_again() -> None:
    query, key, value = drawn("normal", 65, 2, 64)
    assert attention_fp8(query, key, value, simulate=True, guard=True).isfinite().all()
    before = not_finite()
    # The mean of these keys overflows, but their softmax is finite.
    query, key = torch.zeros_like(query), torch.full_like(key, 3e38)
    assert not attention_fp8(query, key, value, simulate=True).isfinite().all()
    TOLD.clear()
    with pytest.warns(UserWarning, match="returned NaN or infinity: exact attention computes"):
        found = attention_fp8(query, key, value, simulate=True, guard=True)
    assert torch.equal(found, attention(query, key, value))
    assert not_finite() == before + 1


def test_compiled_whole() -> None:
    tensors = drawn("normal", 65, 2, 64)

    def both(*x: Tensor) -> tuple[Tensor, Tensor]:
        return attention_fp8(*x, simulate=True, return_lse=True)

    found = torch.compile(both, fullgraph=True, backend="aot_eager")(*tensors)
    assert all(torch.equal(x, y) for x, y in zip(found, both(*tensors), strict=True))
    torch.library.opcheck(torch.ops.postgen.attention_fp8.default, (*tensors, 0.1, None, "plain", True, True, False))


@pytest.mark.parametrize("simulate", [False, True])
def test_mixed_precision_is_heeded_as_by_attention(simulate: bool) -> None:
    """Autocast rounds the inputs, also queries and keys that a norm returned in float32, but it rounds no sum."""
    query, key, value = (x.float() for x in drawn("normal", 96, 2, 64))
    half = [x.bfloat16() for x in (query, key, value)]
    TOLD.add("attention runs on sdpa, not on cudnn_fp8: needs a CUDA GPU")
    expected = attention_fp8(*half, simulate=simulate)
    for given in ((query, key, value), (query, key, half[2])):
        with torch.autocast("cpu", torch.bfloat16):
            found, like = attention_fp8(*given, simulate=simulate), attention(*given)
        assert found.dtype == like.dtype == torch.bfloat16
        assert torch.equal(found, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_fp8(*(x.double() for x in half), simulate=simulate).dtype == torch.float64


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([0], "from 1 to 20, the number of keys"),
        ([21], "from 1 to 20, the number of keys"),
        ([3, 4], r"\(1,\) int32 or int64"),
        ([3.0], r"\(1,\) int32 or int64"),
    ],
)
def test_wrong_lengths_are_refused_as_by_attention(lengths: list[float], message: str) -> None:
    tensors, given = drawn("normal", 20, 2, 16), torch.tensor(lengths)
    with pytest.raises(ValueError, match=f"key_lengths must be {message}"):
        attention(*tensors, key_lengths=given)
    for simulate in (False, True):
        with pytest.raises(ValueError, match=f"key_lengths must be {message}"):
            attention_fp8(*tensors, key_lengths=given, simulate=simulate)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "query must be"),
        (lambda q, k, v: (q, k, v[:, 1:]), "query must be"),
        (lambda q, k, v: (q, k[:, :, 1:], v[:, :, 1:]), "the same batch, heads and channels"),
        (lambda q, k, v: (q[:, :0], k, v), "at least one token"),
        (lambda q, k, v: (q.float(), k, v), "the same dtype"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "got torch.int32"),
    ],
)
def test_what_nobody_can_compute(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_fp8(*change(*drawn("normal", 5, 2, 16)))


@pytest.mark.parametrize("simulate", [False, True])
def test_a_text_is_no_preparation(simulate: bool) -> None:
    with pytest.raises(ValueError, match=r"preparation must be a Preparation, such as .*, got 'plain'"):
        attention_fp8(*drawn("normal", 5, 2, 16), preparation="plain", simulate=simulate)  # type: ignore[call-overload]
