"""FLOPs and bytes, compared with torch's own counter, with formulas by hand, and with sizes of real models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from postgen.errors import UserError
from postgen.families import registry
from postgen.families.calls import call_arguments
from postgen.families.cost import PARTS, call_cost, forward_cost, latent_size
from postgen.families.latency import Latency, LatencyTable, measure_latency
from tests.families.tiny_models import BUILDERS, IMAGES, TinyModel, tiny_model

NOT_ON_META = {"HunyuanVideo Framepack", "HunyuanVideo 1.5", "Mochi", "Helios"}
"""Their `forward` reads values of masks or enters autocast, which does not work on the meta device."""
TWICE = {"CogVideoX 1.0", "Wan image-to-video", "Wan 2.2 text-and-image-to-video", "SkyReels-V2"}
"""Tiny models whose class is tested with another tiny model."""
WAN_14B = {"_class_name": "WanTransformer3DModel", "num_layers": 2}


def test_every_class_is_known() -> None:
    for row in registry.known_layouts():
        assert (row.call is None) == (row.video is None and row.image is None), row.transformer


def test_another_attention_backend_changes_nothing() -> None:
    """The attention backend of the process does not change the cost."""
    from diffusers import attention_backend

    import postgen

    postgen.register_attention_backend()
    expected = forward_cost(WAN_14B, num_frames=5, height=64, width=64)
    with attention_backend("postgen"):
        assert forward_cost(WAN_14B, num_frames=5, height=64, width=64).flops == expected.flops


@pytest.mark.parametrize("name", [name for name in (*BUILDERS, *IMAGES) if name not in TWICE])
def test_every_family(name: str) -> None:
    """For a size in pixels: torch counts the same FLOPs, blocks and parts add up, and all weights are read."""
    tiny = tiny_model(name, layers=1)
    transformer: Any = tiny.transformer
    kind = type(transformer).__name__
    time, space = 4, 2
    clip = {"num_frames": 4 * tiny.frames - 3, "height": 4 * space, "width": 6 * space}
    options: dict[str, Any] = {"text_tokens": 5, "factors": (time, space)}
    if name in IMAGES:
        clip["num_frames"] = 1
    if name == "DiT":  # square pictures, and a class in place of a text
        clip["width"], options["text_tokens"] = clip["height"], None
    cost = forward_cost(transformer, **clip, **options, dtype=torch.float32)
    assert cost.grid is not None
    assert cost.total.weight_bytes == 4 * sum(weight.numel() for weight in read_weights(transformer))
    assert sum(cost.share(part) for part in PARTS) == pytest.approx(1)
    assert cost.parts["self-attention"].flops > 0
    assert len(cost.blocks) == len(registry.layout_of(transformer).block_modules(transformer))
    inside = sum(sum(work.flops for work in block.values()) for block in cost.blocks.values())
    assert 0 < inside < cost.flops
    if name not in NOT_ON_META:
        size = latent_size(kind, transformer.config, *clip.values(), **options)
        arguments = tree_map_only(torch.Tensor, lambda x: x.to("meta"), call_arguments(kind, transformer.config, size))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            transformer.to("meta")(**arguments)
        assert cost.flops == counter.get_total_flops()


def read_weights(transformer: Any) -> list[torch.Tensor]:
    """Return all weights except embedding tables, of which a call reads only a few rows."""
    tables = {id(module.weight) for module in transformer.modules() if isinstance(module, torch.nn.Embedding)}
    return [weight for weight in transformer.parameters() if id(weight) not in tables]


def counted(tiny: TinyModel) -> dict[str, int]:
    return {part: work.flops for part, work in call_cost(tiny.transformer, tiny.arguments).parts.items()}


def test_formula_of_wan() -> None:
    tiny = tiny_model("Wan", batch=2)
    n, d, text, batch, layers, ffn = 24, 32, 5, 2, 2, 32
    found = counted(tiny)
    assert found["self-attention"] == batch * layers * 4 * n * n * d
    assert found["other attention"] == batch * layers * 4 * n * text * d
    assert found["projections"] == batch * layers * (8 * n + 4 * n + 4 * text) * d * d
    assert found["feed-forward"] == batch * layers * 4 * n * d * ffn
    assert found["modulation"] == 0


def test_formula_of_ltx() -> None:
    found = counted(tiny_model("LTX"))
    n, d, text, layers = 24, 32, 5, 2
    assert found["self-attention"] == layers * 4 * n * n * d
    assert found["other attention"] == layers * 4 * n * text * d
    assert found["projections"] == layers * (12 * n + 4 * text) * d * d
    assert found["feed-forward"] == layers * 4 * n * d * 4 * d


def test_formula_of_cogvideox() -> None:
    found = counted(tiny_model("CogVideoX 1.5"))
    n, d, layers, time = 24 + 5, 32, 2, 8
    assert found["self-attention"] == layers * 4 * n * n * d
    assert found["other attention"] == 0
    assert found["projections"] == layers * 8 * n * d * d
    assert found["feed-forward"] == layers * 4 * n * d * 4 * d
    assert found["modulation"] == (layers * 2 * 6 + 2) * 2 * time * d  # the last term is the output layer's


def test_formula_of_hunyuan_video() -> None:
    found = counted(tiny_model("HunyuanVideo"))
    n, text, d, mlp = 24 + 5, 5, 32, 2
    double, single = 2, 2
    assert found["self-attention"] == (double + single) * 4 * n * n * d
    assert found["other attention"] == 4 * text * text * d  # the text refiner
    # In a single block, one layer projects the outputs of attention and feed-forward.
    assert found["projections"] == (double * 8 * n + single * 6 * n + 8 * text) * d * d
    refiner = 4 * text * d * 4 * d
    outputs = single * 2 * n * d * (d + mlp * d) + single * 2 * n * d * mlp * d
    assert found["feed-forward"] == double * 4 * n * d * mlp * d + outputs + refiner


def test_real_sizes_take_no_memory() -> None:
    """The attention scores of one block (32,760 tokens, 40 heads) would take 172 GB in float32."""
    n, d, ffn, text = 32760, 5120, 13824, 512
    cost = forward_cost(WAN_14B, num_frames=81, height=480, width=832)
    assert cost.grid is not None
    assert (n, d, ffn, text) == (cost.grid.tokens, 5120, 13824, 512)
    block = 4 * n * n * d + 12 * n * d * d + 4 * n * d * ffn + 4 * text * n * d + 4 * text * d * d
    assert [sum(work.flops for work in parts.values()) for parts in cost.blocks.values()] == [block, block]
    assert "32760 video tokens, 2 blocks" in cost.table()
    assert f"{cost.flops / 1e12:.3f}  100.0%" in cost.table()


def test_passes_batch_and_blocks() -> None:
    clip = {"num_frames": 9, "height": 64, "width": 96}
    one = forward_cost(WAN_14B, **clip)
    guided, two = forward_cost(WAN_14B, **clip, guidance=5.0), forward_cost(WAN_14B, **clip, batch=2)
    assert guided.flops == two.flops == 2 * one.flops
    assert guided.total.weight_bytes == 2 * one.total.weight_bytes == 2 * two.total.weight_bytes
    assert two.total.activation_bytes == 2 * one.total.activation_bytes
    first, second = one.blocks.values()
    assert first == second
    wide = forward_cost(WAN_14B, **clip, dtype=torch.float32)
    assert wide.total == dataclasses.replace(
        one.total,
        weight_bytes=2 * one.total.weight_bytes,
        activation_bytes=2 * one.total.activation_bytes,
    )


def test_arguments_of_any_dtype() -> None:
    tiny = tiny_model("Wan")
    half = tree_map_only(torch.Tensor, lambda x: x.to(torch.bfloat16), tiny.arguments)
    assert call_cost(tiny.transformer, half) == call_cost(tiny.transformer, tiny.arguments)
    with pytest.raises(UserError, match="passes must be at least 1"):
        call_cost(tiny.transformer, half, passes=0)


def test_attention_moves_no_scores() -> None:
    tiny = tiny_model("Wan")
    work = call_cost(tiny.transformer, tiny.arguments, dtype=torch.float32).parts["self-attention"]
    assert work.activation_bytes == 2 * 4 * 24 * 32 * 4  # layers, q k v and the output, tokens, width, float32


def test_the_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    forward_cost(WAN_14B, num_frames=5, height=16, width=16)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_installed_does_not_count() -> None:
    from postgen.families.linear import replace_linears

    tiny = tiny_model("Wan")
    before = call_cost(tiny.transformer, tiny.arguments)
    replace_linears(tiny.transformer, lambda name, linear: torch.nn.Identity(), owner="nothing")
    assert call_cost(tiny.transformer, tiny.arguments) == before


def test_a_class_that_nobody_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dataclasses.replace(registry.layout_named("WanTransformer3DModel"), call=None)
    monkeypatch.setattr(registry, "_layouts", {**registry._layouts, row.transformer: row})
    with pytest.raises(
        UserError, match=r"how WanTransformer3DModel is called\. Known: .* arguments .* to .*call_cost"
    ):
        forward_cost(WAN_14B, num_frames=9, height=64, width=64)
    tiny = tiny_model("Wan")
    assert call_cost(tiny.transformer, tiny.arguments).flops > 0


def test_wrong_calls() -> None:
    clip = {"num_frames": 9, "height": 64, "width": 64}
    with pytest.raises(UserError, match=r"no layout for Linear\. Known: .*WanTransformer3DModel"):
        forward_cost(torch.nn.Linear(1, 1), **clip)
    with pytest.raises(UserError, match="the config has no _class_name"):
        forward_cost({"num_layers": 2}, **clip)
    with pytest.raises(UserError, match=r"no tokens of a video or picture in UNet3DConditionModel: .*Known"):
        forward_cost({"_class_name": "UNet3DConditionModel"}, **clip)
    for wrong in ({"num_frames": 8}, {"height": 60}, {"width": 0}, {"batch": 0}, {"text_tokens": 0}):
        with pytest.raises(UserError, match=r"WanTransformer3DModel takes .*1 \+ a multiple of 4 frames"):
            forward_cost(WAN_14B, **{**clip, **wrong})  # type: ignore[arg-type]


def test_wrong_calls_of_pictures() -> None:
    for kind, wrong, match in (
        ("FluxTransformer2DModel", {"num_frames": 5}, "makes pictures: num_frames must be 1, got 5"),
        ("FluxTransformer2DModel", {"height": 72}, "sides that are multiples of 16, got 1 frames of 72 x 64"),
        ("DiTTransformer2DModel", {"text_tokens": 4}, "takes no text: leave text_tokens out, got 4"),
        ("PixArtTransformer2DModel", {"text_tokens": 0}, "at least one clip and text token"),
    ):
        size: dict[str, Any] = {"num_frames": 1, "height": 64, "width": 64, **wrong}
        with pytest.raises(UserError, match=f"{kind} .*{match}"):
            forward_cost({"_class_name": kind, "num_layers": 1}, **size)


def test_formula_of_pictures() -> None:
    """Formulas for two blocks of DiT-XL/2 at 256 pixels and PixArt-Sigma at 1024; the published FLOPs of DiT."""
    n, d, layers = 256, 1152, 2
    config = {"_class_name": "DiTTransformer2DModel", "out_channels": 8, "num_layers": layers}
    dit = forward_cost(config, num_frames=1, height=256, width=256)
    assert dit.parts["self-attention"].flops == layers * 4 * n * n * d
    assert dit.parts["other attention"].flops == 0
    assert dit.parts["projections"].flops == layers * 8 * n * d * d
    assert dit.parts["feed-forward"].flops == layers * 16 * n * d * d
    # 28 blocks; 118.6 Gflops, a multiplication and an addition counted as one (arXiv:2212.09748, table 4).
    block = sum(work.flops for work in dit.blocks["transformer_blocks.1"].values())
    assert (dit.flops + 26 * block) / 2e9 == pytest.approx(118.6, rel=0.01)
    n, text = 4096, 300
    pixart = {"_class_name": "PixArtTransformer2DModel", "caption_channels": 4096, "num_layers": layers}
    cost = forward_cost(pixart, num_frames=1, height=1024, width=1024)
    assert cost.grid is not None
    assert (cost.grid.frames, cost.grid.height, cost.grid.width) == (1, 64, 64)
    assert cost.parts["self-attention"].flops == layers * 4 * n * n * d
    assert cost.parts["other attention"].flops == layers * 4 * n * text * d
    assert cost.parts["projections"].flops == layers * (12 * n + 4 * text) * d * d


def test_formula_of_dual_attention() -> None:
    """The second attention of Stable Diffusion 3.5's dual blocks counts as self-attention of the picture."""
    n, text, d = 6, 5, 32
    found = counted(tiny_model("Stable Diffusion 3"))
    assert found["self-attention"] == 2 * 4 * (n + text) ** 2 * d + 4 * n * n * d
    assert found["other attention"] == 0


