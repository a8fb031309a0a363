"""The text side: short sequences that count as the pipeline's 512 tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from postgen.pretrain.autoencoder import new_autoencoder
from postgen.pretrain.pipeline_folder import make_pipeline, new_transformer
from postgen.pretrain.text import PaddedCrossAttention, encode_text, new_text_encoder
from postgen.training.tokenizers import tokenize, train_tokenizer

CAPTIONS = ["a red ball moves left", "a blue cube falls and a green cylinder stays still"] * 20
PROMPTS = ["a red ball moves left", "", "a green cube falls while the camera orbits"]
LENGTH = 29
SETTINGS = SimpleNamespace(patch=2, num_layers=2, num_heads=2, head_dim=12, ffn_dim=32, text_width=16)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, 320)


@pytest.fixture(scope="module")
def pipe(tokenizer):
    torch.manual_seed(0)
    components = {
        "vae": new_autoencoder(8, [1, 2, 2], 4),
        "transformer": new_transformer(SETTINGS, 4),
        "text_encoder": new_text_encoder(len(tokenizer), 16, 2, 4),
        "tokenizer": tokenizer,
    }
    made = make_pipeline(components, 2.0)
    made.text_encoder.eval()
    return made


def test_short_sequences_give_what_512_tokens_give(pipe, tokenizer):
    x = torch.randn(3, 4, 3, 4, 4)
    sigma = torch.tensor([0.9, 0.5, 0.1])
    with torch.no_grad():
        long, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=512)
        assert long.shape == (3, 512, 16)
        hidden, offset = encode_text(pipe.text_encoder, tokenize(tokenizer, PROMPTS, LENGTH))
        assert (hidden[:, :LENGTH] - long[:, :LENGTH]).abs().max() <= 1e-5
        stock = predict(pipe, x, sigma, long)
        short = predict(pipe, x, sigma, hidden, offset)
        assert (short - stock).abs().max() <= 1e-5
        wrong = predict(pipe, x, sigma, hidden, torch.zeros_like(offset))
    assert (wrong - stock).abs().max() > 1e-4


def predict(pipe, x, sigma, hidden, offset=None):
    blocks = pipe.transformer.blocks
    kept = [block.attn2.processor for block in blocks]
    if offset is not None:
        processor = PaddedCrossAttention()
        processor.set(offset, torch.float32)
        for block in blocks:
            block.attn2.processor = processor
    result = pipe.transformer(hidden_states=x, timestep=sigma * 1000, encoder_hidden_states=hidden, return_dict=False)[
        0
    ]
    for block, processor in zip(blocks, kept, strict=True):
        block.attn2.processor = processor
    return result


def test_the_offsets_count_512_keys(pipe, tokenizer):
    ids = tokenize(tokenizer, PROMPTS, LENGTH)
    hidden, offset = encode_text(pipe.text_encoder, ids)
    assert hidden.shape == (3, LENGTH + 1, 16)
    assert torch.allclose(offset.exp().sum(1), torch.full((3,), 512.0))
    assert hidden[1, 1:].abs().max() == 0
    assert hidden[1, 0].abs().max() > 0


def test_rows_of_the_mask_are_aligned():
    processor = PaddedCrossAttention()
    processor.set(torch.zeros(2, 13), torch.float32)
    assert processor.offset.shape == (2, 1, 1, 13)
    assert processor.offset.stride(0) % 8 == 0
    assert processor.offset.abs().max() == 0
