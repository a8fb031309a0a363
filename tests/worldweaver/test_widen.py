"""Widening: RGB outputs stay bitwise equal, and narrowing restores the stock model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import postgen
from postgen.errors import UserError
from postgen.families.registry import layout_of
from postgen.families.widths import channel_axis
from postgen.worldweaver.widen import narrow_transformer, widen_transformer, widened
from tests.families.tiny_models import TinyModel, tiny_model

EXACT = ("Wan", "Wan image-to-video", "SkyReels-V2", "HunyuanVideo", "CogVideoX 1.0", "CogVideoX 1.5", "Mochi")
EXACT += ("Wan 2.2 text-and-image-to-video", "WanVACE", "SkyReels-V2 block-causal", "ChronoEdit", "AnyFlow", "Cosmos")
EXACT += ("Allegro", "Latte", "EasyAnimate", "Motif", "ConsisID", "SANA-Video")
ROUNDED = ("LTX", "HunyuanVideo 1.5")
"""Models whose first layer has 5 input features, summed in another order than 15. For LTX with 4: `test_model`."""


def axis_of(tiny: TinyModel) -> int:
    return channel_axis(layout_of(tiny.transformer))


def with_aux(tiny: TinyModel, count: int) -> Tensor:
    """Return the latents of a tiny model, with random latents of more modalities appended."""
    latents: Tensor = tiny.arguments["hidden_states"]
    axis = axis_of(tiny)
    shape = [5 * count if each == axis else size for each, size in enumerate(latents.shape)]
    return torch.cat([latents, torch.randn(shape)], dim=axis)


def call_of(tiny: TinyModel) -> dict[str, Any]:
    return {"arguments": tiny.arguments} if tiny.name == "SANA-Video" else {}


def config_of(model: Any) -> dict[str, Any]:
    """Return the config as it is saved, with lists in place of tuples, which JSON does not have."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return {name: [*value] if isinstance(value, tuple) else value for name, value in config.items()}


@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_rgb_is_the_stock_models_whatever_the_others_are(name: str, tmp_path: Path) -> None:
    tiny = tiny_model(name, batch=2)
    model, axis, stock = tiny.transformer, axis_of(tiny), tiny()
    config, state = config_of(model), {key: value.clone() for key, value in model.state_dict().items()}
    assert widen_transformer(model, ("depth", "flow"), **call_of(tiny)) is model
    latents = with_aux(tiny, 2)
    out = tiny(hidden_states=latents)
    tolerance = 1e-6 if name in ROUNDED else 0
    for part in out.split(5, dim=axis):  # the new outputs are initialised as copies of RGB
        assert (part - stock).abs().max() <= tolerance
    # The widened model is a plain model of its class, which can be saved and loaded.
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert config_of(loaded)["in_channels"] == config["in_channels"] + 10
    again = TinyModel(**{**vars(tiny), "transformer": loaded})
    assert torch.equal(again(hidden_states=latents), out)
    for wide, aux in ((model, None), (loaded, ("depth", "flow"))):
        narrow_transformer(wide, aux, **call_of(tiny))
        assert config_of(wide) == config
        assert wide.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in wide.state_dict().items())
    assert torch.equal(tiny(), stock)


@pytest.mark.parametrize("aux", [(), ("depth",)])
def test_placed_memory_has_inputs_and_no_outputs(aux: tuple[Any, ...], tmp_path: Path) -> None:
    tiny = tiny_model("Wan")
    model: Any = tiny.transformer
    stock, config = tiny(), config_of(model)
    widen_transformer(model, aux, placed=True)
    count = len(aux)
    assert (model.config.in_channels, model.config.out_channels) == (
        5 + 5 * count + 5 * (1 + count) + 1,
        5 + 5 * count,
    )
    latents = torch.cat([with_aux(tiny, count), torch.randn(1, 5 * (1 + count) + 1, 4, 4, 6)], dim=1)
    out = tiny(hidden_states=latents)
    assert torch.equal(out[:, :5], stock)
    assert ", and placed memory; noise levels" in str(postgen.summary(model))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(TinyModel(**{**vars(tiny), "transformer": loaded})(hidden_states=latents), out)
    narrow_transformer(loaded, aux, placed=True)
    narrow_transformer(model)
    assert config_of(loaded) == config_of(model) == config
    assert torch.equal(tiny(), stock)
    with pytest.raises(UserError, match="has no inputs for placed memory: omit placed"):
        widened(loaded, ("rgb",), placed=True)


def test_conditions_of_image_to_video_keep_their_place() -> None:
    tiny = tiny_model("Wan image-to-video")
    model: Any = tiny.transformer
    old = model.patch_embedding.weight.detach().clone()
    widen_transformer(model)
    assert torch.equal(model.patch_embedding.weight[:, :14], old)
    assert not model.patch_embedding.weight[:, 14:].any()
    assert (model.config.in_channels, model.config.out_channels) == (19, 10)


def test_new_outputs_are_copies_their_multiples_or_zero() -> None:
    for settings, factor in (({"init_out": "zero"}, 0.0), ({"aux_scale": 0.5}, 0.5)):
        tiny = tiny_model("Wan")
        stock = tiny()
        widen_transformer(tiny.transformer, **settings)
        rgb, depth = tiny(hidden_states=with_aux(tiny, 1)).split(5, dim=1)
        assert torch.equal(rgb, stock)
        assert torch.equal(depth, factor * stock)