def test_calls_that_the_class_does_not_take() -> None:
    """A `UserError` with the message of the class, instead of a traceback from inside the counter."""
    wan, clip = tiny_model("Wan").transformer, {"num_frames": 9, "height": 64, "width": 64}
    with pytest.raises(UserError, match=r"WanTransformer3DModel does not take this call: .*nonsense"):
        call_cost(wan, {"nonsense": 1})
    with pytest.raises(UserError, match="factors are 0 frames and 8 pixels"):
        forward_cost(wan, **clip, factors=(0, 8))
    # Its position table fits only clips of the size in its config.
    fixed = tiny_model("CogVideoX 1.0").transformer
    with pytest.raises(UserError, match=r"CogVideoXTransformer3DModel does not take this call: .*broadcast"):
        forward_cost(fixed, num_frames=1, height=256, width=128)
    with pytest.raises(UserError, match=r"a shape must be \(num_frames, height, width\), got \(9, 64\)"):
        measure_latency(wan, [(9, 64)])  # type: ignore[list-item]


def test_measured_latency(tmp_path: Path) -> None:
    pictures = measure_latency(tiny_model("Flux").transformer, [(1, 64, 64)], text_tokens=5, warm_up=0, repeats=1)
    assert [row.tokens for row in pictures.rows] == [16]
    tiny = tiny_model("Wan")
    shapes = [(9, 32, 32), (5, 32, 32), (5, 32, 64)]
    table = measure_latency(tiny.transformer, shapes, text_tokens=5, batch=2, warm_up=1, repeats=3)
    assert [row.tokens for row in table.rows] == [8, 12, 16]
    assert all(row.seconds > 0 for row in table.rows)
    assert (table.transformer, table.dtype, table.batch) == ("WanTransformer3DModel", "float32", 2)
    assert "cpu" in table.device
    table.save(tmp_path / "latency.json")
    assert LatencyTable.load(tmp_path / "latency.json") == table
    assert json.loads((tmp_path / "latency.json").read_text())["torch"] == torch.__version__


