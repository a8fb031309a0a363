"""The tables and the picture of the quantisation pages are up to date, and what the pages say about them holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

from benchmarks import quant_advisor, quant_tables
from benchmarks.cost import MODELS, WAN
from benchmarks.docs_tables import filled
from benchmarks.gates import read_result
from postgen.families.empty import empty_transformer


@pytest.mark.parametrize("page", quant_tables.pages(), ids=lambda page: page.stem)
def test_the_tables_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == filled(text, quant_tables.pages()[page]), "run python -m benchmarks.quant_tables"


def test_bytes_are_those_of_a_loaded_model() -> None:
    """Wan keeps its norms and its timestep embedder in float32; 4 bits with a scale for 64 weights are 4.5."""
    config = {"_class_name": "WanTransformer3DModel", **WAN["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]}
    found = quant_tables.sizes(config)
    weights = found["share"] * found["parameters"]
    assert found["exact"] - found["formats"]["int4:g64"] == pytest.approx(weights * (16 - 4.5) / 8, rel=1e-6)
    bare = quant_tables.exact_bytes(empty_transformer(MODELS["Lightricks/LTX-Video"][0]))
    assert sum(bare.values()) == 2 * quant_tables.sizes(MODELS["Lightricks/LTX-Video"][0])["parameters"]
    assert quant_tables.exact_bytes(empty_transformer(config))["blocks.0.norm2.weight"] == 4 * 1536


def test_the_picture_is_drawn_from_the_result(tmp_path: Path) -> None:
    quant_advisor.draw(read_result("quant_advisor")["pairs"], tmp_path / "x.png")
    new, kept = (Image.open(path).convert("L") for path in (tmp_path / "x.png", quant_advisor.PICTURE))
    assert new.size == kept.size == quant_advisor.SIZE
    # Not equal: another version of Pillow draws letters with other edges.
    assert ImageStat.Stat(ImageChops.difference(new, kept)).mean[0] < 2, "run benchmarks.quant_advisor with --draw"
    assert quant_advisor.PICTURE.stat().st_size < 40_000


def test_what_the_page_says_of_the_model() -> None:
    pairs = {
        (each["pair"][0], each["of"], bool(each["rotate"])): each for each in read_result("quant_advisor")["pairs"]
    }
    gains = {key: each["integers_db"] - each["floating_db"] for key, each in pairs.items()}
    assert all(gain > 0 for key, gain in gains.items() if key[0] == "mxint8")
    assert all(gain < 0 for key, gain in gains.items() if key[0] in ("mxint6", "mxint4"))
    assert gains["nvint4", "inputs", False] < 0 < gains["nvint4", "inputs", True]
    assert pairs["nvint4", "inputs", True]["layers_where_integers_win"] == 1
    for name, of, turned in pairs:
        if turned:
            plain, rotated = pairs[name, of, False], pairs[name, of, True]
            assert rotated["integers_db"] > plain["integers_db"]
            assert name != "nvint4" or rotated["floating_db"] < plain["floating_db"]
