"""The kernels of linear attention in Triton's interpreter. `test_interpreted.py` runs this file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.kernels.linear_attention import naive, triton, triton_descriptors, triton_launch
from tests.kernels.launches import relative_error
from tests.kernels.linear_attention_cases import CASES, in_float64, inputs, off_mean, terms, worst_head
from tests.kernels.poison import poisoned_memory

GRID = (3, 2, 4)
SHAPE = (2, 24, 2, 12)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use tiles of 16 tokens and up to four splits, so that every loop has several iterations."""
    monkeypatch.setattr(triton_launch, "_WIDE", triton_launch.Launch(tokens=16, programs=4))


def both(
    module: Any, of_results: Sequence[Tensor | None], qkv: Sequence[Tensor], given: naive.Terms
) -> tuple[Tensor, list[Tensor], naive.Gradients]:
    """Run the forward and the backward pass; return the result, the two sums and the gradients of the inputs."""
    out, *sums = module.linear_attention(*qkv, given)
    return out, sums, module.linear_attention_backward(*of_results, *qkv, *sums, given)


@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_equal_those_of_the_reference(case: str) -> None:
    given = terms(case, SHAPE, GRID)
    generator = torch.Generator().manual_seed(3)
    batch, _, heads, channels = SHAPE
    of_state = torch.randn(batch, heads, channels, channels, generator=generator) / 100
    of_results = (torch.randn(SHAPE, generator=generator) + 0.3, of_state, of_state[..., 0].clone())
    qkv = inputs(SHAPE)
    with poisoned_memory():
        out, sums, found = both(triton, of_results, qkv, given)
    expected, exact_sums, exact = in_double(of_results, qkv, given)
    assert_equal(out, sums, expected, exact_sums, 1e-5)
    if case == "plain":
        v = qkv[2]
        assert worst_head(off_mean(out, v), off_mean(expected, v)) < 1e-4
    for field in fields(found):
        x, y = getattr(found, field.name), getattr(exact, field.name)
        assert (x is None) == (y is None)
        if x is not None:
            assert relative_error(x, y) < 2e-5, field.name


@pytest.mark.parametrize("case", ["plain", "all"])
def test_float16(case: str) -> None:
    q, k, v = inputs(SHAPE, dtype=torch.float16)
    given = terms(case, SHAPE, GRID)
    with poisoned_memory():
        out, *sums = triton.linear_attention(q, k, v, given)
    assert out.dtype == torch.float16
    expected, *exact_sums = naive.linear_attention(q.double(), k.double(), v.double(), in_float64(given))
    assert_equal(out, sums, expected, exact_sums, 6e-4)


def in_double(
    of_results: Sequence[Tensor | None], qkv: Sequence[Tensor], given: naive.Terms
) -> tuple[Tensor, list[Tensor], naive.Gradients]:
    """Return the result, sums and gradients of the reference in float64."""
    of_exact = [None if x is None else x.double() for x in of_results]
    return both(naive, of_exact, [x.double() for x in qkv], in_float64(given))


def assert_equal(out: Tensor, sums: list[Tensor], expected: Tensor, exact_sums: list[Tensor], bound: float) -> None:
    assert worst_head(out, expected) < bound
    for found, exact in zip(sums, exact_sums, strict=True):
        assert found.dtype == torch.float32
        assert relative_error(found, exact) < 1e-5


