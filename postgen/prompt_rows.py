"""Rows of prompts, and the one reader of files of them: commands and training both take it. Light to import."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from postgen.errors import UserError


def read_prompts(path: str | Path, what: str = "the prompts", *, empty: bool = False) -> list[dict[str, Any]]:
    """Read a file of prompts: JSONL objects with `prompt` and any other keys, or one prompt a line.

    `.jsonl` and `.json` are JSONL, `.txt` is text, and another file is JSONL where it begins with a brace. Blank lines
    do not count; a prompt of a line of text stands without the spaces around it.

    Args:
        path: the file.
        what: what messages call it.
        empty: whether a prompt of JSONL may be empty.

    Raises:
        UserError: no such file, a line that is no object with a prompt, or no prompt at all.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} cannot be read: {error}") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"{what} {path}: there is no prompt in it")
    is_json = path.suffix in (".jsonl", ".json") or (path.suffix != ".txt" and lines[0][1].startswith("{"))
    if not is_json:
        return [{"prompt": line} for _, line in lines]
    return [_json_row(line, f"{what} {path}, line {number}", empty) for number, line in lines]


def prompt_row(row: Any, where: str, *, empty: bool = True) -> dict[str, Any]:
    """Return a row with its prompt as a text: that of a conversation is the last message of its user.

    Args:
        row: an object with `prompt` and any other keys.
        where: what messages call it.
        empty: whether the prompt may be empty.

    Raises:
        UserError: it has no prompt.

    >>> prompt_row({"prompt": [{"role": "user", "content": "a ball"}], "id": 3}, "row 0")
    {'prompt': 'a ball', 'id': 3}
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is {row!r}, it must be an object with a prompt")
    if "prompt" not in row:
        known = ", ".join(map(str, row)) or "nothing"
        raise UserError(f"{where} has no column 'prompt', it has {known}")
    prompt = row["prompt"]
    if isinstance(prompt, list):
        messages = [turn.get("content") for turn in prompt if isinstance(turn, Mapping) and turn.get("role") == "user"]
        prompt = messages[-1] if messages else None
    if not isinstance(prompt, str):
        raise UserError(f"{where}: the prompt is {row['prompt']!r}, it must be a text")
    if not empty and not prompt.strip():
        raise UserError(f"{where}: the prompt is empty")
    return {**row, "prompt": prompt}


def _json_row(line: str, where: str, empty: bool) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is no JSON: {error}") from error
    return prompt_row(row, where, empty=empty)
