"""Everything in a LoRA file is applied, or an error names the tensors that cannot be applied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from postgen.errors import UserError
from postgen.families.lora import check_lora, load_loras
from postgen.families.lora_export import export_lora
from postgen.families.lora_file import WEIGHTS
from postgen.training.lora import AdapterConfig, add_adapters
from tests.families import lora_cases as cases
from tests.families.tiny_pipelines import tiny_pipeline

WIDTH = 24
Q = "diffusion_model.blocks.0.self_attn.q"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def pair(layer: str = Q, outs: int = WIDTH, ins: int = WIDTH, rank: int = 2) -> dict[str, Tensor]:
    return {f"{layer}.lora_down.weight": drawn(rank, ins), f"{layer}.lora_up.weight": drawn(outs, rank)}


@pytest.fixture(scope="module")
def stock() -> Any:
    return cases.wan()


@pytest.fixture
def pipe(stock: Any) -> Any:
    before = {name: value.clone() for name, value in stock.transformer.state_dict().items()}
    yield stock
    stock.unload_lora_weights()
    stock.transformer.load_state_dict(before)


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
        save_file(tensors, tmp_path / "lora.safetensors", metadata=metadata)
        return str(tmp_path / "lora.safetensors")

    return write


def effect(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output of a layer with and without its adapters."""
    with torch.no_grad():
        return layer(x), layer.base_layer(x)


@pytest.mark.parametrize("key", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
def test_magnitudes_of_dora_are_applied(pipe: Any, written: Any, key: str) -> None:
    magnitude = drawn(WIDTH).abs() + 0.5
    value = magnitude[:, None] if key == "dora_scale" else magnitude
    base = pipe.transformer.blocks[0].attn1.to_q.weight.detach().clone()
    load_loras(pipe, [written({**pair(), f"{Q}.alpha": torch.tensor(4.0), f"{Q}.{key}": value})])
    layer = pipe.transformer.blocks[0].attn1.to_q
    assert torch.equal(layer.lora_magnitude_vector["lora0"].weight, magnitude)
    whole = base + 2 * pair()[f"{Q}.lora_up.weight"] @ pair()[f"{Q}.lora_down.weight"]
    whole = magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True)
    x = drawn(3, WIDTH)
    torch.testing.assert_close(effect(layer, x)[0], x @ whole.T + layer.base_layer.bias, rtol=1e-5, atol=1e-5)


