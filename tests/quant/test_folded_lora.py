"""A LoRA for the model before its folds changes the folded model in the same way."""

import copy

import pytest
import torch

from postgen.errors import UserError
from postgen.families.linear import find_linears
from postgen.quant.transforms.gains import gained_blocks, prepare_gains_
from postgen.quant.transforms.hadamard import random_signs, rotate_values_
from postgen.quant.transforms.let import fold_, fold_all_, let_points
from postgen.quant.transforms.lora import fold_lora
from postgen.quant.transforms.records import recorded
from tests.families.tiny_models import tiny_model
from tests.quant.test_let import drawn, error, points_of


def lora_of(model, rank=3):
    """Return a LoRA with random numbers for every linear layer of the blocks, also those of modulations."""
    generator = torch.Generator().manual_seed(7)
    state = {}
    for name, layer in find_linears(model, roles=("attention", "feed_forward", "modulation", "other")).items():
        state[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=generator) / 6
        state[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=generator) / 6
    return state


def with_lora(tiny, state):
    tiny = copy.deepcopy(tiny)
    tiny.transformer.load_lora_adapter(dict(state), prefix="transformer")
    return tiny()


@pytest.mark.parametrize("name", ["Wan image-to-video", "HunyuanVideo", "Flux", "Stable Diffusion 3", "CogVideoX 1.5"])
def test_a_lora_changes_the_folded_model_as_the_model_before(name):
    tiny = tiny_model(name, batch=2)
    model, state = tiny.transformer, lora_of(tiny.transformer)
    plain, expected = tiny(), with_lora(tiny, state)
    points = points_of(model)
    fold_all_(model, [(point, *drawn(point, seed)) for seed, point in enumerate(points)])
    fold_all_(model, [(point, *drawn(point, seed + 50)) for seed, point in enumerate(points)])
    for point in points:
        if point.kind == "value":
            rotate_values_(model, point, signs=random_signs(point.width, 2))
    assert error(plain, expected) > 0.03
    assert error(with_lora(tiny, fold_lora(model, state)), expected) < 1e-5
    assert error(with_lora(tiny, state), expected) > 0.03


def test_the_record_is_in_the_checkpoint():
    tiny = tiny_model("Wan", batch=2)
    state, fresh = lora_of(tiny.transformer), copy.deepcopy(tiny.transformer)
    expected = with_lora(tiny, state)
    for point in let_points(tiny.transformer, "blocks.1"):
        fold_(tiny.transformer, point, *drawn(point))
    assert gained_blocks(tiny.transformer) == ["blocks.1"]
    prepare_gains_(fresh, ["blocks.1"])
    assert not recorded(fresh.blocks[1])
    fresh.load_state_dict(tiny.transformer.state_dict())
    tiny.transformer = fresh
    assert error(with_lora(tiny, fold_lora(fresh, state)), expected) < 1e-5


def test_layers_without_folds_keep_their_lora():
    model = tiny_model("Wan").transformer
    state = {**lora_of(model), "text_encoder.q.lora_A.weight": torch.ones(2, 2)}
    new = fold_lora(model, state)
    assert new.keys() == state.keys()
    assert all(new[key] is state[key] for key in state)
    (point, *_) = let_points(model, "blocks.0", kinds=["value"])
    fold_(model, point, drawn(point)[0])
    new = fold_lora(model, state)
    changed = {key for key in state if not torch.equal(new[key], state[key])}
    names = ("attn1.to_v.lora_B", "attn1.to_out.0.lora_A")
    assert changed == {f"transformer.blocks.0.{name}.weight" for name in names}


def test_what_cannot_be_folded_is_refused():
    model = tiny_model("Wan").transformer
    for point in let_points(model, "blocks.0"):
        fold_(model, point, *drawn(point))
    place = "transformer.blocks.0.attn1.to_q"
    with pytest.raises(UserError, match=r"lora_magnitude_vector of this LoRA changes a layer with folds"):
        fold_lora(model, {f"{place}.lora_magnitude_vector": torch.ones(32)})
    with pytest.raises(UserError, match=r"lacks a half of blocks\.0\.attn1\.to_q"):
        fold_lora(model, {f"{place}.lora_A.weight": torch.ones(2, 32)})
    points = {point.name: point for point in let_points(model, "blocks.1")}
    rotate_values_(model, points["attn1.value"])
    with pytest.raises(UserError, match="is rotated already: fold it before rotation"):
        fold_(model, points["attn1.value"], torch.ones(32))
    with pytest.raises(UserError, match="is rotated already"):
        rotate_values_(model, points["attn1.value"])
