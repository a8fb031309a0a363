"""Conversion of tiny models of every family: weights of the base, training, saving, combinations, refusals."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import postgen
from postgen.errors import UserError
from postgen.families.installed import installed, processor_stack
from postgen.lit import (
    AnchorOptions,
    ChunkOptions,
    LitConfig,
    LitOptions,
    MhlaOptions,
    WindowOptions,
    convert,
    layers_of,
    load,
    revert,
    save,
    set_grid,
)
from postgen.lit.options import LINEAR_TYPES
from tests.families.tiny_models import TinyModel, tiny_model

VIDEO = ("Wan", "HunyuanVideo", "CogVideoX 1.5", "LTX")
PICTURES = ("Flux", "Stable Diffusion 3", "DiT", "PixArt")
NARROW = WindowOptions(radius=0)


def types_for(tiny: TinyModel) -> tuple[str, ...]:
    """Return the layer types to test: all for Wan, otherwise one fully linear type and one with local softmax."""
    return LINEAR_TYPES if tiny.name == "Wan" else ("lit", "window_delta" if tiny.name in VIDEO else "anchor")


def blocks_in(tiny: TinyModel) -> int:
    return len(postgen.families.tokens_of(tiny.transformer).attention_modules(tiny.transformer))


def config_for(tiny: TinyModel, kind: str, **more: Any) -> LitConfig:
    grid = (tiny.frames, 2, 3) if tiny.name in VIDEO else {"DiT": (1, 4, 4)}.get(tiny.name)
    return LitConfig(
        layers=f"all:{kind}", window=NARROW, grid=grid or (1, 2, 3), mhla=MhlaOptions(blocks=(1, 2, 1)), **more
    )


def named(name: str) -> TinyModel:
    return tiny_model(name, batch=2)


@pytest.mark.parametrize("name", [*VIDEO, *PICTURES])
def test_every_family(name: str, tmp_path: Path) -> None:
    """For each layer type: convert, train for two steps, save, load without the base model, and revert."""
    tiny = named(name)
    model: Any = tiny.transformer
    stock, before = tiny(), {key: value.clone() for key, value in model.state_dict().items()}
    config_before = model.to_json_string()
    report = convert(model, LitConfig(layers=("softmax",) * len(postgen.families.blocks_of(model))))
    assert torch.equal(tiny(), stock)
    assert report.new_parameters == 0
    revert(model)
    for kind in types_for(tiny):
        report = convert(model, config_for(tiny, kind))
        assert report.types == ("softmax", *[kind] * (len(report.types) - 1))
        out = tiny()
        assert out.isfinite().all()
        assert not torch.equal(out, stock)
        new = [weight for layer in layers_of(model).values() for weight in layer.parameters()]
        assert report.new_parameters == sum(weight.numel() for weight in new)
        train(tiny, new or [*model.parameters()])
        trained = tiny()
        folder = tmp_path / kind
        save(model, folder)
        other: Any = load(folder)
        assert not other.training
        loaded = TinyModel(name=name, transformer=other, arguments=tiny.arguments, frames=0, attention_layers=0)
        assert torch.equal(loaded(), trained)
        assert str(kind) in str(postgen.summary(other))
        with pytest.raises(ValueError, match=r"got postgen\.lit\.load\(folder\)"):
            type(model).from_pretrained(folder)
        revert(model)
        model.load_state_dict(before)
        assert torch.equal(tiny(), stock)
        assert model.to_json_string() == config_before
        assert not processor_stack(model).names


def train(tiny: TinyModel, weights: list[Any]) -> None:
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    torch.manual_seed(0)
    for _ in range(2):
        prediction: Any = tiny.transformer(**tiny.arguments, return_dict=False)[0]
        loss = (prediction - torch.randn_like(prediction)).square().mean()
        loss.backward()
        assert any(weight.grad is not None and weight.grad.any() for weight in weights)
        optimizer.step()
        optimizer.zero_grad()
    tiny.transformer.zero_grad()


def test_a_wide_window_is_the_base() -> None:
    tiny = named("Wan")
    stock = tiny()
    convert(tiny.transformer, LitConfig(layers="all:window_delta", window=WindowOptions(radius=3)))
    with torch.no_grad():
        for layer in layers_of(tiny.transformer).values():
            for weight in layer.parameters():
                weight.normal_()
    assert torch.equal(tiny(), stock)


def test_padded_texts_do_not_count() -> None:
    """The last token of each text is padding: its value does not change the output of a converted model."""
    tiny = named("HunyuanVideo")
    convert(tiny.transformer, LitConfig(layers="all:lit,1:window_delta", window=NARROW))
    changed = tiny.arguments["encoder_hidden_states"].clone()
    changed[:, -1] += 5
    torch.testing.assert_close(tiny(encoder_hidden_states=changed), tiny())


def test_projections_that_begin_anew(tmp_path: Path) -> None:
    tiny = named("Wan")
    stock, before = tiny(), {*tiny.transformer.state_dict()}
    report = convert(tiny.transformer, LitConfig(layers="all:lit", inherit="output"))
    assert report.rows[1].fresh == ("to_q", "to_k", "to_v")
    assert "to_out" in report.rows[1].inherited
    new = {*tiny.transformer.state_dict()} - before
    assert {name for name in new if "fresh" in name} == {
        f"blocks.1.attn1.{name}.fresh.{part}" for name in ("to_q", "to_k", "to_v") for part in ("weight", "bias")
    }
    out = tiny()
    save(tiny.transformer, tmp_path)
    tiny_2 = TinyModel(name="", transformer=load(tmp_path), arguments=tiny.arguments, frames=4, attention_layers=2)
    assert torch.equal(tiny_2(), out)
    with pytest.raises(ValueError, match="not supported"):  # new projections refuse a LoRA
        add_lora(copy.deepcopy(tiny.transformer))
    revert(tiny.transformer)
    assert torch.equal(tiny(), stock)
    assert {*tiny.transformer.state_dict()} == before


def add_lora(model: Any) -> None:
    from peft import LoraConfig

    model.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    )


def test_a_lora_of_the_base_attaches(tmp_path: Path) -> None:
    tiny: Any = named("Wan")
    converted: Any = named("Wan")
    add_lora(tiny.transformer)
    tiny.transformer.save_lora_adapter(tmp_path)
    convert(converted.transformer, LitConfig(layers="all:window_delta", window=WindowOptions(radius=3)))
    converted.transformer.load_lora_adapter(tmp_path / "pytorch_lora_weights.safetensors", prefix=None)
    assert torch.equal(converted(), tiny())  # the window covers the whole clip
    with pytest.raises(UserError, match="a LoRA is attached"):
        save(converted.transformer, tmp_path / "no")
    converted.transformer.save_pretrained(tmp_path / "no")
    with pytest.raises(UserError, match="a LoRA was attached when the model was saved"):
        load(tmp_path / "no")


def test_copies_compile_and_thread() -> None:
    tiny = named("Wan")
    convert(tiny.transformer, LitConfig(layers="all:lit"))
    out = tiny()
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        for weight in layers_of(tiny.transformer)["blocks.1.attn1"].parameters():
            weight.add_(1)
    assert torch.equal(other(), out)
    assert not torch.equal(tiny(), out)
    revived = pickle.loads(pickle.dumps(other))
    assert torch.equal(revived(), out)


def test_blocks_alone_need_a_grid() -> None:
    tiny = named("Wan")
    convert(tiny.transformer, LitConfig(layers="all:lit"))
    attention = tiny.transformer.get_submodule("blocks.1.attn1")
    angles = torch.rand(1, 24, 1, 8).repeat_interleave(2, -1)
    given: Any = {"hidden_states": torch.randn(1, 24, 32), "rotary_emb": (angles.cos(), angles.sin())}
    with pytest.raises(UserError, match="was called without its transformer"):
        attention(**given)
    set_grid(tiny.transformer, postgen.families.Grid(frames=4, height=2, width=3))
    out = attention(**given)
    assert out.shape == (1, 24, 32)
    assert torch.equal(copy.deepcopy(attention)(**given), out)


def test_with_enhance_a_video_and_fused_operations() -> None:
    tiny = tiny_model("Wan", layers=4)
    convert(tiny.transformer, LitConfig(layers="every 2nd:window_delta", window=NARROW))
    plain = tiny()
    fused = postgen.apply_fused_ops(tiny.transformer)
    assert fused.stats()[""]["norm_rope"] == 2
    torch.testing.assert_close(tiny(), plain, rtol=1e-4, atol=1e-4)
    assert "not in 2 layers of lit" in str(postgen.summary(tiny.transformer))
    enhance = postgen.apply_enhance_a_video(tiny.transformer, postgen.EnhanceAVideoConfig(weight=0.4))
    with pytest.warns(UserWarning, match=r"2 of 4 layers \(lit hides it\)"):
        enhanced = tiny()
    assert not torch.equal(enhanced, plain)
    assert [*enhance.stats()] == ["blocks.0.attn1", "blocks.2.attn1"]
    enhance.remove()
    fused.remove()
    assert torch.equal(tiny(), plain)
    revert(tiny.transformer)
    postgen.apply_fused_ops(tiny.transformer)
    with pytest.raises(UserError, match="fused_ops computes it already"):
        convert(tiny.transformer)
    assert "postgen" not in str(tiny.transformer.config.get("quantization_config"))


def test_wrong_files(tmp_path: Path) -> None:
    tiny = named("Wan")
    convert(tiny.transformer, LitConfig(layers="all:lit"))
    save(tiny.transformer, tmp_path)
    weights, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    state, spec = load_file(weights), json.loads(config.read_text())
    name = "blocks.1.attn1.postgen_lit.conv.space"
    for changed, said in (
        ({key: value for key, value in state.items() if key != name}, f"missing weights {name}"),
        ({**state, "blocks.0.attn1.postgen_lit.conv.space": state[name].clone()}, "unknown weights blocks.0.attn1"),
        ({**state, name: state[name][:, :3, :3].contiguous()}, "options in config.json do not belong together"),
    ):
        save_file(changed, weights)
        with pytest.raises(UserError, match=said):
            load(tmp_path)
    save_file(state, weights)
    note = spec["quantization_config"]
    for changed, said in (
        ({**note, "depth": 3}, "no setting depth"),
        ({**note, "lit": {**note["lit"], "feature_map": "exp"}}, "feature_map must be one of"),
        (None, "not a transformer that postgen.lit converted"),
    ):
        config.write_text(json.dumps({**spec, "quantization_config": changed}))
        with pytest.raises(UserError, match=said):
            load(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        load(tmp_path / "none")
    (tmp_path / "pipe" / "transformer").mkdir(parents=True)
    (tmp_path / "pipe" / "transformer" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="subfolder='transformer'"):
        load(tmp_path / "pipe")


def test_shards(tmp_path: Path) -> None:
    tiny: Any = named("Wan")
    convert(tiny.transformer, LitConfig(layers="all:window_linear", window=NARROW))
    tiny.transformer.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    state = load(tmp_path).state_dict()
    for name, weight in tiny.transformer.state_dict().items():
        assert state[name].dtype == weight.dtype
        assert torch.equal(state[name], weight), name


def test_a_sharded_model_is_exported(tmp_path: Path) -> None:
    """A model sharded by FSDP (with one process) has the same output, and its export is complete."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from postgen.training.sharding import uncut

    tiny = named("Wan")
    convert(tiny.transformer, LitConfig(layers="all:window_linear", window=NARROW))
    expected = tiny()
    weights = {name: weight.clone() for name, weight in tiny.transformer.state_dict().items()}
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in postgen.families.blocks_of(tiny.transformer):
            fully_shard(block.module, mesh=mesh)
        fully_shard(tiny.transformer, mesh=mesh)
        assert torch.equal(tiny(), expected)
        uncut(tiny.transformer, weights).save_pretrained(tmp_path / "out")
    finally:
        distributed.destroy_process_group()
    tiny.transformer = load(tmp_path / "out")
    assert torch.equal(tiny(), expected)


