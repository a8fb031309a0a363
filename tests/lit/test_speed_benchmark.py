"""`benchmarks.lit_speed` and `lit_parts`: the compared models, the rows, the derived numbers and the gates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import lit_parts, lit_tables
from benchmarks import lit_speed as benchmark
from benchmarks.gates import read_result
from benchmarks.lit_checks import FAMILIES, STREAMS, family_converts, resumes_to_the_same, stream_memory
from benchmarks.lit_models import KINDS, LARGE, PLANS, SMALL, TINY, TINY_CLIP, Built, density
from postgen.families.installed import installed
from postgen.kernels.attention import ops
from postgen.lit import WindowOptions, layers_of, set_grid
from postgen.lit.layers import Shape, make_layer


@pytest.fixture(scope="module")
def built() -> Built:
    return Built(TINY, TINY_CLIP.grid, TINY.layers, "cpu", fused=True)


@pytest.mark.parametrize("plan", [PLANS[0], PLANS[2]], ids=lambda plan: plan.kind)
@torch.no_grad()
def test_a_side_is_what_it_says(built: Built, plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the plan have its type, and others run the router's softmax; both sides fuse the same operations."""
    routed: list[int] = []
    run = ops._run
    monkeypatch.setattr(ops, "_run", lambda call, name: routed.append(call.key.shape[1]) or run(call, name))
    tokens, model = TINY_CLIP.grid.tokens, built.transformer
    with built.side(None) as fused:
        stock, counts = built.step(), fused.stats()[""]
    assert routed == [tokens] * TINY.layers
    assert counts == {"norm_rope": TINY.layers, "adaln": TINY.layers, "attention": TINY.layers}
    routed.clear()
    config = KINDS[plan.kind].config(plan.where, TINY_CLIP.grid)
    with built.side(config) as fused:
        converted = benchmark.converted_blocks(config, TINY.layers)
        soft = TINY.layers - len(converted)
        kinds = {name: layer.kind for name, layer in layers_of(model).items()}
        assert kinds == {f"blocks.{block}.attn1": KINDS[plan.kind].kind for block in converted}
        assert fused.stats()[""] == {"norm_rope": soft, "adaln": TINY.layers, "attention": soft}
        assert not torch.equal(built.step(), stock)
    assert routed.count(tokens) == soft
    with built.side(None):
        assert torch.equal(built.step(), stock)
    assert not installed(model).plug_ins


@torch.no_grad()
def test_without_fused_operations_there_are_none_on_either_side() -> None:
    plain = Built(TINY, TINY_CLIP.grid, 2, "cpu", fused=False)
    config = KINDS["lit"].config("1:{}", TINY_CLIP.grid)
    for side, soft in ((None, 2), (config, 1)):
        with plain.side(side) as fused:
            assert fused.stats()[""] == {"attention": soft}


@torch.no_grad()
def test_what_is_timed_is_the_second_block_of_the_step(built: Built) -> None:
    outputs: dict[str, torch.Tensor] = {}
    block: Any = built.blocks[1]
    parts = {"block": block, "layer": block.attn1}
    with built.side(None):
        hooks = [
            module.register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
            for name, module in parts.items()
        ]
        calls = built.calls()
        for hook in hooks:
            hook.remove()
        assert all(torch.equal(calls[name](), outputs[name]) for name in parts)
    grid = TINY_CLIP.grid
    with built.side(KINDS["window_delta radius 1"].config("1:{}", grid)):
        set_grid(built.transformer, grid)
        (layer,) = layers_of(built.transformer).values()
        seen: list[Any] = []
        layer.register_forward_hook(lambda *_: seen.append(1))
        assert not torch.equal(calls["layer"](), outputs["layer"])
        assert seen == [1]
        assert density(layer, grid) == pytest.approx((5 * 3 + 2 * 2) / 49)


