"""Read files of prompts, for the command line and for training. Light to import."""

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
"""Suffixes of the supported files."""

_LARGEST = 2**30
"""Largest size of a file of prompts in bytes."""
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
_READ = "Use JSONL, a JSON array, CSV or TSV with a column `prompt`, or a text file with one prompt per line"


def read_prompts(path: str | Path, what: str = "the prompts", *, empty: bool = False) -> list[dict[str, Any]]:
    """Read a file of prompts, and return its rows: dicts with `prompt` and any other keys.

    The suffix determines the format:

    - `.txt`: text with one prompt per line. White space around a prompt is removed.
    - `.jsonl`, `.ndjson`, `.json`: JSONL objects with `prompt`, or a JSON array of objects or of texts.
    - `.csv`, `.tsv`: a table whose header has a column `prompt`. All values are texts; empty values are omitted.
    - any other suffix: JSON if the content begins like JSON, otherwise text.

    The encoding is UTF-8, or UTF-16 with a byte order mark. Only a newline ends a line. Blank lines are ignored.

    Args:
        path: the file.
        what: name of the file in error messages.
        empty: whether a prompt of JSON or of a table may be empty.

    Raises:
        UserError: the file does not exist, has an unsupported format, or contains no prompt; or a row has no prompt.
    """
    found = _placed(Path(path).expanduser(), what, "prompt")
    if not found:
        raise UserError(f"{what} {Path(path).expanduser()}: the file contains no prompt, write at least one")
    return [prompt_row(row, place, empty=empty) for place, row in found]


def read_rows(path: str | Path, what: str) -> list[tuple[str, Any]]:
    """Read a file of rows that need no column `prompt`; the formats are those of `read_prompts`.

    Args:
        path: the file.
        what: name of the file in error messages.

    Returns:
        (place, row) of each row: the place is a text for messages. The rows are not checked.

    Raises:
        UserError: the file does not exist, or has an unsupported format.
    """
    return _placed(Path(path).expanduser(), what, None)


def _placed(path: Path, what: str, needed: str | None) -> list[tuple[str, Any]]:
    """Return (place, row) of each row of a file; a table must have the column `needed`."""
    where = f"{what} {path}"
    kind = path.suffix.lower()
    if kind in _OTHER_KINDS:
        raise UserError(f"{where}: {kind} is {_OTHER_KINDS[kind]}, which is not supported. {_READ}")
    text = _text(path, where)
    if kind in (".csv", ".tsv"):
        return list(_table(text, kind, where, needed))
    if kind in (".jsonl", ".ndjson", ".json") or (kind != ".txt" and _is_json(text)):
        return _json_rows(text, where)
    return [(f"{where}, line {number}", {"prompt": line}) for number, line in _lines(text)]


def prompt_row(row: Any, where: str, *, empty: bool = True) -> dict[str, Any]:
    """Return a row whose prompt is a text. If the prompt is a conversation, the result has its last user message.

    Args:
        row: an object with `prompt` and any other keys.
        where: name of the row in error messages.
        empty: whether the prompt may be empty.

    Raises:
        UserError: the row has no prompt.

    >>> prompt_row({"prompt": [{"role": "user", "content": "a ball"}], "id": 3}, "row 0")
    {'prompt': 'a ball', 'id': 3}
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is {shown(row)}, it must be an object with a key 'prompt'")
    if "prompt" not in row:
        known = ", ".join(map(str, row)) or "nothing"
        raise UserError(f"{where} has no column 'prompt', it has {known}: add the column")
    prompt = row["prompt"]
    if isinstance(prompt, list):
        messages = [turn.get("content") for turn in prompt if isinstance(turn, Mapping) and turn.get("role") == "user"]
        prompt = messages[-1] if messages else None
    if not isinstance(prompt, str):
        raise UserError(f"{where}: the prompt is {shown(row['prompt'])}, it must be a text")
    if not empty and not prompt.strip():
        raise UserError(f"{where}: the prompt is empty, say what the video shows")
    check_text(f"{where}: the prompt", prompt)
    return {**row, "prompt": prompt}


def _text(path: Path, where: str) -> str:
    data = read_bytes(path, f"{where} cannot be read", most=_LARGEST)
    for magic, name in _MAGIC.items():
        if data.startswith(magic):
            raise UserError(f"{where}: this is a file of type {name}, which is not supported. {_READ}")
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} cannot be read: it is not UTF-8 text ({error.reason}, byte {error.start})"
        ) from error
    if "\0" in text:
        raise UserError(f"{where}: this is not text, because it contains null characters. {_READ}")
    return text


def _lines(text: str) -> list[tuple[int, str]]:
    """Return the lines that are not blank, with their numbers. Other line separators of Unicode do not end a line."""
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _is_json(text: str) -> bool:
    """Return whether a text without a known suffix is JSON.

    A text that begins with a brace is JSON. A text that begins with a bracket may also be a prompt, so it is parsed.
    """
    text = text.lstrip()
    return text.startswith("{") or (text.startswith("[") and isinstance(_parsed(text), list))


def _parsed(text: str) -> Any:
    """Return the value of a JSON text, or the error, whose message begins with a colon."""
    try:
        return parse_json(text, "")
    except UserError as error:
        return error


def _json_rows(text: str, where: str) -> list[tuple[str, Any]]:
    whole = _parsed(text)
    if isinstance(whole, list):
        rows = [{"prompt": row} if isinstance(row, str) else row for row in whole]
        return [(f"{where}, entry {number}", row) for number, row in enumerate(rows, 1)]
    if isinstance(whole, Exception) and text.lstrip().startswith("["):
        raise UserError(f"{where}{whole}")
    if isinstance(whole, dict) and "\n" in text.strip():  # an object over several lines; one line is JSONL, as below
        return [(where, whole)]
    return [(place := f"{where}, line {number}", _json_row(line, place)) for number, line in _lines(text)]


def _json_row(line: str, where: str) -> Any:
    row = _parsed(line)
    if isinstance(row, Exception):
        raise UserError(f"{where}{row}")
    return row


def _table(text: str, kind: str, where: str, needed: str | None) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place, row) for each row of a table; a row contains the columns that are not empty.

    A table has the column `needed`, if there is one; its texts stay even if they are empty, and are stripped.
    """
    header = next((line for _, line in _lines(text)), "")
    # In many countries, spreadsheets separate the columns of CSV by semicolons.
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
                if len(set(names)) < len(names) or (needed and needed not in names):
                    known, one = ", ".join(names), f" and one of them `{needed}`" if needed else ""
                    raise UserError(f"{where}: the first line must name the columns, all different{one}, got {known}")
                continue
            if len(cells) != len(names):
                raise UserError(
                    f"{place} has {len(cells)} values for {len(names)} columns: put quotes around a text that contains"
                    " a separator"
                )
            # An empty prompt stays in the row, because `prompt_row` checks it.
            filled = {name: cell for name, cell in zip(names, cells, strict=True) if cell.strip() or name == needed}
            yield place, {**filled, needed: filled[needed].strip()} if needed else filled
    except csv.Error as error:
        raise UserError(f"{where}, line {reader.line_num}: {error}") from error