def test_refused() -> None:
    wan = named("Wan").transformer
    for config, said in (
        ({"layers": "0:lit"}, "block 0 is the most sensitive"),
        ({"layers": ("softmax", "lit", "lit")}, "has 3 layer types, but the model has 2"),
        ({"layers": "5:lit"}, "names block 5, but the model has blocks 0 to 1"),
        ({"layers": "all:mhla"}, "mhla needs the grid of tokens"),
        ({"layers": "all:lit", "lit": LitOptions(merge_heads=4)}, "merge_heads=4 does not divide 2 heads"),
    ):
        with pytest.raises(UserError, match=said):
            convert(wan, LitConfig(**config))
    assert not installed(wan).plug_ins
    convert(wan, LitConfig(layers="all:lit", first_block=True))
    with pytest.raises(UserError, match="is converted already"):
        convert(wan)
    revert(wan)
    with pytest.raises(UserError, match="is not converted"):
        revert(wan)
    with pytest.raises(UserError, match="is not converted"):
        save(wan, "nowhere")
    for name, said in (
        ("Sana", r"linear \(ReLU\)"),
        ("SANA-Video", r"linear \(ReLU\)"),
        ("Stable Diffusion", "U-Net"),
        ("LTX-2", "tokens other than the grid of the video"),
    ):
        with pytest.raises(UserError, match=said):
            convert(tiny_model(name).transformer)
    with pytest.raises(UserError, match="generates images"):
        convert(named("Flux").transformer, LitConfig(layers="all:window_delta"))