def test_a_run_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "REPEATS", 1)
    monkeypatch.setattr(benchmark, "KINDS", {kind: KINDS[kind] for kind in ("lit", "window_delta radius 2")})
    out = tmp_path / "speed.json"
    assert benchmark.main(["--device", "cpu", "--only", "tiny", "-o", str(out)]) == 0
    result = json.loads(out.read_text())
    rows = {(row["part"], row.get("kind")): row for row in result["rows"]}
    assert [*rows] == [
        ("layer", "softmax"),
        ("step", None),
        *((part, kind) for kind in ("lit", "window_delta radius 2") for part in ("layer", "step")),
    ]
    soft, lit = rows["layer", "softmax"], rows["layer", "lit"]
    assert lit["block_speed_up"] == soft["block_ms"] / lit["block_ms"]
    stock, half = rows["step", None], rows["step", "lit"]
    assert (half["how"], half["converted_blocks"], half["converted_share"]) == (benchmark.WHOLE, 2, 0.5)
    assert stock["attention_share"] == TINY.layers * soft["alone_ms"] / stock["ms"]
    assert half["composed_ms"] == pytest.approx(stock["rest_ms"] + 2 * soft["block_ms"] + 2 * lit["block_ms"])
    assert half["over_ceiling"] == pytest.approx(
        stock["ms"] / half["ms"] * (1 - stock["attention_share"] * half["converted_share"])
    )
    both = tmp_path / "both.json"
    assert benchmark.main(["--join", str(out), str(out), "-o", str(both)]) == 0
    joined = json.loads(both.read_text())
    assert (joined["rows"], joined["gates"], len(joined["measured"])) == (result["rows"], result["gates"], 2)


def test_the_gate_has_a_plan_that_is_sparse_enough() -> None:
    """Both densities are below the limit: .224 in the windows, and .341 with the blocks that stay softmax."""
    plan, grid = PLANS[1], next(each.grid for each in benchmark.PARTS["14b-720p"].clips)
    layer = make_layer(
        "window_delta", Shape(heads=1, channels=2, hidden=2), WindowOptions(radius=KINDS[plan.kind].radius)
    )
    converted = len(benchmark.converted_blocks(KINDS[plan.kind].config(plan.where, grid), LARGE.layers))
    assert converted == 34
    found = benchmark.densities(density(layer, grid), converted / LARGE.layers)
    assert found == {"density": pytest.approx(99 / 441), "plan_density": pytest.approx((34 * 99 / 441 + 6) / 40)}
    assert found["plan_density"] < benchmark.DENSEST
    assert benchmark.densities(None, 0.5) == {"density": None, "plan_density": None}


