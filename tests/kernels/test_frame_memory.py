"""Sums and reads of a frame-wise memory against loops over frames and heads, and the arguments that are refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import library
from torch.nn import functional

from postgen.kernels.frame_memory import naive
from postgen.kernels.frame_memory.ops import frame_memories, frame_reads, frame_sums, gated_sum
from tests.kernels.frame_memory_cases import EPS, case, writes


def test_sums_are_those_of_every_frame_and_head() -> None:
    given = case(3, 5, 2, 4, torch.float64)
    gram, content = frame_sums(given.key, given.value, given.strength, 3)
    assert gram is not None
    for sample, frame, head in ((0, 0, 0), (1, 2, 1)):
        rows = slice(5 * frame, 5 * frame + 5)
        k = functional.silu(given.key[sample, rows, head])
        k = k / k.norm(dim=1, keepdim=True)
        v = functional.silu(given.value[sample, rows, head])
        b = torch.diag(given.strength[sample, rows, head].sigmoid())
        torch.testing.assert_close(gram[sample, frame, head], k.T @ b @ k, rtol=0, atol=1e-12)
        torch.testing.assert_close(content[sample, frame, head], v.T @ b @ k, rtol=0, atol=1e-12)
    nothing, alone = frame_sums(given.key, given.value, given.strength, 3, gram=False)
    assert nothing is None
    assert torch.equal(alone, content)


def test_reads_are_normed_and_gated() -> None:
    given = case(2, 3, 2, 4, torch.float64)
    memory = given.memory.double()
    found = frame_reads(given.query, memory, given.weight, given.gate, EPS)
    for sample, token, head in ((0, 0, 0), (1, 4, 1)):
        q = functional.silu(given.query[sample, token, head])
        read = memory[sample, token // 3, head] @ (q / q.norm())
        expected = functional.rms_norm(read, (4,), given.weight.double(), EPS)
        expected = expected * given.gate[sample, token, head].sigmoid()
        torch.testing.assert_close(found[sample, token, head], expected, rtol=0, atol=1e-12)
    # A read does not depend on the magnitude of the memory, and a read of an empty memory is 0.
    torch.testing.assert_close(
        frame_reads(given.query, 1e6 * memory, given.weight, given.gate, 0.0),
        frame_reads(given.query, memory, given.weight, given.gate, 0.0),
    )
    assert not frame_reads(given.query, 0 * memory, given.weight, given.gate, EPS).any()


def test_what_is_near_and_far_is_added() -> None:
    given = case(2, 3, 2, 4, torch.bfloat16)
    soft = 2 * given.strength.double().sigmoid()[..., None]
    expected = (soft * given.value.double() + given.gate.double()).bfloat16()
    torch.testing.assert_close(gated_sum(given.value, given.gate, given.strength), expected, rtol=2**-7, atol=1e-6)
    # The gate of a new layer is 0, which is a weight of 1.
    ones = gated_sum(given.value, torch.zeros_like(given.value), torch.zeros_like(given.strength))
    assert torch.equal(ones, given.value)


def test_half_precision_is_computed_in_float32() -> None:
    given = case(2, 3, 2, 4, torch.bfloat16)
    gram, content = frame_sums(given.key, given.value, given.strength, 2)
    expected = naive.frame_sums(given.key.float(), given.value.float(), given.strength.float(), 2)
    assert gram is not None
    assert torch.equal(gram, expected[0])
    assert torch.equal(content, expected[1])
    read = frame_reads(given.query, given.memory, given.weight, given.gate, EPS)
    assert read.dtype == torch.bfloat16
    assert torch.equal(
        read, naive.frame_reads(given.query.float(), given.memory, given.weight, given.gate, EPS).bfloat16()
    )


def test_other_dtypes_are_taken_in_that_of_the_keys() -> None:
    given = case(2, 3, 2, 4, torch.float32)
    expected = frame_sums(given.key, given.value, given.strength, 2)
    found = frame_sums(given.key, given.value.double(), given.strength.double(), 2)
    torch.testing.assert_close(found, expected)
    read = frame_reads(given.query, given.memory, given.weight, given.gate, EPS)
    exact = given.double()
    torch.testing.assert_close(frame_reads(given.query, exact.memory, exact.weight, given.gate, EPS), read)


def test_autocast_leaves_products_in_float32() -> None:
    given, of_frames = case(2, 3, 2, 4, torch.float32), writes(3, 4)

    def found() -> list[torch.Tensor | None]:
        sums = frame_sums(given.key, given.value, given.strength, 2)
        read = frame_reads(given.query, given.memory, given.weight, given.gate, EPS)
        return [*sums, read, frame_memories(*of_frames, 1, 0)]

    expected = found()
    with torch.autocast("cpu", torch.bfloat16):
        for x, y in zip(found(), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_there_is_no_gradient() -> None:
    given = case(2, 3, 2, 4, torch.float32)
    key = given.key.clone().requires_grad_()
    results = (
        frame_sums(key, given.value, given.strength, 2)[1],
        frame_memories(*(x.requires_grad_() for x in writes(3, 4)), 1, 0),
        frame_reads(key, given.memory, given.weight, given.gate, EPS),
        gated_sum(key, given.value, given.strength),
    )
    for result in results:
        with pytest.raises(RuntimeError, match="no autograd formula"):
            result.sum().backward()


def test_are_registered_well() -> None:
    given = case(2, 3, 1, 4, torch.float32)
    tokens = (given.key, given.value, given.strength)
    library.opcheck(torch.ops.postgen.frame_sums.default, (*tokens, 2, True))
    library.opcheck(torch.ops.postgen.frame_sums.default, (*tokens, 2, False))
    library.opcheck(frame_memories, (*writes(3, 4), 1, 0))
    library.opcheck(gated_sum, (given.value, given.gate, given.strength))
    library.opcheck(frame_reads, (given.query, given.memory, given.weight, given.gate, EPS))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"value": torch.ones(2, 6, 1, 3)}, r"key and value must be \(B, N, H, D\)"),
        ({"strength": torch.ones(2, 6, 2)}, r"strength \(B, N, H\), got .*\(2, 6, 2\)"),
        ({"frames": 4}, "number of tokens, 6, must be a multiple of frames, 4"),
        ({"key": torch.ones(2, 6, 1, 4).long()}, "floating-point, got key torch.int64"),
        ({"strength": torch.ones(2, 6, 1).long()}, "floating-point, .*strength torch.int64"),
        ({"strength": torch.ones(2, 6, 1, device="meta")}, "one device, got cpu and meta"),
        ({"gate": torch.ones(2, 6, 4)}, "query and gate must be"),
        ({"memory": torch.ones(2, 4, 1, 4, 4)}, r"memory must be \(B, F, H, D, D\)"),
        ({"memory": torch.ones(2, 0, 1, 4, 4)}, r"memory must be .*\(2, 0, 1, 4, 4\)"),
        ({"weight": torch.ones(1, 4)}, r"weight must be \(4,\), got \(1, 4\)"),
        ({"query": torch.ones(2, 6, 1, 4).long()}, "floating-point, got query torch.int64"),
        ({"gate": torch.ones(2, 6, 1, 4).long()}, "floating-point, .*gate torch.int64"),
        ({"weight": torch.ones(4, device="meta")}, "one device, got cpu and meta"),
    ],
)
def test_what_does_not_belong_together(changed: dict[str, Any], message: str) -> None:
    given = case(2, 3, 1, 4, torch.float32)._replace(**changed)
    sums = {*changed} & {"key", "value", "strength", "frames"}
    call = partial(frame_sums, given.key, given.value, given.strength, given.frames)
    other = partial(frame_reads, given.query, given.memory, given.weight, given.gate, EPS)
    with pytest.raises(ValueError, match=message):
        (call if sums else other)()


@pytest.mark.parametrize(
    ("far", "gate", "message"),
    [
        (torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1), r"near and far must be .* got .*\(1, 2, 1, 3\)"),
        (torch.ones(1, 2, 1, 4), torch.ones(1, 2), r"gate \(B, N, H\), got .*\(1, 2\)"),
        (torch.ones(1, 2, 1, 4).long(), torch.ones(1, 2, 1), "floating-point.*int64"),
        (torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, device="meta"), "one device, got cpu and meta"),
    ],
)
def test_what_cannot_be_added(far: torch.Tensor, gate: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_sum(torch.ones(1, 2, 1, 4), far, gate)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({1: torch.ones(2, 3, 2, 4, 3)}, r"content and inverse must be \(B, F, H, D, D\)"),
        ({2: torch.ones(2, 3, 2)}, r"log_decay \(B, F, H, D\), got .*\(2, 3, 2\)"),
        ({0: torch.ones(2, 3, 2, 4, 3)}, "content and inverse must be"),
        ({1: torch.ones(2, 3, 2, 4, 4).bfloat16()}, "all tensors must be float32, or all float64, got torch.bfloat16"),
        ({3: 0}, "chunk must be at least 1"),
        ({0: torch.ones(2, 3, 2, 4, 4, device="meta")}, "one device, got cpu and meta"),
    ],
)
def test_what_is_no_memory(changed: dict[int, Any], message: str) -> None:
    given: list[Any] = [*writes(3, 4), 1, 0]
    for place, value in changed.items():
        given[place] = value
    with pytest.raises(ValueError, match=message):
        frame_memories(*given)
