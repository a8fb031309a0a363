"""A tiny chat model: a two-layer Llama with a tokenizer made from the texts of the tests."""

from __future__ import annotations

from typing import Any

import torch

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)
"""Without the system message, so that sequences stay short."""


def tiny_chat(texts: list[str], seed: int = 0) -> tuple[Any, Any]:
    """Return a model with random weights and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from postgen.training.tokenizers import train_tokenizer

    tokenizer = train_tokenizer(texts, 400)
    # TRL adds the end itself.
    tokenizer._tokenizer.post_processor = type(tokenizer._tokenizer.post_processor)(single="$A", special_tokens=[])
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config), tokenizer
