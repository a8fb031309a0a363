"""FP8 linear layers on whole models: switching, exact removal, saving, copying, gradients, command line."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import postgen
from postgen.families.installed import installed
from postgen.families.linear import replaced_linears
from postgen.fp8_linear import FP8Linear, fp8_linears_for_call
from postgen.kernels.dispatch import TOLD
from tests.families.tiny_models import TinyModel, tiny_model
from tests.kernels.launches import relative_error

FAMILIES = ["Wan", "HunyuanVideo", "CogVideoX 1.5", "LTX"]
QUIET = postgen.FP8LinearConfig(simulate=True)


@pytest.fixture
def wan() -> TinyModel:
    return tiny_model("Wan")


def layers(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FP8Linear)]


@pytest.mark.parametrize("name", FAMILIES)
def test_put_on_and_taken_off(name: str) -> None:
    tiny = tiny_model(name)
    model, stock = tiny.transformer, tiny()
    modules, weights = dict(model.named_modules()), list(model.parameters())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    handle = postgen.apply_fp8_linears(model, QUIET)
    assert 0 < relative_error(tiny(), stock) < 0.05
    assert len(layers(model)) == sum(handle.stats()[""].values())
    # The state dict is that of the stock model.
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    handle.remove()
    assert torch.equal(tiny(), stock)
    assert dict(model.named_modules()) == modules
    assert all(one is other for one, other in zip(model.parameters(), weights, strict=True))
    assert not installed(model).plug_ins


def test_what_it_says(wan: TinyModel) -> None:
    handle = postgen.apply_fp8_linears(wan.transformer, postgen.FP8LinearConfig(cross_attention=False))
    text = "fp8_linears: {}, attention in 8 layers, feed_forward in 2 layers, feed_forward_out in 2 layers"
    assert str(postgen.summary(wan.transformer)).splitlines()[1:] == ["  " + text.format("on")]
    TOLD.clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        wan()
        wan()
        handle.update(simulate=True)
        wan()
    assert [str(each.message) for each in told] == [
        "FP8 linear layers are simulated, which is slower than exact layers: cpu has no FP8 matrix product"
    ]
    handle.disable()
    assert text.format("off") in str(postgen.summary(wan.transformer))
    assert not layers(wan.transformer)


def test_changed_settings_leave_layers_that_stay(wan: TinyModel) -> None:
    handle = postgen.apply_fp8_linears(wan.transformer, QUIET)
    there: Any = wan.transformer.get_submodule("blocks.0.attn1.to_q")
    handle.update(feed_forward=False, last_exact_blocks=1)
    assert set(layers(wan.transformer)) == {
        f"blocks.0.{name}"
        for name in (*(f"attn1.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")), "attn2.to_q", "attn2.to_out.0")
    } | {"blocks.0.ffn.net.2"}
    assert wan.transformer.get_submodule("blocks.0.attn1.to_q") is there


def test_copies_have_their_own(wan: TinyModel) -> None:
    stock, original = wan(), wan.transformer
    postgen.apply_fp8_linears(original, QUIET)
    on = wan()
    for other in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        wan.transformer = other
        assert torch.equal(wan(), on)
        postgen.remove_fp8_linears(other)
        assert torch.equal(wan(), stock)
    wan.transformer = original
    assert torch.equal(wan(), on)
    postgen.remove_fp8_linears(original)
    with pytest.raises(postgen.UserError, match="no FP8 linear layers on this WanTransformer3DModel"):
        postgen.remove_fp8_linears(original)


def test_saved_and_loaded(wan: TinyModel, tmp_path: Path) -> None:
    model: Any = wan.transformer
    stock = wan()
    handle = postgen.apply_fp8_linears(model, QUIET)
    on = wan()
    model.save_pretrained(tmp_path)
    wan.transformer = type(model).from_pretrained(tmp_path)
    assert torch.equal(wan(), stock)
    postgen.apply_fp8_linears(wan.transformer, QUIET)
    assert torch.equal(wan(), on)
    # Loaded weights are rounded again, in place.
    wan.transformer = model
    model.load_state_dict({key: value * 1.5 for key, value in model.state_dict().items()})
    changed = wan()
    handle.remove()
    assert not torch.equal(changed, on)
    assert relative_error(changed, wan()) < 0.1


def test_a_block_that_was_taken_out(wan: TinyModel) -> None:
    """The other blocks compute on, in FP8 and after the weights have changed."""
    model: Any = wan.transformer
    postgen.apply_fp8_linears(model, QUIET)
    before = wan()
    last = model.blocks[-1]
    del model.blocks[-1]
    assert not torch.equal(wan(), before)
    model.blocks.append(last)
    assert torch.equal(wan(), before)


def test_another_dtype_and_back(wan: TinyModel) -> None:
    stock = wan()
    handle = postgen.apply_fp8_linears(wan.transformer, QUIET)
    on, codes = wan(), wan.transformer.get_submodule("blocks.0.attn1.to_q").codes.clone()  # type: ignore[operator]
    wan.transformer.to(torch.float64)
    assert torch.equal(wan.transformer.get_submodule("blocks.0.attn1.to_q").codes, codes)  # type: ignore[arg-type]
    wan.transformer.to(torch.float32)
    assert torch.equal(wan(), on)
    handle.remove()
    assert torch.equal(wan(), stock)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_the_input(checkpointing: bool, wan: TinyModel) -> None:
    model: Any = wan.transformer.requires_grad_(False)
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    given = wan.arguments["hidden_states"].clone().requires_grad_()
    gradients = []
    for on in (False, True):
        with fp8_linears_for_call(model, QUIET if on else False):
            loss = model(**{**wan.arguments, "hidden_states": given}, return_dict=False)[0].square().sum()
            gradients += torch.autograd.grad(loss, given)
    assert 0 < relative_error(gradients[1], gradients[0]) < 0.2


def test_fused_operations_beside_it(wan: TinyModel) -> None:
    postgen.apply_fp8_linears(wan.transformer, QUIET)
    on = wan()
    postgen.apply_fused_ops(wan.transformer)
    # Fused norms round differently, so some values get the next code.
    assert relative_error(wan(), on) < 0.02
    postgen.remove_fp8_linears(wan.transformer)
    postgen.remove_fused_ops(wan.transformer)


def test_offloading_stands_in_the_way_of_removal(wan: TinyModel) -> None:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    handle = postgen.apply_fp8_linears(wan.transformer, QUIET)
    on = wan()
    cpu_offload(wan.transformer, torch.device("cpu"))
    assert torch.equal(wan(), on)
    with pytest.raises(postgen.UserError, match=r"is on blocks.* of fp8_linears: switch offloading off before"):
        handle.remove()
    assert "fp8_linears" in replaced_linears(wan.transformer)
    remove_hook_from_module(wan.transformer, recurse=True)
    with pytest.raises(postgen.UserError, match="group_offloading would lose the layer: replace linear layers before"):
        postgen.apply_fp8_linears(tiny_offloaded(), QUIET)


def tiny_offloaded() -> Any:
    model: Any = tiny_model("Wan").transformer
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    return model


@pytest.fixture(scope="module")
def wide_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import WanPipeline

    from tests.tiny_wan import wan_components

    folder = tmp_path_factory.mktemp("models") / "wan-32"
    WanPipeline(**wan_components(head_dim=16)).save_pretrained(folder)
    return folder


SIZE = ("--size", "32x32", "--frames", "5", "--steps", "1", "--format", "frames")


def test_the_command_line(cli: Any, wide_wan: Path, tmp_path: Path) -> None:
    from postgen.video import read_video

    stock, fp8 = tmp_path / "stock", tmp_path / "fp8"
    for folder, words in ((stock, ()), (fp8, ("--fp8-linears", "auto"))):
        outcome = cli("generate", "a ball", "--model", wide_wan, "-o", folder, *SIZE, *words)
        assert outcome.code == 0, outcome.err
    assert 0 < (read_video(stock) - read_video(fp8)).abs().max() < 0.1
    assert json.loads(fp8.with_suffix(".json").read_text())["settings"]["fp8_linears"] == "auto"


def test_errors_of_the_command_line(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    for text, message in (("int8", "--fp8-linears must be auto, off or some of"), ("auto", "not divisible by 16")):
        words = ("--model", tiny_wan, "-o", tmp_path / "x", *SIZE, "--fp8-linears", text)
        outcome = cli("generate", "a ball", *words)
        assert (outcome.code, list(tmp_path.iterdir())) == (2, [])
        assert message in outcome.err
        assert "Traceback" not in outcome.err
