"""Folds of scales and shifts leave every model's output as it was, and scale what the readers get."""

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from postgen.assets import embedded_model
from postgen.errors import UserError
from postgen.families import blocks_of
from postgen.quant import LayerSpec, QLinear, format_of, quantize_tensor
from postgen.quant.transforms.gains import gained_blocks, prepare_gains_
from postgen.quant.transforms.let import (
    LEAST_SCALE,
    fold_,
    fold_all_,
    folded_input,
    folded_linear,
    initial_scale,
    initial_shift,
    let_points,
)
from tests.families.tiny_models import BLOCK_BUILDERS, BUILDERS, TinyModel, tiny_model
from tests.families.tiny_parts import Size, build

WAN = {"attn1.input", "attn1.value", "attn1.query_key", "attn2.query_input", "attn2.value", "attn2.query_key"}
WAN |= {"ffn.input"}
FLAT = {"attn1.input", "attn1.value", "attn1.query_key", "attn2.value", "attn2.query_key", "ff.input"}
DOUBLE = {"attn.input", "attn.text_input", "attn.value", "attn.query_key", "ff.input", "ff_context.input"}
COGVIDEOX = {"attn1.input", "attn1.value", "attn1.query_key", "ff.input"}
SANA = {"attn1.input", "attn1.value", "attn2.value", "attn2.query_key"}
KANDINSKY = {"self_attention.input", "self_attention.value", "cross_attention.query_input", "cross_attention.value"}
KANDINSKY |= {"feed_forward.input"}
LTX2 = FLAT | {f"audio_{name}" for name in FLAT}
GATED = {"ff.hidden", "ff_context.hidden"}
POINTS = {
    **dict.fromkeys(("Wan", "Wan image-to-video", "Wan 2.2 text-and-image-to-video", "WanVACE", "WanAnimate"), WAN),
    **dict.fromkeys(("SkyReels-V2", "SkyReels-V2 block-causal", "ChronoEdit", "AnyFlow", "Helios"), WAN),
    **dict.fromkeys(("LTX", "Latte", "PixArt"), FLAT),
    "LTX-2": LTX2,
    "Allegro": FLAT - {"attn1.query_key"},
    **dict.fromkeys(("HunyuanVideo", "HunyuanVideo Framepack", "HunyuanVideo 1.5", "HunyuanImage", "Motif"), DOUBLE),
    **dict.fromkeys(("Flux", "LongCat-Image"), DOUBLE),
    "Ovis-Image": DOUBLE | GATED,
    "Qwen-Image": DOUBLE - {"ff.input", "ff_context.input"} | {"img_mlp.input", "txt_mlp.input"},
    "Stable Diffusion 3": DOUBLE | {"attn2.input", "attn2.value", "attn2.query_key"},
    "Chroma": {"attn.value", "attn.query_key"},
    "AuraFlow": {"attn.value"} | GATED,
    **dict.fromkeys(("CogVideoX 1.0", "CogVideoX 1.5", "ConsisID", "DiT"), COGVIDEOX),
    **dict.fromkeys(("CogView 4", "CogView 3 Plus"), COGVIDEOX - {"attn1.query_key"}),
    "EasyAnimate": COGVIDEOX | {"attn1.text_input", "txt_ff.input"},
    "Mochi": COGVIDEOX | {"attn1.text_input", "ff_context.input"} | GATED,
    "Cosmos": {"attn1.value", "attn2.value", "attn2.query_key"},
    "Kandinsky 5": KANDINSKY,
    "Kandinsky 6": {f"{stream}_dec_block.{name}" for stream in ("video", "audio") for name in KANDINSKY},
    **dict.fromkeys(("Sana", "SANA-Video"), SANA),
    "PRX": {"attention.input", "attention.value", "attention.query_key", "mlp.input", "mlp.hidden"},
    "Lumina 2": {"attn.input", "attn.query_key", "feed_forward.input", "feed_forward.hidden"},
    "Z-Image": {
        *("attention.input", "attention.value", "attention.query_key"),
        "feed_forward.input",
        "feed_forward.hidden",
    },
    "Flux 2": {"attn.value", "attn.query_key"} | GATED,
    "JoyImage edit": {"attn.value", "attn.query_key"},
    "JoyImage edit plus": {"attn.value", "attn.query_key"},
    "HunyuanDiT": {"attn1.value", "attn2.query_input", "attn2.value", "ff.input"},
}
SCALED_ONLY = {
    "Mochi": set(POINTS["Mochi"]),
    "Cosmos": set(POINTS["Cosmos"]),
    "Sana": {"attn1.input", "attn1.value"},
    "HunyuanVideo 1.5": {"attn.value"},
    "Kandinsky 5": {"feed_forward.input"},
    "Z-Image": set(POINTS["Z-Image"]),
}
"""Points without a shift besides queries, keys and gated halves, of some models."""


