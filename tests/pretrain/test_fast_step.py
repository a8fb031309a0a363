"""The faster training step computes what diffusers computes."""

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel

from postgen.pretrain.fast_step import GraphedCall, RowRotaryAttention


def small_transformer() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
    )


def arguments(device: str = "cpu") -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 3, 8, 6, device=device),
        "timestep": torch.tensor([300.0, 900.0], device=device),
        "encoder_hidden_states": torch.randn(2, 7, 16, device=device),
    }


def test_rows_rotate_as_pairs_do():
    stock = small_transformer().double()
    ours = copy.deepcopy(stock)
    for block in ours.blocks:
        block.attn1.processor = RowRotaryAttention()
    inputs = {name: value.double() for name, value in arguments().items()}
    results = []
    for model in (stock, ours):
        out = model(**inputs, return_dict=False)[0]
        out.square().sum().backward()
        results.append((out, model.blocks[0].attn1.to_q.weight.grad))
    # The rotary tables are float32 in both.
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def test_row_rotation_is_for_self_attention_only():
    block = small_transformer().blocks[0]
    block.attn2.processor = RowRotaryAttention()
    with pytest.raises(ValueError, match="self-attention"):
        block.attn2(torch.randn(1, 4, 48), torch.randn(1, 3, 48))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("share_memory", [False, True])
def test_graphs_give_the_same_values_and_gradients(share_memory):
    model = small_transformer().cuda()
    for block in model.blocks:
        block.attn1.processor = RowRotaryAttention()

    def call(x, t, text):
        return model(hidden_states=x, timestep=t, encoder_hidden_states=text, return_dict=False)[0]

    graphed = GraphedCall(call, {"model": model}, share_memory=share_memory)
    for frames in (3, 5, 3, 5):
        inputs = [*arguments("cuda").values()]
        inputs[0] = torch.randn(2, 4, frames, 8, 6, device="cuda")
        found = []
        for function in (call, graphed):
            model.zero_grad(set_to_none=True)
            out = function(*inputs)
            out.square().sum().backward()
            found.append((out.detach().clone(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
            # A living graph ties the parameters' gradients to the stream it was made on, and a capture to that stream.
            del out
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
