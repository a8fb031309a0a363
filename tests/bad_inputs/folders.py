"""Broken model folders: errors in small files are found before the weights are read, other errors while reading."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.bad_inputs.row import Content, Row
from tests.bad_inputs.tiny import copied, tensors

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
INDEX, CONFIG, VAE = "model_index.json", "transformer/config.json", "vae/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
DEEP = "[" * 100_000 + "]" * 100_000


def _pickle(path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(path.parents[1] / "pwned"),)

    path.write_bytes(pickle.dumps(Payload()))


def _cut(path: Path) -> None:
    tensors(lambda state: None)(path)
    path.write_bytes(path.read_bytes()[:-100])


EARLY: dict[str, tuple[Content, str]] = {
    "empty folder": (lambda path: path.mkdir(), "no model_index.json"),
    "a file": ("x", "is a file"),
    "a pipe": (os.mkfifo, "is a file|folder"),
    "no index": (copied(files={INDEX: None}), "no model_index.json"),
    "a pipe for an index": (copied(files={INDEX: os.mkfifo}), "model_index.json"),
    "index empty": (copied(files={INDEX: ""}), "cannot read .*model_index"),
    "index a list": (copied(files={INDEX: "[]"}), "expected a JSON object"),
    "index a number": (copied(files={INDEX: "3"}), "expected a JSON object"),
    "index an empty object": (copied(files={INDEX: "{}"}), "does not name a pipeline"),
    "index cut": (copied(files={INDEX: '{"_class_name": "Wan'}), "cannot read .*model_index"),
    "index binary": (copied(files={INDEX: b"\xff\xfe\x00"}), "cannot read .*model_index"),
    "index deep": (copied(files={INDEX: DEEP}), "nested too deeply"),
    "index of 5000 digits": (copied(files={INDEX: f'{{"a": {"9" * 5000}}}'}), "digits"),
    "class of a list": (copied(json_files={INDEX: {"_class_name": ["WanPipeline"]}}), "does not name a pipeline"),
    "class null": (copied(json_files={INDEX: {"_class_name": None}}), "does not name a pipeline"),
    "class empty": (copied(json_files={INDEX: {"_class_name": ""}}), "lacks|name a pipeline"),
    "class nobody's": (copied(json_files={INDEX: {"_class_name": "NobodysPipeline"}}), "which the installed"),
    "class a module": (copied(json_files={INDEX: {"_class_name": "utils"}}), "utils"),
    "class a function": (copied(json_files={INDEX: {"_class_name": "export_to_video"}}), "export_to_video"),
    "class dunder": (copied(json_files={INDEX: {"_class_name": "__name__"}}), "__name__"),
    "class a model": (copied(json_files={INDEX: {"_class_name": "WanTransformer3DModel"}}), "WanTransformer3DModel"),
    "class a scheduler": (copied(json_files={INDEX: {"_class_name": "UniPCMultistepScheduler"}}), "UniPC"),
    "class the base": (copied(json_files={INDEX: {"_class_name": "DiffusionPipeline"}}), "DiffusionPipeline"),
    "class of pictures": (copied(json_files={INDEX: {"_class_name": "FluxPipeline"}}), "makes no video"),
    "transformer nobody's": (
        copied(json_files={INDEX: {"transformer": ["diffusers", "NobodysTransformer"]}}),
        "NobodysTransformer",
    ),
    "transformer a module": (copied(json_files={INDEX: {"transformer": ["diffusers", "utils"]}}), "utils"),
    "transformer of os": (copied(json_files={INDEX: {"transformer": ["os", "system"]}}), "system"),
    "transformer a word": (copied(json_files={INDEX: {"transformer": "diffusers"}}), "transformer"),
    "transformer of three": (copied(json_files={INDEX: {"transformer": ["a", "b", "c"]}}), "transformer"),
    "transformer a number": (copied(json_files={INDEX: {"transformer": ["diffusers", 3]}}), "transformer"),
    "no transformer": (copied(json_files={INDEX: {"transformer": [None, None]}}), "transformer"),
    "vae without config": (copied(files={VAE: None}), "vae"),
    "vae config a list": (copied(files={VAE: "[]"}), "vae.*expected a JSON object"),
    "vae scale a word": (copied(json_files={VAE: {"scale_factor_spatial": "eight"}}), "scale_factor_spatial|vae"),
    "vae scale 0": (copied(json_files={VAE: {"scale_factor_spatial": 0}}), "scale_factor_spatial|vae"),
    "vae scale negative": (copied(json_files={VAE: {"scale_factor_temporal": -4}}), "scale_factor_temporal|vae"),
    "vae scale a list": (copied(json_files={VAE: {"scale_factor_temporal": [4]}}), "scale_factor_temporal|vae"),
    "vae scale 1e30": (copied(json_files={VAE: {"scale_factor_spatial": 1e30}}), "scale_factor_spatial|vae"),
    "patch of two": (copied(json_files={CONFIG: {"patch_size": [1, 2]}}), "patch_size"),
    "patch 0": (copied(json_files={CONFIG: {"patch_size": [1, 0, 2]}}), "patch_size"),
    "patch negative": (copied(json_files={CONFIG: {"patch_size": [1, -2, 2]}}), "patch_size"),
    "patch a word": (copied(json_files={CONFIG: {"patch_size": "2"}}), "patch_size"),
    "patch null": (copied(json_files={CONFIG: {"patch_size": None}}), "patch_size"),
    "patch fractions": (copied(json_files={CONFIG: {"patch_size": [1, 2.5, 2]}}), "patch_size"),
    "patch a number": (copied(json_files={CONFIG: {"patch_size": 2}}), "patch_size"),
    "config empty": (copied(files={CONFIG: ""}), "cannot read .*config.json"),
    "config a list": (copied(files={CONFIG: "[]"}), "expected a JSON object"),
    "config deep": (copied(files={CONFIG: DEEP}), "nested too deeply"),
    "scheduler a list": (copied(files={SCHEDULER: "[1]"}), "expected a JSON object"),
    "scheduler cut": (copied(files={SCHEDULER: "{"}), "cannot read .*scheduler"),
    "own words a list": (copied(files={"postgen.json": "[]"}), "expected a JSON object"),
    "own words unknown": (copied(files={"postgen.json": '{"hight": 3}'}), "invalid entry hight"),
    "own fps a word": (copied(files={"postgen.json": '{"fps": "8"}'}), "invalid entry fps"),
    "own fps NaN": (copied(files={"postgen.json": '{"fps": NaN}'}), "fps"),
    "own fps infinite": (copied(files={"postgen.json": '{"fps": Infinity}'}), "fps"),
    "own fps 0": (copied(files={"postgen.json": '{"fps": 0}'}), "fps"),
    "own width half": (copied(files={"postgen.json": '{"width": 32.5}'}), "width"),
    "own width true": (copied(files={"postgen.json": '{"width": true}'}), "width"),
    "own steps 1e30": (copied(files={"postgen.json": '{"num_inference_steps": 1e30}'}), "num_inference_steps"),
    "own dtype": (copied(files={"postgen.json": '{"dtype": "float8"}'}), "dtype"),
    "own dtype a list": (copied(files={"postgen.json": '{"dtype": ["float32"]}'}), "dtype"),
    "own vocabulary": (copied(files={"postgen.json": '{"closed_vocabulary": [3]}'}), "closed_vocabulary"),
    "own image": (copied(files={"postgen.json": '{"image_to_video": "yes"}'}), "image_to_video"),
    "export of a list": (lambda path: _export(path, "[]"), "base.json"),
    "export of nothing": (lambda path: _export(path, "{}"), "base.json"),
    "export cut": (lambda path: _export(path, '{"base": '), "base.json"),
    "export of itself": (lambda path: _export(path, f'{{"base": "{path}", "parts": ["transformer"]}}'), "export"),
    "export of parts that are not there": (
        lambda path: _export(path, '{"base": "embedded", "parts": ["transformer_9"]}'),
        "copy the whole export",
    ),
    "export of parts outside": (
        lambda path: _export(path, '{"base": "embedded", "parts": ["../m/transformer"]}'),
        "parts",
    ),
}
"""Errors that are found before any model class is used."""


def _export(path: Path, note: str) -> None:
    (path / "transformer").mkdir(parents=True)
    (path / "transformer" / "config.json").write_text("{}", encoding="utf-8")
    (path / "base.json").write_text(note, encoding="utf-8")


def _change(name: str, value: Any) -> Content:
    return copied(json_files={CONFIG: {name: value}})


def _weights(change: Callable[[dict[str, Any]], object]) -> Content:
    return copied(files={WEIGHTS: tensors(change)})


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda state: state.__setitem__(name, value)


QUERY = "blocks.0.attn1.to_q.weight"
LATE: dict[str, tuple[Content, str]] = {
    "missing tensors": (_weights(lambda state: state.pop(QUERY)), "is not complete: transformer lacks 1 weights"),
    "missing block": (_change("num_layers", 3), "is not complete: transformer lacks"),
    "99 layers": (_change("num_layers", 99), "is not complete: transformer lacks"),
    "a block more than the config": (_change("num_layers", 1), "blocks"),
    "no layers": (_change("num_layers", 0), "num_layers is 0"),
    "layers negative": (_change("num_layers", -1), "num_layers is"),
    "layers a word": (_change("num_layers", "two"), "num_layers is"),
    "layers a fraction": (_change("num_layers", 1.5), "num_layers is"),
    "layers null": (_change("num_layers", None), "cannot load"),
    "heads 0": (_change("num_attention_heads", 0), "num_attention_heads is"),
    "heads negative": (_change("num_attention_heads", -2), "num_attention_heads is"),
    "heads of another model": (_change("num_attention_heads", 4), "cannot load"),
    "head_dim 0": (_change("attention_head_dim", 0), "attention_head_dim is"),
    "head_dim odd": (_change("attention_head_dim", 13), "cannot load"),
    "head_dim 1e30": (_change("attention_head_dim", 1e30), "attention_head_dim is"),
    "ffn of another model": (_change("ffn_dim", 64), "cannot load"),
    "text_dim a list": (_change("text_dim", [16]), "text_dim is"),
    "eps a word": (_change("eps", "small"), "eps is"),
    "config an empty object": (copied(files={CONFIG: "{}"}), "cannot load|not complete"),
    "no weights": (copied(files={WEIGHTS: None}), "cannot load"),
    "weights empty": (copied(files={WEIGHTS: b""}), "cannot load"),
    "weights cut": (copied(files={WEIGHTS: _cut}), "cannot load"),
    "weights a text": (copied(files={WEIGHTS: "no weights"}), "cannot load"),
    "weights a pickle": (copied(files={WEIGHTS: _pickle}), "cannot load"),
    "weights a pickle by name": (
        copied(files={WEIGHTS: None, "transformer/diffusion_pytorch_model.bin": _pickle}),
        "cannot load",
    ),
    "weights of another shape": (_weights(_set(QUERY, torch.ones(3, 3))), "cannot load"),
    "weights of no tensors": (_weights(dict.clear), "cannot load|not complete"),
    "weights that are NaN": (_weights(lambda state: state[QUERY].fill_(torch.nan)), "NaN|finite"),
    "weights that are infinite": (_weights(lambda state: state[QUERY].fill_(torch.inf)), "NaN|finite"),
    "header of a terabyte": (copied(files={WEIGHTS: b"\xff" * 7 + b"\0{}"}), "cannot load"),
    "class of another model": (_change("_class_name", "UNet2DModel"), "cannot load|UNet2DModel"),
    "vae without weights": (
        copied(files={"vae/diffusion_pytorch_model.safetensors": None}),
        "cannot load",
    ),
    "tokenizer empty": (copied(files={"tokenizer/tokenizer.json": ""}), "cannot load"),
    "tokenizer a list": (copied(files={"tokenizer/tokenizer.json": "[]"}), "cannot load"),
    "text encoder of another class": (
        copied(json_files={"model_index.json": {"text_encoder": ["transformers", "BertModel"]}}),
        "cannot load|BertModel|text_encoder",
    ),
    "text encoder config empty": (copied(files={"text_encoder/config.json": ""}), "cannot load"),
    "scheduler unknown": (
        copied(json_files={"model_index.json": {"scheduler": ["diffusers", "NobodysScheduler"]}}),
        "NobodysScheduler|cannot load",
    ),
    "scheduler shift a word": (copied(json_files={SCHEDULER: {"shift": "far"}}), "cannot load"),
    "scheduler of no steps": (copied(json_files={SCHEDULER: {"num_train_timesteps": 0}}), "cannot load"),
}
"""Errors that are found when the weights are read. No code of a class in the folder may run."""

RIGHT: dict[str, Content] = {
    "as it is": copied(),
    "an entry more in the index": copied(json_files={INDEX: {"_more": 3}}),
    "own words": copied(files={"postgen.json": '{"fps": 12.5, "width": 32, "dtype": "float32"}'}),
    "a byte order mark": copied(files={"postgen.json": b'\xef\xbb\xbf{"fps": 12.5}'}),
    "whole numbers as floats": copied(files={"postgen.json": '{"fps": 12}'}),
    "a file more": copied(files={"notes.txt": "mine"}),
}


def rows() -> Iterator[Row]:
    """Yield all rows."""
    words = ("generate", "a", "--model", "./m", "--size", "32x32", "--frames", "5", "--steps", "1", "-o", "x.mp4")
    for name, (content, says) in EARLY.items():
        yield Row(name=f"model: {name}", words=words, files={"m": content}, says=says)
    for name, (content, says) in LATE.items():
        yield Row(name=f"model: {name}", words=words, files={"m": content}, says=says, loads=True)
    for name, content in RIGHT.items():
        yield Row(name=f"model: {name} right", words=words, files={"m": content}, wrong=False)
