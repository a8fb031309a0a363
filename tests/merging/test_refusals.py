"""What `postgen merge` refuses: one line, exit code 2, and no output."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from tests.merging.models import FILE, moved, network, networks, tensors


def refused(cli: Any, folder: Path, *words: str | Path, output: str = "out") -> str:
    """Merge, and return the error message without the beginning."""
    done = cli("merge", *words, "-o", folder / output)
    # Errors in the values are found during the merge, when the bar is shown.
    lines = [line for line in done.err.splitlines() if line.strip() and not line.startswith("merging")]
    assert (done.code, len(lines)) == (2, 1), done.err
    assert lines[0].startswith("postgen: error: ")
    assert not (folder / output).exists()
    assert not list(folder.glob(".*part*"))
    return str(lines[0].removeprefix("postgen: error: "))


def lora(model: Path, folder: Path, rank: int = 2, layers: tuple[str, ...] = ("to_q",), **settings: Any) -> Path:
    """Write a LoRA with random weights."""
    from diffusers import WanPipeline, WanTransformer3DModel

    transformer = WanTransformer3DModel.from_pretrained(model, subfolder="transformer")
    config = LoraConfig(r=rank, target_modules=list(layers), init_lora_weights=False, **settings)
    transformer.add_adapter(config)
    WanPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    return folder


Change = Callable[[Path], Any]


def _weights(**changed: torch.Tensor) -> Change:
    return lambda folder: save_file({**tensors(1), **changed}, folder / FILE)


def _config(**changed: Any) -> Change:
    return lambda folder: (folder / "config.json").write_text(
        json.dumps({"_class_name": "Tiny", "width": 7, **changed})
    )


def _bytes(text: bytes) -> Change:
    return lambda folder: (folder / FILE).write_bytes(text)


def _other_format(folder: Path) -> None:
    (folder / FILE).rename(folder / "diffusion_pytorch_model.bin")


def _missing_shard(folder: Path) -> None:
    (folder / FILE).rename(folder / "diffusion_pytorch_model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_weights(more=torch.zeros(2)), "do not fit: 1 only in the second, such as more"),
        (lambda folder: save_file({"a": torch.zeros(1)}, folder / FILE), "5 tensors are only in the first"),
        (_weights(scale=torch.zeros(2)), "scale is [] and [2]"),
        (_weights(scale=torch.tensor(1.0).half()), "scale is F32 and F16 (--dtype merges different dtypes)"),
        (_weights(scale=torch.tensor(math.nan)), "holds NaN in scale: it is damaged, leave it out"),
        (_weights(scale=torch.tensor(math.inf)), "scale holds infinite values that differ"),
        (_weights(number=torch.tensor([1, 2])), "number is I64 and differs"),
        (_weights(**{"x.lora_A.weight": torch.zeros(1)}), "holds factors of a LoRA|only in the"),
        (_config(width=8), "differ in width (width: 7 and 8)"),
        (_config(quantization_config={"bits": 4}), "differ in quantization_config"),
        (lambda folder: (folder / "config.json").write_text("["), "config.json: it is not valid JSON"),
        (_bytes(b"no tensors"), "it is not a safetensors file, or it is damaged"),
        (_bytes(b""), "it is not a safetensors file, or it is damaged"),
        (_other_format, "it has diffusion_pytorch_model.bin, but only safetensors are read"),
        (_missing_shard, "has 1 of 2 shards"),
        (lambda folder: (folder / FILE).unlink(), "holds no *.safetensors"),
    ],
)
def test_networks_that_cannot_be_merged(tmp_path: Path, cli: Any, change: Change, message: str) -> None:
    one, two = networks(tmp_path, 2)
    change(two)
    told = refused(cli, tmp_path, one, two)
    assert any(part in told for part in message.split("|")), told


@pytest.mark.parametrize("factor", ["lora_A.weight", "hada_w1_a", "aux_up", "branch_up"])
def test_factors_of_loras_and_branches_are_not_averaged(tmp_path: Path, cli: Any, factor: str) -> None:
    both = [network(tmp_path / name, {f"x.{factor}": torch.randn(2, 3)}) for name in ("a", "b")]
    assert "the mean of factors is not the mean of their products" in refused(cli, tmp_path, *both)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["n0", "n1", "--method", "smaa"], "--method must be one of sma"),
        (["n0", "n1", "--eta", "0.5"], "eta 0.5 needs the model that the sources began from: give it with --base"),
        (["n0", "n1", "--method", "add"], "method add needs the model"),
        (["n0", "n1", "--base", "n2"], "method sma uses a base only with eta"),
        (["n0", "n0"], "n0 is given twice"),
        (["n0", "absent"], "there is no"),
        (["n0", "n1", "--last", "2"], "--last needs the folder of a run"),
        (["n0", "n1", "--method", "ties"], "method ties is for LoRA files"),
        (["n0", "n1", "--rank", "4"], "rank is for LoRA files"),
        (["n0", "n1", "n2", "--method", "slerp"], "slerp needs two sources, got 3"),
        (
            ["n0", "n1", "--method", "curve", "--curve", "0.5,0.6"],
            "--curve must have 1 numbers|--curve must not increase",
        ),
        (["n0", "n1", "--method", "curve", "--curve", "1.5"], "--curve must hold numbers from 0 to 1"),
        (["n0", "n1", "--method", "soup", "--weights", "1,x"], "--weights must be numbers with commas"),
        (["n0", "n1", "--method", "soup", "--weights", "1"], "--weights must be 2 numbers"),
        (["n0", "n1", "--method", "soup", "--weights", "1,-1"], "--weights must not be negative"),
        (["n0", "n1", "--method", "soup", "--weights", "0,0"], "--weights must not all be 0"),
        (["n0", "n1", "--method", "power", "--sigma-rel", "0.1"], "needs checkpoints of a run"),
        (["n0", "n1", "--method", "posthoc_ema", "--sigma-rel", "0.1"], "is no stored average"),
        (["n0", "n1", "--method", "power", "--sigma-rel", "3"], "--sigma-rel must be from 0.0001"),
        (["n0", "n1", "--alpha", "0.3"], "--alpha is not used by method sma, only by ema"),
        (["n0", "n1", "--dtype", "int8"], "--dtype must be one of float32"),
        (["n0", "n1", "--base", "other", "--eta", "0.5"], "the base"),
        (["n0", "n0/diffusion_pytorch_model.safetensors", "--base", "n1/config.json"], "is not a .safetensors file"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, cli: Any, words: list[str], message: str) -> None:
    networks(tmp_path, 3)
    network(tmp_path / "other", {"in.weight": torch.zeros(2, 2)})
    names = {path.name for path in tmp_path.iterdir()} | {"absent"}
    given = [str(tmp_path / word) if word.split("/")[0] in names else word for word in words]
    told = refused(cli, tmp_path, *given)
    assert any(part in told for part in message.split("|")), told


def test_outputs_that_are_refused(tmp_path: Path, cli: Any) -> None:
    one, two = networks(tmp_path, 2)
    words = ("merge", one, two, "-o")
    for output, message in (
        (one, "is not empty and not an earlier merge"),
        (one / "new", "is inside of"),
        (tmp_path / "x.safetensors", "the sources are folders: give a folder"),
        (Path("/proc/x"), "cannot write /proc/x"),
    ):
        done = cli(*words, output)
        assert (done.code, message in done.err) == (2, True), done.err
    done = cli("merge", one / FILE, two / FILE, "-o", tmp_path / "folder")
    assert "give the name of a .safetensors file" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n0", "n1"]
    assert sorted(path.name for path in one.iterdir()) == ["config.json", FILE]


def test_what_a_dtype_cannot_merge_does_not_advise_it(tmp_path: Path, cli: Any) -> None:
    one, two = networks(tmp_path, 2)
    save_file({**tensors(1), "scale": torch.tensor(1.0).to(torch.float8_e4m3fn)}, two / FILE)
    told = refused(cli, tmp_path, one, two)
    assert told.endswith("scale is F32 and F8_E4M3")
    assert refused(cli, tmp_path, one, two, "--dtype", "float32") == told


def test_a_folder_with_several_loras(tmp_path: Path, tiny_wan: Path, cli: Any) -> None:
    one = lora(tiny_wan, tmp_path / "one")
    file = one / "pytorch_lora_weights.safetensors"
    (tmp_path / "more").mkdir()
    for name in "ab":
        shutil.copy(file, tmp_path / "more" / f"{name}.safetensors")
    assert "more holds several LoRA files" in refused(cli, tmp_path, one, tmp_path / "more")


def test_a_full_disk_is_found_before_the_merge(tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = networks(tmp_path, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    assert "GB free" in refused(cli, tmp_path, one, two)


def test_pipelines_of_other_classes_or_bases(tmp_path: Path, tiny_wan: Path, cli: Any) -> None:
    other = moved(tiny_wan, tmp_path / "other", 1)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "_class_name": "WanImageToVideoPipeline"}))
    assert "differ in _class_name" in refused(cli, tmp_path, tiny_wan, other)
    exports = []
    for base in ("x/Wan2.1-T2V", "y/Wan2.2-TI2V"):
        export = tmp_path / Path(base).name
        network(export / "transformer", tensors(len(exports)))
        (export / "base.json").write_text(json.dumps({"base": base, "parts": ["transformer"]}))
        exports.append(export)
    assert "differ in base (base: 'Wan2.1-T2V' and 'Wan2.2-TI2V')" in refused(cli, tmp_path, *exports)
    told = refused(cli, tmp_path, exports[0], tiny_wan)
    assert "give the folder of one network of each (MODEL/transformer), or the whole model as the base" in told


def test_loras_that_cannot_be_merged(tmp_path: Path, tiny_wan: Path, cli: Any) -> None:
    one = lora(tiny_wan, tmp_path / "one")
    cases: list[tuple[Path, tuple[str, ...], str]] = [
        (lora(tiny_wan, tmp_path / "rank", rank=4), (), "has the ranks 2 and 4. Choose the rank"),
        (lora(tiny_wan, tmp_path / "layers", layers=("to_q", "to_v")), (), "only one of the two changes these layers"),
        (lora(tiny_wan, tmp_path / "dora", use_dora=True), (), "DoRA"),
        (tiny_wan, (), "is a LoRA and"),
        (lora(tiny_wan, tmp_path / "fine"), ("--method", "slerp"), "slerp is for full weights only"),
        (tmp_path / "fine", ("--base", str(tiny_wan), "--eta", "0.5"), "needs no base"),
        (tmp_path / "fine", ("--dtype", "float16"), "dtype is for full weights"),
        (tmp_path / "fine", ("--method", "ties", "--density", "2"), "--density must be above 0"),
        (tmp_path / "fine", ("--rank", "0"), "--rank must be at least 1"),
    ]
    for other, words, message in cases:
        told = refused(cli, tmp_path, one, other, *words)
        assert message in told, told
    bases = [json.dumps({"pipeline": name}) for name in ("WanPipeline", "LTXPipeline")]
    for folder, note in zip((one, tmp_path / "fine"), bases, strict=True):
        (folder / "lora.json").write_text(note)
    assert "different base models" in refused(cli, tmp_path, one, tmp_path / "fine")
    (tmp_path / "fine" / "lora.json").unlink()
    assert "is a LoRA: the base is a model" in refused(cli, tmp_path, tiny_wan, "--base", one, "--eta", "0.5")
    assert "the name" not in refused(cli, tmp_path, one, tmp_path / "absent", output="x.safetensors")


def test_loras_of_two_experts(tmp_path: Path, tiny_wan: Path, cli: Any) -> None:
    both = []
    for name in ("one", "two"):
        for expert in ("transformer", "transformer_2"):
            folder = lora(tiny_wan, tmp_path / name / expert)
            (folder / "lora.json").write_text(json.dumps({"pipeline": "WanPipeline", "network": expert}))
        both.append(tmp_path / name)
    assert cli("merge", *both, "-o", tmp_path / "merged").code == 0
    report = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert report["lora"].keys() == {"transformer", "transformer_2"}
    for expert in ("transformer", "transformer_2"):
        assert json.loads((tmp_path / "merged" / expert / "lora.json").read_text())["network"] == expert
    told = refused(cli, tmp_path, *both, output="x.safetensors")
    assert "the LoRAs of two networks: give a folder" in told
    assert "others have one LoRA only" in refused(cli, tmp_path, both[0], both[1] / "transformer")


def test_runs_that_cannot_be_merged(tmp_path: Path, cli: Any) -> None:
    run = tmp_path / "run"
    (run / "checkpoint-3").mkdir(parents=True)
    assert "has no complete checkpoint: checkpoint-3 lacks files" in refused(cli, tmp_path, run)
    assert "is not a complete checkpoint" in refused(cli, tmp_path, run / "checkpoint-3")
    (tmp_path / "empty").mkdir()
    assert "holds no *.safetensors" in refused(cli, tmp_path, tmp_path / "empty")
