"""The benchmark of kernels compares functions with equal results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import fused_step, linear_launches, linear_profile, lit_parts, lit_speed
from benchmarks import kernels as benchmark
from benchmarks.bandwidth import Bandwidth
from benchmarks.kernels import Shape, adaln, gates, norm_rope, temporal_cfi

STAMP = {
    **{"date": "today", "device": "one", "versions": {}},
    **{"copy_tb_per_s": 4.2, "read_tb_per_s": 4.3, "write_tb_per_s": 4.0},
}
TINY = Shape(name="tiny", frames=3, places=4, heads=2, channels=8)
CASES = [
    temporal_cfi(TINY, device="cpu"),
    adaln(TINY, residual=False, device="cpu"),
    adaln(TINY, residual=True, device="cpu"),
    adaln(TINY, residual=True, per_token=True, device="cpu"),
    *[norm_rope(replace(TINY, name=name), device="cpu") for name in ("Wan", "HunyuanVideo", "CogVideoX", "LTX")],
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}, {case.shape}")
def test_the_peer_computes_the_same(case: benchmark.Case) -> None:
    inputs = tuple(x.float() for x in case.make())
    ours, eager = case.ours(*inputs), case.eager(*inputs)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}, {case.shape}")
def test_errors_are_those_of_bfloat16(case: benchmark.Case) -> None:
    assert 0 < benchmark.written_bytes(case, case.make()) < case.moved_bytes
    assert 0 < case.error() < (1e-4 if case.op == "temporal_cfi" else 4e-3)


def test_bytes_that_must_move() -> None:
    tokens, width = 12, 16
    assert CASES[0].moved_bytes == 2 * tokens * width * 2
    assert CASES[1].moved_bytes == 2 * tokens * width * 2 + 2 * width * 4
    assert CASES[3].moved_bytes == 4 * tokens * width * 2 + 3 * tokens * width * 4
    assert CASES[4].moved_bytes == 4 * tokens * width * 2 + 2 * tokens * 8 * 4 + 2 * width * 2
    assert CASES[7].moved_bytes == 4 * tokens * width * 2 + 2 * tokens * width * 4 + 2 * width * 2


def test_gates_take_the_worst_shape() -> None:
    row: dict[str, Any] = {
        "over_floor": 1.1, "extra_mib": 0.1, "vs_eager": 9.0, "vs_compiled": 2.0, "relative_error": 1e-5
    }  # fmt: skip
    slow = {**row, "over_floor": 1.5, "vs_compiled": 0.9}
    rows = [{**row, "op": "temporal_cfi"}, {**row, "op": "adaln x"}, {**slow, "op": "adaln y"}]
    rows += [{**row, "op": "norm_rope"}, {**row, "op": "norm_rope", "vs_liger": 0.8}]
    found = {each["name"]: each["ok"] for each in gates(rows)}
    assert found.pop("adaln_over_floor") is False
    assert found.pop("adaln_vs_best_peer") is False
    assert found.pop("norm_rope_vs_best_peer") is False
    assert all(found.values())
    assert len(found) == 7


def test_results_are_joined_and_the_last_row_counts(tmp_path: Path) -> None:
    linear = {"over_floor": 1.0, "vs_sana": 11.0, "vs_compiled": 3.0, "relative_error": 1e-3}
    row = {"over_floor": 1.1, "extra_mib": 0.1, "vs_eager": 9.0, "vs_compiled": 2.0, "relative_error": 1e-5}
    ops = ("linear_attention", "linear_attention + convolution", "linear_attention backward")
    rows: list[dict[str, Any]] = [{**row, "op": op} for op in ("temporal_cfi", "adaln x", "norm_rope")]
    rows += [{**linear, "op": op} for op in ops]
    rows += [
        {"op": "attention", "shape": "Wan 14B", "backends_ms": {}, "router_vs_best": 1.0, "router_vs_default": 1.2}
    ]
    rows[-1]["relative_error"] = 1e-3
    rows = [{"shape": "Wan", **each} for each in rows]
    rows[3]["over_floor"] = 9.0
    again = {**rows[3], "over_floor": 1.2}
    stamp = STAMP
    overhead = {"op": "enhance_a_video", "shape": "Wan", "overhead": 0.004}
    one, two, both = (tmp_path / name for name in ("one.json", "two.json", "both.json"))
    one.write_text(json.dumps({**stamp, "rows": [*rows, overhead]}))
    other = [{**each, "shape": "LTX"} for each in rows if each["op"] == "temporal_cfi"]
    two.write_text(json.dumps({**stamp, "device": "other", "rows": [again, *other]}))
    assert benchmark.main(["--join", str(one), str(two), "-o", str(both)]) == 0
    found = json.loads(both.read_text())
    assert [each["device"] for each in found["measured"]] == ["one", "other"]
    assert len(found["rows"]) == len(rows) + 2
    values = {each["name"]: each["value"] for each in found["gates"]}
    assert values["linear_fwd_over_floor"] == 1.2
    assert values["eav_step_overhead"] == 0.004


def test_a_joined_result_is_joined_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"op": "temporal_cfi", "shape": "Wan", "over_floor": 1.1, "extra_mib": 0.1, "vs_eager": 9.0}
    row |= {"relative_error": 1e-5, "ours_ms": 2.0, "moved_bytes": 8_000_000_000, "written_bytes": 4_000_000_000}
    names = ("one", "fast", "new", "both", "all", "mixed")
    one, fast, new, both, whole, mixed = (tmp_path / f"{name}.json" for name in names)
    one.write_text(json.dumps({**STAMP, "rows": [row]}))
    fast.write_text(json.dumps({**STAMP, "copy_tb_per_s": 5.0, "rows": [{**row, "shape": "LTX"}]}))
    new.write_text(json.dumps({**STAMP, "rows": [{**row, "ours_ms": 1.9}]}))
    for files, out in (((one, fast), both), ((both, new), whole), ((one, fast, new), mixed)):
        assert benchmark.main(["--join", *map(str, files), "-o", str(out)]) == 0
    found, straight = (json.loads(path.read_text()) for path in (whole, mixed))
    assert found["rows"] == straight["rows"]
    assert found["measured"] == straight["measured"]
    mixed.write_text(json.dumps({**found, "measured": [STAMP, {**STAMP, "device": "other"}]}))
    assert benchmark.main(["--join", str(mixed), "-o", str(both)]) == 2
    assert "joins runs of several devices, one, other: give one file per run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "is not a result of benchmarks.kernels: JSONDecodeError"),
        ("[]", "is not a result of benchmarks.kernels"),
        ('{"gates": []}', "is not a result of benchmarks.kernels: KeyError"),
        (json.dumps({**STAMP, "rows": [{"op": "x"}]}), "KeyError('shape')"),
        (
            json.dumps({**STAMP, "rows": [{"op": "temporal_cfi", "shape": "x", "over_floor": 1}]}),
            "KeyError('extra_mib')",
        ),
    ],
)
def test_files_that_cannot_be_joined(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, out = tmp_path / "broken.json", tmp_path / "out.json"
    if text is not None:
        broken.write_text(text)
    assert benchmark.main(["--join", str(broken), "-o", str(out)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith(str(broken))
    assert said.count("\n") == 1
    assert not out.exists()


def test_a_row_faster_than_its_floor_fails_the_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part, out = tmp_path / "part.json", tmp_path / "out.json"
    row = {"op": "temporal_cfi", "shape": "Wan", "over_floor": 0.98, "extra_mib": 0.1, "vs_eager": 9.0}
    part.write_text(json.dumps({**STAMP, "rows": [{**row, "relative_error": 1e-5}]}))
    assert benchmark.main(["--join", str(part), "-o", str(out)]) == 2
    assert "faster than their floors, so the floors are wrong: temporal_cfi at Wan (0.980)" in capsys.readouterr().err
    assert not out.exists()


def test_floors_of_joined_rows_are_of_the_best_rates_of_their_device(tmp_path: Path) -> None:
    slow, fast, other = (
        {**STAMP, "device": device, "copy_tb_per_s": copy, "rows": rows}
        for device, copy, rows in [("H200", 4.0, []), ("H200", 4.2, []), ("H100", 5.0, [])]
    )
    # Reading and writing 8.4 GB takes 2 ms at 4.2 TB/s. Only reading 8.6 GB takes equally long.
    row = {"op": "adaln x", "ours_ms": 2.05, "over_floor": 0.98, "vs_compiled": 2.0, "relative_error": 1e-5}
    slow["rows"] = [
        {**row, "shape": "copy", "moved_bytes": 84 * 10**8, "written_bytes": 42 * 10**8},
        {**row, "shape": "read", "moved_bytes": 86 * 10**8, "written_bytes": 0},
        {**row, "shape": "old", "over_floor": 1.5},
    ]
    paths = [tmp_path / f"{name}.json" for name in "abc"]
    for path, each in zip(paths, (slow, fast, other), strict=True):
        path.write_text(json.dumps(each))
    assert benchmark.main(["--join", *map(str, paths), "-o", str(tmp_path / "out.json")]) == 0
    found = {each["shape"]: each for each in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert found["copy"]["floor_ms"] == pytest.approx(2.0)
    assert found["copy"]["over_floor"] == found["read"]["over_floor"] == pytest.approx(1.025)
    assert found["old"]["over_floor"] == 1.5


def test_the_bandwidth_is_a_gate_on_an_h200_alone() -> None:
    def rate(*devices: str) -> list[Any]:
        found = benchmark.all_gates([], [{**STAMP, "device": device} for device in devices])
        return [(each["value"], each["ok"]) for each in found if each["name"] == "copy_tb_per_s"]

    assert rate("NVIDIA H200", "NVIDIA H200") == [(4.2, True)]
    assert rate("NVIDIA H100") == rate("NVIDIA H200", "NVIDIA H100") == []


def test_floors_count_what_is_written_as_copied_and_the_rest_as_read_or_written() -> None:
    rates = Bandwidth(copy=4.2e9, read=4.4e9, write=4.6e9)
    assert rates.floor(int(4.2e9), int(2.1e9)) == 1.0
    assert rates.floor(int(4.4e9), 0) == 1.0
    assert rates.floor(int(8.6e9), int(2.1e9)) == pytest.approx(2.0)
    assert rates.floor(int(8.8e9), int(6.7e9)) == pytest.approx(2.0)
    assert rates.told() == {"copy_tb_per_s": 4.2, "read_tb_per_s": 4.4, "write_tb_per_s": 4.6}


def test_what_no_file_has_measured_passes_no_gate(tmp_path: Path) -> None:
    part, out = tmp_path / "part.json", tmp_path / "out.json"
    row = {"op": "temporal_cfi", "shape": "Wan", "over_floor": 1.0, "extra_mib": 0.1, "vs_eager": 9.0}
    stamp = STAMP
    part.write_text(json.dumps({**stamp, "rows": [{**row, "relative_error": 1e-5}]}))
    assert benchmark.main(["--join", str(part), "-o", str(out)]) == 0
    found = {each["name"]: each["ok"] for each in json.loads(out.read_text())["gates"]}
    assert {name for name, ok in found.items() if ok} == {name for name in found if name.startswith("cfi_")}
    assert len(found) == 26


def test_operations_that_there_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--only", "temporal_cfi", "adaln"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "--only adaln: unknown, choose from adaln gate + residual + norm + modulate, adaln norm + modulate, "
    )
    assert benchmark.main(["--only", "temporal_cfi", "--join", "a.json"]) == 2
    assert "omit one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--channels", "16"], "--channels 16: the table has launches for even numbers from 34 to 256"),
        (["--channels", "258"], "--channels 258"),
        (["--heads", "0"], "must be at least 1"),
        (["--only", "convolution"], "need --conv"),
        (["--only", "keys", "--conv"], "no other passes"),
        (["--described", "--conv"], "do not copy whole tiles"),
    ],
)
def test_launches_of_passes_that_there_are_not(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert linear_launches.main(options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "main",
    [benchmark.main, linear_launches.main, linear_profile.main, fused_step.main, lit_speed.main, lit_parts.main],
)
def test_without_a_gpu(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.endswith(" needs a GPU: torch sees none\n")


def test_the_chart_shows_ours_first_then_the_fastest(tmp_path: Path) -> None:
    from benchmarks.kernel_chart import bars, draw

    timed = {"op": "adaln norm + modulate", "shape": "A, modulation per sample", "ours_ms": 0.8, "floor_ms": 1.0}
    row = {**timed, "eager_ms": 9.0, "compiled_ms": 2.0, "over_floor": 0.8}
    assert [name for name, _ in bars(row)] == ["floor", "ours", "compiled", "eager"]
    routed = {"op": "attention", "shape": "A", "chosen": "fa4", "ours_ms": 3.0, "default_ms": 5.0}
    routed["backends_ms"] = {"fa4": 3.1, "flash": 4.0}
    assert bars(routed) == [("ours: fa4", 3.0), ("flash", 4.0), ("torch's default", 5.0)]
    draw([row, routed], "A", tmp_path / "chart.png")
    picture = Image.open(tmp_path / "chart.png").convert("RGB")
    assert {(30, 110, 60), (110, 150, 210)} <= {colour for _, colour in picture.getcolors(1 << 20) or ()}
    with pytest.raises(ValueError, match="no rows of shape 'B': choose from A"):
        draw([row, routed], "B", tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()
