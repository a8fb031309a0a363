"""Blocks whose frozen weights are in main memory give the same outputs and gradients, bit by bit."""

import gc
from itertools import pairwise
from weakref import ref

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import nn

from postgen.errors import UserError
from postgen.families import blocks_of
from postgen.training.block_offload import BlockOffload, offload_in, spread

CPU = torch.device("cpu")
LAYERS = 4


def made(*, adapted=True, checkpointing=True, device="cpu", layers=LAYERS):
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_layers=layers, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=64,
    )  # fmt: skip
    model.requires_grad_(False)
    if adapted:
        model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_v", "to_out.0"]))
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model.to(device).train()


def blocks(model):
    return [block.module for block in blocks_of(model)]


def call(model, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 3, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    return model(x.to(device), torch.tensor([10.0, 500.0], device=device), text.to(device), return_dict=False)[0]


def gradients(model, device="cpu"):
    call(model, device).square().mean().backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("count", [1, 3, LAYERS])
def test_outputs_and_gradients_are_those_of_the_model_on_the_device(count):
    check_equal(count, "cpu")


def check_equal(count, device):
    model, plain = made(device=device), made(device=device)
    offload = BlockOffload(model, spread(blocks(model), count), torch.device(device))
    wanted = gradients(plain, device)
    assert wanted
    for _ in range(2):  # steps of training, with a rollout between them
        found = gradients(model, device)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        with torch.no_grad():
            assert torch.equal(call(model, device), call(plain, device))
    before = dict(plain.state_dict())
    assert all(torch.equal(value.cpu(), before[name].cpu()) for name, value in model.state_dict().items())
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()}
    assert offload_in(nn.Sequential(model)) is offload


def test_each_block_is_copied_once_in_each_direction():
    model = made()
    offload = BlockOffload(model, blocks(model), CPU)
    gradients(model)
    assert offload.copies == LAYERS + LAYERS - 2  # the last two are still there when the backward pass begins
    with torch.no_grad():
        call(model)
        call(model)
    assert offload.copies <= 2 * LAYERS - 2 + 2 * LAYERS


def test_memory_on_the_device_is_that_of_two_blocks():
    model = made()
    weights = sum(each.nbytes for each in blocks(model)[0].parameters() if not each.requires_grad)
    offload = BlockOffload(model, blocks(model), CPU)
    assert 2 * weights <= offload.device_bytes < 2.5 * weights
    assert offload.home_bytes == LAYERS * offload.device_bytes / 2
    # A second buffer for one block would need more memory than no offload.
    alone = BlockOffload(model := made(), blocks(model)[2:3], CPU)
    assert alone.device_bytes == alone.home_bytes == offload.device_bytes / 2
    call(model).square().mean().backward()
    assert len(alone._buffers) == 1


def test_conversions_of_the_model_do_not_move_the_weights():
    model = made()
    BlockOffload(model, blocks(model), CPU)
    block = blocks(model)[1]
    weight, scale = block.ffn.net[0].proj.weight, block.attn1.to_q.lora_A
    model.to(torch.float64)
    assert block.ffn.net[0].proj.weight is weight
    assert weight.dtype == torch.float32
    assert next(scale.parameters()).dtype == torch.float64
    assert model.patch_embedding.weight.dtype == torch.float64
    model.to(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model).values(), gradients(made()).values(), strict=True))


def test_it_can_be_removed():
    model = made()
    offload = BlockOffload(model, blocks(model), CPU)
    call(model)
    offload.remove()
    assert offload_in(model) is None
    assert not any(block._forward_pre_hooks or "_apply" in vars(block) for block in blocks(model))
    assert torch.equal(call(model), call(made()))
    assert model.to(torch.float64).blocks[0].ffn.net[0].proj.weight.dtype == torch.float64


def test_without_gradient_checkpointing_torch_detects_overwritten_weights():
    model = made(checkpointing=False)
    BlockOffload(model, blocks(model), CPU)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(model)


def test_blocks_are_chosen_at_equal_distances():
    every = list(range(30))
    assert spread(every, 30) == every
    assert spread(every, 3) == [5, 15, 25]
    assert {second - first for first, second in pairwise(spread(every, 10))} == {3}
    with pytest.raises(UserError, match="offload_blocks is 31, but the network has 30 blocks: use at most that many"):
        spread(every, 31)


def test_what_cannot_be_offloaded_is_refused():
    trained = made(adapted=False)
    trained.requires_grad_(True)
    with pytest.raises(UserError, match="but a WanTransformerBlock has none: train a LoRA"):
        BlockOffload(trained, blocks(trained), CPU)
    model = made()
    first, second = blocks(model)[:2]
    second.ffn = first.ffn
    with pytest.raises(UserError, match="a WanTransformerBlock that shares weights with another block"):
        BlockOffload(model, blocks(model), CPU)

    class Coded(nn.Parameter):
        """A weight of another library, with attributes that a copy would lose."""

    model = made()
    linear = blocks(model)[0].ffn.net[2]
    linear.weight = Coded(linear.weight.data, requires_grad=False)
    with pytest.raises(UserError, match="cannot move weight of a Linear, which is a Coded: use base_quant int4"):
        BlockOffload(model, blocks(model), CPU)


def test_a_dropped_model_frees_its_memory():
    model = made()
    BlockOffload(model, blocks(model), CPU)
    gradients(model)
    weight, network = ref(blocks(model)[0].ffn.net[0].proj.weight), ref(model)
    assert offload_in(model) is not None
    del model
    gc.collect()
    assert network() is None
    assert weight() is None
