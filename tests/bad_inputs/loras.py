"""LoRA files: wrong metadata and tensors, found before the model is loaded; wrong shapes, found when it is loaded."""

from __future__ import annotations

import functools
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postgen.families.lora import load_loras, parse_lora
from postgen.families.lora_export import export_lora
from tests.bad_inputs.row import Content, Row
from tests.bad_inputs.tiny import folder

OWN = "transformer.blocks.0.attn1.to_q"
WIDTH = 24


def pair(name: str = OWN, rank: int = 2, halves: tuple[str, str] = ("lora_A", "lora_B")) -> dict[str, Tensor]:
    """LoRA tensors for a layer of the tiny model."""
    torch.manual_seed(0)
    down, up = halves
    return {f"{name}.{down}.weight": torch.randn(rank, WIDTH), f"{name}.{up}.weight": torch.randn(WIDTH, rank)}


def written(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Callable[[Path], None]:
    """Return a function that writes a file with these tensors."""

    def make(path: Path) -> None:
        from safetensors.torch import save_file

        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))

    return make


def said(**settings: Any) -> dict[str, str]:
    """Settings of peft in the form that diffusers writes."""
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})}


def header(text: str | bytes) -> bytes:
    """Write a safetensors file that has only a header."""
    data = text.encode() if isinstance(text, str) else text
    return len(data).to_bytes(8, "little") + data


A, B = (f"{OWN}.lora_{half}.weight" for half in "AB")
DEEP = "[" * 100_000 + "]" * 100_000
EARLY: dict[str, tuple[Content, str]] = {
    "empty": (b"", "cannot read the LoRA"),
    "a text": ("no weights", "cannot read the LoRA"),
    "a pickle": (pickle.dumps({A: 1}), "cannot read the LoRA"),
    "cut": (lambda path: (written(pair())(path), os.truncate(path, 200)), "cannot read the LoRA"),
    "a pipe": (os.mkfifo, "LoRA"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "LoRA"),
    "an empty folder": (lambda path: path.mkdir(), "LoRA"),
    "a dangling link": (lambda path: path.symlink_to("nowhere"), "there is no LoRA"),
    "header no JSON": (header("{"), "cannot read the LoRA"),
    "header a list": (header("[]"), "cannot read the LoRA"),
    "header no text": (header(b"\xff\xfe"), "cannot read the LoRA"),
    "header of a terabyte": ((2**40).to_bytes(8, "little"), "cannot read the LoRA"),
    "header deep": (header('{"a":' * 5000 + "1" + "}" * 5000), "cannot read the LoRA"),
    "dtype unknown": (
        header('{"a.lora_A.weight": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}'),
        "cannot read",
    ),
    "offsets outside": (
        header('{"a.lora_A.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'),
        "cannot read",
    ),
    "shape negative": (
        header('{"a.lora_A.weight": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}'),
        "cannot read",
    ),
    "shape of 2**62": (
        header(f'{{"a.lora_A.weight": {{"dtype": "F32", "shape": [{2**62}, 8], "data_offsets": [0, 0]}}}}'),
        "cannot read",
    ),
    "no tensors": (written({}), "is not a LoRA"),
    "other tensors": (written({"blocks.0.weight": torch.ones(2)}), "is not a LoRA"),
    "NaN": (written({**pair(), A: torch.full((2, WIDTH), torch.nan)}), "NaN or infinity"),
    "infinity": (written({**pair(), B: torch.full((WIDTH, 2), -torch.inf)}), "NaN or infinity"),
    "integers": (written({**pair(), A: torch.ones(2, WIDTH, dtype=torch.int8)}), "quantised"),
    "alpha NaN": (written({**pair(), f"{OWN}.alpha": torch.tensor(torch.nan)}), "NaN or infinity"),
    "settings no JSON": (written(pair(), {"lora_adapter_metadata": "{"}), "cannot read the LoRA"),
    "settings a list": (written(pair(), {"lora_adapter_metadata": "[1]"}), "settings"),
    "settings a number": (written(pair(), {"lora_adapter_metadata": "3"}), "settings"),
    "settings null": (written(pair(), {"lora_adapter_metadata": "null"}), "settings"),
    "settings a word": (written(pair(), {"lora_adapter_metadata": '"r"'}), "settings"),
    "settings deep": (written(pair(), {"lora_adapter_metadata": DEEP}), "nested too deeply"),
    "settings of 5000 digits": (written(pair(), {"lora_adapter_metadata": f'{{"r": {"9" * 5000}}}'}), "digits"),
    "rank a word": (written(pair(), said(r="two", lora_alpha=2)), "r is 'two'"),
    "rank 0": (written(pair(), said(r=0, lora_alpha=2)), "r is 0"),
    "rank negative": (written(pair(), said(r=-2, lora_alpha=2)), "r is -2"),
    "rank a fraction": (written(pair(), said(r=1.5, lora_alpha=2)), "r is 1.5"),
    "rank true": (written(pair(), said(r=True, lora_alpha=2)), "r is True"),
    "rank null": (written(pair(), said(r=None, lora_alpha=2)), "r is None"),
    "rank a list": (written(pair(), said(r=[2], lora_alpha=2)), r"r is \[2\]"),
    "rank 10^12": (written(pair(), said(r=10**12, lora_alpha=2)), "r is"),
    "alpha a word": (written(pair(), said(r=2, lora_alpha="two")), "lora_alpha is 'two'"),
    "alpha infinite": (written(pair(), said(r=2, lora_alpha=float("inf"))), "lora_alpha is inf"),
    "alpha 1e30": (written(pair(), said(r=2, lora_alpha=1e30)), "lora_alpha is 1e"),
    "alpha 400 digits": (written(pair(), said(r=2, lora_alpha=10**400)), "lora_alpha is"),
    "alpha true": (written(pair(), said(r=2, lora_alpha=True)), "lora_alpha is True"),
    "pattern a list": (written(pair(), said(r=2, lora_alpha=2, rank_pattern=[2])), "rank_pattern"),
    "pattern a word": (written(pair(), said(r=2, lora_alpha=2, alpha_pattern="all")), "alpha_pattern"),
    "pattern of words": (written(pair(), said(r=2, lora_alpha=2, rank_pattern={"to_q": "two"})), "rank_pattern"),
    "pattern no pattern": (written(pair(), said(r=2, lora_alpha=2, rank_pattern={"(": 2})), "rank_pattern"),
    "begun as PiSSA": (written(pair(), said(r=2, lora_alpha=2, init_lora_weights="pissa")), "pissa"),
    "note no JSON": (written(pair(), {"postgen": "{"}), "the note of"),
    "note a list": (written(pair(), {"postgen": "[]"}), "the note of"),
    "note deep": (written(pair(), {"postgen": DEEP}), "the note of"),
    "note without pipeline": (written(pair(), {"postgen": "{}"}), "the note of"),
    "note of a number": (written(pair(), {"postgen": '{"pipeline": 3}'}), "the note of"),
}
"""Errors that are found in the file alone."""