def points_of(model):
    return [point for block in blocks_of(model) for point in let_points(model, block)]


def drawn(point, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = (0.7 * torch.randn(point.width, generator=generator)).exp()
    if point.fold.paired:
        scale = scale[::2].repeat_interleave(2)
    return scale, torch.randn(point.width, generator=generator) if point.shiftable else None


def folded(model, points):
    model = copy.deepcopy(model)
    fold_all_(model, [(point, *drawn(point, seed)) for seed, point in enumerate(points)])
    return model


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


class Inputs(dict):
    """The last input of every linear layer of a model, by name."""

    def __init__(self, model):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, args, name=name: self.update({name: args[0].clone()}))


def check_exact(tiny, points):
    new = folded(tiny.transformer, points)
    before = Inputs(tiny.transformer)
    expected = tiny()
    tiny.transformer = new
    after = Inputs(tiny.transformer)
    assert error(tiny(), expected) < 1e-6
    for seed, point in enumerate(points):
        scale, shift = drawn(point, seed)
        for part in point.readers:
            layer = f"{point.block}.{part.name}"
            wanted = folded_input(point, part.name, before[layer], scale, shift)
            assert error(after[layer], wanted) < 1e-5, layer


@pytest.mark.parametrize("name", POINTS)
def test_folds_are_exact_and_scale_what_the_readers_get(name):
    tiny = tiny_model(name, batch=2)
    points = points_of(tiny.transformer)
    assert {point.name for point in points} == POINTS[name]
    if name in SCALED_ONLY:
        usual = {point.name for point in points if point.kind in ("query_key", "gated")}
        assert {point.name for point in points if not point.shiftable} == usual | SCALED_ONLY[name]
    check_exact(tiny, points)


def test_every_model_but_unets_has_rows():
    unets = {"Stable Diffusion", "AnimateDiff", "ModelScope", "I2VGen-XL", "Stable Video Diffusion"}
    assert POINTS.keys() == {*BUILDERS, *BLOCK_BUILDERS} - unets


def test_the_embedded_model_is_the_same_after_folds_of_its_own_ranges():
    model = WanTransformer3DModel.from_pretrained(embedded_model(), subfolder="transformer", torch_dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, model.config.in_channels, 2, 4, 4, generator=generator)
    text = torch.randn(2, 12, model.config.text_dim, generator=generator)
    inputs = Inputs(model)
    with torch.no_grad():
        expected = model(latents, torch.tensor([900.0, 300.0]), text, return_dict=False)[0]
        folds = []
        for point in points_of(model):
            if point.readers:
                x = inputs[f"{point.block}.{point.readers[0].name}"].flatten(0, -2)
                shift = initial_shift(point, x.amin(0), x.amax(0))
                folds.append((point, initial_scale(model, point, (x - shift).abs().amax(0)), shift))
        fold_all_(model, folds)
        assert len(folds) == 40
        assert error(model(latents, torch.tensor([900.0, 300.0]), text, return_dict=False)[0], expected) < 1e-6


def changed(name, **changes):
    """Return a tiny model with other config entries."""
    kind, config, arguments = BUILDERS[name](Size(batch=2, frames=4, layers=2))
    transformer = build(kind, {**config, **changes})
    return TinyModel(name=name, transformer=transformer, arguments=arguments, frames=4, attention_layers=0)


def test_gates_and_further_modulation_of_ltx_2():
    both = {f"{stream}{flag}": True for stream in ("", "audio_") for flag in ("gated_attn", "cross_attn_mod")}
    tiny = changed("LTX-2", **both)
    tiny.arguments["sigma"] = tiny.arguments["timestep"] / 1000
    points = points_of(tiny.transformer)
    assert {point.name for point in points} == LTX2 | {"attn2.query_input", "audio_attn2.query_input"}
    assert not any(point.shiftable for point in points if point.kind == "value")
    check_exact(tiny, points)


def test_blocks_of_easyanimate_without_weights_for_the_text_keep_their_values():
    tiny = changed("EasyAnimate", num_layers=3, mmdit_layers=1)
    points = points_of(tiny.transformer)
    assert {point.block for point in points if point.kind == "value"} == {"transformer_blocks.0"}
    check_exact(tiny, points)


