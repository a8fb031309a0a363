"""Rows and columns of each channel, compared with biases that number the rows and with removed channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families.registry import layout_of
from postgen.families.widths import Widths, channel_axis, find_widths
from tests.families.tiny_models import TinyModel, tiny_model

PATCH_FIRST = ("Wan", "Wan image-to-video", "SkyReels-V2 block-causal", "SANA-Video", "Mochi")
CHANNEL_FIRST = ("HunyuanVideo", "CogVideoX 1.0", "CogVideoX 1.5", "LTX", "Kandinsky 5")


@pytest.fixture(scope="module", params=(*PATCH_FIRST, *CHANNEL_FIRST))
def found(request: pytest.FixtureRequest) -> tuple[TinyModel, Widths]:
    """Return a tiny model and its widths; tests restore every change of the model."""
    tiny = tiny_model(request.param)
    return tiny, find_widths(tiny.transformer, tiny.arguments if request.param == "SANA-Video" else None)


def axis(tiny: TinyModel) -> int:
    return channel_axis(layout_of(tiny.transformer))


def test_rows_are_what_the_biases_show(found: tuple[TinyModel, Widths]) -> None:
    tiny, widths = found
    last = tiny.transformer.get_submodule(widths.last)
    old = {name: value.clone() for name, value in last.state_dict().items()}
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.arange(len(last.bias)))
    out = tiny().movedim(axis(tiny), 1)[0].flatten(1)
    last.load_state_dict(old)
    patch_first = tiny.name in PATCH_FIRST
    expected = torch.arange(widths.rows.numel())
    expected = expected.view(*widths.rows.shape[::-1]).T if patch_first else expected.view(widths.rows.shape)
    assert torch.equal(widths.rows, expected)
    # All channels at one place of the output belong to one position in the patch.
    places = {tuple(column) for column in out.T.tolist()}
    assert places == {tuple(column) for column in widths.rows.T.float().tolist()}


def test_without_its_columns_a_channel_has_no_effect(found: tuple[TinyModel, Widths]) -> None:
    tiny, widths = found
    first = tiny.transformer.get_submodule(widths.first)
    old = first.weight.detach().clone()
    assert widths.columns.flatten().sort()[0].tolist() == list(range(first.weight[0].numel()))
    channel = 2
    with torch.no_grad():
        first.weight.flatten(1)[:, widths.columns[channel]] = 0
    outputs = [tiny(hidden_states=changed(tiny, each)) for each in (None, channel, channel + 1)]
    with torch.no_grad():
        first.weight.copy_(old)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def changed(tiny: TinyModel, channel: int | None) -> Tensor:
    latents: Tensor = tiny.arguments["hidden_states"].clone()
    if channel is not None:
        latents.select(axis(tiny), channel).add_(1.0)
    return latents


def test_nothing_stays_on_the_model() -> None:
    tiny = tiny_model("Wan")
    before, output = {name: value.clone() for name, value in tiny.transformer.state_dict().items()}, tiny()
    state = torch.get_rng_state()
    find_widths(tiny.transformer)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in tiny.transformer.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.transformer.modules())
    assert torch.equal(tiny(), output)


@pytest.mark.parametrize("name", ["Wan", "CogVideoX 1.5"])
def test_other_number_types_give_the_same(name: str) -> None:
    tiny = tiny_model(name)
    expected = find_widths(tiny.transformer)
    for dtype in (torch.bfloat16, torch.float64):
        other = find_widths(tiny.transformer.to(dtype))
        assert torch.equal(other.rows, expected.rows)
        assert torch.equal(other.columns, expected.columns)


def test_more_numbers_than_bfloat16_has() -> None:
    from diffusers import WanTransformer3DModel

    # 144 channels, as in Wan2.2-TI2V-5B with depth and flow.
    model = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, text_dim=4, freq_dim=4, ffn_dim=4, num_layers=1, in_channels=144,
        out_channels=144,
    )  # fmt: skip
    widths = find_widths(model.to(torch.bfloat16))
    assert torch.equal(widths.rows, torch.arange(576).view(4, 144).T)


def test_models_that_it_cannot_do_are_refused() -> None:
    with pytest.raises(UserError, match="the output of LTX2VideoTransformer3DModel is not a permutation of its last"):
        find_widths(tiny_model("LTX-2").transformer)
    with pytest.raises(UserError, match=r"SanaVideoTransformer3DModel.*give the arguments of a small forward pass$"):
        find_widths(tiny_model("SANA-Video").transformer)
    with pytest.raises(UserError, match="no layout for Linear"):
        find_widths(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="weights of this WanTransformer3DModel are not in memory"):
        find_widths(tiny_model("Wan").transformer.to("meta"))
    tiny = tiny_model("Wan")
    big = {**tiny.arguments, "hidden_states": torch.zeros(1, 5, 4, 100, 100)}
    with pytest.raises(UserError, match="the latents have 200000 elements: give smaller arguments"):
        find_widths(tiny.transformer, big)
    with pytest.raises(UserError, match=r"a small forward pass of WanTransformer3DModel, .* failed: "):
        find_widths(tiny.transformer, {**tiny.arguments, "encoder_hidden_states": torch.zeros(1, 2, 3)})