LATE: dict[str, tuple[Content, str]] = {
    "rank larger than said": (written(pair(rank=2), said(r=64, lora_alpha=64)), "its settings have rank 64"),
    "a half": (written({A: pair()[A]}), "no complete pair"),
    "two ranks": (written({**pair(), A: torch.ones(3, WIDTH)}), "ranks of .* differ"),
    "one dimension": (written({A: torch.ones(WIDTH), B: torch.ones(WIDTH)}), "LoRA"),
    "no dimension": (written({A: torch.tensor(1.0), B: torch.tensor(1.0)}), "LoRA"),
    "rank 0 tensors": (written({A: torch.ones(0, WIDTH), B: torch.ones(WIDTH, 0)}), "LoRA"),
    "another width": (written({A: torch.ones(2, 30), B: torch.ones(30, 2)}), "30 x 30 in the LoRA and 24 x 24"),
    "another block": (written(pair("transformer.blocks.9.attn1.to_q")), "match no layer"),
    "another model": (written(pair("transformer.transformer_blocks.0.attn1.to_q")), "match no layer|those of"),
    "mixed naming": (
        written(pair() | pair("lora_unet_blocks_0_self_attn_q", halves=("lora_down", "lora_up"))),
        "twice",
    ),
    "alpha of two": (written({**pair(), f"{OWN}.alpha": torch.ones(2)}), "alpha of"),
    "names empty": (written({"lora_A.weight": torch.ones(2, 2), "lora_B.weight": torch.ones(2, 2)}), "LoRA"),
    "a name of 5000 letters": (written(pair(f"transformer.{'a' * 5000}")), "match no layer|cannot be applied"),
}
"""Errors that are found when the LoRA is loaded into the model."""

RIGHT: dict[str, Content] = {
    "plain": written(pair()),
    "alpha negative": written({**pair(), f"{OWN}.alpha": torch.tensor(-2.0)}),  # the LoRA is subtracted
    "metadata of others": written(pair(), {"ss_network_dim": "many", "format": "pt"}),
    "settings": written(pair(), said(r=2, lora_alpha=2.5)),
    "zero": written({A: torch.zeros(2, WIDTH), B: torch.zeros(WIDTH, 2)}),
    "kohya": written(pair("lora_unet_blocks_0_self_attn_q", halves=("lora_down", "lora_up"))),
}