def test_parts_are_timed_with_and_without_kernels(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lit_parts, "REPEATS", 1)
    out = tmp_path / "parts.json"
    assert lit_parts.main(["--device", "cpu", "-o", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    written = json.loads(out.read_text())
    assert [lit_parts.line(row) for row in written["rows"]] == lines
    assert (written["model"], written["clip"], written["repeats"], written["gates"]) == (TINY.name, "tiny", 1, [])
    compared = [line for line in lines if "kernels" in line]
    assert sum(line.startswith("layer, ") for line in compared) == len(KINDS)
    # On a CPU no kernel runs, so both sides compute the same.
    assert len(compared) > len(KINDS) + 5
    assert all(line.endswith("differ by 0.0e+00") for line in compared)
    assert lit_parts.main(["--device", "cpu", "-o", "lit_parts"]) == 2
    assert "must not replace" in capsys.readouterr().err


def test_the_page_has_the_numbers_of_the_results() -> None:
    page = (Path(__file__).parents[2] / "docs" / "lit.md").read_text(encoding="utf-8")
    printed = "\n".join(lit_tables.tables()).strip("\n").split("\n\n")
    assert len(printed) == 7
    assert not [table for table in printed if f"\n\n{table}\n\n" not in page]
    found = {each["name"]: each["value"] for each in read_result("lit_speed")["gates"]}
    large, small = (found[f"step_over_ceiling_{model}_720p"] for model in ("14b", "1p3b"))
    assert f"Half `lit` reaches {large:.3f} (14B) and {small:.3f} (1.3B) of the upper bound" in page
    assert f"is {found['window_delta_step_14b_720p']:.2f} times as fast" in page


def test_crossings() -> None:
    found = benchmark.crossing
    assert found([(100, 0.5), (400, 2.0), (800, 3.0)]) == {"tokens": 200, "at_most": False}
    assert found([(100, 1.5), (400, 2.0)]) == {"tokens": 100, "at_most": True}
    assert found([(100, 1.5), (400, 0.9)]) == {"tokens": None, "at_most": False}
    row = {"part": "layer", "model": "a", "kind": "lit", "clip": "480p 9f", "tokens": 100}
    rows = [{**row, "layer_speed_up": 0.5}, {**row, "clip": "480p 21f", "tokens": 400, "layer_speed_up": 2.0}]
    rows += [{**row, "clip": "720p 21f", "tokens": 800, "layer_speed_up": 0.1}, {**row, "failed": "out of memory"}]
    assert benchmark.crossings(rows) == [{"model": "a", "kind": "lit", "tokens": 200, "at_most": False}]


def test_gates() -> None:
    def step(model: str, plan: Any, **values: Any) -> benchmark.Row:
        row = {"part": "step", "model": model, "clip": "720p 81f", "plan": plan.name, "kind": plan.kind, "ms": 1.0}
        return {**row, "how": benchmark.WHOLE, "plan_density": None, **values}

    lit, narrow, wide = PLANS[:3]
    rows = [{"part": "check", "check": name, "value": 1} for name in ("memory_constant", "resume_identical")]
    rows += [{"part": "check", "check": "families_converted", "value": 8}]
    rows += [step(LARGE.name, lit, over_ceiling=0.96), step(SMALL.name, lit, over_ceiling=0.9)]
    rows += [step(LARGE.name, narrow, speed_up=1.4, plan_density=0.3)]
    rows += [step(LARGE.name, wide, speed_up=1.6, plan_density=0.4)]
    # Sums of parts and rows without a time (out of memory) do not count for gates.
    rows += [step(SMALL.name, lit, over_ceiling=0.99, how=benchmark.ADDED_UP), step(LARGE.name, wide, ms=None)]
    found = {each["name"]: (each["value"], each["ok"]) for each in benchmark.gates(rows)}
    assert found == {
        "families_converted": (8, True),
        "step_over_ceiling_14b_720p": (0.96, True),
        "step_over_ceiling_1p3b_720p": (0.9, False),
        "window_delta_step_14b_720p": (1.4, True),
        "memory_constant": (1, True),
        "resume_identical": (1, True),
    }
    assert not any(each["ok"] for each in benchmark.gates([]))


def test_checks(tmp_path: Path) -> None:
    assert len(FAMILIES) == 8
    assert family_converts("PixArt") == ""
    for kind in STREAMS:
        found = stream_memory(kind, "cpu")
        assert found["short"] == found["long"], kind
        assert found["short"]["state_bytes"] > 0
    assert resumes_to_the_same(tmp_path, start="fork")


def test_clips_are_those_of_the_issue() -> None:
    clips = {each.name: each.grid.tokens for part in benchmark.PARTS.values() for each in part.clips}
    assert (clips["480p 81f"], clips["720p 81f"], clips["480p 333f"]) == (32760, 75600, 4 * 32760)
    assert (clips["720p 333f"], clips["720p 553f"]) == (4 * 75600, 500400)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--only", "all"], "--only has unknown parts all. Known: checks, curve"),
        (["--device", "cpu", "--only", "14b-720p", "-o", "a.json"], "needs a GPU; the CPU supports checks, tiny"),
        (["--device", "cpu"], "name another file"),
        (["--device", "cpu", "--quick"], "--quick needs a GPU"),
        (["--device", "cpu", "--kinds", "wide", "-o", "a.json"], "unknown layer types wide. Known: lit, window_delta"),
        (["--join", "a.json", "--plain"], "--join measures nothing"),
        (["--join", "none.json"], "none.json cannot be read"),
    ],
)
def test_what_cannot_be(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(argv) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
