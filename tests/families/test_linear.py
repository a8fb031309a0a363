"""Replacing linear layers, on tiny models of the real classes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from postgen import summary
from postgen.errors import UserError
from postgen.families.installed import installed
from postgen.families.linear import find_linears, replace_linears, replaced_linears
from tests.families.tiny_models import TinyModel, tiny_model
from tests.families.toy_linears import Double, Inside, copied, double, inside, sharing

FAMILIES = ["Wan", "CogVideoX 1.5", "HunyuanVideo", "LTX", "Mochi", "Latte"]


@pytest.fixture
def wan() -> TinyModel:
    return tiny_model("Wan")


def refused(model: nn.Module, message: str) -> None:
    keys = list(model.state_dict())
    with pytest.raises(UserError, match=message):
        replace_linears(model, double, owner="fp8")
    assert list(model.state_dict()) == keys
    assert not replaced_linears(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_replace_and_remove(name: str) -> None:
    tiny = tiny_model(name)
    model, before = tiny.transformer, tiny()
    modules, weights, keys = dict(model.named_modules()), list(model.parameters()), list(model.state_dict())
    handle = replace_linears(model, inside, owner="same")
    assert torch.equal(tiny(), before)
    handle.remove()
    handle = replace_linears(model, double, owner="fp64")
    assert summary(model).transformers[0].plug_ins == {
        "linear layers (fp64)": f"{len(handle.modules)} linear layers are Double"
    }
    torch.testing.assert_close(tiny(), before, atol=1e-5, rtol=1e-5)
    assert not torch.equal(tiny(), before)
    changed = set(model.state_dict()) ^ set(keys)
    assert {key.rpartition(".")[2] for key in changed} <= {"matrix", "offset", "weight", "bias"}
    assert all(f"{layer}.matrix" in changed for layer in handle.modules)
    handle.remove()
    assert torch.equal(tiny(), before)
    assert dict(model.named_modules()) == modules  # modules compare by identity
    assert all(one is other for one, other in zip(model.parameters(), weights, strict=True))
    assert list(model.state_dict()) == keys
    assert summary(model).transformers[0].plug_ins == {}
    with pytest.raises(UserError, match="were put back"):
        handle.remove()


def test_which_layers(wan: TinyModel) -> None:
    attention = [f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    block = [*attention, "ffn.net.0.proj", "ffn.net.2"]
    assert list(find_linears(wan.transformer)) == [f"blocks.{i}.{name}" for i in (0, 1) for name in block]
    assert len(find_linears(wan.transformer, roles=["feed_forward"])) == 4
    with pytest.raises(UserError, match="unknown roles ffn: choose from attention, feed_forward, modulation, other"):
        find_linears(wan.transformer, roles=["ffn"])  # type: ignore[list-item]
    assert list(find_linears(wan.transformer, pattern="proj_out")) == ["proj_out"]
    single = find_linears(tiny_model("HunyuanVideo").transformer)
    assert "single_transformer_blocks.0.proj_mlp" in single
    assert not [name for name in single if "norm" in name or "embed" in name or "refiner" in name]
    with pytest.raises(UserError, match="no linear layers named 'nothing'"):
        find_linears(wan.transformer, pattern="nothing")
    with pytest.raises(UserError, match="no layout for Sequential"):
        find_linears(nn.Sequential(nn.Linear(1, 1)))
    assert list(find_linears(nn.Sequential(nn.Linear(1, 1)), pattern="0")) == ["0"]


def test_some_are_left(wan: TinyModel) -> None:
    handle = replace_linears(wan.transformer, lambda n, x: Double(x) if n.endswith("to_q") else None, owner="q")
    assert list(handle.modules) == [f"blocks.{i}.attn{j}.to_q" for i in (0, 1) for j in (1, 2)]
    handle.remove()
    for originals in ("here", "dropped"):
        with pytest.raises(UserError, match="q replaced none of 20"):
            replace_linears(wan.transformer, lambda n, x: None, owner="q", originals=originals)  # type: ignore[arg-type]
        assert not replaced_linears(wan.transformer)


def test_a_failing_make_leaves_no_trace(wan: TinyModel) -> None:
    modules = dict(wan.transformer.named_modules())

    def fail(name: str, linear: nn.Linear) -> nn.Module:
        if name.startswith("blocks.1"):
            raise ValueError("no")
        return Double(linear)

    with pytest.raises(ValueError, match="no"):
        replace_linears(wan.transformer, fail, owner="fp8")
    with pytest.raises(UserError, match=r"fp8 made int for blocks.0.attn1.to_q"):
        replace_linears(wan.transformer, lambda n, x: 3, owner="fp8")  # type: ignore[arg-type, return-value]
    one = Double(nn.Linear(1, 1))
    for make in (lambda n, x: one, lambda n, x: modules["blocks.0.ffn"]):
        with pytest.raises(UserError, match=r"fp8 made a module for .* that the model already has"):
            replace_linears(wan.transformer, make, owner="fp8")
    assert dict(wan.transformer.named_modules()) == modules
    assert not installed(wan.transformer).plug_ins


def test_two_owners(wan: TinyModel) -> None:
    before = wan()
    first = replace_linears(wan.transformer, inside, owner="fp8", roles=["attention"])
    for roles in (["attention"], ["feed_forward", "attention"]):
        with pytest.raises(UserError, match=r"blocks.0.attn1.to_q is already replaced by fp8: .*before sparse"):
            replace_linears(wan.transformer, inside, owner="sparse", roles=roles)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="fp8 has replaced"):
        replace_linears(wan.transformer, inside, owner="fp8", roles=["feed_forward"])
    second = replace_linears(wan.transformer, double, owner="sparse", roles=["feed_forward"])
    assert set(replaced_linears(wan.transformer)) == {"fp8", "sparse"}
    first.remove()
    second.remove()
    assert torch.equal(wan(), before)


def test_one_owner_inside_another(wan: TinyModel) -> None:
    before = wan()
    outer = replace_linears(wan.transformer, inside, owner="outer")
    ((name, _),) = outer.modules["blocks.0.attn1.to_q"].named_children()
    inner = replace_linears(wan.transformer, copied, owner="inner", pattern=rf".*to_q\.{name}")
    with pytest.raises(UserError, match=r"inner replaced a layer inside blocks.0.attn1.to_q: remove it before outer"):
        outer.remove()
    inner.remove()
    outer.remove()
    assert torch.equal(wan(), before)
    assert not replaced_linears(wan.transformer)


def test_handles_know_what_another_handle_did(wan: TinyModel) -> None:
    first = replace_linears(wan.transformer, double, owner="fp8")
    second = replaced_linears(wan.transformer)["fp8"]
    first.remove()
    third = replace_linears(wan.transformer, double, owner="fp8")
    for call in (second.remove, lambda: second.modules, first.remove):
        with pytest.raises(UserError, match="were put back: replace them again"):
            call()
    third.remove()


def test_wrong_words(wan: TinyModel) -> None:
    for call, message in (
        (lambda: find_linears(wan.transformer, pattern="blocks.("), "is not a regular expression"),
        (lambda: replace_linears(wan.transformer, double, owner="fp8", originals="gpu"), "'gpu'. Allowed: here, cpu"),  # type: ignore[arg-type]
        (lambda: find_linears(object()), "in a torch module only, got object"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError, match=message):
            call()  # type: ignore[no-untyped-call]


def test_copies_have_their_own(wan: TinyModel) -> None:
    before = wan()
    replace_linears(wan.transformer, double, owner="fp8")
    changed, original = wan(), wan.transformer
    for copied_model in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        wan.transformer = copied_model
        assert torch.equal(wan(), changed)
        replaced_linears(copied_model)["fp8"].remove()
        assert torch.equal(wan(), before)
    wan.transformer = original
    assert torch.equal(wan(), changed)


def test_where_the_old_layers_wait(wan: TinyModel) -> None:
    before = wan()
    kept = replace_linears(wan.transformer, double, owner="fp8", originals="cpu")
    kept.remove()
    assert torch.equal(wan(), before)
    dropped = replace_linears(wan.transformer, double, owner="fp8", originals="dropped")
    assert not installed(wan.transformer).plug_ins["linear layers (fp8)"].originals
    with pytest.raises(UserError, match="fp8 dropped"):
        dropped.remove()


@pytest.mark.parametrize("copies", [False, True])
def test_parameters_that_were_taken_over_come_back_as_they_are_then(copies: bool, wan: TinyModel) -> None:
    """Shared parameters go back to the old layer, also as new objects; a replacement's own parameters do not."""
    replace_linears(wan.transformer, sharing, owner="half", roles=["attention"])
    replace_linears(wan.transformer, copied, owner="own", roles=["feed_forward"])
    if copies:
        wan.transformer = pickle.loads(pickle.dumps(copy.deepcopy(wan.transformer)))
    loaded = {name: value + 1 for name, value in wan.transformer.state_dict().items()}
    wan.transformer.load_state_dict(loaded, assign=True)
    for handle in replaced_linears(wan.transformer).values():
        handle.remove()
    found = wan.transformer.state_dict()
    assert found.keys() == loaded.keys()
    assert all(torch.equal(found[name], loaded[name]) == (".ffn." not in name) for name in found)