SCALES = {
    **dict.fromkeys(("inf", "-inf", "nan", "1e30", "-1e30", "1000000000000", "9" * 5000), "the scale of the LoRA"),
    **dict.fromkeys(("", "0x10", "true", "half", "1,5", " "), "LoRA"),
}


@functools.cache
def _pipe() -> Any:
    from diffusers import WanPipeline

    return WanPipeline.from_pretrained(folder("wan"))


def _put_in(here: Path) -> bool:
    pipe = _pipe()
    try:
        load_loras(pipe, [str(here / "l.safetensors")])
    finally:
        pipe.unload_lora_weights()
    return True


def rows() -> Iterator[Row]:
    """Yield all rows."""
    words = ("generate", "a", "--model", "{wan}", "--size", "32x32", "--frames", "5", "-o", "x.mp4", "--lora")
    for name, (content, says) in EARLY.items():
        yield Row(name=f"LoRA {name}", words=(*words, "./l.safetensors"), files={"l.safetensors": content}, says=says)
    for name, (content, says) in LATE.items():
        yield Row(name=f"LoRA {name}", call=_put_in, files={"l.safetensors": content}, says=says, loads=True)
    for name, content in RIGHT.items():
        files = {"l.safetensors": content}
        yield Row(name=f"LoRA {name} right", words=(*words, "./l.safetensors"), files=files, wrong=False)
        yield Row(name=f"LoRA {name} put in", call=_put_in, files=files, wrong=False, loads=True, value=True)
    files = {"l.safetensors": written(pair())}
    for text, says in SCALES.items():
        yield Row(name=f"LoRA scale {text[:20]!r}", words=(*words, f"l.safetensors:{text}"), files=files, says=says)
    for text in ("0.5", "-1", "1e-3", "+2", "1_0"):
        words_of = (*words, f"l.safetensors:{text}")
        yield Row(name=f"LoRA scale {text} right", words=words_of, files=files, wrong=False)
    yield Row(name="LoRA -0", call=lambda _: parse_lora("l:-0.0").scale == 0, value=True, wrong=False)
    for text, says in {
        "": "LoRA", "./absent.safetensors": "there is no LoRA", "\0": "LoRA", "a" * 5000: "LoRA",
        "transformer_9=l.safetensors": "LoRA", "transformer=": "LoRA", ":1": "LoRA",
    }.items():  # fmt: skip
        yield Row(name=f"LoRA {text[:20]!r}", words=(*words, text), files=files, says=says)
    yield from _exports(files)


def _exports(files: Mapping[str, Content]) -> Iterator[Row]:
    out = ("-o", "y.safetensors", "--format")
    for command in (("export-lora",), ("convert", "lora")):
        source = (*command, "l.safetensors")
        for words, says in {
            (*source, *out, "webui"): "format",
            (*source, *out, ""): "format",
            (*source, *out, "comfyui", "--family", "sora"): "unknown family 'sora'",
            (*source, *out, "comfyui", "--family", ""): "unknown family ''",
            (*source, *out, "comfyui", "--family", "Wan"): "unknown family 'Wan'",
            (*source, *out, "kohya", "--family", "wan"): "MLPs",
            (*command, "absent.safetensors", *out, "kohya"): "absent",
            (*source, "-o", "l.safetensors", "--format", "diffusers"): "is the model to convert",
            (*source, "-o", "y.safetensors"): "--format",
        }.items():
            yield Row(name=" ".join(words)[:60], words=words, files=files, says=says)
        right = (*source, *out, "comfyui", "--family", "wan")
        yield Row(name=f"{' '.join(command)} right", words=right, files=files, wrong=False)
    for name in (
        "empty",
        "a text",
        "NaN",
        "settings a list",
        "rank a word",
        "header no JSON",
        "note a list",
        "a pipe",
    ):
        content, _ = EARLY[name]
        words = ("export-lora", "l.safetensors", *out, "kohya", "--family", "wan")
        yield Row(name=f"export-lora {name}", words=words, files={"l.safetensors": content}, says="LoRA|note")
    for value in (3, None, ["kohya"], True):
        call: Callable[[Path], Any] = lambda here, value=value: export_lora(  # noqa: E731
            here / "l.safetensors", here / "y.safetensors", value
        )
        yield Row(name=f"export_lora format={value!r}", call=call, files=files, says="format")