def test_float16_without_norms_and_replaced_processors() -> None:
    tiny = named("PixArt")
    convert(tiny.transformer, LitConfig(layers="all:lit"))
    tiny.transformer.half()
    given = {key: x.half() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in tiny.arguments.items()}
    with pytest.raises(UserError, match="overflow in float16 if the model does not normalise"):
        tiny.transformer(**given)
    revert(tiny.transformer)
    with pytest.raises(UserError, match="overflow in float16 if the model does not normalise"):
        convert(tiny.transformer, LitConfig(layers="all:lit"))
    cog = named("CogVideoX 1.5")
    convert(cog.transformer, LitConfig(layers="all:lit"))
    cog.transformer.fuse_qkv_projections()
    with pytest.raises(UserError, match="processors of 1 converted layers were replaced"):
        cog()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": "every 2nd"}, "WHERE:TYPE"),
        ({"layers": "some:lit"}, "use all, every N"),
        ({"layers": "3-1:lit"}, "use all, every N"),
        ({"layers": "all:windowdelta"}, "Did you mean 'window_delta'"),
        ({"layers": ()}, "layers must be"),
        ({"inherit": "none"}, "inherit must be one of all, output"),
        ({"grid": (1, 2)}, "three whole numbers"),
        ({"seed": -1}, "seed must be"),
        ({"lit": WindowOptions()}, "lit must be LitOptions"),
        ({"first_block": 1}, "first_block must be one of True, False"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        LitConfig(**changes)


@pytest.mark.parametrize("kind", [LitOptions, MhlaOptions, AnchorOptions, ChunkOptions, WindowOptions])
def test_wrong_options(kind: Any) -> None:
    """Every option refuses invalid values with a message that names the option."""
    for field in dataclasses.fields(kind):
        for wrong in (math.nan, math.inf, -1, 10**12, "many", None, [1], 2.5, (1, 0, 1)):
            with pytest.raises(UserError, match=f"{field.name}|needs"):
                kind(**{field.name: wrong})
    for field in dataclasses.fields(LitConfig):
        with pytest.raises(UserError, match=field.name):
            LitConfig(**{field.name: math.nan})
    same = LitConfig.from_json(json.loads(json.dumps(LitConfig(grid=(1, 2, 3)).as_json())))
    assert same == LitConfig(grid=(1, 2, 3))