def lora(model: Any, **changes: Any) -> None:
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False, **changes))


def test_lora_before(wan: TinyModel) -> None:
    lora(wan.transformer)
    before = wan()
    handle = replace_linears(wan.transformer, double, owner="fp8")
    assert "blocks.0.attn1.to_q" in handle.modules
    torch.testing.assert_close(wan(), before, atol=1e-5, rtol=1e-5)
    # peft removes its wrappers around the replacements; the old layers can still be put back.
    wan.transformer.delete_adapters("default")  # type: ignore[operator]
    handle.remove()
    fresh = tiny_model("Wan")
    assert torch.equal(wan(), fresh())


def test_lora_after(wan: TinyModel) -> None:
    plain = wan()
    handle = replace_linears(wan.transformer, copied, owner="fp8")
    torch.manual_seed(0)
    lora(wan.transformer)
    adapted = wan()
    assert not torch.allclose(adapted, plain)
    handle.remove()
    assert torch.equal(wan(), adapted)
    with pytest.raises(UserError, match="no linear layers named"):
        find_linears(wan.transformer, pattern=r".*lora_A.*")


@pytest.mark.parametrize("first", ["lora", "layers"])
def test_lora_fused_into_a_new_layer(first: str, wan: TinyModel) -> None:
    """The removal is refused: the old layer's weight does not contain the LoRA that unfusing would subtract."""
    plain, model = wan(), wan.transformer
    torch.manual_seed(0)
    if first == "lora":
        lora(model)
    handle = replace_linears(model, copied, owner="fp8")
    if first == "layers":
        lora(model)
    adapted = wan()
    model.fuse_lora()  # type: ignore[operator]
    with pytest.raises(UserError, match=r"LoRA is fused into blocks.0.attn1.to_q of fp8: unfuse"):
        handle.remove()
    torch.testing.assert_close(wan(), adapted)
    model.unfuse_lora()  # type: ignore[operator]
    handle.remove()
    assert torch.equal(wan(), adapted)
    model.unload_lora()  # type: ignore[operator]
    assert torch.equal(wan(), plain)


