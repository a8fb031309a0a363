"""Sums and reads of a frame-wise memory on a GPU, with the head sizes of Wan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from postgen.kernels.dispatch import TOLD
from postgen.kernels.frame_memory import naive
from postgen.kernels.frame_memory.ops import frame_memories, frame_reads, frame_sums, gated_sum
from tests.kernels.frame_memory_cases import EPS, Case, case, writes
from tests.kernels.launches import assert_compiles_whole, assert_records, assert_repeats, relative_error
from tests.kernels.poison import poisoned_memory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SHAPES = [(3, 1560, 4, 128), (2, 77, 3, 64), (5, 3, 2, 112), (1, 3600, 2, 128)]
"""Numbers of frames, tokens per frame, heads and channels."""


def sums(given: Case) -> Any:
    return frame_sums(given.key, given.value, given.strength, given.frames)


def reads(given: Case) -> Any:
    return frame_reads(given.query, given.memory, given.weight, given.gate, EPS)


def added(given: Case) -> Any:
    return gated_sum(given.value, given.gate, given.strength)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equals_float64(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    given = case(*shape, dtype, "cuda")
    with poisoned_memory():
        gram, content = sums(given)
        read, both = reads(given), added(given)
    exact = given.double()
    of_gram, of_content = naive.frame_sums(exact.key, exact.value, exact.strength, exact.frames)
    assert relative_error(gram, of_gram) < 2e-5
    assert torch.equal(gram, gram.mT)
    assert relative_error(content, of_content) < 2e-5
    expected = naive.frame_reads(exact.query, exact.memory, exact.weight, exact.gate, EPS)
    assert relative_error(read, expected) < 5e-3
    assert relative_error(both, naive.gated_sum(exact.value, exact.gate, exact.strength)) < 4e-3


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize(("frames", "channels", "radius"), [(21, 128, 1), (21, 128, 2), (7, 64, 0), (3, 112, 9)])
def test_memories_equal_float64(frames: int, channels: int, radius: int, delta: bool) -> None:
    inverse, content, log_decay = writes(frames, channels, 5, "cuda")
    given = inverse if delta else None
    with poisoned_memory():
        found = frame_memories(given, content, log_decay, 1, radius)
    exact = None if given is None else given.double()
    expected = naive.frame_memories(exact, content.double(), log_decay.double(), 1, radius)
    assert float((found - expected).norm()) <= 3e-5 * float(expected.norm())


def test_more_numbers_than_32_bits_count() -> None:
    """Scans of 1,100 frames with 64 heads need 64-bit offsets; the last head alone does not."""
    content = torch.randn(1, 1100, 64, 128, 128, device="cuda")
    log_decay = -torch.rand(1, 1100, 64, 128, device="cuda")
    found = frame_memories(None, content, log_decay, 1, 1)[:, :, -1:]
    assert torch.equal(found, frame_memories(None, content[:, :, -1:], log_decay[:, :, -1:], 1, 1))


def test_float64_runs_as_plain_torch_and_says_so() -> None:
    inverse, content, log_decay = (x.double() for x in writes(3, 16, 2, "cuda"))
    TOLD.clear()
    with pytest.warns(UserWarning, match="frame_memories runs as plain torch.*float64"):
        frame_memories(inverse, content, log_decay, 1, 0)


def test_repeats_records_and_compiles() -> None:
    given = case(3, 500, 4, 128, torch.bfloat16, "cuda")
    for call in (sums, reads, added):
        assert_repeats(lambda call=call: call(given))
        assert_records(lambda call=call: call(given))
    of_frames = writes(4, 128, 4, "cuda")
    assert_repeats(lambda: frame_memories(*of_frames, 1, 0))
    assert_records(lambda: frame_memories(*of_frames, 1, 0))
    assert_compiles_whole(lambda i, b, c: frame_memories(i, b, c, 1, 0) * 2, *of_frames)
    assert_compiles_whole(lambda k, v, b: frame_sums(k, v, b, 3), given.key, given.value, given.strength)
    assert_compiles_whole(
        lambda q, m, w, g: frame_reads(q, m, w, g, EPS) * 2, given.query, given.memory, given.weight, given.gate
    )
