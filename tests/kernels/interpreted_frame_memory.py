"""Sums and reads of a frame-wise memory in Triton's interpreter. `test_interpreted.py` runs this file.

In the interpreter the matrix products take float16 instead of bfloat16. A number in two terms then has a relative
error of 2^-22 instead of 2^-17.
"""

from __future__ import annotations

import pytest
import torch

from postgen.kernels.frame_memory import naive, triton
from tests.kernels.frame_memory_cases import EPS, case, writes
from tests.kernels.launches import relative_error
from tests.kernels.poison import poisoned_memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("frames", "places", "channels"), [(2, 70, 12), (3, 3, 16), (1, 300, 20)])
def test_equals_the_reference(frames: int, places: int, channels: int, dtype: torch.dtype) -> None:
    given = case(frames, places, 2, channels, dtype)
    exact = given.double()
    with poisoned_memory():
        gram, content = triton.frame_sums(given.key, given.value, given.strength, frames, True)
        nothing, alone = triton.frame_sums(given.key, given.value, given.strength, frames, False)
        read = triton.frame_reads(given.query, given.memory, given.weight, given.gate, EPS)
        both = triton.gated_sum(given.value, given.gate, given.strength)
    expected = naive.frame_sums(exact.key, exact.value, exact.strength, frames)
    assert gram is not None
    assert relative_error(gram, expected[0]) < 1e-5
    assert torch.equal(gram, gram.mT)
    assert relative_error(content, expected[1]) < 1e-5
    assert nothing is None
    assert torch.equal(alone, content)
    assert read.dtype == dtype
    assert relative_error(both, naive.gated_sum(exact.value, exact.gate, exact.strength)) < 5e-4
    # In the product the queries have one term and the memory has two terms.
    reads = naive.frame_reads(exact.query, exact.memory, exact.weight, exact.gate, EPS)
    assert relative_error(read, reads) < 5e-4


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize(("frames", "channels", "chunk", "radius"), [(5, 12, 1, 1), (3, 20, 2, 0), (1, 16, 1, 5)])
def test_memories_equal_the_reference(frames: int, channels: int, chunk: int, radius: int, delta: bool) -> None:
    inverse, content, log_decay = writes(frames, channels)
    given = inverse if delta else None
    with poisoned_memory():
        found = triton.frame_memories(given, content, log_decay, chunk, radius)
    exact = None if given is None else given.double()
    expected = naive.frame_memories(exact, content.double(), log_decay.double(), chunk, radius)
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