def test_lora_that_reads_the_weight(wan: TinyModel) -> None:
    lora(wan.transformer)
    wan.transformer.fuse_lora()  # type: ignore[operator]
    refused(wan.transformer, "blocks.0.attn1.to_q cannot be replaced: LoRA is merged")
    other = tiny_model("Wan").transformer
    lora(other, use_dora=True)
    refused(other, "DoRA in it")


def test_compiled() -> None:
    wan = tiny_model("Wan", layers=1)
    model = wan.transformer
    before = wan()
    wan.transformer = torch.compile(model, backend="eager")  # type: ignore[assignment]
    assert torch.equal(wan(), before)
    handle = replace_linears(wan.transformer, lambda n, x: Shifted(x), owner="shift")
    shifted = wan()
    assert not torch.equal(shifted, before)
    wan.transformer = model
    assert torch.equal(wan(), shifted)
    handle.remove()
    assert torch.equal(wan(), before)


class Shifted(Inside):
    """A replacement with an output that differs from that of the old layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_tied_and_hooked_layers(wan: TinyModel) -> None:
    attention: Any = wan.transformer.get_submodule("blocks.0.attn1")
    hook = attention.to_k.register_forward_hook(lambda module, args, out: None)
    refused(wan.transformer, "to_k cannot be replaced: 1 hooks on it")
    hook.remove()
    attention.to_k.weight = attention.to_q.weight
    refused(wan.transformer, r"to_q cannot be replaced: its weights are tied: .*to_q.weight and .*to_k.weight")
    attention.to_k = attention.to_q
    refused(wan.transformer, "tied|the same layer")


def test_layers_that_are_more(wan: TinyModel) -> None:
    attention: Any = wan.transformer.get_submodule("blocks.0.attn1")
    attention.to_q = copied("", attention.to_q)
    refused(wan.transformer, "to_q cannot be replaced: it is a Copied")
    attention.to_q = nn.Linear(32, 32, device="meta")
    refused(wan.transformer, "to_q cannot be replaced: its weight is not in memory")


def test_fused_projections(wan: TinyModel) -> None:
    model: Any = wan.transformer
    model.fuse_qkv_projections()
    refused(model, "the projections are fused, so some are not called")
    model.unfuse_qkv_projections()
    replace_linears(model, double, owner="fp8").remove()


def test_projections_fused_from_new_layers(wan: TinyModel) -> None:
    """The fused projection contains the weights of replacements, so the removal is refused until it is unfused."""
    before, model = wan(), wan.transformer

    def other(name: str, linear: nn.Linear) -> nn.Module:
        made = copied(name, linear)
        made.weight.data.mul_(2)  # type: ignore[operator, union-attr]
        return made

    handle = replace_linears(model, other, owner="fp8")
    model.fuse_qkv_projections()  # type: ignore[operator]
    with pytest.raises(UserError, match=r"attn1.to_q of fp8 is part of fused .*unfuse_qkv_projections\(\) first"):
        handle.remove()
    model.unfuse_qkv_projections()  # type: ignore[operator]
    handle.remove()
    assert torch.equal(wan(), before)


def test_offloading(wan: TinyModel) -> None:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    model: Any = wan.transformer
    cpu_offload(model, torch.device("cpu"))
    refused(model, "cannot be replaced: (its weight is not in memory|accelerate's AlignDevicesHook)")
    remove_hook_from_module(model, recurse=True)
    grouped: Any = tiny_model("Wan").transformer
    grouped.enable_group_offload(onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    refused(grouped, "the diffusers hook (lazy_prefetch_)?group_offloading would lose the layer")
    cast: Any = tiny_model("Wan").transformer
    cast.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    refused(cast, "hooks? .*(layerwise_casting|peft)|hooks on it")


def test_wrapped_for_training(wan: TinyModel, tmp_path: Any) -> None:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        refused(DistributedDataParallel(wan.transformer), "wrapped by DistributedDataParallel")
    finally:
        distributed.destroy_process_group()


def test_a_new_layer_that_was_taken_out(wan: TinyModel) -> None:
    handle = replace_linears(wan.transformer, double, owner="fp8")
    attention: Any = wan.transformer.get_submodule("blocks.0.attn1")
    mine, attention.to_q = attention.to_q, nn.Linear(32, 32)
    with pytest.raises(
        UserError, match=r"1 layers of fp8 are no longer in the model, the first is blocks.0.attn1.to_q"
    ):
        handle.remove()
    attention.to_q = mine
    handle.remove()


def test_saving_while_replaced(wan: TinyModel, tmp_path: Any) -> None:
    """`save_pretrained` writes the parameters of the replacements; after the removal the model is as before."""
    model: Any = wan.transformer
    handle = replace_linears(model, copied, owner="fp8")
    model.save_pretrained(tmp_path)
    handle.remove()
    before = wan()
    wan.transformer = type(model).from_pretrained(tmp_path)
    assert torch.equal(wan(), before)
