"""The kernels around FP8 attention in Triton's interpreter, against plain torch.

Not collected by name: `test_interpreted.py` runs it in a process of its own. The cast to E4M3 itself is tested on a
GPU: the interpreter rounds it otherwise than hardware does, so results are in float32 here.
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
        # Before it is rotated a number is rounded to 11 bits here, to 8 on a GPU.
        assert (out - expected).norm() <= (1e-3 if rotates else 1e-5) * expected.norm()
    with poisoned_memory():
        undone = triton.changed(expected, Change(None, plan.undo.factor), plus=plan.undo.value_mean, dtype=dtype)
    torch.testing.assert_close(undone, plan.undo.output(expected).to(dtype), rtol=1e-3, atol=1e-3)