def test_the_attention_to_the_text_of_motif_reads_folded_tensors():
    tiny = changed("Motif", enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True)
    points = points_of(tiny.transformer)
    assert {point.name for point in points} == DOUBLE | {"cross_attn.value"}
    check_exact(tiny, points)


def test_only_modulation_by_a_shared_embedding_needs_a_gain():
    for name, gained in (("Wan", "temb_gain"), ("PixArt", "timestep_gain"), ("Flux", ""), ("CogVideoX 1.0", "")):
        model = tiny_model(name).transformer
        kinds = folded(model, points_of(model))
        buffers = {each for each, _ in kinds.named_buffers() if each.endswith("_gain")}
        assert {each.rpartition(".")[2] for each in buffers} == ({gained} if gained else set())
        assert gained_blocks(kinds) == [block.name for block in blocks_of(model)]
        assert gained_blocks(model) == []


def test_a_gated_feed_forward_network_scales_the_half_without_activation():
    from diffusers.models.attention import BasicTransformerBlock

    torch.manual_seed(0)
    block = BasicTransformerBlock(32, 2, 16, norm_type="ada_norm_zero", num_embeds_ada_norm=10, activation_fn="geglu")
    (point,) = let_points(block, kinds=["gated"])
    x, step = torch.randn(2, 5, 32), torch.tensor([3, 4])
    expected = block(x, timestep=step, class_labels=step).detach()
    fold_(block, point, drawn(point)[0])
    assert error(block(x, timestep=step, class_labels=step).detach(), expected) < 1e-6
    with pytest.raises(UserError, match="cannot be shifted"):
        fold_(block, point, torch.ones(point.width), torch.ones(point.width))


def test_several_folds_in_low_precision_round_each_weight_once():
    model = tiny_model("Wan").transformer.to(torch.bfloat16)
    (point, *_) = let_points(model, "blocks.0")
    half = torch.full((point.width,), 0.75)
    once = copy.deepcopy(model)
    fold_all_(once, [(point, half, None), (point, 1 / half, None)])
    assert all(torch.equal(new, old) for new, old in zip(once.parameters(), model.parameters(), strict=True))


def test_what_a_layer_gets_and_holds_is_differentiable():
    model = tiny_model("Wan").transformer
    for point in let_points(model, "blocks.1"):
        scale, shift = drawn(point)
        for part in (*point.readers, *point.writers):
            layer = model.get_submodule(f"blocks.1.{part.name}")
            s, d = scale.requires_grad_(), None if shift is None else shift.requires_grad_()
            weight, bias = folded_linear(point, part.name, layer.weight, layer.bias, s, d)
            new = folded(model, [])
            fold_(new, point, s, d)
            found = new.get_submodule(f"blocks.1.{part.name}")
            assert torch.allclose(weight, found.weight)
            assert torch.allclose(bias, found.bias, atol=1e-6)
            (gradient,) = torch.autograd.grad(weight.sum() + bias.sum(), s)
            assert gradient.abs().sum() > 0
    assert folded_linear(point, "another", layer.weight, None, s) == (layer.weight, None)


