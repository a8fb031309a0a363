"""A tiny chat model: a two-layer Llama with a tokenizer made from the texts of the tests."""

from __future__ import annotations

from typing import Any

import torch

TEMPLATE = (
    "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Without the system message, so that sequences stay short."""


def tiny_chat(texts: list[str], seed: int = 0) -> tuple[Any, Any]:
    """Return a model with random weights and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from postgen.training.tokenizers import train_tokenizer

    tokenizer = train_tokenizer([*texts, "user: assistant:"], 320)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config), tokenizer