@pytest.mark.parametrize(
    ("case", "warps", "dtype", "bound"),
    [
        ("plain", 1, torch.float32, 1e-5),
        ("plain", 8, torch.float16, 6e-4),
        ("rope", 8, torch.float32, 1e-5),
        ("norm", 1, torch.float32, 1e-5),
        ("lengths", 1, torch.float32, 1e-5),
        ("text before and after", 1, torch.float32, 1e-5),
    ],
)
def test_tiles_that_are_copied_whole(
    case: str, warps: int, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = triton_launch.Launch(tokens=16, programs=4, described=True, warps=warps)
    monkeypatch.setattr(triton_launch, "_WIDE", how)
    shape = (2, 24, 2, 16)
    q, k, v = inputs(shape, dtype=dtype)
    assert triton_descriptors.described(how, q, torch.empty(shape, dtype=dtype))[1].described
    given = terms(case, shape, GRID)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    with poisoned_memory():
        out, sums, found = both(triton, (gradient, None, None), (q, k, v), given)
    expected, exact_sums, exact = in_double((gradient, None, None), (q, k, v), given)
    assert worst_head(out, expected) < bound
    assert all(relative_error(x, y) < 1e-5 for x, y in zip(sums, exact_sums, strict=True))
    for name in ("query", "key", "value"):
        assert relative_error(getattr(found, name), getattr(exact, name)) < 2 * bound, name


def test_what_is_copied_whole() -> None:
    how = triton_launch.Launch(tokens=16, described=True)
    fused = torch.empty(2, 24, 3, 2, 16)
    query = fused[:, :, 0]
    for x in (query, query[:1], query[:, 3:7], query[:, :, :1], fused.flatten(2, 3)):
        (tile,), run = triton_descriptors.described(how, x)
        assert run.described
        assert tile.shape[1] == x.shape[1]
    narrow, wide = torch.empty(2, 24, 2, 12), torch.empty(2, 24, 2, 256)
    odd = torch.empty(2 * 24 * 2 * 16 + 1)[1:].view(2, 24, 2, 16)
    by_head, repeated = torch.empty(2, 2, 24, 16).transpose(1, 2), query[:1].expand(2, -1, -1, -1)
    for x in (narrow, wide, odd, by_head, repeated, query[..., ::2]):
        assert triton_descriptors.described(how, query, x) == ([query, x], how.by_threads)
    plain = triton_launch.Launch(tokens=16)
    assert triton_descriptors.described(plain, query) == ([query], plain)


@pytest.mark.parametrize(
    ("queries", "keys", "channels"),
    [
        (1, 1, 16),
        (15, 17, 64),
        (16, 1, 80),
        (17, 63, 128),
        (1, 33, 112),
        (64, 65, 96),
        (32, 31, 6),
        (17, 33, 136),
        (33, 17, 256),
    ],
)
def test_ragged_tokens_and_any_channels(queries: int, keys: int, channels: int) -> None:
    q, k, v = inputs((1, queries, 1, channels), keys=keys)
    gradient = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    given = naive.Terms(eps=1e-3)
    with poisoned_memory():
        out, _, found = both(triton, (gradient, None, None), (q, k, v), given)
    expected, _, exact = in_double((gradient, None, None), (q, k, v), given)
    assert worst_head(out, expected) < 1e-5
    for name in ("query", "key", "value"):
        x, y = getattr(found, name).double(), getattr(exact, name)
        # With one key, the terms of the gradients of queries and keys cancel, and only rounding errors remain.
        assert float((x - y).norm()) < 2e-5 * float(y.norm() + gradient.norm())


@pytest.mark.parametrize("case", ["rope", "norm", "text and all"])
def test_wide_heads_are_computed_in_parts(case: str) -> None:
    shape = (1, 24, 1, 136)
    q, k, v = inputs(shape)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    given = terms(case, shape, GRID)
    with poisoned_memory():
        out, _, found = both(triton, (gradient, None, None), (q, k, v), given)
    expected, _, exact = in_double((gradient, None, None), (q, k, v), given)
    assert worst_head(out, expected) < 1e-5
    for field in fields(found):
        x, y = getattr(found, field.name), getattr(exact, field.name)
        assert x is None or relative_error(x, y) < 2e-5, field.name


@pytest.mark.parametrize(
    ("grid", "space", "time", "launch"),
    [
        ((1, 1, 1), 7, 5, {}),
        ((2, 1, 5), 5, 0, {"strip": 2}),
        ((1, 3, 3), 5, 3, {"programs": 64}),
        ((3, 4, 3), 3, 5, {"channels": 16, "strip": 1}),
        ((1, 2, 17), 3, 1, {"strip": 16, "programs": 64, "stacked": True}),
        ((3, 4, 3), 5, 3, {"channels": 16, "strip": 2, "stacked": True}),
        ((5, 2, 8), 0, 3, {"strip": 8}),
        ((2, 2, 9), 1, 7, {}),
    ],
)
def test_convolutions_of_any_size_on_any_grid(
    grid: tuple[int, int, int], space: int, time: int, launch: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_launch, "_WIDE", triton_launch.Launch(**{"tokens": 16, "programs": 4, **launch}))
    tokens = grid[0] * grid[1] * grid[2]
    q, k, v = inputs((2, tokens, 1, 20))
    gradient = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([tokens, tokens // 2 + 1])
    filters = {
        "conv_space": torch.randn(20, space, space) if space else None,
        "conv_time": torch.randn(20, time) if time else None,
    }
    given = naive.Terms(grid=grid, eps=1e-3, key_lengths=lengths, **filters)
    with poisoned_memory():
        out, _, found = both(triton, (gradient, None, None), (q, k, v), given)
    expected, _, exact = in_double((gradient, None, None), (q, k, v), given)
    assert worst_head(out, expected) < 1e-5
    assert relative_error(found.value, exact.value) < 2e-5
    for name in ("conv_space", "conv_time"):
        x, y = getattr(found, name), getattr(exact, name)
        assert x is None or relative_error(x, y) < 2e-5


@pytest.mark.parametrize("lengths", [torch.tensor([[20, 1], [11, 1]])[:, 0], torch.tensor([13]).expand(2)])
@pytest.mark.parametrize("space", [None, torch.randn(12, 3, 3)])
def test_lengths_may_lie_apart(lengths: Tensor, space: Tensor | None) -> None:
    q, k, v = inputs(SHAPE)
    gradient = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    apart, together = (
        naive.Terms(grid=GRID, conv_space=space, key_lengths=each) for each in (lengths, lengths.contiguous())
    )
    results = []
    for given in (apart, together):
        out, sums, found = both(triton, (gradient, None, None), (q, k, v), given)
        gradients = (found.query, found.key, found.value, found.conv_space)
        results.append([out, *sums, *(x for x in gradients if x is not None)])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