def test_dora_goes_through_a_run_and_through_diffusers_keys_alone(pipe: Any, tmp_path: Path) -> None:
    adapter = cases.trained(pipe, peft_config=LoraConfig(r=2, use_dora=True, target_modules=["to_q", "to_v"]))
    layer = pipe.transformer.blocks[1].attn2.to_v
    x, expected = drawn(3, WIDTH), layer.lora_magnitude_vector[adapter].weight.clone()
    after = effect(layer, x)[0]
    cases.save(pipe, tmp_path, adapter)
    pipe.unload_lora_weights()
    export_lora(tmp_path, tmp_path / "out.safetensors", "diffusers")
    for source in (tmp_path, tmp_path / "out.safetensors"):
        load_loras(pipe, [str(source)])
        layer = pipe.transformer.blocks[1].attn2.to_v
        assert torch.equal(layer.lora_magnitude_vector["lora0"].weight, expected)
        assert torch.equal(effect(layer, x)[0], after)
        pipe.unload_lora_weights()
    pipe.load_lora_weights(str(tmp_path), weight_name="out.safetensors")
    assert torch.equal(effect(pipe.transformer.blocks[1].attn2.to_v, x)[0], after)
    pipe.unload_lora_weights()
    for format in ("comfyui", "kohya"):
        with pytest.raises(UserError, match=rf"has DoRA, .* from {format} files: .*Use --format diffusers"):
            export_lora(tmp_path, tmp_path / "x.safetensors", format)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"is DoRA, whose magnitudes cannot be scaled: its scale must be 1, got 0\.5"):
        load_loras(pipe, [f"{tmp_path}:0.5"])


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_differences_of_layers_are_applied(pipe: Any, written: Any, scale: float) -> None:
    """Test differences of a weight, of a bias, of both in addition to a LoRA pair, and of the patch embedding."""
    whole, low, bias = drawn(32, WIDTH), drawn(WIDTH, 32), drawn(WIDTH)
    patch = drawn(WIDTH, 4, 1, 2, 2)
    ffn = "diffusion_model.blocks.1.ffn"
    tensors = {f"{ffn}.0.diff": whole, f"{ffn}.2.diff": low, f"{ffn}.2.diff_b": bias, **pair(f"{ffn}.2", WIDTH, 32)}
    tensors |= {
        "diffusion_model.patch_embedding.diff": patch,
        f"{Q}.diff_b": bias.clone(),
        f"{ffn}.2.alpha": torch.tensor(4.0),
    }
    load_loras(pipe, [f"{written(tensors)}:{scale}"])
    found = cases.changes(pipe)["transformer"]
    both = (
        low.double() + 2 * tensors[f"{ffn}.2.lora_up.weight"].double() @ tensors[f"{ffn}.2.lora_down.weight"].double()
    )
    assert found.keys() == {"blocks.1.ffn.net.0.proj", "blocks.1.ffn.net.2", "patch_embedding"}
    assert torch.equal(found["blocks.1.ffn.net.0.proj"], scale * whole.double())
    torch.testing.assert_close(found["blocks.1.ffn.net.2"], scale * both, rtol=1e-6, atol=1e-6)
    assert torch.equal(found["patch_embedding"], scale * patch.double().flatten(1))
    network = pipe.transformer
    for layer, x, change in (
        (network.blocks[0].attn1.to_q, drawn(3, WIDTH), bias),
        (network.blocks[1].ffn.net[2], drawn(3, 32), drawn(3, 32) @ both.float().T + bias),
        (network.patch_embedding, video := drawn(1, 4, 2, 4, 4), torch.conv3d(video, patch, stride=(1, 2, 2))),
    ):
        after, before = effect(layer, x)
        torch.testing.assert_close(after, before + scale * change, rtol=1e-5, atol=1e-5)


def test_differences_of_norms_and_tables_are_added(pipe: Any, written: Any, tmp_path: Path) -> None:
    parameters = {
        "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
        "blocks.1.norm3.diff": "blocks.1.norm2.weight",
        "blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
        "blocks.1.modulation.diff": "blocks.1.scale_shift_table",
        "head.modulation.diff": "scale_shift_table",
    }
    own = dict(pipe.transformer.named_parameters())
    differences = {key: drawn(*own[name].shape) for key, name in parameters.items()}
    before = {name: own[name].detach().clone() for name in parameters.values()}
    file = written({f"diffusion_model.{key}": value for key, value in differences.items()} | pair())
    with pytest.raises(
        UserError, match=r"contains differences of norms or tables, .*blocks\.0\.attn1\.norm_q\.weight, bl"
    ):
        add_adapters(pipe, cases.denoiser_for(pipe), AdapterConfig(lora_path=file))
    load_loras(pipe, [f"{file}:0.5"])
    for key, name in parameters.items():
        expected = (before[name].double() + 0.5 * differences[key].double()).float()
        torch.testing.assert_close(pipe.transformer.get_parameter(name), expected, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"difference of blocks\.\d\.\S+ has shape .*, which no weight of a layer"):
        export_lora(file, tmp_path / "x.safetensors", "comfyui")


def test_differences_that_are_zero_are_nothing(pipe: Any, written: Any) -> None:
    load_loras(pipe, [written({**pair(), "diffusion_model.blocks.0.norm9.diff": torch.zeros(3)})])
    assert list(cases.changes(pipe)["transformer"]) == ["blocks.0.attn1.to_q"]


