"""Wrong files of prompts, images and sidecars, and wrong rows of a training dataset."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image

from tests.bad_inputs.row import Content, Row

DEEP = "[" * 100_000 + "]" * 100_000
SMALL = ("--size", "32x32", "--frames", "5", "--steps", "1")


def _picture(path: Path) -> None:
    Image.new("RGB", (20, 30), "red").save(path, "PNG")


def _bomb(path: Path) -> None:
    """Write an image of 60,000 x 60,000 pixels in a few bytes."""
    size = (60_000).to_bytes(4, "big") * 2 + b"\1\0\0\0\0"
    chunk = b"IHDR" + size
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big"))


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _itself(path: Path) -> None:
    path.symlink_to(path.name)


def _cut(path: Path) -> None:
    _picture(path)
    os.truncate(path, 60)


PROMPTS: dict[str, tuple[str, Content, str]] = {
    # description: name of the file, its content, pattern of the message
    "empty": ("p.txt", "", "contains no prompt"),
    "blank lines": ("p.txt", "\n \n\t\n", "contains no prompt"),
    "not UTF-8": ("p.txt", b"caf\xe9\n", "not UTF-8 text"),
    "null characters": ("p.txt", "a\0b\n", "null characters"),
    "UTF-16 cut": ("p.txt", "red ball".encode("utf-16")[:-1], "cannot be read|not text"),
    "a folder": ("p.txt", lambda path: path.mkdir(), "cannot be read"),
    "a pipe": ("p.txt", os.mkfifo, "named pipe"),
    "a device": ("p.txt", _endless, "device"),
    "a link to itself": ("p.txt", _itself, "cannot be read"),
    "a dangling link": ("p.txt", lambda path: path.symlink_to("nowhere"), "cannot be read"),
    "a spreadsheet": ("p.xlsx", b"PK\x03\x04", "spreadsheet"),
    "Parquet": ("p.parquet", b"PAR1", "table of columns"),
    "Parquet under another name": ("p.jsonl", b"PAR1\0\0", "Parquet"),
    "YAML": ("p.yaml", "- prompt: a\n", "document"),
    "a picture": ("p.txt", b"\x89PNG\r\n\x1a\n", "not UTF-8 text"),
    "JSONL cut": ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"', "line 2: it is not valid JSON"),
    "JSONL of words": ("p.jsonl", "a red ball\n", "line 1: it is not valid JSON"),
    "JSONL of numbers": ("p.jsonl", '{"prompt": "a"}\n3\n', "line 2"),
    "JSONL of null": ("p.jsonl", "null\n", "line 1"),
    "JSONL without a prompt": ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2 has no column 'prompt'"),
    "JSONL empty prompt": ("p.jsonl", '{"prompt": " "}\n', "the prompt is empty"),
    "JSONL prompt a number": ("p.jsonl", '{"prompt": 3}\n', "line 1: the prompt is 3"),
    "JSONL prompt null": ("p.jsonl", '{"prompt": null}\n', "the prompt is None"),
    "JSONL prompt a mapping": ("p.jsonl", '{"prompt": {"a": 1}}\n', "the prompt is"),
    "JSONL prompt a conversation of nobody": ("p.jsonl", '{"prompt": [{"role": "system"}]}\n', "the prompt is"),
    "JSONL deep": ("p.jsonl", DEEP, "nested too deeply"),
    "JSONL of 5000 digits": ("p.jsonl", f'{{"prompt": "a", "n": {"9" * 5000}}}\n', "too many digits"),
    "JSONL of single quotes": ("p.jsonl", "{'prompt': 'a'}\n", "not valid JSON"),
    "JSONL with a comma": ("p.jsonl", '{"prompt": "a"},\n', "not valid JSON"),
    "JSON empty list": ("p.json", "[]", "contains no prompt"),
    "JSON empty object": ("p.json", "{}", "no column 'prompt'"),
    "JSON of lists": ("p.json", '[["a"]]', "entry 1"),
    "JSON cut": ("p.json", '[{"prompt": "a"}', "not valid JSON"),
    "CSV without a header": ("p.csv", "a red ball\nb\n", "must name the columns"),
    "CSV header twice": ("p.csv", "prompt,prompt\na,b\n", "must name the columns"),
    "CSV header alone": ("p.csv", "prompt\n", "contains no prompt"),
    "CSV with a value more": ("p.csv", "prompt,seed\na,1,2\n", "line 2 has 3 values"),
    "CSV with a value less": ("p.csv", "prompt,seed\na\n", "line 2 has 1 values"),
    "CSV with an open quote": ("p.csv", 'prompt\n"a\n', "line"),
    "CSV empty prompt": ("p.csv", "prompt,seed\n,1\n", "the prompt is empty"),
    "CSV with a long field": ("p.csv", f"prompt\n{'a' * 200_000}\n", "field larger"),
    "TSV with commas": ("p.tsv", "prompt,seed\na,1\n", "must name the columns"),
}

RIGHT_PROMPTS: dict[str, tuple[str, Content]] = {
    "lines": ("p.txt", "a red ball\n"),
    "byte order mark": ("p.txt", b"\xef\xbb\xbfa\n"),
    "UTF-16": ("p.txt", "a\n".encode("utf-16")),
    "a line that looks like JSON": ("p.txt", "[a red ball]\n"),
    "Windows": ("p.txt", "a\r\nb\r\n"),
    "JSONL": ("p.jsonl", '{"prompt": "a", "n": 1}\n\n{"prompt": "b"}\n'),
    "JSON of texts": ("p.json", '["a", "b"]'),
    "CSV": ("p.csv", 'prompt,seed\n"a, b",1\n'),
    "CSV with semicolons": ("p.csv", "prompt;seed\na;1\n"),
    "TSV": ("p.tsv", "prompt\tseed\na\t1\n"),
}

PICTURES: dict[str, tuple[Content, str]] = {
    "empty": (b"", "cannot read the picture"),
    "a text": ("no picture", "cannot read the picture"),
    "cut": (_cut, "cannot read the picture"),
    "a bomb": (_bomb, "cannot read the picture"),
    "a folder": (lambda path: path.mkdir(), "cannot read the picture"),
    "a pipe": (os.mkfifo, "named pipe"),
    "a device": (_endless, "device"),
    "a link to itself": (_itself, "cannot read the picture"),
    "SVG": ("<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot read the picture"),
    "floating point": (lambda path: Image.new("F", (4, 4)).save(path, "TIFF"), "known range"),
}

SIDECARS: dict[str, tuple[Content, str]] = {
    "empty": ("", "cannot read the sidecar"),
    "cut": ('{"settings": {', "cannot read the sidecar"),
    "a list": ("[1]", "is not a sidecar"),
    "a number": ("3", "is not a sidecar"),
    "settings a list": ('{"settings": [], "format": "mp4"}', "is not a sidecar"),
    "no format": ('{"settings": {"prompt": "a"}}', "is not a sidecar"),
    "format a number": ('{"settings": {"prompt": "a"}, "format": 3}', "is not a sidecar"),
    "format unknown": ('{"settings": {"prompt": "a"}, "format": "mov"}', "unknown video format"),
    "not UTF-8": (b"\xff\xfe{", "cannot read the sidecar"),
    "deep": (DEEP, "nested too deeply"),
    "a pipe": (os.mkfifo, "named pipe"),
    "a device": (_endless, "device"),
    "a folder": (lambda path: path.mkdir(), "a folder"),
    "unknown setting": ('{"settings": {"prompt": "a", "hight": 3}, "format": "mp4"}', "unknown settings hight"),
}

SETTINGS = {
    "width": ("tall", 32.5, True, [32], 10**12, 0, -16),
    "num_frames": ("5", 5.5, 10**400, 0),
    "fps": ("8", 0, -1, 1e30, [8]),
    "guidance_scale": ("1", -1, 1e30, {}),
    "num_inference_steps": ("1", 0, 1.5, 10**12),
    "seed": ("0", -1, 2**63, 1.5, True, None),
    "prompt": (3, "", " ", None, ["a"]),
    "negative_prompt": (3, ["a"]),
    "lora": ("x", [3], {}, 3),
    "dtype": ("float8", 3, ["float32"], None),
    "device": ("tpu", 3, "", None),
    "offload": ("disk", 3, None),
    "model": (3, ["a"], ""),
    "image": (3, "absent.png", ""),
    "enhance": (3, "many", "inf", ["auto"]),
    "fused": (True, "nothing", ["adaln"]),
}
"""Setting of a sidecar -> wrong values."""


def _prompts() -> Iterator[Row]:
    for name, (file, content, says) in PROMPTS.items():
        words = ("generate", "--prompts", file, "--model", "{wan}", *SMALL, "-o", "x.mp4")
        yield Row(name=f"prompts: {name}", words=words, files={file: content}, says=says)
    for name, (file, content) in RIGHT_PROMPTS.items():
        words = ("generate", "--prompts", file, "--model", "{wan}", *SMALL, "-o", "x.mp4")
        yield Row(name=f"prompts: {name} right", words=words, files={file: content}, wrong=False)
    for prompt in ("", "   ", "\n"):
        yield Row(name=f"prompt {prompt!r}", words=("generate", prompt, "--model", "{wan}"), says="prompt is empty")


def _pictures() -> Iterator[Row]:
    words = ("generate", "a", "--model", "{image}", *SMALL, "-o", "x.mp4", "--image", "i.png")
    for name, (content, says) in PICTURES.items():
        yield Row(name=f"picture: {name}", words=words, files={"i.png": content}, says=says)
    yield Row(name="picture: absent", words=words, says="cannot read the picture")
    yield Row(name="picture: none given", words=words[:-2], says="give one with --image")
    yield Row(name="picture: right", words=words, files={"i.png": _picture}, wrong=False)
    text_only = (*words[:3], "{wan}", *words[4:])
    yield Row(name="picture: for text", words=text_only, files={"i.png": _picture}, says="takes text only")


def _sidecars() -> Iterator[Row]:
    words = ("generate", "--from", "s.json", "--model", "{wan}", *SMALL, "-o", "y.mp4")
    for name, (content, says) in SIDECARS.items():
        again = words[:-2] if name == "format unknown" else words
        yield Row(name=f"sidecar: {name}", words=again, files={"s.json": content}, says=says)
    base = {"prompt": "a", "seed": 0}
    for setting, values in SETTINGS.items():
        for value in values:
            note = {"settings": {**base, setting: value}, "format": "mp4"}
            text = json.dumps(note)
            plain = ("generate", "--from", "s.json", "-o", "y.mp4")
            says = {"image": "picture|image", "model": "model"}.get(setting, setting)
            row = f"sidecar {setting}={str(value)[:20]!r}"
            yield Row(name=row, words=plain, files={"s.json": text}, says=says)
    text = json.dumps({"settings": base, "format": "mp4"})
    yield Row(name="sidecar right", words=words, files={"s.json": text}, wrong=False)
    yield Row(name="sidecar with a mark", words=words, files={"s.json": "\ufeff" + text}, wrong=False)


RECIPE = """method: dancegrpo
output_dir: run
train_dataset: p.jsonl
reward_funcs: [brightness_band]
device: cpu
report_to: none
height: 32
width: 32
num_frames: 5
num_generations: 2
per_device_train_batch_size: 2
"""

_GOOD = {"prompt": "a", "image": "i.png"}
ROWS: dict[str, tuple[str, list[Mapping[str, object]], str]] = {
    # description: model, rows, pattern of the message
    "no image in row 6": ("image", [*[_GOOD] * 5, {"prompt": "b"}], "row 6 of train_dataset has no image"),
    "image null": ("image", [_GOOD, {"prompt": "a", "image": None}], "row 2 of train_dataset has no image"),
    "no image at all": ("image", [{"prompt": "a"}], "row 1 of train_dataset has no image"),
    "image absent": ("image", [_GOOD, {"prompt": "a", "image": "j.png"}], "row 2 .* cannot read the picture j.png"),
    "image empty": ("image", [{"prompt": "a", "image": ""}], "row 1 of train_dataset"),
    "image a number": ("image", [{"prompt": "a", "image": 3}], "row 1 .* its image is 3"),
    "image a list": ("image", [{"prompt": "a", "image": ["i.png"]}], "row 1 .* its image is"),
    "image no picture": ("image", [{"prompt": "a", "image": "p.jsonl"}], "row 1 .* cannot read the picture"),
    "image a folder": ("image", [{"prompt": "a", "image": "."}], "row 1 .* a folder"),
    "image a pipe": ("image", [{"prompt": "a", "image": "pipe.png"}], "row 1 .* named pipe"),
    "image for text": ("wan", [{"prompt": "a"}, _GOOD], "row 2 of train_dataset has an image"),
    "negative prompt a number": ("wan", [{"prompt": "a", "negative_prompt": 3}], "row 1 .* negative_prompt is 3"),
    **{
        f"column {name}": ("wan", [{"prompt": "a", name: 1}], f"row 1 of train_dataset has a column '{name}'")
        for name in ("fps", "prompts", "completions", "latents", "trainer_state", "log_extra", "log_metric")
    },
    "column must_score": ("wan", [{"prompt": "a"}, {"prompt": "a", "must_score": 1}], "has a column 'must_score'"),
}

RIGHT_ROWS: dict[str, tuple[str, list[Mapping[str, object]]]] = {
    "with images": ("image", [_GOOD, _GOOD]),
    "plain": ("wan", [{"prompt": "a"}]),
    "columns of their own": ("wan", [{"prompt": "a", "rate": 8, "self": 1, "negative_prompt": "b"}]),
    "image null for text": ("wan", [{"prompt": "a", "image": None}]),
}

TRAIN: dict[str, str] = {
    # lines of the recipe -> pattern of the message
    "train_dataset: absent.jsonl": "absent.jsonl cannot be read",
    "train_dataset: sys:exit": "ended the program",
    "train_dataset: math:pi": "not a function",
    "train_dataset: pipe.jsonl": "named pipe",
    "train_dataset: ''": "train_dataset",
    "eval_dataset: absent.jsonl": "absent.jsonl cannot be read",
    "eval_steps: 3": "give eval_dataset",
    "data_beta: 1": "row 1 of train_dataset .* does not describe a scene",
    "data_beta: 1\ndata_source: absent.jsonl": "absent.jsonl cannot be read",
    "data_beta: 1\ndata_source: p.jsonl": "row 1 of data_source: video must be",
    "data_beta: 1\ndata_source: ''": "data_source",
    "eval_fm_clips: 2": "give eval_dataset",
    "reward_funcs: []": "there is no reward",
    "reward_funcs: [wrld]": "Did you mean 'world'",
    "reward_funcs: [world, world]": "two rewards are named",
    "reward_funcs: ['clip_score(frames=0)']": "frames",
    "reward_funcs: ['file.py:fn']": "does not exist",
    "reward_funcs: [sys:exit]": "reward|sys",
    "reward_device: tpu": "reward_device",
    "height: 33": "height must be a multiple",
    "num_frames: 6": "the number of frames",
    "num_generations: 3": "num_generations|multiple",
    "model: absent": "absent",
    "model: ./p.jsonl": "is a file",
    "model: ''": "model",
    "lora_path: absent.safetensors": "absent.safetensors",
    "lora_path: p.jsonl": "LoRA",
    "init_from: absent": "absent",
}


def _training() -> Iterator[Row]:
    for name, (model, lines, says) in ROWS.items():
        yield Row(name=f"rows: {name}", words=_train(model), files=_files(lines), says=says)
    for name, (model, lines) in RIGHT_ROWS.items():
        yield Row(name=f"rows: {name} right", words=_train(model), files=_files(lines), wrong=False)
    for line, says in TRAIN.items():
        key = line.partition(":")[0]
        recipe = "".join(f"{each}\n" for each in RECIPE.splitlines() if each.partition(":")[0] != key) + line + "\n"
        words = _train("wan") if key != "model" else ("train", "r.yaml")
        files = {**_files([{"prompt": "a"}]), "r.yaml": recipe, "pipe.jsonl": os.mkfifo}
        yield Row(name=f"train: {line}", words=words, files=files, says=says)
    for words, says in {
        ("train",): "RECIPE",
        ("train", "absent.yaml"): "absent.yaml cannot be read",
        ("train", "--max_steps", "3"): "The recipe comes first",
        ("train", ""): "cannot be read|folder",
        ("train", "r.yaml", "--resume", "--max_stepz", "3"): "Did you mean",
        ("train", "r.yaml", "--dry-run", "--method", "world_judge"): "has no cost estimate|Unknown key",
    }.items():
        yield Row(name=" ".join(words), words=words, files=_files([{"prompt": "a"}]), says=says)


def _train(model: str) -> tuple[str, ...]:
    return ("train", "r.yaml", "--model", "{" + model + "}")


def _files(lines: list[Mapping[str, object]]) -> dict[str, Content]:
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    return {"r.yaml": RECIPE, "p.jsonl": text, "i.png": _picture, "pipe.png": os.mkfifo}


def rows() -> Iterator[Row]:
    """Yield all rows."""
    yield from _prompts()
    yield from _pictures()
    yield from _sidecars()
    yield from _training()
