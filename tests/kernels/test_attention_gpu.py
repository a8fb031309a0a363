"""Attention on a GPU: every backend that runs there, and the router with the shapes of real models."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.kernels.attention import naive
from postgen.kernels.attention import ops as attention_ops
from postgen.kernels.attention.backends import (
    CUDNN,
    FLASH,
    FLASH_4,
    FLEX,
    LAST_RESORTS,
    MATH,
    TIMED,
    Backend,
    Call,
    last_backend,
)
from postgen.kernels.attention.ops import attention
from postgen.kernels.attention.router import Problem, Router
from postgen.kernels.attention.store import Store
from tests.kernels.launches import assert_compiles_whole, assert_records, assert_repeats, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

BACKENDS = list(dict.fromkeys((*TIMED, *LAST_RESORTS)))
WAN_480P = (1, 32760, 12, 128)


@pytest.fixture(scope="module", autouse=True)
def mine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """Replace the router of `attention` by one with its own file."""
    file = tmp_path_factory.mktemp("cache") / "attention.json"
    kept = attention_ops.router
    made = Router(store=Store(file))
    attention_ops.router = lambda: made  # type: ignore[assignment]
    yield made
    attention_ops.router = kept


def drawn(
    tokens: int, keys: int, *, heads: int = 4, key_heads: int = 4, channels: int = 128, dtype: Any = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = (tokens, heads), (keys, key_heads), (keys, key_heads)
    query, key, value = (torch.randn(2, *size, channels, device="cuda").to(dtype) for size in sizes)
    return query, key, value


def run(mine: Router, backend: Backend, call: Call) -> tuple[Tensor, Tensor | None]:
    """Run a backend; skip the test if the backend refuses the call beforehand, but let errors of the run fail it."""
    if backend is FLEX:
        torch.compiler.reset()  # flex attention compiles for at most eight kinds of inputs
    reason = mine.why_not(backend, call)
    if reason is not None:
        pytest.skip(f"{backend.name}: {reason}")
    return backend.run(call)


# Not all combinations are tested, because some backends compile for many seconds for each of them.
@pytest.mark.parametrize(
    ("channels", "lengths", "lse"),
    [
        (64, None, False),
        (80, None, True),
        (96, None, False),
        (112, None, True),
        (128, None, False),
        (128, None, True),
        (64, [1500, 77], True),
        (128, [1500, 77], False),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_equals_float64(mine: Router, backend: Backend, channels: int, lengths: list[int] | None, lse: bool) -> None:
    query, key, value = drawn(1031, 1500, channels=channels)
    given = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device="cuda")
    out, found = run(mine, backend, Call(query, key, value, channels**-0.5, given, lse))
    exact = (x.double() for x in (query, key, value))
    expected, divisor = naive.attention(*exact, key_lengths=given)
    assert relative_error(out, expected) <= 4e-3
    if lengths is None:
        # The mean of the values is half of the output and easy to compute, so the rest is checked separately.
        mean = value.double().mean(dim=1, keepdim=True)
        assert relative_error(out.double() - mean, expected - mean) <= 6e-3
    if lse:
        assert found is not None
        assert found.shape == divisor.shape
        assert float((found.double() - divisor).abs().max()) < 2e-3


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (63, 64), (65, 1), (129, 127), (4992, 4992)])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_odd_sizes_and_grouped_heads(mine: Router, backend: Backend, tokens: int, keys: int, key_heads: int) -> None:
    query, key, value = drawn(tokens, keys, key_heads=key_heads)
    out, _ = run(mine, backend, Call(query, key, value, 0.1, None, False))
    expected, _ = naive.attention(query.double(), key.double(), value.double(), scale=0.1)
    assert relative_error(out, expected) <= 4e-3


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_views_of_a_fused_projection(mine: Router, backend: Backend) -> None:
    query, key, value = torch.randn(2, 777, 3, 4, 128, dtype=torch.bfloat16, device="cuda").unbind(2)
    out, _ = run(mine, backend, Call(query, key, value, 0.1, None, False))
    expected, _ = naive.attention(query.double(), key.double(), value.double(), scale=0.1)
    assert relative_error(out, expected) <= 4e-3


@pytest.mark.parametrize("backend", [FLASH_4, CUDNN, FLASH], ids=lambda backend: backend.name)
def test_the_output_needs_no_copy(mine: Router, backend: Backend) -> None:
    assert run(mine, backend, Call(*drawn(1024, 1024), 0.1, None, False))[0].is_contiguous()


@pytest.mark.parametrize("backend", [each for each in BACKENDS if each is not MATH], ids=lambda backend: backend.name)
def test_more_numbers_than_32_bits_count(mine: Router, backend: Backend) -> None:
    # With two samples of Wan 14B at 720p the views span 2 x 75600 x 3 x 5120 = 2.3e9 numbers.
    query, key, value = torch.randn(2, 75600, 3, 40, 128, dtype=torch.bfloat16, device="cuda").unbind(2)
    out, _ = run(mine, backend, Call(query, key, value, 128**-0.5, None, False))
    last = (x[1:, :, -2:] for x in (query[:, -64:], key, value))
    expected, _ = naive.attention(*(x.double() for x in last))
    assert relative_error(out[1:, -64:, -2:], expected) <= 4e-3


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("lengths", [[2000, 2000], [1, 1999], [1337, 64]])
def test_key_lengths(where: str, lengths: list[int]) -> None:
    query, key, value = drawn(2000, 2000, heads=24, key_heads=24)
    given = torch.tensor(lengths, device=where)
    out, lse = attention(query, key, value, key_lengths=given, return_lse=True)
    exact = (x.double() for x in (query, key, value))
    expected, divisor = naive.attention(*exact, key_lengths=given)
    assert relative_error(out, expected) <= 4e-3
    assert float((lse.double() - divisor).abs().max()) < 2e-3


@pytest.mark.parametrize("lengths", [[2000, 2000], [1, 1999], [1337, 64]])
def test_large_calls_read_their_lengths(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample is cut to its keys, so also kernels without key lengths run; named kernels get the lengths."""
    monkeypatch.setattr(attention_ops, "WORTH_READING", 0)
    query, key, value = drawn(2000, 2000, heads=24, key_heads=24)
    given = torch.tensor(lengths, device="cuda")
    expected, _ = naive.attention(query.double(), key.double(), value.double(), key_lengths=given)
    for backend in (None, "cudnn", "flash"):
        out = attention(query, key, value, key_lengths=given, backend=backend)
        assert relative_error(out, expected) <= 4e-3
        assert backend in (None, last_backend())
    with pytest.raises(ValueError, match="key_lengths must be from 1 to 2000"):
        attention(query, key, value, key_lengths=given + 2000)


