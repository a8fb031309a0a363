"""Wrong recipes: YAML syntax, keys, values, and overrides on the command line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from postgen.training.recipe import load_recipe
from tests.bad_inputs.row import Content, Row

BASE = "method: dancegrpo\noutput_dir: x\ntrain_dataset: p.txt\nreward_funcs: [world]\n"


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**31)


_LAUGHS = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" if n else "a0: &a0 [b]\n" for n in range(30))

WHOLE: dict[str, tuple[Content, str]] = {
    "empty": ("", "key: value"),
    "comment only": ("# nothing\n", "key: value"),
    "a list": ("- method: dancegrpo\n", "key: value"),
    "a word": ("dancegrpo", "key: value"),
    "a number": ("3\n", "key: value"),
    "two documents": (f"{BASE}---\n{BASE}", "valid YAML"),
    "tabs": ("method: dancegrpo\nlora:\n\tr: 4\n", "valid YAML"),
    "open bracket": (f"{BASE}reward_weights: [1\n", "valid YAML"),
    "not UTF-8": (b"method: \xff\xfe\x00caf\xe9\n", "cannot be read"),
    "UTF-16": (BASE.encode("utf-16"), "cannot be read"),
    "null characters": (f"{BASE}seed: \0", "valid YAML"),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "cannot be read"),
    "python object": (f"{BASE}seed: !!python/object/apply:os.system ['touch pwned']\n", "valid YAML"),
    "python name": (f"{BASE}seed: !!python/name:os.system\n", "valid YAML"),
    "unknown tag": (f"{BASE}seed: !secret 3\n", "valid YAML"),
    "wrong tag": (f"{BASE}seed: !!int many\n", "YAML"),
    "wrong date": (f"{BASE}seed: !!timestamp 2026-99-99\n", "YAML"),
    "5000 digits": (f"{BASE}seed: {'9' * 5000}\n", "YAML|seed"),
    "deep lists": (f"{BASE}reward_weights: {'[' * 1500}{']' * 1500}\n", "deep|nested"),
    "deep mappings": (f"{BASE}lora: {'{a: ' * 3000}1{'}' * 3000}\n", "deep|nested"),
    "deep enough": (f"{BASE}reward_weights: {'[' * 60}1{']' * 60}\n", "deep|nested|reward_weights"),
    "itself": (f"{BASE}reward_weights: &a [*a]\n", "itself|reward_weights"),
    "a billion laughs": (f"{_LAUGHS}{BASE}reward_weights: *a29\n", "too many"),
    "laughs in a value": (
        f"{BASE}reward_weights: &a [1, 1]\nreward_funcs: &b [*a, *a]\n",
        "reward_funcs is given twice",
    ),
    "unknown alias": (f"{BASE}seed: *nobody\n", "valid YAML"),
    "twice": (f"{BASE}seed: 1\nseed: 2\n", "seed is given twice"),
    "twice in a part": (f"{BASE}lora: {{r: 1, r: 2}}\n", "r is given twice"),
    "two spellings": (f"{BASE}lora: {{r: 4}}\nlora_r: 8\n", "lora_r is given twice"),
    "merge of no mapping": (f"{BASE}<<: 3\n", "valid YAML"),
    "a folder": (lambda path: path.mkdir(), "cannot be read"),
    "a pipe": (os.mkfifo, "cannot be read"),
    "a device": (_endless, "cannot be read"),
    "huge": (_large, "cannot be read"),
    "key of a list": (f"{BASE}? [a, b]\n: 3\n", "YAML|Unknown key"),
    "key of a number": (f"{BASE}3: 4\n", "Unknown key '3'"),
    "key of nothing": (f"{BASE}: 4\n", "valid YAML"),
    "key of a date": (f"{BASE}2026-01-01: 4\n", "Unknown key"),
    "key of a switch": (f"{BASE}yes: 4\n", "Unknown key"),
    "no method": ("output_dir: x\n", "names no method"),
    "empty method": ("method:\noutput_dir: x\n", "names no method"),
    "method of a list": ("method: [dancegrpo]\noutput_dir: x\n", "names no method"),
    "method of a date": ("method: 2026-01-01\noutput_dir: x\n", "names no method"),
    "near method": ("method: dance_grpo\noutput_dir: x\n", "Did you mean 'dancegrpo'"),
    "method of another program": ("method: sys:exit\noutput_dir: x\n", "not a subclass of"),
    "method nowhere": ("method: nobody.here:Trainer\noutput_dir: x\n", "cannot be imported"),
    "no output_dir": ("method: dancegrpo\n", "output_dir"),
    "empty output_dir": ("method: dancegrpo\noutput_dir: ''\n", "output_dir"),
    "null output_dir": ("method: dancegrpo\noutput_dir:\n", "output_dir"),
    "env of a list": (f"{BASE}env: [A]\n", "env in"),
    "env of a word": (f"{BASE}env: A\n", "env in"),
    "env with a list": (f"{BASE}env: {{A: [1]}}\n", "env"),
    "env with nothing": (f"{BASE}env: {{A: }}\n", "env"),
    "env with an equals sign": (f"{BASE}env: {{'A=B': 1}}\n", "env"),
    "env without a name": (f"{BASE}env: {{'': 1}}\n", "env"),
}
"""Name -> content of the file, and pattern of the message."""

VALUES: dict[str, str] = {
    "max_steps: 2026-01-01": "max_steps",
    "max_steps: 2026-01-01 10:00:00": "max_steps",
    "max_steps: 1:30:00": "1:30:00|max_steps",
    "seed: 0o17": "seed",
    "seed: 017": "017|seed",
    "max_steps: 1.5": "max_steps",
    "max_steps: [3]": "max_steps",
    "max_steps: {a: 1}": "max_steps",
    "max_steps: ten": "max_steps",
    "max_steps: ''": "max_steps",
    "max_steps:": "max_steps",
    "max_steps: true": "max_steps",
    "max_steps: .inf": "max_steps",
    "max_steps: !!binary aGVsbG8=": "max_steps",
    "max_steps: !!set {a, b}": "max_steps",
    "max_steps: 1000000000000": "max_steps",
    f"max_steps: {2**70}": "max_steps",
    f"seed: {2**70}": "seed",
    "seed: -1": "seed",
    "learning_rate: .inf": "learning_rate",
    "learning_rate: -.inf": "learning_rate",
    "learning_rate: .nan": "learning_rate",
    "learning_rate: 1e30": "learning_rate",
    "learning_rate: 0": "learning_rate",
    "learning_rate: -0.0": "learning_rate",
    "learning_rate: fast": "learning_rate",
    "learning_rate: 2026-01-01": "learning_rate",
    "learning_rate: true": "learning_rate",
    "bf16: maybe": "bf16",
    "bf16: 2": "bf16",
    "bf16: [true]": "bf16",
    "bf16: 2026-01-01": "bf16",
    "device: tpu": "device",
    "device: [cpu]": "device",
    "device: 2026-01-01": "device",
    "report_to: 3": "report_to",
    "report_to: 2026-01-01": "report_to",
    "report_to: [nobody]": "report_to",
    "report_to: [[wandb]]": "report_to",
    "report_to: {a: 1}": "report_to",
    "lr_scheduler_type: steps": "lr_scheduler_type",
    "lr_scheduler_type: 3": "lr_scheduler_type",
    "reward_weights: 1": "reward_weights",
    "reward_weights: [a]": "reward_weights",
    "reward_weights: [1, 2]": "reward_weights",
    "reward_weights: [.nan]": "reward_weights",
    "reward_weights: [2026-01-01]": "reward_weights",
    "reward_weights: {a: 1}": "reward_weights",
    "lora_target_modules: [3]": "lora_target_modules",
    "lora_target_modules: {a: 1}": "lora_target_modules",
    "sde_window_range: [0]": "sde_window_range",
    "sde_window_range: [0, 1, 2]": "sde_window_range",
    "sde_window_range: [a, b]": "sde_window_range",
    "init_from: 2026-01-01": "init_from",
    "init_from: 3": "init_from",
    "output_dir: 3": "output_dir",
    "output_dir: [a]": "output_dir",
    "resume_from_checkpoint: 2026-01-01": "resume_from_checkpoint",
    "resume_from_checkpoint: [a]": "resume_from_checkpoint",
    "save_total_limit: ''": "save_total_limit",
    "save_total_limit: -1": "save_total_limit",
    "lora: 3": "lora",
    "lora: [r, 4]": "lora",
    "lora: {rank: 4}": "Did you mean",
    "lora: {alpha: {a: 1}}": "lora_alpha",
    "lora: {r: 2026-01-01}": "lora_r",
    "lora: {max_steps: 3}": "part training",
    "lora: {3: 4}": "Unknown key",
    "lorra: {r: 4}": "no part 'lorra'",
    "max_stepz: 3": "Did you mean 'max_steps'",
    "lora.r: 3": "Did you mean 'lora_r'",
    "MAX_STEPS: 3": "Did you mean 'max_steps'",
    "'max_steps ': 3": "Did you mean 'max_steps'",
    "on: 3": "Unknown key",
    "max_sequence_length: 1000000000": "max_sequence_length",
    "num_inference_steps: 1": "num_inference_steps",
    "lora_r: 70000": "lora_r",
    "height: 1000000": "height",
    "num_frames: 10000000": "num_frames",
    "fps: 0": "fps",
    "fps: -1": "fps",
    "fps: 1.0e+5": "fps",
    "guidance_scale: 1.0e+6": "guidance_scale",
    "reward_funcs: [3]": "reward_funcs",
    "reward_funcs: [2026-01-01]": "reward_funcs",
    "reward_funcs: {world: 1}": "reward_funcs",
    "train_dataset: 3": "train_dataset",
    "train_dataset: [a]": "train_dataset",
    "train_dataset: 2026-01-01": "train_dataset",
    "negative_prompt: 3": "negative_prompt",
    "negative_prompt: 2026-01-01": "negative_prompt",
}
"""Lines of a recipe that replace the same key of the base -> pattern of the message."""

WORDS: dict[tuple[str, ...], str] = {
    ("--max_steps",): "max_steps",
    ("--max_steps", "many"): "max_steps",
    ("--max_steps=many",): "max_steps",
    ("--max_steps", "inf"): "max_steps",
    ("--max_steps", "1e3"): "max_steps",
    ("--max_steps", "9" * 5000): "max_steps",
    ("--max_steps", ""): "max_steps",
    ("--max_steps", "3", "4"): "4",
    ("--max_stepz", "3"): "Did you mean 'max_steps'",
    ("--learning_rate", "nan"): "learning_rate",
    ("--learning_rate", "inf"): "learning_rate",
    ("--learning_rate", "0x1p3"): "learning_rate",
    ("--bf16", "maybe"): "bf16",
    ("--reward_weights", "a"): "reward_weights",
    ("--reward_weights", "nan"): "reward_weights",
    ("--device", "tpu"): "device",
    ("max_steps", "3"): "--key value",
    ("--", "3"): "key|argument|3",
    ("-max_steps", "3"): "--key value",
    ("--method", "nobody"): "Unknown method",
    ("--method",): "method",
    ("--config", "other.yaml"): "Unknown key 'config'",
    ("--seed", str(2**70)): "seed",
    ("--output_dir", ""): "output_dir",
}

RIGHT: dict[str, tuple[str, str, Any]] = {
    "plain": ("", "lora_r", 32),
    "byte order mark": ("\ufeff", "lora_r", 32),
    "float without a point": ("learning_rate: 1e-4\n", "learning_rate", 1e-4),
    "whole float": ("max_steps: 3.0\n", "max_steps", 3),
    "underscores": ("max_steps: 1_000\n", "max_steps", 1000),
    "hexadecimal": ("seed: 0x10\n", "seed", 16),
    "nested": ("lora: {r: 4, alpha: 8}\n", "lora_r", 4),
    "anchors": ("lora: {r: &rank 4, alpha: *rank}\n", "lora_alpha", 4),
    "merge": ("lora: {<<: {r: 4, alpha: 8}, alpha: 2}\n", "lora_alpha", 2),
    "report_to none": ("report_to: none\n", "report_to", []),
    "report_to of one": ("report_to: tensorboard\n", "report_to", ["tensorboard"]),
    "zero is no limit": ("save_total_limit: 0\n", "save_total_limit", None),
    "resume true": ("resume_from_checkpoint: true\n", "resume_from_checkpoint", "latest"),
    "resume false": ("resume_from_checkpoint: false\n", "resume_from_checkpoint", None),
    "largest seed": (f"seed: {2**31 - 1}\n", "seed", 2**31 - 1),
    "switch": ("bf16: yes\n", "bf16", True),
    "text of a number": ("negative_prompt: '3'\n", "negative_prompt", "3"),
    "lists": ("reward_weights: [2.5]\n", "reward_weights", [2.5]),
    "whole numbers for floats": ("reward_weights: [2]\n", "reward_weights", [2.0]),
    "environment": ("env: {POSTGEN_MATRIX: 1}\n", "lora_r", 32),
    "fps": ("fps: 23.976\n", "fps", 23.976),
    "long prompts": ("max_sequence_length: 4096\n", "max_sequence_length", 4096),
}
"""Name -> lines before the base, name of a field, and its expected value."""


def _field(name: str, words: list[str], here: Path) -> Any:
    with patch.dict(os.environ):
        return getattr(load_recipe(here / "r.yaml", words)[1], name)


def rows() -> Iterator[Row]:
    """Yield all rows."""
    lora = partial(_field, "lora_r", [])
    for name, (content, says) in WHOLE.items():
        yield Row(name=f"recipe: {name}", call=lora, files={"r.yaml": content}, says=says)
    for line, says in VALUES.items():
        key = line.partition(":")[0]
        base = "".join(f"{each}\n" for each in BASE.splitlines() if each.partition(":")[0] != key)
        yield Row(name=f"recipe: {line[:40]}", call=lora, files={"r.yaml": f"{base}{line}\n"}, says=says)
    for words, says in WORDS.items():
        call = partial(_field, "lora_r", list(words))
        yield Row(name=f"recipe {' '.join(words)[:40]}", call=call, files={"r.yaml": BASE}, says=says)
    for name, (lines, field, value) in RIGHT.items():
        call = partial(_field, field, [])
        yield Row(name=f"recipe: {name} right", call=call, files={"r.yaml": lines + BASE}, value=value, wrong=False)
    for words, field, value in (
        (["--max_steps", "3"], "max_steps", 3),
        (["--max-steps=3"], "max_steps", 3),
        (["--reward_weights", "2"], "reward_weights", [2.0]),
        (["--bf16", "true"], "bf16", True),
    ):
        call = partial(_field, field, words)
        yield Row(name=f"recipe {words[0]} right", call=call, files={"r.yaml": BASE}, value=value, wrong=False)
