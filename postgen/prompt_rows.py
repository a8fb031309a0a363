"""Rows of prompts, and the one reader of files of them: commands and training both take it. Light to import."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from postgen.errors import UserError, check_text, shown
from postgen.reading import parse_json, read_bytes

FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
"""Ends of names of files that are read."""

_LARGEST = 2**30
"""Bytes of a file of prompts."""
_OTHER_KINDS = {
    **dict.fromkeys((".parquet", ".arrow", ".feather", ".orc", ".avro"), "a table of columns"),
    **dict.fromkeys((".xls", ".xlsx", ".ods", ".numbers"), "a spreadsheet"),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".7z"), "a packed file"),
    **dict.fromkeys(
        (".yaml", ".yml", ".toml", ".xml", ".html", ".rtf", ".doc", ".docx", ".odt", ".pdf"), "a document"
    ),
    **dict.fromkeys((".pkl", ".pickle", ".npy", ".npz", ".pt", ".pth", ".safetensors", ".db", ".sqlite"), "data"),
}
_MAGIC = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"PK\x03\x04": "zip (a spreadsheet or an archive)",
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"%PDF": "PDF",
    b"SQLite format 3": "SQLite",
}
_READ = "JSONL, a JSON array, CSV or TSV with a header `prompt`, and lines of text are read: write one of these"


def read_prompts(path: str | Path, what: str = "the prompts", *, empty: bool = False) -> list[dict[str, Any]]:
    """Read a file of prompts: JSONL objects with `prompt` and any other keys, or one prompt a line.

    `.txt` is text, `.jsonl`, `.ndjson` and `.json` are JSONL or a JSON array (of objects, or of texts), `.csv` and
    `.tsv` have a header with `prompt` (their values are texts; an empty one is not there), and another file is JSON
    where it begins as such. UTF-8, or UTF-16 with its mark. Lines end with a newline alone. Blank lines do not count;
    a prompt of a line of text stands without the spaces around it.

    Args:
        path: the file.
        what: what messages call it.
        empty: whether a prompt of JSON or of a table may be empty.

    Raises:
        UserError: no such file, a format that is not read, a line that has no prompt, or no prompt at all.
    """
    path = Path(path).expanduser()
    where = f"{what} {path}"
    kind = path.suffix.lower()
    if kind in _OTHER_KINDS:
        raise UserError(f"{where}: {kind} is {_OTHER_KINDS[kind]}, which is not read. {_READ}")
    text = _text(path, where)
    if kind in (".csv", ".tsv"):
        rows = [prompt_row(row, place, empty=empty) for place, row in _table(text, kind, where)]
    elif kind in (".jsonl", ".ndjson", ".json") or (kind != ".txt" and _is_json(text)):
        rows = _json_rows(text, where, empty)
    else:
        rows = [{"prompt": line} for _, line in _lines(text)]
    if not rows:
        raise UserError(f"{where}: there is no prompt in it")
    return rows


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
        raise UserError(f"{where} is {shown(row)}, it must be an object with a prompt")
    if "prompt" not in row:
        known = ", ".join(map(str, row)) or "nothing"
        raise UserError(f"{where} has no column 'prompt', it has {known}")
    prompt = row["prompt"]
    if isinstance(prompt, list):
        messages = [turn.get("content") for turn in prompt if isinstance(turn, Mapping) and turn.get("role") == "user"]
        prompt = messages[-1] if messages else None
    if not isinstance(prompt, str):
        raise UserError(f"{where}: the prompt is {shown(row['prompt'])}, it must be a text")
    if not empty and not prompt.strip():
        raise UserError(f"{where}: the prompt is empty")
    check_text(f"{where}: the prompt", prompt)
    return {**row, "prompt": prompt}


def _text(path: Path, where: str) -> str:
    data = read_bytes(path, f"{where} cannot be read", most=_LARGEST)
    for magic, name in _MAGIC.items():
        if data.startswith(magic):
            raise UserError(f"{where} is {name}, which is not read. {_READ}")
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} cannot be read: it is no text in UTF-8 ({error.reason}, byte {error.start})"
        ) from error
    if "\0" in text:
        raise UserError(f"{where} is no text: it has null characters. {_READ}")
    return text


def _lines(text: str) -> list[tuple[int, str]]:
    """Return the lines that are not blank with their numbers; other separators of Unicode are part of a prompt."""
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _is_json(text: str) -> bool:
    """Whether a file whose name says nothing is JSON: a brace begins no prompt, a bracket may."""
    text = text.lstrip()
    return text.startswith("{") or (text.startswith("[") and isinstance(_parsed(text), list))


def _parsed(text: str) -> Any:
    """Return the content of JSON, or the error."""
    try:
        return parse_json(text, "")
    except UserError as error:
        return error


def _json_rows(text: str, where: str, empty: bool) -> list[dict[str, Any]]:
    whole = _parsed(text)
    if isinstance(whole, list):
        rows = [{"prompt": row} if isinstance(row, str) else row for row in whole]
        return [prompt_row(row, f"{where}, entry {number}", empty=empty) for number, row in enumerate(rows, 1)]
    if isinstance(whole, Exception) and text.lstrip().startswith("["):
        raise UserError(f"{where} is no JSON{whole}")
    if isinstance(whole, dict) and "\n" in text.strip():  # an object over several lines; one line is JSONL
        return [prompt_row(whole, where, empty=empty)]
    return [_json_row(line, f"{where}, line {number}", empty) for number, line in _lines(text)]


def _json_row(line: str, where: str, empty: bool) -> dict[str, Any]:
    row = _parsed(line)
    if isinstance(row, Exception):
        raise UserError(f"{where} is no JSON{row}")
    return prompt_row(row, where, empty=empty)


def _table(text: str, kind: str, where: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place, row) of a table: the columns that a row fills."""
    header = next((line for _, line in _lines(text)), "")
    # Spreadsheets of many countries write semicolons.
    comma = ";" if header.count(";") > header.count(",") else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if kind == ".tsv" else comma, strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            place = f"{where}, line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if not names:
                names = [cell.strip() for cell in cells]
                if "prompt" not in names or len(set(names)) < len(names):
                    known = ", ".join(names)
                    raise UserError(
                        f"{where}: its first line must name the columns, `prompt` once among them, got {known}"
                    )
                continue
            if len(cells) != len(names):
                raise UserError(
                    f"{place} has {len(cells)} values for {len(names)} columns: a text with a separator needs quotes"
                )
            # An empty prompt is for `prompt_row` to judge.
            filled = {name: cell for name, cell in zip(names, cells, strict=True) if cell.strip() or name == "prompt"}
            yield place, {**filled, "prompt": filled["prompt"].strip()}
    except csv.Error as error:
        raise UserError(f"{where}, line {reader.line_num}: {error}") from error