def test_two_halves_of_the_keys_make_the_whole() -> None:
    query, key, value = drawn(4000, 4000, heads=24, key_heads=24)
    parts = [
        attention(query, k, v, return_lse=True) for k, v in zip(key.split(1777, 1), value.split(1777, 1), strict=True)
    ]
    out, _ = naive.merge([(out.float(), lse) for out, lse in parts])
    expected, _ = naive.attention(query.double(), key.double(), value.double())
    assert relative_error(out, expected) <= 4e-3


def test_the_router_takes_the_fastest_at_the_shape_of_a_model(mine: Router) -> None:
    query, key, value = torch.randn(3, *WAN_480P, device="cuda").bfloat16().unbind(0)
    out = attention(query, key, value)
    call = Call(query, key, value, 128**-0.5, None, False)
    chosen, times = mine.choose(call), mine.times[Problem.of(call)]
    assert times[chosen.name] == min(times.values())
    assert {"cudnn", "flash"} & times.keys()
    print({name: round(each, 2) for name, each in times.items()})
    expected, _ = naive.attention(query[:, :64].double(), key.double(), value.double())
    assert relative_error(out[:, :64], expected) <= 4e-3
    # Another process reads the choice from the file.
    assert mine._store is not None
    other = Router(store=Store(mine._store.path))
    assert other.choose(call).name == chosen.name
    assert not other.times


