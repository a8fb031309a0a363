"""The benchmark of linear attention compares things that compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import kernel_linear
from benchmarks.kernels import Case, Shape
from postgen.kernels.linear_attention.naive import Terms

TINY = Shape(name="tiny", frames=3, places=4, heads=3, channels=12)
CASES = {case.op: case for case in (Case(**each) for each in kernel_linear.cases(TINY, device="cpu"))}


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.op)
def test_all_compute_the_same(case: Case) -> None:
    inputs = tuple(x.float() for x in case.make())
    ours = case.ours(*inputs)
    for other in (case.eager, *case.peers.values()):
        torch.testing.assert_close(other(*inputs), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.op)
def test_errors_are_those_of_bfloat16(case: Case) -> None:
    assert 0 < case.error() < 4e-3


def test_the_peer_is_the_processor_of_diffusers() -> None:
    from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0

    attention = Attention(36, heads=3, dim_head=12, bias=False, processor=SanaLinearAttnProcessor2_0())
    attention.to_out[0] = torch.nn.Identity()
    hidden = torch.randn(1, 10, 36)
    qkv = (layer(hidden).unflatten(2, (3, 12)) for layer in (attention.to_q, attention.to_k, attention.to_v))
    torch.testing.assert_close(kernel_linear.sana(*qkv).flatten(2), attention(hidden))


def test_bytes_that_must_move() -> None:
    tensor = 12 * 36 * 2
    moved = [case.moved_bytes // tensor for case in CASES.values()]
    assert moved == [4, 4, 5, 7]
    assert kernel_linear._full_tables(Terms()) is None


def test_gates_take_the_worst_shape() -> None:
    row: dict[str, Any] = {
        "shape": kernel_linear.LARGE,
        "over_floor": 1.1,
        "vs_sana": 20.0,
        "vs_compiled": 3.0,
        "relative_error": 1e-3,
    }
    rows = [{**row, "op": op} for op in CASES]
    assert all(each["ok"] for each in kernel_linear.gates(rows))
    worse = [*rows, {**row, "shape": "tiny", "op": "linear_attention", "over_floor": 1.5, "vs_sana": 9.0}]
    found = {each["name"] for each in kernel_linear.gates(worse) if not each["ok"]}
    assert found == {"linear_fwd_over_floor", "linear_vs_sana_eager"}


def test_a_loop_of_machine_code_is_counted() -> None:
    from benchmarks.convolution_profile import loops

    lines = ["FFMA R1, R2, R3, R4;", "LBB0:", "@P0 LDG.E R1, [R2];", "FFMA R1, R1, R3, R4;", "FADD.FTZ R5, R1, R4;"]
    lines += ["@P1 BRA LBB1;", "FFMA R1, R1, R3, R4;", "LBB1:", "@!P2 BRA LBB0;", "EXIT;"]
    sass = "\n".join(line if line.endswith(":") else f"--:-:-:-:1\t{line}" for line in lines)
    (found,) = loops(sass)
    assert found == {"LDG": 1, "FFMA": 2, "FADD": 1, "BRA": 2}
