"""Folders of converted transformers are written completely or not at all; damaged ones are errors of one line."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from postgen.errors import UserError
from postgen.lit import LitConfig, convert, layers_of, load, save
from postgen.pipelines import WanPipeline
from tests.families.tiny_models import tiny_model
from tests.test_cli_errors import names
from tests.test_first_frame import changed


def student(layers: str = "1:window_delta") -> Any:
    model = tiny_model("Wan").transformer
    convert(model, LitConfig(layers=layers))
    return model


@pytest.mark.parametrize(
    "wrong",
    [{"num_layers": "x"}, {"ffn_dim": -1}, {"text_dim": None}, {"rope_max_seq_len": []}, {"attention_head_dim": -1}],
    ids=str,
)
def test_a_damaged_config(tmp_path: Path, wrong: dict[str, Any]) -> None:
    save(student(), tmp_path / "a")
    changed(tmp_path / "a", "config.json", **wrong)
    with pytest.raises(UserError, match=r"a: cannot create a WanTransformer3DModel from its config\.json") as refused:
        load(tmp_path / "a")
    assert "\n" not in str(refused.value)


def test_weights_that_are_no_floats(tmp_path: Path) -> None:
    save(student(), tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file(weights | {"scale_shift_table": weights["scale_shift_table"].to(torch.int64)}, path)
    with pytest.raises(UserError, match=r"scale_shift_table is torch\.int64, but the layer needs torch\.float32"):
        load(tmp_path)


def test_what_stands_there_is_replaced_when_all_is_written(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    place = tmp_path / "a"
    save(student("1:lit"), place)
    (place / "README.md").write_text("mine")
    before = {name: (place / name).read_bytes() for name in names(place)}
    (place / "diffusion_pytorch_model-00001-of-00002.safetensors").write_text("old")
    index = place / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}))
    other = student()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # simulates a disk with room for the config only
    try:
        for there in (place, tmp_path / "new" / "deep"):
            with pytest.raises(UserError, match=r"cannot write .*: .*File too large"):
                save(other, there)
        words = ("convert", "lit", tiny_wan, "--layers", "1:lit", "-o", tmp_path / "new" / "half")
        done = cli(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (done.code, f"cannot write {words[-1]}: Error while serializing" in done.err) == (2, True), done.err
    assert not (tmp_path / "new").exists()
    assert all((place / name).read_bytes() == content for name, content in before.items())
    save(other, place)
    assert names(place) == sorted(before)
    assert [layer.kind for layer in layers_of(load(place)).values()] == ["window_delta"]
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="contains a whole pipeline"):
        save(other, tmp_path)


def test_drop_in_classes_load_exports(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = cli("convert", "lit", tiny_wan, "--layers", "1:lit", "-o", out, "--frames", 5)
    assert done.code == 0, done.err
    pipe = WanPipeline.from_pretrained(out, dtype=torch.bfloat16)
    assert [layer.kind for layer in layers_of(pipe.transformer).values()] == ["lit"]
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
    given = WanPipeline.from_pretrained(out, transformer=pipe.transformer)
    assert given.transformer is pipe.transformer
    assert type(pipe.vae) is diffusers.AutoencoderKLWan
    for base in (out, tmp_path / "absent"):
        changed(out, "base.json", base=str(base))
        with pytest.raises(UserError, match=r"base\.json names .*, which is no complete model"):
            WanPipeline.from_pretrained(out)
    changed(out, "base.json", base=str(tiny_wan))
    again = cli("convert", "lit", out, "--layers", "1:lit", "-o", tmp_path / "no")
    assert (again.code, "is converted: convert the stock transformer" in again.err) == (2, True)


@pytest.mark.parametrize("layers", ["", "every " + "9" * 5000 + ":lit", "1-" + "9" * 5000 + ":lit"], ids=len)
def test_layers_that_cannot_be_read(cli: Any, tiny_wan: Path, tmp_path: Path, layers: str) -> None:
    done = cli("convert", "lit", tiny_wan, "--layers", layers, "-o", tmp_path / "no")
    assert (done.code, done.err.count("\n"), names(tmp_path)) == (2, 1, []), done.err
    assert "layers " in done.err
