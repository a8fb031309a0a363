"""The benchmark of linear attention compares functions with equal results."""

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


def test_a_trace_is_read_call_by_call() -> None:
    from benchmarks.linear_profile import by_place, kernel_events, pauses_of, row_of

    def event(name: str, ts: float, dur: float) -> dict[str, Any]:
        said = {"grid": [3, 2, 1], "block": [256, 1, 1], "registers per thread": 119, "shared memory": 114688}
        return {"cat": "kernel", "name": name, "ts": ts, "dur": dur, "args": said}

    names = ["sum_keys", "read_state"] * 3
    events = [event(name, 10.0 * at, 8.0 + at % 2) for at, name in enumerate(names)]
    found = kernel_events({"traceEvents": [*reversed(events), {"cat": "gpu_memset", "ts": 1}]})
    assert found == events
    first, second = by_place(found, 3)
    assert [each["name"] for each in second] == ["read_state"] * 3
    assert pauses_of(found) == [0, 2, 1, 2, 1, 2]
    row = row_of(first, pauses_of(found)[0::2], {("sum_keys", 119): 8})
    assert row["us"] == 8
    assert row["pause_before_us"] == 1
    assert (row["programs"], row["warps"], row["spilled"], row["programs_a_processor"]) == (6, 8, 8, 2)
    for calls, message in ((4, "6 kernel events cannot be 4 equal calls"), (6, "calls differ")):
        with pytest.raises(ValueError, match=message):
            by_place(found, calls)


def test_programs_that_fit_a_processor() -> None:
    from benchmarks.linear_profile import programs_a_processor

    assert programs_a_processor(255, 256, 0) == 1  # limited by registers
    assert programs_a_processor(32, 1024, 0) == 2  # limited by threads
    assert programs_a_processor(16, 32, 0) == 32
    assert programs_a_processor(85, 256, 131088) == 1  # limited by shared memory
    assert programs_a_processor(98, 256, 114696) == 2


def test_errors_of_launches_are_those_of_the_worst_tensor() -> None:
    from benchmarks import linear_errors

    ones = torch.ones(3)
    assert len(linear_errors.outcome((ones, (2 * ones, None)))) == 2
    assert linear_errors.relative([ones, 2 * ones], [ones, ones]) == 1
    assert linear_errors.relative([ones * torch.nan], [ones]) == float("inf")
    terms = Terms(conv_time=torch.ones(5 * 4, 3), query_weight=torch.ones(4), key_lengths=torch.ones(1).int())
    few = linear_errors.few_heads(terms, 5, 4)
    assert few.conv_time is not None
    assert few.query_weight is not None
    assert (len(few.conv_time), len(few.query_weight), few.conv_time.dtype) == (8, 4, torch.float64)
    assert few.key_lengths is terms.key_lengths


def test_launches_that_are_tried() -> None:
    from benchmarks.linear_launches import candidates, changed
    from postgen.kernels.linear_attention.triton_launch import LAUNCHES, Launch

    whole = [Launch(**each) for each in candidates("queries", described=True)]
    assert len(set(whole)) == len(whole) == 42
    assert all(how.described for how in whole)
    assert not any(each.get("described") for each in candidates("queries"))
    assert [each.name for each in changed(LAUNCHES["keys", 64])] == ["warps", "stages", "programs"]
