"""Converted transformers: copies of their blocks, their config, and the pipelines that contain them."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import postgen
from postgen.errors import UserError
from postgen.families.loaded import defaults_of
from postgen.families.loading import inspect_model, load_pipeline
from postgen.lit import LitConfig, convert, layers_of, load, revert, save
from postgen.pipelines import WanPipeline
from tests.families.tiny_models import tiny_model
from tests.test_first_frame import changed

HALF = LitConfig(layers="1:window_delta")


@pytest.mark.parametrize(
    "put",
    [lambda model: convert(model, LitConfig(layers="all:lit")), postgen.apply_fused_ops],
    ids=["converted", "fused"],
)
def test_a_block_is_copied_when_its_transformer_is_gone(put: Callable[[Any], Any]) -> None:
    tiny = tiny_model("Wan")
    put(tiny.transformer)
    block = copy.deepcopy(tiny.transformer.get_submodule("blocks.1"))  # the copied transformer itself never existed
    others = [copy.deepcopy(block), pickle.loads(pickle.dumps(block))]
    block = tiny.transformer.get_submodule("blocks.1")
    del tiny
    gc.collect()
    others += [copy.deepcopy(block), pickle.loads(pickle.dumps(block))]
    for other in others:
        for name, weight in block.state_dict().items():
            assert torch.equal(other.state_dict()[name], weight)


def test_a_stock_model_of_a_converted_ones_config(tmp_path: Path) -> None:
    """`from_config` copies the entry of the conversion, but creates no layers of it."""
    tiny = tiny_model("Wan")
    clean = {name: value for name, value in tiny.transformer.config.items() if not name.startswith("_")}
    convert(tiny.transformer, HALF)
    marked = type(tiny.transformer).from_config(tiny.transformer.config)
    assert "nothing is on" in str(postgen.summary(marked))
    marked.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"missing weights .*postgen_lit.*\(these are weights of a stock model"):
        load(tmp_path)
    revert(marked)
    assert {name: value for name, value in marked.config.items() if not name.startswith("_")} == clean
    with pytest.raises(UserError, match="is not converted"):
        revert(marked)
    marked = type(tiny.transformer).from_config(tiny.transformer.config)
    convert(marked, LitConfig(layers="1:lit"))
    save(marked, tmp_path / "other")
    assert [layer.kind for layer in layers_of(load(tmp_path / "other")).values()] == ["lit"]


@pytest.fixture
def whole(tiny_wan: Path, tmp_path: Path) -> Path:
    """Save a pipeline with a converted block 1, made from a model with its own `postgen.json`."""
    model = shutil.copytree(tiny_wan, tmp_path / "model")
    changed(model, "postgen.json", num_frames=5, width=32, height=16, image_to_video=True)
    pipe = diffusers.WanPipeline.from_pretrained(model)
    convert(pipe.transformer, HALF)
    pipe.save_pretrained(tmp_path / "whole")
    shutil.rmtree(model)
    return tmp_path / "whole"


def test_a_saved_pipeline_knows_what_its_model_said(whole: Path, tmp_path: Path) -> None:
    facts = inspect_model(whole)
    assert (facts.defaults.num_frames, facts.defaults.width, facts.defaults.height) == (5, 32, 16)
    assert facts.image_pipeline == "WanImageToVideoPipeline"
    # The settings survive a second saving, and a pipeline in memory has them too.
    pipe = load_pipeline(facts, device="cpu")
    pipe.save_pretrained(tmp_path / "again")
    assert inspect_model(tmp_path / "again").defaults == facts.defaults
    assert defaults_of(pipe).num_frames == 5
    (whole / "postgen.json").write_text('{"num_frames": 9}')  # a file in the folder takes precedence
    assert inspect_model(whole).defaults.num_frames == 9
    config = json.loads((tmp_path / "again" / "transformer" / "config.json").read_text())
    config["quantization_config"]["postgen.json"] = [1]
    (tmp_path / "again" / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config of a network in it has .* as postgen\.json, it must be an object"):
        inspect_model(tmp_path / "again")


def test_a_saved_pipeline_is_loaded_by_drop_in_classes(whole: Path, tmp_path: Path) -> None:
    transformer = load(whole, subfolder="transformer")
    hub = tmp_path / "cache" / "models--owner--name"
    shutil.copytree(whole, hub / "snapshots" / ("0" * 40))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0" * 40)
    places: list[dict[str, Any]] = [
        {"pretrained_model_name_or_path": whole},
        {
            "pretrained_model_name_or_path": "owner/name",
            "cache_dir": tmp_path / "cache",
            "local_files_only": True,
            "dtype": torch.bfloat16,
        },
    ]
    for place in places:
        with pytest.raises(ValueError, match=r"postgen\.lit\.load\(folder\)"):
            diffusers.WanPipeline.from_pretrained(**place)
        pipe = WanPipeline.from_pretrained(**place)
        assert [*layers_of(pipe.transformer)] == ["blocks.1.attn1"]
        assert pipe.transformer.dtype == pipe.text_encoder.dtype == place.get("dtype", torch.float32)
        assert pipe.transformer.scale_shift_table.dtype == torch.float32  # the class keeps this table in float32
        given = WanPipeline.from_pretrained(**place, transformer=transformer)
        assert given.transformer is transformer


@pytest.mark.parametrize("way", ["postgen.nothing.load", "postgen.generate.load"])
def test_a_config_names_formats_and_nothing_else(whole: Path, way: str) -> None:
    config = whole / "transformer" / "config.json"
    text = config.read_text()
    config.write_text(text.replace("postgen.lit.load(folder)", f"{way}(folder)"))
    with pytest.raises(UserError, match=rf"names {way}, which this version of postgen lacks"):
        WanPipeline.from_pretrained(whole)
    config.write_text(text.replace("postgen.lit.load(folder)", "postgen.files._remove(folder)"))
    with pytest.raises(ValueError, match="Unknown quantization type"):  # diffusers refuses an entry that is not ours
        WanPipeline.from_pretrained(whole)
    assert config.is_file()
