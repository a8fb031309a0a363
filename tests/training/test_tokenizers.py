"""Tokenizers of word pieces: they accept any string in upper and lower case, and can be saved."""

from __future__ import annotations

import pytest
import torch

from postgen.training.tokenizers import tokenize, train_tokenizer

CAPTIONS = ["a red ball moves left", "a blue cube falls and a green cylinder stays still"] * 20
PROMPTS = ["a red ball moves left", "", "a green cube falls while the camera orbits"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, 320)


def test_case_does_not_count(tokenizer):
    assert tokenizer("A RED Ball")["input_ids"] == tokenizer("a red ball")["input_ids"]


STRINGS = ["a red ball", "ein gr\u00fcner w\u00fcrfel", "\u7403 \U0001f600 \u0436", "", "x=1; {}\t~"]


@pytest.mark.parametrize("text", STRINGS)
def test_every_string_comes_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id == 1
    assert ids.count(1) == 1
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_captions_take_few_tokens(tokenizer):
    assert len(tokenizer(CAPTIONS[0])["input_ids"]) <= 10
    assert len(tokenizer) <= 320


def test_a_cut_text_still_ends(tokenizer):
    ids = tokenize(tokenizer, ["ball " * 50, "ball"], 8)
    assert (ids.dtype, ids.shape) == (torch.int16, (2, 8))
    assert ids[0, -1] == 1
    assert ids[1, -1] == 0


def test_it_survives_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*PROMPTS, "\u00c4 \U0001f600"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (again.pad_token_id, again.eos_token_id, again.model_max_length) == (0, 1, 512)
    assert again.padding_side == "right"