@pytest.mark.parametrize(
    "base", ["transformer.blocks.0.attn1.to_q", "blocks.0.attn1.to_q", "lora_unet_blocks_0_self_attn_q"]
)
def test_alpha_beside_any_keys_counts(pipe: Any, written: Any, base: str) -> None:
    tensors = pair(base)
    load_loras(pipe, [written({**tensors, f"{base}.alpha": torch.tensor(6.0)})])
    expected = 3 * tensors[f"{base}.lora_up.weight"].double() @ tensors[f"{base}.lora_down.weight"].double()
    assert torch.equal(cases.changes(pipe)["transformer"]["blocks.0.attn1.to_q"], expected)


def test_ranks_and_alphas_of_every_layer_go_on(pipe: Any, written: Any, tmp_path: Path) -> None:
    """Every layer keeps its rank and alpha in training, in its export and in a conversion to diffusers' keys."""
    tensors: dict[str, Tensor] = {}
    expected = {}
    for number, part in enumerate("qkvo"):
        base = f"diffusion_model.blocks.1.self_attn.{part}"
        tensors |= pair(base, rank=1 + number % 3) | {f"{base}.alpha": torch.tensor(2.0 ** (number % 2 + 2))}
        own = "blocks.1.attn1." + ("to_out.0" if part == "o" else f"to_{part}")
        scale = 2.0 ** (number % 2 + 2) / (1 + number % 3)
        down, up = (tensors[f"{base}.lora_{half}.weight"].double() for half in ("down", "up"))
        expected[own] = scale * up @ down
    adapter = add_adapters(pipe, cases.denoiser_for(pipe), AdapterConfig(lora_path=written(tensors)))
    assert adapter is not None
    assert cases.same(cases.changes(pipe), {"transformer": expected})
    cases.save(pipe, tmp_path / "run", adapter)
    pipe.unload_lora_weights()
    export_lora(tmp_path / "run", tmp_path / "out.safetensors", "diffusers")
    for file in (tmp_path / "run" / WEIGHTS, tmp_path / "out.safetensors"):
        assert cases.same(cases.read_by_postgen(pipe, str(file)), {"transformer": expected})
        assert cases.same(cases.read_by_diffusers(pipe, {"transformer": file}), {"transformer": expected})


def peft_metadata(**settings: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})}


