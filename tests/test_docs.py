"""The examples of the pages run as written, one after the other, in a folder that contains the embedded model."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from benchmarks.docs_blocks import ROOT, blocks_of_page, pages
from postgen.families import BlockGroup, Blocks, layout, registry, video_tokens
from tests.doc_blocks import Page

WORKED = ("CONTRIBUTING.md", "kernels.md")
"""Pages whose Python blocks run in other tests: tests/test_worked_*.py, tests/kernels/test_docs.py."""
CHECKED = re.findall(r'parametrize\("ran", \["(.+?)"\]', Path(__file__).read_text(encoding="utf-8"))
"""Pages for which this file has further assertions."""
OTHERS = [page for page in pages() if page.name not in CHECKED and any(b.no_run is None for b in blocks_of_page(page))]


@pytest.fixture(autouse=True)
def _own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the rows that a page registers, and let it import the modules that it writes."""
    monkeypatch.setattr(registry, "_layouts", dict(registry._layouts))
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def ran(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], str]:
    """Run a page, and return its variables and its output."""
    monkeypatch.chdir(tmp_path)
    page = Page(ROOT / "docs" / request.param)
    printed = page.run()
    return page.names, printed


@pytest.mark.slow
@pytest.mark.parametrize("page", OTHERS, ids=[page.stem for page in OTHERS])
def test_other_pages(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Page(page).run(("bash",) if page.name in WORKED else ("python", "bash"))


@pytest.mark.parametrize("ran", ["models.md"], indirect=True)
def test_models(ran: tuple[dict[str, Any], str]) -> None:
    names, printed = ran
    assert len(names["others"]) == 3
    assert torch.equal(names["after"], names["recording"]["blocks.4"][0].output())
    assert "attention processors: diffusers < windowed (computes) < enhance_a_video" in printed
    assert "last gains" in printed


@pytest.mark.parametrize("ran", ["cost.md"], indirect=True)
def test_cost(ran: tuple[dict[str, Any], str]) -> None:
    names, _ = ran
    assert round(names["cost"].flops / 1e12) == 6523
    assert round(names["cost"].share("self-attention"), 3) == 0.718
    assert names["seconds"] > 0


@pytest.mark.parametrize("ran", ["lit.md"], indirect=True)
def test_lit(ran: tuple[dict[str, Any], str]) -> None:
    names, printed = ran
    call = {**names["size"], "num_inference_steps": 2, "output_type": "latent", "generator": torch.manual_seed(0)}
    assert not torch.equal(names["other"]("a red ball", **call).frames, names["stock"])
    assert names["report"].types == ("softmax", "window_delta") * 4
    assert "4 of 8 blocks are linear: 4 window_delta" in printed
    assert names["chosen"].share <= 0.8
    assert names["chosen"].types[0] == "softmax"


@pytest.mark.parametrize("ran", ["streaming.md"], indirect=True)
def test_streaming(ran: tuple[dict[str, Any], str]) -> None:
    import postgen
    from postgen.families import denoiser_for

    names, _ = ran
    with torch.no_grad():
        expected = denoiser_for(names["pipe"]).decode(names["video"].frames)
    torch.testing.assert_close(names["whole"], expected, rtol=0, atol=1e-5)
    assert postgen.probe("ball.mp4").frames == 17


@pytest.mark.parametrize("ran", ["linear_layers.md"], indirect=True)
def test_linear_layers(ran: tuple[dict[str, Any], str]) -> None:
    names, printed = ran
    assert "linear layers (int8): 16 linear layers are Int8Linear" in printed
    assert not any(isinstance(module, names["Int8Linear"]) for module in names["transformer"].modules())


@pytest.mark.parametrize("ran", ["low_precision_linears.md"], indirect=True)
def test_low_precision_linears(ran: tuple[dict[str, Any], str]) -> None:
    names, printed = ran
    assert "fp8_linears: on, attention in 32 layers, cross_attention in 16 layers, feed_forward in 8 layers" in printed
    assert names["handle"].stats() == {}


@pytest.mark.parametrize("ran", ["reconstruct.md"], indirect=True)
def test_reconstruct(ran: tuple[dict[str, Any], str]) -> None:
    names, printed = ran
    assert len(names["records"].plan["records"]) == 12
    before = [result.error_before for result in names["report"].blocks.values()]
    after = [result.error_after for result in names["report"].blocks.values()]
    assert all(0 < late < early for early, late in zip(before, after, strict=True)), printed
    assert [type(block.ffn.net[0].proj).__name__ for block in names["pipe"].transformer.blocks].count("LowRank") == 2
    assert names["task"].modules == ("blocks.3.attn1", "blocks.3.attn1.to_out.0")


@pytest.mark.parametrize("ran", ["lit_training.md"], indirect=True)
def test_lit_training(ran: tuple[dict[str, Any], str]) -> None:
    names, _ = ran
    assert [*names["report"].blocks] == ["blocks.3.attn1", "blocks.4.attn1"]
    assert not names["report"].unfinished
    assert all(row.error_after < row.error_before for row in names["report"].blocks.values())
    assert hasattr(names["pipe"].transformer.blocks[3].attn1, "postgen_lit")


@pytest.mark.parametrize("ran", ["worldweaver_training.md"], indirect=True)
def test_worldweaver_training(ran: tuple[dict[str, Any], str]) -> None:
    names, _ = ran
    assert names["loaded"].settings["ar_step"] == 2
    assert names["video"].depth.shape == (1, 13, 32, 32)
    assert names["disparity"].shape == (17, 32, 32)


@pytest.mark.parametrize("ran", ["world.md"], indirect=True)
def test_world(ran: tuple[dict[str, Any], str]) -> None:
    names, printed = ran
    assert len(set(printed.splitlines())) == 2
    assert names["last"].rgb_BF3HW.shape == (1, 8, 3, 48, 48)
    text = (ROOT / "docs" / "world.md").read_text(encoding="utf-8")
    assert not [name for name in names["clip"].__slots__ if f"`{name}`" not in text]


@pytest.mark.parametrize("ran", ["drift.md"], indirect=True)
def test_drift(ran: tuple[dict[str, Any], str]) -> None:
    """The page describes a frozen clip, which is the second clip."""
    names, _ = ran
    both, text = names["both"], (ROOT / "docs" / "drift.md").read_text(encoding="utf-8")
    assert (both["motion.total"].b, both["motion.most"].b, both["contrast.sharpness.contrast"].b) == (0, 0, 0)
    assert both["permanence.always"].difference.low > 0
    assert all(row["seam"] is None and row["motion"]["total"] == 0 for row in names["second"])
    assert not [key for key in names["first"][0] if key != "frames" and f"`{key}" not in text]


@pytest.mark.parametrize("ran", ["sampling.md"], indirect=True)
def test_sampling(ran: tuple[dict[str, Any], str]) -> None:
    """The page asserts that the given frame does not change. The first example equals the video of the pipeline."""
    names, _ = ran
    noise = names["sampler"].noise([7])
    expected = names["pipe"](
        "a red ball rolls left", **names["size"], num_inference_steps=4, guidance_scale=3.0, latents=noise,
        output_type="pt",
    ).frames[0]  # fmt: skip
    torch.testing.assert_close(names["clip"], expected, rtol=0, atol=1e-4)
    assert Path("given.png").is_file()


@pytest.mark.parametrize("ran", ["worldweaver.md"], indirect=True)
def test_worldweaver(ran: tuple[dict[str, Any], str]) -> None:
    names, printed = ran
    assert torch.equal(names["rgb"], names["depth"])
    assert "worldweaver: rgb + depth, 16 channels each; noise levels: RGB level of each frame as" in printed
    assert names["loaded"].settings == {"ar_step": 7}
    assert names["pipe"].transformer.config.in_channels == 32


@pytest.mark.parametrize("ran", ["worldweaver_rollout.md"], indirect=True)
def test_worldweaver_rollout(ran: tuple[dict[str, Any], str]) -> None:
    """The page asserts that a saved state continues bit by bit; 4 latent frames are 13 frames."""
    names, _ = ran
    assert names["clip"].shape == (1, 13, 3, 96, 96)
    assert names["state"].calls == names["segments"].calls(4) == 10
    assert float(names["error"]) < 1e-4
    assert bool(names["mask"].any())
    low, high = (names["disparity"].quantile(share) for share in (0.02, 0.98))
    assert float((names["decoded"] - names["disparity"].clamp(low, high)).abs().mean() / (high - low)) < 0.1
    torch.testing.assert_close(names["flow"], names["scene"].flow_BF2HW, rtol=0, atol=1e-3)
    page = (ROOT / "docs" / "worldweaver_rollout.md").read_text(encoding="utf-8")
    picture = [line[10:].split() for line in page.splitlines() if line.startswith("group ")]
    walked = list(names["Segments"](steps=6, groups=3).walk(4))
    assert picture == [[str(call[group]) for call in walked if group in call] for group in range(4)]


@pytest.mark.parametrize("ran", ["worldweaver_pipeline.md"], indirect=True)
def test_worldweaver_pipeline(ran: tuple[dict[str, Any], str]) -> None:
    """The page asserts that a saved state continues bit by bit."""
    names, _ = ran
    assert [clip.shape[1] for clip in names["rest"]] == [4, 4]
    assert names["video"].shape == (1, 9, 96, 96, 3)


@pytest.mark.parametrize("ran", ["faq.md"], indirect=True)
def test_faq(ran: tuple[dict[str, Any], str]) -> None:
    """The page itself contains assertions for its answers."""
    names, printed = ran
    assert "attention auto in 8 layers" in printed
    assert "TFLOP a pass" in printed
    assert names["seconds"] > 0
    assert names["out"].shape == (1, 64, 2, 16)


@pytest.mark.parametrize("ran", ["own_model.md"], indirect=True)
def test_own_model(ran: tuple[dict[str, Any], str]) -> None:
    """The page asserts that removal restores the model. Its tables name every field and every allowed value."""
    names, printed = ran
    assert "enhance_a_video: on, weight 8.0, 2 of 2 layers" in printed
    assert not torch.equal(names["enhanced"], names["before"])
    assert names["result"].global_step == 2
    assert not torch.equal(names["after"], names["before"])
    assert Path("runs/own-recipe/export/pytorch_lora_weights.safetensors").is_file()
    called = 'pipe.transformer.load_lora_adapter("THIS_FOLDER", prefix="transformer"'
    assert called in Path("runs/own/export/README.md").read_text(encoding="utf-8")
    text = (ROOT / "docs" / "own_model.md").read_text(encoding="utf-8")
    kinds = (video_tokens.TokenOrder, video_tokens.LatentAxes, video_tokens.ScaleTarget, layout.TimestepShape)
    rows = (layout.Layout, layout.Call, Blocks, BlockGroup, video_tokens.VideoTokens)
    words = [field.name for row in rows for field in dataclasses.fields(row)]
    words += [value for kind in kinds for value in get_args(kind)]
    words += [name for name in vars(video_tokens) if name.startswith("grid_")]
    assert not [word for word in words if f"`{word}`" not in text]