def test_new_inputs_get_gradients_at_once_and_types_stay() -> None:
    tiny = tiny_model("Wan")
    model: Any = tiny.transformer.to(torch.bfloat16).requires_grad_(False)
    model.patch_embedding.requires_grad_(True)
    widen_transformer(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.proj_out.weight.requires_grad
    told = {name: value.bfloat16() for name, value in tiny.arguments.items() if name != "timestep"}
    told |= {"timestep": tiny.arguments["timestep"], "hidden_states": with_aux(tiny, 1).bfloat16()}
    model(**told)[0][:, :5].square().mean().backward()
    gradient = model.patch_embedding.weight.grad
    assert (gradient[:, 5:].flatten(1).abs().sum(dim=0) > 0).all()


def test_what_was_trained_is_sliced() -> None:
    tiny = tiny_model("HunyuanVideo")
    model: Any = widen_transformer(tiny.transformer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("x_embedder", "proj_out")):
                parameter.add_(torch.randn_like(parameter))
    latents = with_aux(tiny, 1)
    latents[:, 5:] = 0
    rgb = tiny(hidden_states=latents)[:, :5]
    narrow_transformer(model)
    torch.testing.assert_close(tiny(), rgb, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("HunyuanVideo Framepack", r"clean_x_embedder.proj.weight also depends on the number of channels"),
        ("Helios", r"patch_short.weight also depends on the number of channels"),
        ("WanAnimate", r"it cannot be created with more channels: in_channels should be 2 \* latent_channels \+ 4"),
        ("Kandinsky 5", "its config has no in_channels and out_channels"),
        ("LTX-2", "the output of LTX2VideoTransformer3DModel is not a permutation"),
        ("DiT", "it has 10 outputs for 5 inputs, so it also predicts a variance"),
    ],
)
def test_models_that_it_cannot_do_are_refused_and_left_alone(name: str, message: str) -> None:
    tiny = tiny_model(name)
    if name == "DiT":
        from diffusers import DiTTransformer2DModel

        tiny.transformer = DiTTransformer2DModel.from_config({**config_of(tiny.transformer), "out_channels": 10})
    before = {key: value.clone() for key, value in tiny.transformer.state_dict().items()}
    with pytest.raises(UserError, match=message):
        widen_transformer(tiny.transformer)
    assert all(torch.equal(value, before[key]) for key, value in tiny.transformer.state_dict().items())


def test_a_failure_in_between_leaves_the_model_as_it_was() -> None:
    tiny = tiny_model("Wan")
    model: Any = tiny.transformer
    stock, config = tiny(), config_of(model)

    def fail(module: nn.Module, inputs: Any) -> None:
        if module.weight.shape[0] > 20:
            raise MemoryError("no more")

    handle = model.proj_out.register_forward_pre_hook(fail)
    with pytest.raises(UserError, match="failed: MemoryError: no more"):
        widen_transformer(model)
    handle.remove()
    assert config_of(model) == config
    assert torch.equal(tiny(), stock)


def test_two_experts_are_refused() -> None:
    from tests.families.test_frame_levels import two_experts, wan

    for pipe in (two_experts(), wan(boundary_ratio=0.9)):
        with pytest.raises(UserError, match=r"has two experts, one for high and one for low noise \(Wan2.2-A14B\)"):
            widen_transformer(pipe)


def test_wrong_calls_are_one_line() -> None:
    from peft import LoraConfig

    model: Any = tiny_model("Wan").transformer
    for settings, message in (
        ({"aux": ("flow",)}, r"aux must be \('depth',\) or \('depth', 'flow'\), got \('flow',\)"),
        ({"init_out": "ones"}, "init_out must be 'copy' or 'zero', got 'ones'"),
        ({"init_out": "zero", "aux_scale": 2.0}, "aux_scale=2 applies to copied rows"),
        ({"aux_scale": float("nan")}, "aux_scale must be at least"),
    ):
        with pytest.raises(UserError, match=message):
            widen_transformer(model, **settings)
    with pytest.raises(UserError, match="is not widened: call widen_transformer"):
        narrow_transformer(model)
    widen_transformer(model)
    with pytest.raises(UserError, match="is already widened: call narrow_transformer first"):
        widen_transformer(model)
    with pytest.raises(UserError, match="this transformer has rgb, depth, but rgb, depth, flow is requested"):
        widened(model, ("rgb", "depth", "flow"))
    assert "worldweaver: rgb + depth, 5 channels each; noise levels: not set yet" in str(postgen.summary(model))
    narrow_transformer(model)
    assert "nothing is on" in str(postgen.summary(model))
    for layer in ("proj_out", "patch_embedding"):
        model = tiny_model("Wan").transformer
        model.add_adapter(LoraConfig(r=2, target_modules=[layer]))
        with pytest.raises(UserError, match=f"{layer} has a LoRA, so the number of channels cannot change"):
            widen_transformer(model)


def test_a_lora_on_other_layers_stays() -> None:
    from peft import LoraConfig

    tiny = tiny_model("Wan")
    model: Any = tiny.transformer
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    stock = tiny()
    widen_transformer(model)
    assert torch.equal(tiny(hidden_states=with_aux(tiny, 1))[:, :5], stock)
