"""FP8 linear layers on a GPU: compared with simulated layers, at widths of real models, compiled, with LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import postgen
from postgen.families import layout_of
from postgen.fp8_linear import FP8Linear
from postgen.kernels.fp8_rows import naive
from postgen.kernels.fp8_rows.ops import why_not_fp8
from tests.families.tiny_models import tiny_model
from tests.kernels.launches import relative_error

HAS = torch.cuda.is_available() and why_not_fp8(torch.device("cuda", 0)) is None
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS, reason="needs a GPU with FP8")]
ALL = postgen.FP8LinearConfig(min_features=0)


def wan() -> tuple[Any, dict[str, Any]]:
    """Return a bfloat16 transformer with two layers of Wan 1.3B's width, and arguments for a small clip."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    config = {"attention_head_dim": 128, "num_attention_heads": 12, "num_layers": 2, "text_dim": 64, "ffn_dim": 8960}
    with torch.device("cuda"):
        model = WanTransformer3DModel(**config).to(torch.bfloat16).requires_grad_(False)
        arguments = {
            "hidden_states": torch.randn(1, 16, 5, 16, 16, dtype=torch.bfloat16),
            "encoder_hidden_states": torch.randn(1, 226, 64, dtype=torch.bfloat16),
            "timestep": torch.tensor([500.0]),
        }
    return model.eval(), arguments


@torch.no_grad()
def predicted(model: Any, arguments: dict[str, Any]) -> Tensor:
    out: Tensor = model(**arguments, return_dict=False)[0]
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("inputs", "outputs"), [(1536, 1536), (5120, 13824), (13824, 5120), (16, 16)])
@torch.no_grad()
def test_a_layer_is_the_simulated_one(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, device="cuda", dtype=dtype)
    layer, x = FP8Linear(linear), torch.randn(2, 77, inputs, device="cuda", dtype=dtype)
    found = layer(x)
    weight = naive.quantize_rows(linear.weight)
    expected = naive.rows_matmul(*naive.quantize_rows(x), *weight, linear.bias, torch.float32)
    assert (found.dtype, found.shape) == (dtype, (2, 77, outputs))
    assert relative_error(found, expected) < 0.006
    assert relative_error(found, linear(x)) < 0.045


@pytest.mark.parametrize("name", ["Wan", "HunyuanVideo", "CogVideoX 1.5", "LTX"])
def test_models_are_the_simulated_ones(name: str) -> None:
    tiny = tiny_model(name)
    postgen.apply_fp8_linears(tiny.transformer, postgen.FP8LinearConfig(simulate=True))
    expected = tiny()
    tiny.transformer.to("cuda")
    moved = {
        key: value.cuda()
        if isinstance(value, Tensor)
        else tuple(each.cuda() for each in value)
        if isinstance(value, tuple) and all(isinstance(each, Tensor) for each in value)
        else value
        for key, value in tiny.arguments.items()
    }
    found = predicted(tiny.transformer, moved)
    # Sums in another order move some values to the next code.
    assert relative_error(found.cpu(), expected) < 0.03
    postgen.remove_fp8_linears(tiny.transformer)


def test_put_on_taken_off_and_compiled() -> None:
    model, arguments = wan()
    stock = predicted(model, arguments)
    handle = postgen.apply_fp8_linears(model, ALL)
    on = predicted(model, arguments)
    assert torch.equal(predicted(model, arguments), on)
    assert 0 < relative_error(on, stock) < 0.1
    handle.remove()
    assert torch.equal(predicted(model, arguments), stock)
    postgen.apply_fp8_linears(model, ALL)
    for block in layout_of(model).block_modules(model).values():
        block.compile(fullgraph=True)
    assert relative_error(predicted(model, arguments), on) < 0.05
    postgen.apply_fused_ops(model)
    assert relative_error(predicted(model, arguments), on) < 0.05
    torch.compiler.reset()


def test_moved_between_devices() -> None:
    model, arguments = wan()
    postgen.apply_fp8_linears(model, ALL)
    on = predicted(model, arguments)
    model.to("cpu")
    model.to("cuda")
    assert torch.equal(predicted(model, arguments), on)


def test_applied_on_a_processor_and_moved() -> None:
    model, arguments = wan()
    postgen.apply_fp8_linears(model, ALL)
    on = predicted(model, arguments)
    postgen.remove_fp8_linears(model)
    model.to("cpu")
    postgen.apply_fp8_linears(model, ALL)
    model.to("cuda")
    assert torch.equal(predicted(model, arguments), on)


def test_a_graph_records_the_quantisation() -> None:
    layer = FP8Linear(nn.Linear(256, 128).cuda().bfloat16(), shared=True)
    static = torch.randn(64, 256).cuda().bfloat16()
    with torch.no_grad():
        layer(static)  # keeps the codes of these values
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = layer(static)
        static.copy_(torch.randn(64, 256))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, layer(static))


def test_lora_is_trained_on_top() -> None:
    from peft import LoraConfig

    model, arguments = wan()
    postgen.apply_fp8_linears(model, ALL)
    model.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_v", "net.2"], init_lora_weights=False))
    model.enable_gradient_checkpointing()
    model.train()
    model(**arguments, return_dict=False)[0].float().square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients
    assert all(each is not None and each.isfinite().all() and each.abs().sum() > 0 for each in gradients)


def test_narrow_layers_are_no_faster_and_stay_exact() -> None:
    model, _ = wan()
    with pytest.raises(postgen.UserError, match=r"fewer than 2048 inputs or outputs .* set min_features=0"):
        postgen.apply_fp8_linears(model)
