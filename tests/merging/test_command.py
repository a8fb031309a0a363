"""`postgen merge` on folders, networks, files, runs and LoRAs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from postgen.merging.posthoc_ema import gamma_of, power_weights
from postgen.tensor_files import read_tensors
from tests.grpo.test_lora import video_run
from tests.merging.models import FILE, moved, networks, tensors, weights_in

LORA = "pytorch_lora_weights.safetensors"


def _run(model: Path, folder: Path, **changes: Any) -> Path:
    run = video_run(model, folder, save_steps=1, max_steps=4, save_total_limit=3, num_inference_steps=2, **changes)
    run.train()
    return folder / "run"


@pytest.fixture(scope="module")
def full_run(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that trained all weights, with the checkpoints 2, 3 and 4."""
    return _run(tiny_wan, tmp_path_factory.mktemp("full"), use_peft=False)


@pytest.fixture(scope="module")
def lora_run(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that trained a LoRA, with the checkpoints 2, 3 and 4."""
    return _run(tiny_wan, tmp_path_factory.mktemp("lora"))


def change(folder: Path) -> dict[str, torch.Tensor]:
    """Return the change of each layer by a LoRA file of diffusers."""
    file = folder if folder.is_file() else folder / LORA
    weights = load_file(file)
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        settings = json.loads(content.metadata()["lora_adapter_metadata"])
    scale = settings["transformer.lora_alpha"] / settings["transformer.r"]
    ups = {name.removesuffix(".lora_B.weight"): value for name, value in weights.items() if "lora_B" in name}
    return {name: scale * up.double() @ weights[f"{name}.lora_A.weight"].double() for name, up in ups.items()}


def test_the_last_checkpoints_of_a_run_become_a_model(
    full_run: Path, tiny_wan: Path, tmp_path: Path, cli: Any
) -> None:
    done = cli("merge", full_run, "--last", "2", "-o", tmp_path / "out", "--method", "wma")
    assert done.code == 0, done.err
    assert "checkpoint-4" in done.out
    assert "checkpoint-2" not in done.out
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert [source["step"] for source in report["sources"]] == [3, 4]
    assert [source["weight"] for source in report["sources"]] == pytest.approx([1 / 3, 2 / 3])
    assert report["curve"] == pytest.approx([2 / 3])
    found = weights_in(tmp_path / "out" / "transformer")
    three, four = (read_tensors(full_run / f"checkpoint-{step}" / "weights.safetensors") for step in (3, 4))
    for name, value in found.items():
        mean = (three[f"transformer.{name}"].double() + 2 * four[f"transformer.{name}"].double()) / 3
        torch.testing.assert_close(value.double(), mean, atol=1e-6, rtol=1e-6)
    assert found.keys() == weights_in(full_run / "export" / "transformer").keys()
    words = ["--size", "32x16", "--frames", "5", "--steps", "1", "-o", tmp_path / "x.gif"]
    assert cli("generate", "a", "--model", tmp_path / "out", *words).code == 0
    again = video_run(tiny_wan, tmp_path / "more", use_peft=False, init_from=str(tmp_path / "out"), max_steps=1)
    again.train()


@pytest.mark.parametrize("settings", [{"use_peft": False}, {"lora_r": 4, "lora_alpha": 4}, {"lora_r": 4}])
def test_a_merge_of_files_is_the_merge_at_the_end_of_the_run(
    settings: dict[str, Any], tiny_wan: Path, tmp_path: Path, cli: Any
) -> None:
    run = _run(tiny_wan, tmp_path, merge_last=3, merge_kind="wma", merge_keep="always", **settings)
    rank = [] if "use_peft" in settings else ["--rank", "4"]
    done = cli("merge", run, "--last", "3", "-o", tmp_path / "out", "--method", "wma", *rank)
    assert done.code == 0, done.err
    if not rank:
        found, wanted = (weights_in(folder / "transformer") for folder in (tmp_path / "out", run / "export"))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in found.items())
        return
    found, wanted = change(tmp_path / "out"), change(run / "export")
    if "lora_alpha" in settings:  # the scale of the run is 1, as that of every merged file
        assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    assert found.keys() == wanted.keys()
    assert all((value - wanted[name]).norm() <= 1e-6 * wanted[name].norm() for name, value in found.items())


def test_checkpoints_between_a_base_and_their_mean(full_run: Path, tiny_wan: Path, tmp_path: Path, cli: Any) -> None:
    words = ["--base", tiny_wan / "transformer", "--eta", "0.5", "--dtype", "bfloat16"]
    done = cli("merge", full_run, "-o", tmp_path / "out", *words)
    assert done.code == 0, done.err
    base = weights_in(tiny_wan / "transformer")
    runs = [read_tensors(full_run / f"checkpoint-{step}" / "weights.safetensors") for step in (2, 3, 4)]
    for name, value in weights_in(tmp_path / "out" / "transformer").items():
        mean = sum(run[f"transformer.{name}"].double() for run in runs) / 3
        wanted = (base[name].double() + mean) / 2
        torch.testing.assert_close(value.double(), wanted, atol=1e-2, rtol=1e-2)
        assert value.dtype is torch.bfloat16
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert report["base"]["weight"] == 0.5
    assert -1 <= report["mean_cosine"] <= 1
    assert report["sources"][0]["to_base"] > 0


def test_checkpoints_that_lack_frozen_weights_are_filled(full_run: Path, tmp_path: Path, cli: Any) -> None:
    run = shutil.copytree(full_run, tmp_path / "run")
    for step in (2, 3):
        _without(run / f"checkpoint-{step}", "transformer.proj_out.weight")
    shutil.rmtree(run / "checkpoint-4")
    assert cli("merge", run, "-o", tmp_path / "out").code == 0
    found = weights_in(tmp_path / "out" / "transformer")
    export = weights_in(full_run / "export" / "transformer")
    assert found.keys() == export.keys()
    assert torch.equal(found["proj_out.weight"], export["proj_out.weight"])


def _without(checkpoint: Path, name: str) -> None:
    """Remove a tensor from a checkpoint, as if it had not been trained."""
    from postgen.training import checkpoint as files

    snapshot = files.read(checkpoint)
    del snapshot.weights[name]
    shutil.rmtree(checkpoint)
    files.write(checkpoint.parent, snapshot)


@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_checkpoints_of_a_lora_are_merged_exactly(lora_run: Path, tmp_path: Path, cli: Any, output: str) -> None:
    done = cli("merge", lora_run, "-o", tmp_path / output)
    assert done.code == 0, done.err
    assert "100 % of the change kept" in done.out
    merged = change(tmp_path / output)
    scale = 64 / 2
    for layer, value in merged.items():
        wanted = torch.zeros_like(value)
        for step in (2, 3, 4):
            weights = read_tensors(lora_run / f"checkpoint-{step}" / "weights.safetensors")
            up, down = (weights[f"{layer}.lora_{side}.default.weight"].double() for side in ("B", "A"))
            wanted += scale * up @ down / 3
        torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-5)
    told = tmp_path / ("out/merge.json" if output == "out" else "out.merge.json")
    report = json.loads(told.read_text())
    assert report["lora"]["lora"]["rank"] == 6
    assert report["sources"][0]["to_merged"] > 0
    assert -1 <= report["mean_cosine"] <= 1


def test_a_merged_lora_loads_and_keeps_its_strength(lora_run: Path, tiny_wan: Path, tmp_path: Path, cli: Any) -> None:
    assert cli("merge", lora_run / "export", "-o", tmp_path / "same").code == 0
    assert cli("merge", lora_run, "-o", tmp_path / "half", "--last", "1", "--eta", "0.5", "--rank", "2").code == 0
    whole, half = change(tmp_path / "same"), change(tmp_path / "half")
    for name, value in whole.items():
        torch.testing.assert_close(half[name], value / 2, atol=1e-6, rtol=1e-5)
    words = ["--size", "32x16", "--frames", "5", "--steps", "1", "--model", tiny_wan, "-o", tmp_path / "x.gif"]
    assert cli("generate", "a", "--lora", tmp_path / "half", *words).code == 0


def test_loras_are_added_without_a_base(lora_run: Path, tmp_path: Path, cli: Any) -> None:
    both = [lora_run / "checkpoint-3", lora_run / "checkpoint-4"]
    assert cli("merge", *both, "-o", tmp_path / "sum", "--method", "add", "--weights", "1,-0.5").code == 0
    assert cli("merge", both[0], "-o", tmp_path / "less", "--method", "negate").code == 0
    for step in (3, 4):
        assert cli("merge", lora_run / f"checkpoint-{step}", "-o", tmp_path / str(step)).code == 0
    three, four = change(tmp_path / "3"), change(tmp_path / "4")
    total, less = change(tmp_path / "sum"), change(tmp_path / "less")
    for name, value in three.items():
        torch.testing.assert_close(total[name], value - 0.5 * four[name], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(less[name], -value, atol=1e-5, rtol=1e-5)


def test_the_angles_of_loras_are_those_of_dense_changes(lora_run: Path, tmp_path: Path, cli: Any) -> None:
    assert cli("merge", lora_run, "-o", tmp_path / "out", "--method", "wma").code == 0
    every = []
    for step in (2, 3, 4):
        weights = read_tensors(lora_run / f"checkpoint-{step}" / "weights.safetensors")
        layers = sorted(name.partition(".lora_B")[0] for name in weights if ".lora_B." in name)
        pairs = [[weights[f"{n}.lora_{side}.default.weight"].double() for side in "BA"] for n in layers]
        every.append(torch.cat([(32 * up @ down).flatten() for up, down in pairs]))
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    steps = [every[1] - every[0], every[2] - every[1]]
    assert report["mean_cosine"] == pytest.approx(float(torch.cosine_similarity(*steps, dim=0)), abs=1e-4)
    assert report["sources"][0]["to_next"] == pytest.approx(float(steps[0].norm()), rel=1e-4)
    mean = (every[0] + 2 * every[1] + 3 * every[2]) / 6
    assert report["sources"][2]["to_merged"] == pytest.approx(float((every[2] - mean).norm()), rel=1e-3)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "magnitude_prune"])
def test_methods_of_peft_for_loras(lora_run: Path, tmp_path: Path, cli: Any, method: str) -> None:
    words = ["--method", method, "--density", "0.7", "--weights", "2,1,1"]
    done = cli("merge", lora_run, "-o", tmp_path / "out.safetensors", *words)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out.merge.json").read_text())
    assert [source["weight"] for source in report["sources"]] == [0.5, 0.25, 0.25]


def test_a_run_that_trains_more_than_a_lora_is_refused(lora_run: Path, tmp_path: Path, cli: Any) -> None:
    from postgen.training import checkpoint as files

    run = shutil.copytree(lora_run, tmp_path / "run")
    snapshot = files.read(run / "checkpoint-4")
    snapshot.weights["transformer.buffer"] = torch.ones(2)
    shutil.rmtree(run / "checkpoint-4")
    files.write(run, snapshot)
    assert cli("merge", run, "-o", tmp_path / "out", "--last", "1").code == 0
    snapshot.weights["transformer.more.weight"] = torch.ones(2)
    snapshot.optimizer["transformer.more.weight|exp_avg"] = torch.ones(2)
    shutil.rmtree(run / "checkpoint-4")
    files.write(run, snapshot)
    done = cli("merge", run, "-o", tmp_path / "more")
    assert (done.code, "such as transformer.more.weight" in done.err, done.err.count("\n")) == (2, True, 1)


def test_power_weights_use_the_steps_of_the_checkpoints(full_run: Path, tmp_path: Path, cli: Any) -> None:
    done = cli("merge", full_run, "-o", tmp_path / "out", "--method", "power", "--sigma-rel", "0.2")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    weights = [source["weight"] for source in report["sources"]]
    assert weights == pytest.approx(power_weights([2, 3, 4], gamma_of(0.2)))


def test_checkpoints_in_another_order_and_too_few(full_run: Path, tmp_path: Path, cli: Any) -> None:
    two, four = full_run / "checkpoint-2", full_run / "checkpoint-4"
    done = cli("merge", four, two, "-o", tmp_path / "out", "--method", "wma")
    assert (done.code, "in the order of their steps" in done.err, done.err.count("\n")) == (2, True, 1)
    assert cli("merge", four, two, "-o", tmp_path / "out").code == 0  # the mean does not depend on the order
    done = cli("merge", full_run, "-o", tmp_path / "few", "--last", "9")
    assert (done.code, "has 3 complete checkpoints, --last asks for 9" in done.err) == (2, True)
    done = cli("merge", two, "-o", tmp_path / "few", "--base", full_run, "--eta", "0.5")
    assert (done.code, "give one of its checkpoints" in done.err) == (2, True)


def test_checkpoints_of_a_rescued_spike_are_left_out(full_run: Path, tmp_path: Path, cli: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(full_run, run)
    head = json.loads((run / "checkpoint-4" / "state.json").read_text())
    head["meta"]["spikes"]["spiked"] = [[3, 3]]
    (run / "checkpoint-4" / "state.json").write_text(json.dumps(head))
    assert cli("merge", run, "-o", tmp_path / "out").code == 0
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert [source["step"] for source in report["sources"]] == [2, 4]


def test_stored_averages_are_combined(tmp_path: Path, cli: Any) -> None:
    for number, (gamma, step) in enumerate([(6.94, 100), (16.97, 100), (6.94, 50)]):
        metadata = {"ema_gamma": str(gamma), "ema_step": str(step)}
        save_file(tensors(number), tmp_path / f"{number}.safetensors", metadata=metadata)
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    words = ["--method", "posthoc_ema", "--sigma-rel", "0.0500025"]  # of gamma 16.97
    done = cli("merge", *files, "-o", tmp_path / "out.safetensors", *words)
    assert done.code == 0, done.err
    found = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(found["in.weight"], tensors(1)["in.weight"], atol=1e-2, rtol=0)


def test_files_folders_and_methods(tmp_path: Path, tiny_wan: Path, cli: Any) -> None:
    one, two, three = networks(tmp_path, 3)
    file = tmp_path / "out.safetensors"
    assert cli("merge", one / FILE, two / FILE, "-o", file, "--method", "slerp", "--t", "0").code == 0
    torch.testing.assert_close(load_file(file)["in.weight"], tensors(0)["in.weight"])
    assert (tmp_path / "out.merge.json").is_file()
    curve = ["--method", "curve", "--curve", "1,0"]
    assert cli("merge", one, two, three, "-o", tmp_path / "curve", *curve).code == 0
    assert all(torch.equal(value, tensors(1)[name]) for name, value in weights_in(tmp_path / "curve").items())
    add = ["--method", "add", "--base", three, "--weights", "1,-1"]
    assert cli("merge", one, two, "-o", tmp_path / "curve", *add).code == 0  # replaces an earlier merge
    wanted = tensors(2)["in.weight"] + tensors(0)["in.weight"] - tensors(1)["in.weight"]
    torch.testing.assert_close(weights_in(tmp_path / "curve")["in.weight"], wanted)
    moved(tiny_wan, tmp_path / "wan", 1)
    done = cli("merge", tiny_wan, tmp_path / "wan", "-o", tmp_path / "both", "--method", "ema", "--alpha", "0.1")
    assert done.code == 0, done.err
    assert (tmp_path / "both" / "model_index.json").is_file()
    base = ["--base", tiny_wan, "--eta", "2"]
    assert cli("merge", tmp_path / "wan" / "transformer", "-o", tmp_path / "far", *base).code == 0
    assert cli("merge", tmp_path / "wan", "-o", tmp_path / "whole", *base).code == 0
    far = weights_in(tmp_path / "whole" / "transformer")
    assert all(torch.equal(value, far[name]) for name, value in weights_in(tmp_path / "far").items())