NAN = torch.full((2, WIDTH), torch.nan)
OWN = "transformer.blocks.0.attn1.to_q"
BAD = {
    "nan": ({**pair(), f"{Q}.lora_down.weight": NAN}, {}, rf"NaN or infinity in 1 tensors: {Q}\.lora_down\.weight$"),
    "infinity": (
        {**pair(), f"{Q}.lora_up.weight": NAN.T.nan_to_num(torch.inf).contiguous()},
        {},
        "NaN or infinity in 1",
    ),
    "alpha": ({**pair(), f"{Q}.alpha": torch.tensor(torch.nan)}, {}, rf"NaN or infinity in 1 tensors: {Q}\.alpha$"),
    "alpha said": (pair(OWN), peft_metadata(r=2, lora_alpha=float("nan")), "is damaged: lora_alpha is nan"),
    "alpha of words": (pair(OWN), peft_metadata(lora_alpha="many"), "is damaged: lora_alpha is 'many'"),
    "a pattern": (
        pair(OWN),
        peft_metadata(r=2, lora_alpha=2, alpha_pattern={"a": None}),
        "alpha_pattern of a is None",
    ),
    "settings": (pair(OWN), {"lora_adapter_metadata": "[1]"}, "cannot read the LoRA"),
    "rank said": (
        pair(OWN),
        peft_metadata(r=4, lora_alpha=4),
        r"blocks\.0\.attn1\.to_q has rank 2, but its settings have rank 4$",
    ),
    "ranks": ({**pair(), f"{Q}.lora_up.weight": drawn(WIDTH, 3)}, {}, r"the ranks of blocks\.0\.attn1\.to_q differ"),
    "half": ({f"{Q}.lora_up.weight": drawn(WIDTH, 3)}, {}, r"to_q has no complete pair of LoRA matrices, only up$"),
    "twice": (pair() | pair(OWN), {}, r"contains blocks\.0\.attn1\.to_q twice, under different keys$"),
    "nothing": ({}, {"format": "pt"}, "is not a LoRA: none of its 0 tensors has 'lora' in its name"),
    "alphas": ({f"{Q}.alpha": torch.ones(2), **pair()}, {}, r"alpha of blocks\.0\.attn1\.to_q has shape \(2,\)"),
    "size": (pair(outs=30), {}, r"attn1\.to_q is 30 x 24 in the LoRA and 24 x 24 in the model: the LoRA was"),
    "inputs": (
        {**pair(), f"{Q}.dora_scale": drawn(1, WIDTH)},
        {},
        r"only DoRA with a magnitude for each of the 24 out",
    ),
    "some DoRA": (
        {**pair(), **pair("diffusion_model.blocks.0.self_attn.k"), f"{Q}.dora_scale": drawn(WIDTH, 1)},
        {},
        r"1 of its 2 layers have no DoRA magnitude, .*: blocks\.0\.attn1\.to_k$",
    ),
    "unknown difference": (
        {**pair(), **{f"diffusion_model.blocks.{n}.odd.diff": drawn(2) for n in range(5)}},
        {},
        r"5 of its 7 tensors cannot be applied to WanPipeline: \S+\.0\.odd\.diff, \S+, \S+ and 2 more$",
    ),
    "text encoder": (
        pair() | pair("lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        {},
        r"2 of its 4 tensors cannot be applied to WanPipeline: lora_te1_text_model_encoder_layers_0_mlp_fc1",
    ),
    "LoHa": (
        {"lora_unet_blocks_0_ffn_0.hada_w1_a": drawn(2, 3), **pair("lora_unet_blocks_0_self_attn_q")},
        {},
        r"1 of its 3 tensors cannot be applied to WanPipeline: lora_unet_blocks_0_ffn_0\.hada_w1_a$",
    ),
    "another block": (
        pair("lora_unet_blocks_7_ffn_0"),
        {},
        r"0 of its 1 layer names match, .*: blocks\.7\.ffn\.net\.0\.proj",
    ),
    "LTX": (
        pair("diffusion_model.transformer_blocks.0.attn1.to_q"),
        {},
        r"Its layers are those of ltx or cogvideox$",
    ),
    "said": (
        pair("transformer.transformer_blocks.0.attn1.to_q"),
        {"postgen": json.dumps({"pipeline": "LTXPipeline"})},
        r"these match no layer: transformer\.transformer_blocks\.0\.attn1\.to_q\. It was made for LTXPipeline$",
    ),
    "note": (pair(), {"postgen": "[]"}, "the note of .* cannot be read: TypeError"),
}


@pytest.mark.parametrize("what", BAD)
def test_lora_that_cannot_be_applied(pipe: Any, written: Any, what: str) -> None:
    tensors, metadata, said = BAD[what]
    with pytest.raises(UserError, match=said) as caught:
        load_loras(pipe, [written(tensors, metadata)])
    assert "\n" not in str(caught.value)
    assert not hasattr(pipe.transformer.blocks[0].attn1.to_q, "base_layer")


def test_values_are_looked_at_before_a_model_is_loaded(written: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="NaN or infinity"):
        check_lora(written({**pair(), f"{Q}.alpha": torch.tensor(torch.inf)}))
    Path(written(pair())).write_bytes(b"")
    with pytest.raises(UserError, match="cannot read the LoRA"):
        check_lora(str(tmp_path))


def test_numbers_of_eight_bits_are_read(pipe: Any, written: Any) -> None:
    tensors = {key: value.to(torch.float8_e4m3fn) for key, value in pair().items()}
    load_loras(pipe, [written(tensors)])
    down, up = (tensors[f"{Q}.lora_{half}.weight"].double() for half in ("down", "up"))
    assert torch.equal(cases.changes(pipe)["transformer"]["blocks.0.attn1.to_q"], up @ down)


def test_folders_that_hold_one_lora(pipe: Any, tmp_path: Path) -> None:
    """Test a run, its export, a folder that peft wrote, and a folder with one file of another name."""
    adapter = cases.trained(pipe)
    expected = cases.changes(pipe)
    cases.save(pipe, tmp_path / "run" / "export", adapter)
    from peft.utils import get_peft_model_state_dict

    (tmp_path / "peft").mkdir()
    state = get_peft_model_state_dict(pipe.transformer, adapter_name=adapter)
    save_file(
        {f"base_model.model.{key}": value for key, value in state.items()},
        tmp_path / "peft" / "adapter_model.safetensors",
    )
    pipe.transformer.peft_config[adapter].save_pretrained(tmp_path / "peft")
    pipe.unload_lora_weights()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "style.safetensors").write_bytes((tmp_path / "run" / "export" / WEIGHTS).read_bytes())
    for folder in ("run", "run/export", "peft", "other"):
        assert cases.same(cases.read_by_postgen(pipe, str(tmp_path / folder)), expected)


