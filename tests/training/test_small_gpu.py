"""Savings of memory on a GPU: equal gradients, less memory, and the estimate against the measured peak."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from postgen.families.activations import training_memory
from postgen.training.block_offload import BlockOffload
from postgen.training.parking import Parking
from tests.training.test_block_offload import LAYERS, blocks, check_equal, gradients, made

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("count", [1, 3, LAYERS])
def test_offloaded_blocks_have_equal_gradients(count):
    check_equal(count, "cuda")


def large(device):
    """Return a network whose blocks take some milliseconds, so that copies overlap with them, and its arguments."""
    from diffusers import WanTransformer3DModel
    from peft import LoraConfig

    torch.manual_seed(0)
    model = WanTransformer3DModel(num_layers=12, num_attention_heads=8, attention_head_dim=128, ffn_dim=4096)
    model.requires_grad_(False).to(torch.bfloat16)
    model.add_adapter(LoraConfig(r=8, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    for name, each in model.named_parameters():
        if "lora_" in name:
            each.requires_grad_(True)
            each.data = each.data.float()
    model.enable_gradient_checkpointing()
    place = {"device": device, "dtype": torch.bfloat16}
    arguments = {
        "hidden_states": torch.randn(1, 16, 5, 60, 80, **place),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": torch.randn(1, 64, 4096, **place),
        "return_dict": False,
    }
    return model.to(device).train(), arguments


@pytest.fixture
def deterministic():
    """Gradients of attention are summed in a fixed order; fused kernels of attention add them as they come."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def step(model, arguments):
    with torch.autocast("cuda", torch.bfloat16):
        out = model(**arguments)[0]
    out.float().square().mean().backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.usefixtures("deterministic")
def test_large_blocks_overlap_exactly_and_save_memory():
    model, arguments = large("cuda")
    wanted = step(model, arguments)
    model.zero_grad()
    again = step(model, arguments)
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    offload = BlockOffload(model, blocks(model), torch.device("cuda"))
    for _ in range(3):
        found = step(model, arguments)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        model.zero_grad()
    saved = offload.home_bytes - offload.device_bytes
    assert torch.cuda.memory_allocated() <= before - 0.95 * saved
    offload.remove()
    assert all(torch.equal(value, wanted[name]) for name, value in step(model, arguments).items())


def test_the_estimate_of_activations_is_close_to_the_measured_peak():
    model, arguments = large("cuda")
    step(model, arguments)  # gradients exist from here on, as the estimate assumes
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        out = model(**arguments)[0]
    out.float().square().mean().backward()
    measured = torch.cuda.max_memory_allocated() - base
    assert training_memory(model, arguments, autocast=torch.bfloat16) == pytest.approx(measured, rel=0.15)


def test_parked_components_leave_the_device():
    part, network = torch.nn.Linear(4096, 4096), torch.nn.Linear(2, 2).cuda()
    wanted = part(torch.ones(1, 4096))
    before = torch.cuda.memory_allocated()
    Parking([part], [network], torch.device("cuda"))
    torch.testing.assert_close(part(torch.ones(1, 4096)).cpu(), wanted, rtol=1e-3, atol=1e-3)
    assert torch.cuda.memory_allocated() >= before + part.weight.nbytes
    network(torch.ones(1, 2, device="cuda"))
    assert torch.cuda.memory_allocated() < before + 2**20
    assert part.weight.device.type == "cpu"


def test_gradients_of_small_networks_do_not_depend_on_the_number_of_steps():
    model = made(device="cuda")
    BlockOffload(model, blocks(model), torch.device("cuda"))
    first, second = gradients(model, "cuda"), gradients(model, "cuda")
    assert all(torch.equal(first[name], second[name]) for name in first)
