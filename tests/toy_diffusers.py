"""A model in the style of diffusers that diffusers does not have, for the worked example in CONTRIBUTING.md.

It has self-attention over the video, with a norm of the queries and keys of each head and without rotary embedding,
and cross-attention to the text.
"""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn


class ToyAttnProcessor:
    """Self-attention over the video tokens, or cross-attention from the video tokens to the text."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: ToyAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(2, (attn.heads, -1)))
        key = attn.norm_k(attn.to_k(source).unflatten(2, (attn.heads, -1)))
        value = attn.to_v(source).unflatten(2, (attn.heads, -1))
        out = dispatch_attention_fn(
            query, key, value, attention_mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        out = attn.to_out[0](out.flatten(2, 3).to(query.dtype))
        return attn.to_out[1](out)  # type: ignore[no-any-return]


class ToyAttention(nn.Module, AttentionModuleMixin):
    def __init__(self, width: int, heads: int, source_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k, self.to_v = nn.Linear(source_width, width), nn.Linear(source_width, width)
        self.norm_q, self.norm_k = nn.RMSNorm(width // heads, eps=1e-6), nn.RMSNorm(width // heads, eps=1e-6)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])
        self.set_processor(ToyAttnProcessor())  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states)  # type: ignore[no-any-return]


class ToyBlock(nn.Module):
    def __init__(self, width: int, heads: int, text_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn1 = ToyAttention(width, heads, width)
        self.attn2 = ToyAttention(width, heads, text_dim)
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> Tensor:
        x = hidden_states + temb[:, None]
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), encoder_hidden_states)
        return x + self.ff(self.norm3(x))


class ToyTransformer3DModel(ModelMixin, ConfigMixin, CacheMixin):
    _no_split_modules = ("ToyBlock",)

    @register_to_config
    def __init__(
        self,
        num_layers: int = 2,
        num_attention_heads: int = 2,
        attention_head_dim: int = 8,
        in_channels: int = 4,
        text_dim: int = 16,
        patch_size: tuple[int, int, int] = (1, 2, 2),
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.patch = nn.Conv3d(in_channels, width, patch_size, patch_size)
        self.time_proj, self.time_embedder = Timesteps(16, True, 0), TimestepEmbedding(16, width)
        self.layers = nn.ModuleList(ToyBlock(width, num_attention_heads, text_dim) for _ in range(num_layers))
        self.proj_out = nn.ConvTranspose3d(width, in_channels, patch_size, patch_size)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        x = self.patch(hidden_states)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        temb = self.time_embedder(self.time_proj(timestep).to(x.dtype))
        for layer in self.layers:
            x = layer(x, encoder_hidden_states, temb)
        out = self.proj_out(x.transpose(1, 2).unflatten(2, grid))
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)


class ToyVideoPipeline(diffusers.WanPipeline):
    """Wan's pipeline with another transformer."""
