"""FP8 attention by cuDNN on a GPU: the checks of the reference, and the checks of every kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.lowp_inputs import KINDS, drawn
from postgen.kernels.attention import naive as exact
from postgen.kernels.attention.backends import CUDNN_FP8, Call
from postgen.kernels.attention.ops import attention, router
from postgen.kernels.attention_fp8 import graphs, naive
from postgen.kernels.attention_fp8.graphs import refusal
from postgen.kernels.attention_fp8.ops import attend, attention_fp8, quantised
from postgen.kernels.attention_fp8.preparation import CANDIDATES, Preparation
from tests.kernels import attention_fp8_cases as cases
from tests.kernels.launches import assert_compiles_whole, assert_records, assert_repeats, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def by_cudnn(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Run cuDNN; skip the test if the machine lacks a requirement, and fail it if cuDNN refuses for another reason."""
    scale = options.pop("scale", query.shape[-1] ** -0.5)
    lengths = options.pop("key_lengths", None)
    reason = router().why_not(CUDNN_FP8, Call(query, key, value, scale, lengths, True))
    if reason is not None:
        (pytest.skip if refusal(query.device, query.shape[-1]) else pytest.fail)(f"cudnn_fp8: {reason}")
    out, lse = attend(query, key, value, scale=scale, key_lengths=lengths, lse=True, **options)
    assert lse is not None
    return out, lse


def by_naive(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return attention_fp8(query, key, value, return_lse=True, simulate=True, **options)


@pytest.fixture(params=[by_naive, by_cudnn], ids=["naive", "cudnn"])
def run(request: pytest.FixtureRequest) -> cases.Run:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [64, 128])
def test_the_error_is_that_of_the_format(run: cases.Run, kind: str, channels: int) -> None:
    cases.error_is_bounded(run, kind, channels, "cuda")


@pytest.mark.parametrize("tokens", cases.SIZES)
@pytest.mark.parametrize("channels", [64, 112, 128])
def test_sizes(run: cases.Run, tokens: int, channels: int) -> None:
    if run is by_cudnn and tokens < CUDNN_FP8.fewest_keys:
        pytest.skip("cudnn_fp8 takes more keys")
    cases.size_is_borne(run, tokens, channels, "cuda")


@pytest.mark.parametrize("name", cases.EXTREMES)
def test_extremes(run: cases.Run, name: str) -> None:
    cases.extreme_is_borne(run, name, "cuda")


def test_parts_of_the_keys(run: cases.Run) -> None:
    cases.halves_make_the_whole(run, "cuda")


def test_lengths(run: cases.Run) -> None:
    cases.lengths_are_kept(run, "cuda")


@pytest.mark.parametrize("preparation", CANDIDATES, ids=str)
def test_is_what_the_reference_says(preparation: Preparation) -> None:
    tensors = drawn("normal", 1024, 2, 128, batch=2, device="cuda")
    out, lse = by_cudnn(*tensors, preparation=preparation)
    rounds = graphs.output_dtype(tensors[0].device) == torch.float8_e4m3fn
    wanted, wanted_lse = naive.attention_fp8(*tensors, preparation=preparation, rounds_output=rounds)
    # cuDNN and the reference round exponentials and outputs at different points, so this bound is not tighter. Both
    # are much closer to each other than to float64.
    assert relative_error(out, wanted) <= 0.045
    assert (lse - wanted_lse).abs().max() < 0.02


@pytest.mark.parametrize("channels", [64, 80, 112, 128])
def test_what_cudnn_is_given(channels: int) -> None:
    query, key, value = drawn("hard", 777, 3, channels, batch=2, device="cuda")
    preparation = Preparation(value_scale=True)
    plan, tensors = quantised(*torch.stack([query, key, value], 2).unbind(2), preparation)
    wanted = naive.changed(query, key, value, naive.planned_for(query, key, value, preparation))
    for mine, exactly, scale in zip(tensors, wanted, plan[4:7], strict=True):
        assert mine.is_contiguous()
        assert scale.shape == ()
        # A number close to the middle between two E4M3 numbers may be rounded up or down.
        assert relative_error(mine.float(), naive.rounded(exactly)) < 0.02
        assert float((mine.float() != naive.rounded(exactly)).float().mean()) < 0.1


@pytest.mark.parametrize("preparation", [Preparation(), Preparation.parsed("plain")], ids=str)
def test_repeats_records_and_compiles(preparation: Preparation) -> None:
    tensors = drawn("normal", 2048, 8, 128, device="cuda")
    by_cudnn(*tensors)
    assert_repeats(lambda: attention_fp8(*tensors, preparation=preparation))
    assert_records(lambda: attention_fp8(*tensors, preparation=preparation))
    assert_compiles_whole(lambda *x: attention_fp8(*x, preparation=preparation, return_lse=True), *tensors)


def test_a_shape_that_a_graph_meets_first_is_exact() -> None:
    by_cudnn(*drawn("normal", 512, 2, 128, device="cuda"))
    tensors = drawn("normal", 515, 2, 128, device="cuda")
    attention(*tensors)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = attention_fp8(*tensors)
    graph.replay()
    torch.cuda.synchronize()
    expected, _ = exact.attention(*(x.double() for x in tensors))
    assert relative_error(out, expected) <= 4e-3
    assert relative_error(attention_fp8(*tensors), expected) > 0.02


def test_a_stream_of_its_own() -> None:
    tensors = drawn("normal", 4096, 8, 128, device="cuda")
    by_cudnn(*tensors)
    expected = attention_fp8(*tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = attention_fp8(*tensors)
    stream.synchronize()
    assert torch.equal(found, expected)


def test_another_device_may_be_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors = drawn("normal", 1024, 4, 128, device="cuda:1")
    by_cudnn(*tensors)
    with torch.cuda.device(0):
        out = attention_fp8(*tensors)
    assert out.device == torch.device("cuda:1")
    expected, _ = exact.attention(*(x.double() for x in tensors))
    assert relative_error(out, expected) <= 0.07


def test_more_than_170000_tokens() -> None:
    query, key, value = drawn("normal", 176_000, 1, 128, device="cuda")
    out, _ = by_cudnn(query, key, value)
    rows = torch.arange(0, 176_000, 4000, device="cuda")
    expected, _ = exact.attention(query[:, rows].double(), key.double(), value.double())
    assert out.isfinite().all()
    assert relative_error(out[:, rows], expected) <= 0.065


def test_more_numbers_than_32_bits_count() -> None:
    # With two samples of Wan 14B at 720p the views span 2 x 75600 x 3 x 5120 = 2.3e9 numbers.
    query, key, value = torch.randn(2, 75600, 3, 40, 128, dtype=torch.bfloat16, device="cuda").unbind(2)
    by_cudnn(query[:, :512], key[:, :512], value[:, :512])
    out = attention_fp8(query, key, value)
    last = (x[1:, :, -1:] for x in (query[:, -64:], key, value))
    expected, _ = exact.attention(*(x.double() for x in last))
    assert relative_error(out[1:, -64:, -1:], expected) <= 0.065
