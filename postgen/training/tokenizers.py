"""Small tokenizers for models trained from scratch, made from their captions: byte-level BPE or whole words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

MAX_SEQUENCE_LENGTH = 512
"""Maximum number of tokens of a text; `WanPipeline.encode_prompt` pads to this length by default."""
_SPECIAL = ["<pad>", "</s>", "<unk>"]


def train_tokenizer(captions: Iterable[str], vocabulary: int = 640) -> Any:
    """Train a fast byte-level BPE tokenizer. It lower-cases texts and can encode every string.

    Args:
        captions: texts from which the merges are learnt.
        vocabulary: maximum size of the vocabulary, at least 300 (it always contains 256 bytes and the special tokens).

    Returns:
        A `PreTrainedTokenizerFast` with <pad> (0), </s> (1, appended to every text) and <unk> (2).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.normalizer = _normalizer()
    tokenizer.train_from_iterator(captions, trainer)
    return _finished(tokenizer)


def _normalizer() -> Any:
    from tokenizers import normalizers

    return normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])


def _finished(tokenizer: Any) -> Any:
    """Add lower-casing and a final </s> to a tokenizer, and wrap it for transformers."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer.normalizer = _normalizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_SEQUENCE_LENGTH,
        padding_side="right",
    )


def word_tokenizer(words: Iterable[str]) -> Any:
    """Make a fast tokenizer of whole words and the punctuation marks , ; . - that lower-cases texts.

    Words outside the vocabulary become <unk>.

    Args:
        words: the vocabulary, in lower case.

    Returns:
        A `PreTrainedTokenizerFast` with <pad> (0), </s> (1, appended to every text) and <unk> (2).
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = [*_SPECIAL, ",", ";", ".", "-", *sorted(set(words))]
    model = models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    return _finished(tokenizer)


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """Return the words of a prompt that the tokenizer encodes as unknown, in order and without repetition.

    Punctuation is left out. A byte-level BPE tokenizer encodes every string, so its list is always empty.

    Args:
        tokenizer: a fast tokenizer with an unknown token.
        prompt: any text.
    """
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    found = [prompt[start:end].lower() for token, (start, end) in spans if token == tokenizer.unk_token_id]
    return list(dict.fromkeys(word for word in found if any(map(str.isalnum, word))))


def tokenize(tokenizer: Any, captions: list[str], length: int) -> Tensor:
    """Return token ids (N, length), int16, of N captions, padded with 0. Longer captions are cut and end in </s>."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, max_length=length)["input_ids"]
    return torch.tensor(encoded, dtype=torch.int16)
