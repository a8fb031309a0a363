"""LoRA files with the keys of other programs: diffusers' own converters read the same change of every weight back."""

import json
import re

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

from postgen.errors import UserError
from postgen.families.lora_export import export_lora, keyed, read_lora, rename
from postgen.families.lora_file import NOTE
from postgen.families.lora_layers import Layer, fuse
from postgen.families.lora_names import NAMES

ATTENTION = r"(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$"
MODELS = {
    "wan": ("WanTransformer3DModel", {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12}),
    "skyreels": (
        "SkyReelsV2Transformer3DModel",
        {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12},
    ),
    "hunyuan_video": ("HunyuanVideoTransformer3DModel", {"num_layers": 1, "num_single_layers": 1}),
    "ltx": ("LTXVideoTransformer3DModel", {"num_layers": 2}),
    "cogvideox": ("CogVideoXTransformer3DModel", {"num_layers": 2}),
    "flux": ("FluxTransformer2DModel", {"num_layers": 1, "num_single_layers": 1}),
    "stable_diffusion_3": ("SD3Transformer2DModel", {"num_layers": 2}),
    "stable_diffusion": ("UNet2DConditionModel", {"cross_attention_dim": 32, "block_out_channels": (32, 64, 64, 64)}),
}
PIPELINES = {
    "wan": "WanPipeline",
    "skyreels": "SkyReelsV2Pipeline",
    "hunyuan_video": "HunyuanVideoPipeline",
    "ltx": "LTXPipeline",
    "cogvideox": "CogVideoXPipeline",
    "flux": "FluxPipeline",
    "stable_diffusion_3": "StableDiffusion3Pipeline",
    "stable_diffusion": "StableDiffusionPipeline",
}


def linear_layers(model):
    """Return the names and shapes of a model's linear layers; the model is on the meta device."""
    name, config = MODELS[model]
    with torch.device("meta"):
        network = getattr(diffusers, name)(**config)
    return {key: tuple(m.weight.shape) for key, m in network.named_modules() if isinstance(m, torch.nn.Linear)}


