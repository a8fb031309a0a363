"""The kernels around FP8 attention in Triton's interpreter, against plain torch. `test_interpreted.py` runs this file.

The results are in float32 here, because the interpreter and the hardware round differently in the cast to E4M3. GPU
tests cover that cast.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.lowp_inputs import drawn
from postgen.kernels.attention_fp8 import triton
from postgen.kernels.attention_fp8.preparation import Change, Channels, Preparation, planned, rotation
from tests.kernels.poison import poisoned_memory


@pytest.mark.parametrize(
    ("tokens", "channels", "dtype"), [(1, 64, torch.float16), (65, 64, torch.float32), (129, 80, torch.float16)]
)
def test_equals_plain_torch(tokens: int, channels: int, dtype: torch.dtype) -> None:
    tensors = torch.stack(drawn("hard", tokens, 3, channels, batch=2, dtype=dtype), 2).unbind(2)
    with poisoned_memory():
        found = [triton.channels_of(x) for x in tensors]
    for mine, x in zip(found, tensors, strict=True):
        for part, wanted in zip(mine, Channels.of(x), strict=True):
            torch.testing.assert_close(part, wanted, rtol=1e-5, atol=1e-5)
    plan = planned(*found, Preparation(value_scale=True))
    for x, change, rotates in zip(tensors, plan[:3], (True, True, False), strict=True):
        with poisoned_memory():
            out = triton.changed(x, change, rotates=rotates, dtype=torch.float32)
        expected = change(x, rotation(channels, change.times) if rotates else None)
        assert out.is_contiguous()
        # The kernel rounds numbers before the rotation: to 11 bits in the interpreter, to 8 bits on a GPU.
        assert (out - expected).norm() <= (1e-3 if rotates else 1e-5) * expected.norm()
    with poisoned_memory():
        undone = triton.changed(expected, Change(None, plan.undo.factor), plus=plan.undo.value_mean, dtype=dtype)
    torch.testing.assert_close(undone, plan.undo.output(expected).to(dtype), rtol=1e-3, atol=1e-3)


def test_factors_of_outliers_against_zeros_are_finite() -> None:
    """The factors of such channels are the largest and the smallest ones."""
    query, key, value = drawn("normal", 70, 2, 64, dtype=torch.float32)
    query[..., :3], key[..., :3] = 0, key[..., :3] * 1e6
    key[..., 9], query[..., 9] = 1000, query[..., 9] * 1e6
    plan = planned(*(triton.channels_of(x) for x in (query, key, value)), Preparation())
    for x, change in ((query, plan.query), (key, plan.key)):
        out = triton.changed(x, change, rotates=True, dtype=torch.float32)
        expected = change(x, rotation(64, change.times))
        assert (out - expected).norm() <= 1e-3 * expected.norm()
        # The other channels use the range of E4M3: 448 is a bound that the norms of rows stay below.
        assert 10 < out.abs().max() <= 448