def test_small_calls_are_not_timed(mine: Router) -> None:
    timed = dict(mine.times)
    attention(*drawn(300, 300))
    assert mine.times == timed


def test_records_repeats_and_compiles() -> None:
    tensors = drawn(2048, 2048, heads=24, key_heads=24)
    lengths = torch.tensor([2048, 900], device="cuda")
    assert_repeats(lambda: attention(*tensors))
    for options in ({}, {"key_lengths": lengths, "return_lse": True}):
        attention(*tensors, **options)
        assert_records(lambda options=options: attention(*tensors, **options))
        assert_compiles_whole(lambda *x, options=options: attention(*x, **options), *tensors)


@pytest.mark.parametrize("worth", [0, 1e12])
def test_a_graph_reads_key_lengths_at_every_replay(worth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_ops, "WORTH_READING", worth)
    query, key, value = drawn(2048, 2048, heads=24, key_heads=24)
    lengths = torch.tensor([2048, 900], device="cuda")
    attention(query, key, value, key_lengths=lengths)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = attention(query, key, value, key_lengths=lengths)
    lengths.copy_(torch.tensor([5, 1999]))
    graph.replay()
    expected, _ = naive.attention(query.double(), key.double(), value.double(), key_lengths=lengths)
    assert relative_error(out, expected) <= 4e-3


def test_what_a_graph_meets_first_runs_untimed(tmp_path: Path) -> None:
    fresh = Router(store=Store(tmp_path / "attention.json"))
    call = Call(*drawn(3000, 3000), 0.1, None, False)
    LAST_RESORTS[0].run(call)  # this call loads the kernel
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out, _ = fresh.run(call)
    graph.replay()
    torch.cuda.synchronize()
    assert not fresh.times
    assert not (tmp_path / "attention.json").exists()
    assert relative_error(out, MATH.run(call)[0]) <= 4e-3
    fresh.choose(call)
    assert fresh.times


@pytest.mark.parametrize("lengths", [False, True])
def test_gradients_flow(lengths: bool) -> None:
    tensors = [x.requires_grad_() for x in drawn(500, 500)]
    given = torch.tensor([500, 123], device="cuda") if lengths else None
    out = attention(*tensors, key_lengths=given)
    found = torch.autograd.grad(out.float().square().sum(), tensors)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    wanted = torch.autograd.grad(naive.attention(*exact, key_lengths=given)[0].square().sum(), exact)
    for mine, theirs in zip(found, wanted, strict=True):
        assert relative_error(mine, theirs) < 2e-2


def test_a_backend_that_does_not_load_gives_way(mine: Router) -> None:
    tensors = drawn(1000, 1000)
    call = Call(*tensors, 128**-0.5, None, False)
    if mine.why_not(next(each for each in TIMED if each.name == "xformers"), call) is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = attention(*tensors, backend="xformers")
    else:
        with pytest.warns(UserWarning, match="not on xformers: "):
            out = attention(*tensors, backend="xformers")
    assert relative_error(out, MATH.run(call)[0]) <= 4e-3


def test_another_device_may_be_the_current_one(mine: Router) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors = [x.to("cuda:1") for x in drawn(4096, 4096, heads=24, key_heads=24)]
    with torch.cuda.device(0):
        out = attention(*tensors)
    assert out.device == torch.device("cuda:1")
    expected, _ = naive.attention(*(x.double() for x in tensors))
    assert relative_error(out, expected) <= 4e-3


def test_a_stream_of_its_own() -> None:
    tensors = drawn(4096, 4096, heads=24, key_heads=24)
    expected = attention(*tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = attention(*tensors)
    stream.synchronize()
    assert torch.equal(found, expected)