UNET = "unet_down_blocks_1_attentions_0_transformer_blocks_0"
SGM = "unet_input_blocks_3_1_transformer_blocks_0"


@pytest.mark.parametrize("family", ["Stable Diffusion", "Stable Diffusion XL"])
def test_text_encoders_of_kohya_and_their_own_alphas(written: Any, family: str) -> None:
    """The keys of XL's UNet have the author's names. diffusers converts them, but mixes up alphas that differ."""
    pipe, _ = tiny_pipeline(family)
    unet, places = (UNET, ("te",)) if family == "Stable Diffusion" else (SGM, ("te1", "te2"))
    width = 8
    text = "text_model_encoder_layers_0_self_attn"
    layers = {
        f"lora_{unet}_attn1_to_{part}": f"unet down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_{part}"
        for part in "qk"
    }
    layers |= {
        f"lora_{te}_{text}_{part}_proj": f"text_encoder{'_2' * (te == 'te2')} encoder.layers.0.self_attn.{part}_proj"
        for te in places
        for part in ("q", "k", "v", "out")
    }
    tensors = {}
    for number, name in enumerate(layers):
        tensors |= pair(name, width, width) | {f"{name}.alpha": torch.tensor(3.0 + number)}
    load_loras(pipe, [f"{written(tensors)}:0.5"])
    for number, (name, place) in enumerate(layers.items()):
        part, _, layer = place.partition(" ")
        whole = {key.replace("text_model.", ""): module for key, module in getattr(pipe, part).named_modules()}[layer]
        found = whole.scaling["lora0"] * whole.lora_B["lora0"].weight.double() @ whole.lora_A["lora0"].weight.double()
        down, up = (tensors[f"{name}.lora_{half}.weight"].double() for half in ("down", "up"))
        torch.testing.assert_close(found, (3 + number) / 4 * up @ down)
    pipe.unload_lora_weights()
    with pytest.raises(UserError, match=r"changes text_encoder(, text_encoder_2)?, which training does not train or"):
        add_adapters(pipe, cases.denoiser_for(pipe), AdapterConfig(lora_path=written(tensors)))


def test_what_diffusers_would_leave_out_is_named(written: Any) -> None:
    flux, _ = tiny_pipeline("FLUX")
    layer = "lora_unet_double_blocks_0_img_attn_proj"
    lost = pair("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.k", 8, 8)
    with pytest.raises(UserError, match=r"2 of its 4 tensors cannot be applied to FluxPipeline: text_encoders\.t5xxl"):
        load_loras(flux, [written(pair(layer, 32, 32) | lost)])


def test_a_repository_on_the_hub_has_one_file_or_the_usual_name(
    pipe: Any, written: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    path = written(pair())
    listed = ["README.md", "a.safetensors"]
    asked = []
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: listed)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: asked.append((name, file)) or path)
    load_loras(pipe, ["owner/style:0.5"])
    listed.append(WEIGHTS)
    pipe.unload_lora_weights()
    load_loras(pipe, ["owner/style"])
    assert asked == [("owner/style", "a.safetensors"), ("owner/style", WEIGHTS)]
    listed[2:] = ["b.safetensors"]
    with pytest.raises(UserError, match=r"owner/style has 2 \.safetensors files on the hub \(a\.safetensors, b\."):
        load_loras(pipe, ["owner/style"])
