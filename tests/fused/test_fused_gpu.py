"""Fused blocks on a GPU at widths of real models: error, CUDA graphs, compilation, reproducibility."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import postgen
from postgen.families import layout_of
from tests.fused.counted import count_operations

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

WIDE: dict[str, Any] = {"attention_head_dim": 128, "num_attention_heads": 12, "num_layers": 2}


def model(name: str) -> tuple[Any, dict[str, Any]]:
    """Return a transformer with two layers of a real model's width, and arguments for a small clip."""
    import diffusers

    torch.manual_seed(0)
    with torch.device("cuda"):
        text, latents = torch.randn(1, 226, 64), torch.randn(1, 16, 5, 16, 16)
        arguments = {"hidden_states": latents, "encoder_hidden_states": text, "timestep": torch.tensor([500.0])}
        if name == "Wan":
            built = diffusers.WanTransformer3DModel(**WIDE, text_dim=64, ffn_dim=512)
        elif name == "HunyuanVideo":
            narrow = {"text_embed_dim": 64, "pooled_projection_dim": 64, "num_single_layers": 2, "mlp_ratio": 1.0}
            built = diffusers.HunyuanVideoTransformer3DModel(**WIDE, **narrow)
            mask = torch.ones(1, 226)
            mask[:, 100:] = 0
            arguments |= {"encoder_attention_mask": mask, "pooled_projections": torch.randn(1, 64)}
            arguments["guidance"] = torch.tensor([6000.0])
        elif name == "CogVideoX":
            own = {"num_attention_heads": 48, "attention_head_dim": 64, "use_rotary_positional_embeddings": True}
            built = diffusers.CogVideoXTransformer3DModel(
                **{**WIDE, **own}, text_embed_dim=64, sample_width=16, sample_height=16
            )
            angles = torch.rand(5 * 64, 32).repeat_interleave(2, dim=1)
            arguments |= {"hidden_states": latents.transpose(1, 2), "image_rotary_emb": (angles.cos(), angles.sin())}
        else:
            own = {"num_attention_heads": 32, "attention_head_dim": 64, "in_channels": 16, "caption_channels": 64}
            built = diffusers.LTXVideoTransformer3DModel(**{**WIDE, **own})
            arguments |= {"hidden_states": latents.flatten(2).transpose(1, 2), "num_frames": 5, "height": 16}
            arguments |= {"width": 16, "encoder_attention_mask": torch.ones(1, 226)}
    return built.eval(), arguments


NAMES = ("CogVideoX", "HunyuanVideo", "LTX", "Wan")


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any], torch.Tensor]:
    """Return the bfloat16 model, its arguments, and the prediction of the stock model in float64."""
    built, arguments = model(request.param)
    exact = _call(copy.deepcopy(built).double(), _to(arguments, torch.float64))
    return built.to(torch.bfloat16), _to(arguments, torch.bfloat16), exact


def _to(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def cast(name: str, value: Any) -> Any:
        inputs = isinstance(value, torch.Tensor) and value.dim() > 1 and "mask" not in name
        return value.to(dtype) if inputs else value

    return {name: cast(name, value) for name, value in arguments.items()}


@torch.no_grad()
def _call(transformer: Any, arguments: dict[str, Any]) -> torch.Tensor:
    output: torch.Tensor = transformer(**arguments, return_dict=False)[0]
    return output


def test_as_near_to_float64_as_the_stock_model(pair: Any) -> None:
    transformer, arguments, exact = pair
    stock = _call(transformer, arguments)
    postgen.apply_fused_ops(transformer)
    with count_operations() as run:
        fused = _call(transformer, arguments)
    assert {"qk_norm_rope", "norm_modulate", "gate_residual", "attention"} <= set(run.counts)
    assert (fused.double() - exact).norm() < 1.1 * (stock.double() - exact).norm()
    for _ in range(5):
        assert torch.equal(_call(transformer, arguments), fused)
    postgen.remove_fused_ops(transformer)
    assert torch.equal(_call(transformer, arguments), stock)


def test_compiled_whole_and_with_enhance_a_video(pair: Any) -> None:
    transformer, arguments, _ = pair
    postgen.apply_enhance_a_video(transformer, postgen.EnhanceAVideoConfig(relative_weight=0.4))
    postgen.apply_fused_ops(transformer)
    expected = _call(transformer, arguments).float()
    torch.compiler.reset()
    blocks = layout_of(transformer).block_modules(transformer).values()
    for block in blocks:
        block.compile(fullgraph=True)
    found = _call(transformer, arguments).float()
    assert (found - expected).norm() < 0.02 * expected.norm()
    for block in blocks:
        block._compiled_call_impl = None
    postgen.remove_fused_ops(transformer)
    postgen.remove_enhance_a_video(transformer)