def test_a_block_alone_is_folded_like_the_block_of_a_model():
    model = tiny_model("HunyuanVideo").transformer
    whole, block = copy.deepcopy(model), copy.deepcopy(model.transformer_blocks[1])
    for point, own in zip(let_points(whole, "transformer_blocks.1"), let_points(block), strict=True):
        fold_(whole, point, *drawn(point))
        fold_(block, own, *drawn(point))
    pairs = zip(whole.transformer_blocks[1].parameters(), block.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_gains_survive_saving_and_casts(tmp_path):
    tiny = tiny_model("Wan")
    expected = tiny()
    tiny.transformer = folded(tiny.transformer, points_of(tiny.transformer))
    state = tiny.transformer.state_dict()
    names = gained_blocks(tiny.transformer)
    loaded = WanTransformer3DModel.from_config(tiny.transformer.config)
    prepare_gains_(loaded, names)
    loaded.load_state_dict(state)
    tiny.transformer = loaded.eval()
    assert error(tiny(), expected) < 1e-6
    gain = loaded.blocks[0].temb_gain.clone()
    assert torch.equal(loaded.to(torch.bfloat16).blocks[0].temb_gain, gain)
    with pytest.raises(UserError, match=r"has folds in blocks\.9, but Wan.* has no such block"):
        prepare_gains_(loaded, ["blocks.9"])


def test_a_block_with_a_gain_trains_and_compiles_like_any_other():
    tiny = tiny_model("Wan")
    tiny.transformer = folded(tiny.transformer, points_of(tiny.transformer))
    expected = tiny()
    tiny.transformer.enable_gradient_checkpointing()
    out = tiny.transformer(**tiny.arguments, return_dict=False)[0]
    assert torch.equal(out, expected)
    out.sum().backward()
    assert tiny.transformer.blocks[0].scale_shift_table.grad.abs().sum() > 0


def test_initial_values_of_scale_and_shift():
    model = tiny_model("Wan").transformer
    (point, *_) = let_points(model, "blocks.0")
    largest = torch.linspace(0, 4, point.width)
    columns = torch.stack([model.blocks[0].attn1.get_submodule(name).weight for name in ("to_q", "to_k", "to_v")])
    expected = (largest.clamp_min(1e-5) / columns.abs().amax((0, 1))).sqrt().clamp_min(LEAST_SCALE)
    assert torch.allclose(initial_scale(model, point, largest), expected)
    assert torch.equal(initial_shift(point, -largest, 2 * largest), largest / 2)
    rows = {each.name: each for each in let_points(model, "blocks.0")}
    assert initial_shift(rows["attn1.query_key"], largest, largest) is None


def test_errors_name_the_point_and_change_nothing():
    model = tiny_model("Wan").transformer
    before = copy.deepcopy(model.state_dict())
    points = {point.name: point for point in let_points(model, "blocks.1")}
    ones = torch.ones(32)
    cases = [
        ("attn1.input", torch.ones(5), None, r"scale of attn1\.input of blocks\.1 has shape \(5,\): it needs \(32,\)"),
        ("attn1.input", ones, ones.sqrt().log() / 0, "not finite"),
        ("attn1.input", -ones, None, "must be positive"),
        ("attn1.query_key", ones, ones, "cannot be shifted"),
        ("attn1.query_key", torch.arange(1.0, 33), None, "rotary embeddings mix"),
    ]
    for name, scale, shift, message in cases:
        with pytest.raises(UserError, match=message):
            fold_all_(model, [(points["ffn.input"], ones * 2, None), (points[name], scale, shift)])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_without_rows_or_with_other_layers_is_refused():
    with pytest.raises(UserError, match="no folds are known for blocks of the class DownBlock2D"):
        points_of(tiny_model("Stable Diffusion").transformer)
    model = tiny_model("Wan").transformer
    with pytest.raises(UserError, match=r"has no block 'blocks\.7'. Blocks: blocks\.0 \.\.\. blocks\.1"):
        let_points(model, "blocks.7")
    fused = copy.deepcopy(model)
    fused.fuse_qkv_projections()
    with pytest.raises(UserError, match=r"blocks\.0\.attn1 has fused projections"):
        points_of(fused)
    layer = model.blocks[0].ffn.net[2]
    quantized = copy.deepcopy(model)
    spec = LayerSpec(weight=format_of("int4:g16"))
    quantized.blocks[0].ffn.net[2] = QLinear.of(layer, quantize_tensor(layer.weight, spec.weight), spec)
    eight = copy.deepcopy(model)
    eight.blocks[0].ffn.net[2].weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    for other in (quantized, eight):
        with pytest.raises(UserError, match=r"blocks\.0\.ffn\.net\.2 is quantised already"):
            points_of(other)


def test_numbers_that_overflow_and_shared_weights_are_refused():
    model = tiny_model("Wan").transformer.to(torch.float16)
    before = copy.deepcopy(model.state_dict())
    (point, *_) = let_points(model, "blocks.0")
    (other, *_) = let_points(model, "blocks.1")
    with pytest.raises(UserError, match="too large for float16 after this fold"):
        fold_all_(model, [(point, 2 * torch.ones(32), None), (other, torch.full((32,), 1e7), None)])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.blocks[1].scale_shift_table = model.blocks[0].scale_shift_table
    with pytest.raises(UserError, match=r"blocks\.0\.scale_shift_table is also blocks\.1\.scale_shift_table"):
        let_points(model, "blocks.0")
    model.blocks[1].ffn.net[2].to("meta")
    with pytest.raises(UserError, match=r"blocks\.1\.ffn\.net\.2 are not loaded"):
        let_points(model, "blocks.1")


def test_an_adapter_is_refused():
    from peft import LoraConfig

    model = tiny_model("Wan").transformer
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UserError, match=r"to_q has an adapter"):
        points_of(model)