def change(down, up, scale):
    """Return the product of a change of a weight with three random vectors, which differs for different changes."""
    probe = torch.randn(down.shape[1], 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return scale * up.double() @ (down.double() @ probe)


def close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def lora_file(folder, model, pattern, *, rank=4, alpha=12, note=True):
    """Write a file in diffusers' form, with alpha in the metadata; return the file and the change of each weight."""
    part = "unet" if model == "stable_diffusion" else "transformer"
    source, tensors, changes = torch.Generator().manual_seed(0), {}, {}
    for name, (outs, ins) in linear_layers(model).items():
        if re.search(pattern, name):
            down, up = (torch.randn(*shape, generator=source) for shape in ((rank, ins), (outs, rank)))
            tensors |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
            changes[name] = change(down, up, alpha / rank)
    packed = {f"{part}.r": rank, f"{part}.lora_alpha": alpha}
    folder.mkdir(exist_ok=True)
    path = folder / "pytorch_lora_weights.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(packed)})
    if note:
        (folder / NOTE).write_text(json.dumps({"pipeline": PIPELINES[model]}))
    return path, changes


def read_by_diffusers(model, path):
    """Return the change of each weight in diffusers' conversion of a file."""
    state, alphas = getattr(diffusers, PIPELINES[model]).lora_state_dict(path), {}
    if isinstance(state, tuple):
        state, alphas = state
    found = {}
    for key, down in state.items():
        # For UNets, the conversion returns an older form of diffusers' keys.
        match = re.fullmatch(r"(?:transformer|unet)\.(.+?)(\.lora_A|_lora\.down|\.lora\.down)\.weight", key)
        if match is None:
            continue
        up = state[key.replace(match[2], {".lora_A": ".lora_B"}.get(match[2], match[2].replace("down", "up")))]
        scaled = [value for name, value in (alphas or {}).items() if key.startswith(name.removesuffix(".alpha"))]
        alpha = scaled[0] if scaled else len(down)
        name = re.sub(r"(\.to_out)$", r"\1.0", match[1].replace(".processor", ""))
        found[name] = change(down, up, alpha / len(down))
    return found


BLOCK = r"blocks\.\d+\."
CASES = {
    "wan-comfyui": rf"{BLOCK}(attn[12]\.{ATTENTION}|ffn)|time_proj|_embedder\.linear_|^proj_out",
    "wan-kohya": rf"{BLOCK}(attn[12]\.{ATTENTION}|ffn)",
    "skyreels-comfyui": rf"{BLOCK}attn1\.to_[qk]$",
    "hunyuan_video-comfyui": r"^(single_)?transformer_blocks\.\d+\.",
    "ltx-comfyui": rf"{BLOCK}(attn[12]\.{ATTENTION}|ff)",
    "cogvideox-comfyui": rf"{BLOCK}(attn1\.{ATTENTION}|ff)",
    "flux-comfyui": rf"^(single_)?transformer_blocks\.\d+\.(attn\.{ATTENTION}|ff|proj|norm1)",
    "flux-kohya": rf"^(single_)?transformer_blocks\.\d+\.attn\.{ATTENTION}",
    "stable_diffusion_3-comfyui": rf"attn\.{ATTENTION}",
    "stable_diffusion-kohya": rf"attn[12]\.{ATTENTION}",
    "stable_diffusion-comfyui": rf"attn[12]\.{ATTENTION}|ff\.net",
}


@pytest.mark.parametrize("case", CASES)
def test_export_lora_is_read_back_by_diffusers(tmp_path, case):
    model, format = case.split("-")
    _, changes = lora_file(tmp_path / "export", model, CASES[case])
    target = tmp_path / "out.safetensors"
    export_lora(tmp_path, target, format)
    found = read_by_diffusers(model, target)
    # diffusers reads the untrained parts of a fused layer as zeros.
    found = {name: change for name, change in found.items() if name in changes or change.any()}
    assert len(changes) > 1
    assert found.keys() == changes.keys()
    for name, expected in changes.items():
        close(found[name], expected)


@pytest.mark.parametrize(
    ("family", "convert"),
    [
        ("wan", single_file_utils.convert_wan_transformer_to_diffusers),
        ("ltx", single_file_utils.convert_ltx_transformer_checkpoint_to_diffusers),
        ("hunyuan_video", single_file_utils.convert_hunyuan_video_transformer_to_diffusers),
    ],
)
def test_export_lora_names_are_those_of_the_authors_weights(family, convert):
    """diffusers' single-file conversion maps exactly these names of the authors to diffusers' names."""
    for mine, theirs in NAMES[family].plain.items():
        assert list(convert({f"{theirs.format(1)}.weight": torch.zeros(4, 2)})) == [f"{mine.format(1)}.weight"]
    for theirs, members in NAMES[family].fused.items():
        if "single" not in theirs:
            found = convert({f"{theirs.format(1)}.weight": torch.zeros(6, 2)})
            assert list(found) == [f"{mine.format(1)}.weight" for mine in members]


def test_export_lora_fuses_by_blocks():
    one, two = torch.ones(1, 2), 2 * torch.ones(2, 2)
    fused = fuse([Layer(one, torch.ones(3, 1), 0.5), None, Layer(two, torch.ones(3, 2), 2.0)], (1, 1, 1))
    assert torch.equal(fused.down, torch.cat([one, two]))
    expected = torch.tensor([[0.5, 0, 0]] * 3 + [[0.0, 0, 0]] * 3 + [[0.0, 2, 2]] * 3)
    assert torch.equal(fused.up, expected)
    alone = fuse([None, None, None, Layer(one, torch.ones(8, 1))], (1, 1, 1, 4))
    assert alone.up.tolist() == [[0.0]] * 6 + [[1.0]] * 8


def test_export_lora_of_hunyuans_token_refiner(tmp_path):
    """Compare with the weights directly: diffusers' converter divides the rank by three and cannot read these."""
    _, changes = lora_file(tmp_path, "hunyuan_video", r"refiner_blocks\.0\.attn\.to_[qkv]$")
    export_lora(tmp_path, tmp_path / "out.safetensors", "comfyui")
    key = "diffusion_model.txt_in.individual_token_refiner.blocks.0.self_attn_qkv"
    tensors = load_file(tmp_path / "out.safetensors")
    assert tensors.keys() == {f"{key}.lora_A.weight", f"{key}.lora_B.weight"}
    found = change(tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"], 1.0)
    parts = [changes[f"context_embedder.token_refiner.refiner_blocks.0.attn.to_{part}"] for part in "qkv"]
    close(found, torch.cat(parts))


@pytest.mark.parametrize("model", ["wan", "hunyuan_video", "ltx", "flux"])
def test_export_lora_for_kohya_has_the_names_of_comfyui(tmp_path, model):
    lora_file(tmp_path, model, rf"transformer_blocks\.0\.attn1?\.{ATTENTION}|^blocks\.0\.attn1")
    note = {"pipeline": PIPELINES[model], "outputs": {"blocks.{}.ffn.net.0.proj": 32}}
    (tmp_path / NOTE).write_text(json.dumps(note))
    for format in ("comfyui", "kohya"):
        export_lora(tmp_path, tmp_path / f"{format}.safetensors", format)
    comfyui, kohya = (load_file(tmp_path / f"{format}.safetensors") for format in ("comfyui", "kohya"))
    names = {re.sub(r"\.(lora_[AB]|lora_down|lora_up)\.weight$|\.alpha$", "", key) for key in comfyui}
    for name in names:
        down, up = (comfyui.get(f"{name}.{a}.weight", comfyui.get(f"{name}.{b}.weight")) for a, b in
                    (("lora_A", "lora_down"), ("lora_B", "lora_up")))  # fmt: skip
        theirs = name.replace("diffusion_model.", "lora_unet_").replace(".", "_")
        scale = kohya[f"{theirs}.alpha"].item() / len(kohya[f"{theirs}.lora_down.weight"])
        expected = change(kohya[f"{theirs}.lora_down.weight"], kohya[f"{theirs}.lora_up.weight"], scale)
        mine = comfyui.get(f"{name}.alpha", torch.tensor(float(len(down)))).item() / len(down)
        close(change(down, up, mine), expected)
    # diffusers reads kohya's keys of Wan only if a block has all layers, so the missing layers are written as zeros.
    more = {key.split(".")[0] for key in kohya} - {
        name.replace("diffusion_model.", "lora_unet_").replace(".", "_") for name in names
    }
    assert len(more) == (6 if model == "wan" else 0)
    assert not any(kohya[f"{name}.lora_{half}.weight"].any() for name in more for half in ("down", "up"))
    assert len(kohya) == 3 * (len(names) + len(more))


def test_export_lora_of_unets_is_diffusers_own_conversion(tmp_path):
    from diffusers.utils import convert_state_dict_to_kohya

    path, _ = lora_file(tmp_path, "stable_diffusion", rf"attn1\.{ATTENTION}", alpha=4)
    export_lora(path, tmp_path / "out.safetensors", "kohya")
    expected, found = convert_state_dict_to_kohya(load_file(path)), load_file(tmp_path / "out.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key].to(found[key].dtype)) for key in expected)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}}, 0.5),
        ({}, 1.0),
    ],
)
def test_export_lora_scale_of_a_peft_folder(tmp_path, settings, scale):
    key = "base_model.model.blocks.0.attn1.to_q"
    tensors = {f"{key}.lora_A.weight": torch.ones(4, 2), f"{key}.lora_B.weight": torch.ones(3, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    (layer,) = read_lora(tmp_path / "adapter_model.safetensors").values()
    assert layer.scale == scale
    assert export_lora(tmp_path, tmp_path / "out.safetensors", "comfyui") == ["blocks.0.self_attn.q"]
    assert load_file(tmp_path / "out.safetensors")["diffusion_model.blocks.0.self_attn.q.lora_B.weight"].max() == scale


def test_export_lora_reads_alphas_among_the_tensors(tmp_path):
    tensors = {"transformer.blocks.0.attn1.to_q.lora.down.weight": torch.ones(4, 2)}
    tensors |= {"transformer.blocks.0.attn1.to_q.lora.up.weight": torch.ones(3, 4)}
    tensors |= {"transformer.blocks.0.attn1.to_q.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    (layer,) = read_lora(tmp_path / "a.safetensors").values()
    assert layer.scale == 0.5
    assert keyed({"x": layer}, "kohya")["lora_unet_x.alpha"] == 2


def test_export_lora_says_what_is_wrong(tmp_path, cli):
    def told(*words):
        done = cli("export-lora", *words, "-o", tmp_path / "out.safetensors")
        assert done.code == 2
        assert done.err.startswith("postgen: error: ")
        assert done.err.count("\n") == 1
        return done.err

    comfyui = ("--format", "comfyui")
    path, _ = lora_file(tmp_path / "a", "flux", rf"attn\.{ATTENTION}", note=False)
    assert "fit hunyuan_video and flux: choose one with --family" in told(path, *comfyui)
    assert "unknown family 'flxu'. Known: wan, hunyuan_video" in told(path, *comfyui, "--family", "flxu")
    assert re.search(
        r"as wan: \d+ of \d+ layers are unknown: \S+, \S+, \S+, \.\.\.", told(path, *comfyui, "--family", "wan")
    )
    assert "format is 'peft'. Allowed: comfyui, kohya" in told(path, "--format", "peft")
    assert "there is no LoRA file" in told(tmp_path / "nowhere", *comfyui)
    (path.parent / NOTE).write_text('{"pipeline": "MochiPipeline"}')
    assert "the LoRA keys of MochiPipeline in other formats are unknown" in told(path, *comfyui)
    cog, _ = lora_file(tmp_path / "b", "cogvideox", r"attn1\.to_q$")
    assert "kohya's tools have no keys for cogvideox" in told(cog, "--format", "kohya")
    save_file({"transformer.blocks.0.attn1.to_q.lora_magnitude_vector": torch.ones(2)}, tmp_path / "d.safetensors")
    assert "no complete pair of LoRA matrices, only lora_magnitude" in told(tmp_path / "d.safetensors", *comfyui)
    save_file(
        {"transformer.other.lora_A.weight": torch.ones(2, 2), "transformer.other.lora_B.weight": torch.ones(2, 2)},
        tmp_path / "e.safetensors",
    )
    assert "fit no family, the first is other" in told(tmp_path / "e.safetensors", *comfyui)
    (tmp_path / "f.safetensors").write_text("nothing")
    assert "cannot read the LoRA" in told(tmp_path / "f.safetensors", *comfyui)
    (tmp_path / "g" / "transformer").mkdir(parents=True)
    (tmp_path / "g" / "transformer" / "config.json").write_text("{}")
    assert "holds a whole model, not a LoRA: use it as the --model of postgen generate" in told(
        tmp_path / "g", *comfyui
    )
    assert not (tmp_path / "out.safetensors").exists()


def test_export_lora_with_a_layer_of_another_family():
    layers = {
        "blocks.0.attn1.to_q": Layer(torch.ones(1, 2), torch.ones(2, 1)),
        "blocks.0.odd": Layer(torch.ones(1, 2), torch.ones(2, 1)),
    }
    with pytest.raises(UserError, match=r"x: 1 of 2 layers are unknown: blocks\.0\.odd$"):
        rename(layers, NAMES["wan"], "x")