def row_of(tokens: int, seconds: float) -> Latency:
    return Latency(num_frames=1, height=1, width=1, tokens=tokens, seconds=seconds)


def test_latency_between_and_beyond() -> None:
    rows = (row_of(300, 5.0), row_of(100, 1.0), row_of(100, 3.0), row_of(200, 4.0))
    about = {"transformer": "T", "device": "D", "dtype": "float32", "torch": "2"}
    table = LatencyTable(rows=rows, **about, batch=1, text_tokens=5, repeats=1)
    assert [table.seconds(tokens) for tokens in (100, 150, 200, 250, 300)] == [2.0, 3.0, 4.0, 4.5, 5.0]
    for outside in (99, 301):
        with pytest.raises(
            UserError, match=f"{outside} tokens are outside the latency table of D, which covers 100 to 300"
        ):
            table.seconds(outside)
    with pytest.raises(UserError, match="at least one measured size"):
        dataclasses.replace(table, rows=())


def test_latency_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a latency table"):
        LatencyTable.load(tmp_path / "nothing.json")
    (tmp_path / "other.json").write_text('{"rows": [{"tokens": 1}]}')
    with pytest.raises(UserError, match="is not a latency table"):
        LatencyTable.load(tmp_path / "other.json")
    with pytest.raises(UserError, match="repeats must be at least 1"):
        measure_latency(tiny_model("Wan").transformer, [(5, 32, 32)], repeats=0)
