"""`benchmarks.worldweaver_speed` with tiny models: its counts, and its gates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import worldweaver_speed
from benchmarks.worldweaver_systems import STEPS, TINY, Bench, ours, skyreels


@torch.no_grad()
def test_rows_of_tiny_models() -> None:
    bench = Bench(TINY, "cpu", 16)
    own, other = ours(bench), skyreels(bench)
    assert own["seconds_per_chunk"] == pytest.approx(3 * own["seconds_per_latent"])
    assert 0 < own["network_seconds_per_latent"] < own["seconds_per_latent"]
    assert own["settled_chunks"] == 11
    assert len(own["seconds"]) == 16
    # Our window has 15 latent frames of 16 tokens, that of SkyReels 5 here; text tokens account for the rest.
    more = 10 * 16 * 2 * (4 * 48**2 + 2 * 48**2 + 2 * 48 * 32) / 1e12
    assert own["teraflops_per_call"] - other["teraflops_per_call"] > more
    assert other["new_latents_per_window"] == 3
    assert other["seconds_per_window"] == pytest.approx(3 * other["seconds_per_latent"])


@torch.no_grad()
def test_number_types_are_those_of_loaded_models() -> None:
    bench = Bench(TINY, "cpu", 16)
    model = bench.transformer("WanTransformer3DModel")
    kinds = {name: value.dtype for name, value in model.named_parameters()}
    assert model.dtype == kinds["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert kinds["blocks.0.norm2.weight"] == kinds["scale_shift_table"] == torch.float32
    assert kinds["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    assert model.rope.freqs_cos.dtype == torch.float32


def test_gates_take_the_worse_size_and_join_keeps_the_last_row(tmp_path: Path) -> None:
    def row(size: str, system: str, seconds: float, time: float = 0.0, memory: float = 0.0) -> dict[str, object]:
        growth = {"time_growth": [time, time, time + 1], "memory_growth": [-1, -memory, -memory]}
        return {"model": size, "system": system, "seconds_per_latent": seconds, **growth}

    found = [row("1.3b", "worldweaver", 1.0), row("1.3b", "skyreels_v2", 2.0)]
    first = worldweaver_speed.gates(found)
    assert [each["value"] for each in first] == [0.5, 0, 0]
    assert all(each["ok"] for each in first)
    more = [row("14b", "worldweaver", 3.0, 0.01, 0.02), row("14b", "skyreels_v2", 2.0)]
    assert [each["value"] for each in worldweaver_speed.gates(found + more)] == [1.5, 0.01, 0.02]
    assert worldweaver_speed.gates([])[0]["value"] is None
    for name, part in {"a": found, "b": [row("1.3b", "worldweaver", 4.0)]}.items():
        stamp = {"date": name, "device": f"GPU {name}", "versions": {}}
        (tmp_path / f"{name}.json").write_text(json.dumps({**stamp, "rows": part, "gates": []}))
    out = tmp_path / "out.json"
    assert not worldweaver_speed.main(["--join", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "-o", str(out)])
    whole = json.loads(out.read_text())
    assert whole["gates"][0]["value"] == 2.0
    assert (whole["device"], whole["remeasured"]["1.3b/worldweaver"]["device"]) == ("GPU a", "GPU b")


@torch.no_grad()
def test_windows_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(TINY._replace(windows=1), "cpu", 16)
    assert skyreels(bench)["calls_per_latent"] == STEPS / 3
    monkeypatch.setitem(bench.call, "num_inference_steps", STEPS - 1)
    with pytest.raises(RuntimeError, match="got 5 forward passes, expected 6"):
        skyreels(bench)
