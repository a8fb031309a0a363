"""Checks of FP8 attention, for the reference on a CPU and for cuDNN on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.lowp_inputs import drawn
from postgen.kernels.attention import naive as exact
from tests.kernels.launches import relative_error

Run = Callable[..., tuple[Tensor, Tensor]]
"""`run(query, key, value, **options)` -> (out, lse), with the options of `attention_fp8`."""

BOUNDS = {"normal": 0.063, "hard": 0.085, "clustered": 0.035}
"""The largest relative error by kind of inputs: rounding q, k, exponentials, v and the output adds 2.6 % each, and a
margin covers the random draw of few tokens."""
SIZES = (1, 63, 64, 65, 127, 129)


def errors(run: Run, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> float:
    """Return the relative error of the output in the head with the largest error."""
    out, lse = run(query, key, value, **options)
    known = {name: options[name] for name in ("scale", "key_lengths") if name in options}
    expected, divisor = exact.attention(query.double(), key.double(), value.double(), **known)
    assert out.dtype == query.dtype
    assert out.isfinite().all()
    assert lse.shape == divisor.shape
    assert (lse - divisor).abs().max() <= 0.05 * (1 + divisor.abs().max())
    heads = zip(out.unbind(2), expected.unbind(2), strict=True)
    return max(relative_error(mine, wanted) for mine, wanted in heads if wanted.abs().max() > 0)


def error_is_bounded(run: Run, kind: str, channels: int, device: str = "cpu") -> None:
    tensors = drawn(kind, 1024, 2, channels, device=device)
    assert errors(run, *tensors) <= BOUNDS[kind]


def size_is_borne(run: Run, tokens: int, channels: int, device: str = "cpu") -> None:
    query, key, value = drawn("normal", tokens, 3, channels, batch=2, device=device)
    assert errors(run, query, key, value) <= 0.09
    # The same inputs as views of a fused projection.
    fused = torch.stack([query, key, value], dim=2)
    assert torch.equal(run(*fused.unbind(2))[0], run(query, key, value)[0])


def extreme_is_borne(run: Run, name: str, device: str = "cpu") -> None:
    query, key, value = drawn("normal", 129, 2, 64, device=device)
    bound = 0.09
    if name == "outlier channels":
        key[..., 5], query[..., 9] = key[..., 5] * 300, query[..., 9] * 300
        bound = 0.4  # the softmax selects one key, and rounding changes which of two close logits is larger
    elif name == "equal keys":
        # The attention weights are uniform, so the output is the mean value, which is not rounded to 8 bits.
        key[:] = key[:, :1]
        bound = 0.01
    elif name == "large logits":
        # The logits reach 1e4 before the scale, and each query attends to one key only.
        rows = torch.eye(64, device=device).repeat(3, 1)[:129].view(1, 129, 1, 64)
        query, key = (rows.expand(1, 129, 2, 64) * 120).to(query), (rows.expand(1, 129, 2, 64) * 120).to(key)
        bound = 0.06
    elif name == "zeros":
        query, key = torch.zeros_like(query), torch.zeros_like(key)
        bound = 0.01
    elif name == "zero values":
        value = torch.zeros_like(value)
        assert not run(query, key, value)[0].any()
        return
    elif name == "zero channel":
        value[..., 3] = 0
        assert not run(query, key, value)[0][..., 3].any()
    elif name == "constant values":
        value[:] = value[:, :1]
        bound = 0.005
    elif name == "outliers against zeros":
        # These channels add nothing to any logit, so they must not cost the others precision.
        query[..., :3], key[..., :3] = 0, key[..., :3] * 1000
        key[..., 9], query[..., 9] = 0, query[..., 9] * 1e6
        query, key = query * 1e-10, key * 1e10
    elif name == "outliers against a constant":
        key[..., :3], query[..., :3] = 1000, query[..., :3] * 1000
    elif name == "small against large":
        query[..., :3], key[..., :3] = query[..., :3] * 1e-6, key[..., :3] * 1e6
    elif name == "zero query":
        query[:, 7] = 0
    elif name == "one head of zeros":
        for each in (query, key, value):
            each[:, :, 1] = 0
    elif name == "tiny":
        query, key, value = query * 1e-20, key * 1e-20, value * 1e-20
    else:
        raise ValueError(name)
    assert errors(run, query, key, value) <= bound


EXTREMES = (
    "outlier channels",
    "equal keys",
    "large logits",
    "zeros",
    "zero values",
    "zero channel",
    "constant values",
    "outliers against zeros",
    "outliers against a constant",
    "small against large",
    "zero query",
    "one head of zeros",
    "tiny",
)


def halves_make_the_whole(run: Run, device: str = "cpu") -> None:
    """Attention over two parts of the keys, combined by their LSE, equals attention over all keys."""
    query, key, value = drawn("hard", 1024, 2, 64, device=device)
    cut = 377
    parts = [run(query, k, v) for k, v in zip(key.split(cut, 1), value.split(cut, 1), strict=True)]
    out, lse = exact.merge([(out.float(), lse) for out, lse in parts])
    expected, divisor = exact.attention(query.double(), key.double(), value.double())
    assert relative_error(out, expected) <= 0.1
    assert (lse - divisor).abs().max() < 0.3


def lengths_are_kept(run: Run, device: str = "cpu") -> None:
    query, key, value = drawn("normal", 200, 2, 64, batch=2, device=device)
    lengths = torch.tensor([200, 37], dtype=torch.int32, device=device)
    assert errors(run, query, key, value, key_lengths=lengths) <= 0.09
