"""SmolLM2-135M from its Python package, a small language model for machines without a network.

The package contains 4-bit weights in GGUF format. They are converted once to bfloat16 safetensors (269 MB) in the
cache folder, because the conversion takes half a minute.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from postgen.assets import ASSETS, locate, verify
from postgen.errors import UserError
from postgen.files import replacing
from postgen.prompt.cache import cache_folder
from postgen.prompt.chat import ChatRewriter

ASSET = "smollm2-135m"
"""Name of the weights in the table of optional assets."""
# A small model repeats itself with greedy decoding without these.
_GENERATION = {"repetition_penalty": 1.05, "no_repeat_ngram_size": 3}


def smollm2(*, device: str = "cpu", temperature: float = 0.0) -> ChatRewriter:
    """Return the rewriter with SmolLM2-135M.

    It is a weak writer: the guard refuses many of its answers.

    Args:
        device: device of the model; the CPU is fast enough.
        temperature: see `ChatRewriter`.

    Raises:
        UserError: the package is not installed, or gguf is needed for the conversion and is not installed.
    """
    return ChatRewriter(
        str(converted()),
        device=device,
        temperature=temperature,
        max_new_tokens=80,
        sentences=1,
        generation=_GENERATION,
        name="smollm2",
    )


def check_smollm2() -> None:
    """Check that SmolLM2 can be used, without converting it.

    Raises:
        UserError: a package is not installed.
    """
    file = locate(ASSET)
    if not (_folder() / "model.safetensors").is_file() and find_spec("gguf") is None:
        raise UserError(f"{file.name} needs the package gguf to be converted once: pip install gguf")


def converted() -> Path:
    """Return the folder with SmolLM2 as safetensors; the first call converts it.

    Raises:
        UserError: a package is not installed, the file in it is damaged, or the folder cannot be written.
    """
    folder = _folder()
    if (folder / "model.safetensors").is_file():
        return folder
    check_smollm2()
    file = verify(ASSET)
    model, tokenizer = _dequantised(file)
    try:
        with replacing(folder) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}. Set POSTGEN_CACHE to another folder"
        ) from error
    return folder


def _folder() -> Path:
    return cache_folder() / f"{ASSET}-{ASSETS[ASSET].sha256}"


def _dequantised(file: Path) -> tuple[Any, Any]:
    import torch

    from postgen.prompt.chat import load_chat_model

    model, tokenizer = load_chat_model(str(file.parent), "cpu", "float32", gguf_file=file.name)
    # Otherwise `save_pretrained` refuses, because it takes the weights for GGUF weights.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.to(torch.bfloat16), tokenizer
