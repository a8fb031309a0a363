"""A LoRA for the model before its folds changes the folded model in the same way."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from postgen.errors import UserError
from postgen.families.linear import find_linears
from postgen.families.lora import load_loras, save_lora
from postgen.quant import QuantSpec, merge_lora_, quantize_weights
from postgen.quant.transforms.gains import gained_blocks, prepare_gains_
from postgen.quant.transforms.hadamard import random_signs, rotate_values_
from postgen.quant.transforms.let import fold_, fold_all_, let_points
from postgen.quant.transforms.lora import guard_folds_
from postgen.quant.transforms.records import recorded
from tests.families.tiny_models import tiny_model
from tests.quant.test_let import drawn, error, points_of
from tests.reconstruct.toy import pipeline


def lora_of(model, rank=3):
    """Return a LoRA with random numbers for every linear layer of the blocks, also those of modulations."""
    generator = torch.Generator().manual_seed(7)
    state = {}
    for name, layer in find_linears(model, roles=("attention", "feed_forward", "modulation", "other")).items():
        state[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=generator) / 6
        state[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=generator) / 6
    return state


def with_lora(tiny, state, *, guarded=True):
    tiny = copy.deepcopy(tiny)
    if not guarded:
        vars(tiny.transformer).pop("load_lora_adapter")
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
    assert error(with_lora(tiny, state), expected) < 1e-5
    assert error(with_lora(tiny, state, guarded=False), expected) > 0.03


def test_the_record_is_in_the_checkpoint():
    tiny = tiny_model("Wan", batch=2)
    state, fresh = lora_of(tiny.transformer), copy.deepcopy(tiny.transformer)
    expected = with_lora(tiny, state)
    for point in let_points(tiny.transformer, "blocks.1"):
        fold_(tiny.transformer, point, *drawn(point))
    assert gained_blocks(tiny.transformer) == ["blocks.1"]
    prepare_gains_(fresh, ["blocks.1"])
    guard_folds_(fresh)
    assert not recorded(fresh.blocks[1])
    fresh.load_state_dict(tiny.transformer.state_dict())
    tiny.transformer = fresh
    assert error(with_lora(tiny, state), expected) < 1e-5


def test_only_the_layers_of_folds_are_changed():
    tiny = tiny_model("Wan")
    model, state = tiny.transformer, lora_of(tiny.transformer)
    (point, *_) = let_points(model, "blocks.0", kinds=["value"])
    fold_(model, point, drawn(point)[0])
    model.load_lora_adapter(dict(state), prefix="transformer", adapter_name="a")
    own = {f"transformer.{name}": value for name, value in get_peft_model_state_dict(model, adapter_name="a").items()}
    assert own.keys() == state.keys()
    changed = {key for key in state if not torch.equal(own[key], state[key])}
    names = ("attn1.to_v.lora_B", "attn1.to_out.0.lora_A")
    assert changed == {f"transformer.blocks.0.{name}.weight" for name in names}


@torch.no_grad()
def predicted(model):
    config, draws = model.config, torch.Generator().manual_seed(0)
    return model(
        hidden_states=torch.randn(1, config.in_channels, 2, 4, 4, generator=draws),
        timestep=torch.tensor([500]),
        encoder_hidden_states=torch.randn(1, 6, config.text_dim, generator=draws),
        return_dict=False,
    )[0]


def folded(batch=1):
    tiny = tiny_model("Wan", batch=batch)
    for point in let_points(tiny.transformer, "blocks.0"):
        fold_(tiny.transformer, point, *drawn(point))
    return tiny


def test_a_lora_that_was_trained_on_the_folded_model_stays(tmp_path):
    tiny = folded()
    trained = copy.deepcopy(tiny)
    trained.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    for name, value in trained.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    trained.transformer.save_lora_adapter(tmp_path)
    again = copy.deepcopy(tiny)
    again.transformer.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.equal(again(), trained())
    assert not torch.equal(again(), tiny())
    other = tiny_model("Wan")
    for point in let_points(other.transformer, "blocks.0", kinds=["value"]):
        fold_(other.transformer, point, drawn(point)[0])
    with pytest.raises(UserError, match=r"was trained on folded weights .* and this model has others"):
        other.transformer.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert not getattr(other.transformer, "peft_config", None)


def test_a_folded_lora_is_saved_and_loaded_again(tmp_path):
    tiny = folded()
    first = copy.deepcopy(tiny)
    first.transformer.load_lora_adapter(lora_of(tiny.transformer), prefix="transformer", adapter_name="a")
    first.transformer.save_lora_adapter(tmp_path, adapter_name="a")
    again = copy.deepcopy(tiny)
    again.transformer.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.equal(again(), first())


def test_a_folded_lora_is_merged_with_its_bias():
    tiny = folded()
    quantize_weights(tiny.transformer, QuantSpec(weight="int8"))
    tiny.transformer.load_lora_adapter(lora_of(tiny.transformer), prefix="transformer")
    expected = tiny()
    merge_lora_(tiny.transformer, requantize=False)
    assert error(tiny(), expected) < 1e-5


def test_guards_do_not_keep_models_alive_and_can_be_pickled():
    tiny = folded()
    again = pickle.loads(pickle.dumps(tiny.transformer))
    assert vars(again)["load_lora_adapter"].model is again
    alone = copy.deepcopy(tiny.transformer)
    assert vars(alone)["add_adapter"].model is alone
    seen = weakref.ref(alone)
    gc.disable()
    try:
        del alone
        assert seen() is None
    finally:
        gc.enable()


def test_what_cannot_be_folded_is_refused():
    model = folded().transformer
    state = {key: value for key, value in lora_of(model).items() if "blocks.0.attn1.to_q" in key}
    key = "transformer.blocks.0.attn1.to_q.lora_magnitude_vector"
    with pytest.raises(UserError, match=r"attn1\.to_q is folded, and the magnitudes of this LoRA \(DoRA\)"):
        model.load_lora_adapter({**state, key: torch.ones(32)}, prefix="transformer")
    assert not getattr(model, "peft_config", None)
    points = {point.name: point for point in let_points(model, "blocks.1")}
    rotate_values_(model, points["attn1.value"])
    with pytest.raises(UserError, match="is rotated already: fold it before rotation"):
        fold_(model, points["attn1.value"], torch.ones(32))
    with pytest.raises(UserError, match="is rotated already"):
        rotate_values_(model, points["attn1.value"])


def test_lora_files_on_folded_and_exact_pipelines(tmp_path):
    """`--lora` and `lora_path` fold a LoRA for the exact model, and keep one that was trained on the folded one."""
    exact, _ = pipeline("Wan")
    state = lora_of(exact.transformer)
    save_file(state, tmp_path / "old.safetensors")
    folded, other = copy.deepcopy(exact), copy.deepcopy(exact)
    for point in let_points(folded.transformer, "blocks.0"):
        fold_(folded.transformer, point, *drawn(point))
    trained = copy.deepcopy(folded)
    adapter = trained.transformer
    adapter.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), adapter_name="a")
    for name, value in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    save_lora(trained, tmp_path / "new", "transformer", adapter, "a")
    load_loras(other, [str(tmp_path / "old.safetensors")])
    for source, expected in (("old.safetensors", other), ("new", trained)):
        pipe = copy.deepcopy(folded)
        load_loras(pipe, [str(tmp_path / source)])
        torch.testing.assert_close(predicted(pipe.transformer), predicted(expected.transformer), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"it was trained on the folded weights of a quantised model"):
        load_loras(exact, [str(tmp_path / "new")])
    save_file({**state, "transformer.scale_shift_table.diff": torch.ones(1, 2, 24)}, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match=r"differences of norms, tables or biases, which do not fit the folded"):
        load_loras(folded, [str(tmp_path / "more.safetensors")])
