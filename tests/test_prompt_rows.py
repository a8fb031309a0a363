"""Files of prompts: supported formats, and formats that are refused."""

from pathlib import Path

import pytest

from postgen import UserError
from postgen.commands.generate import _file_name
from postgen.prompt_rows import read_prompts
from postgen.reading import read_text
from postgen.training.prompts import made_rows

MARK = b"\xef\xbb\xbf"
RED, BLUE = {"prompt": "a red ball"}, {"prompt": "a blue cube"}


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("p.txt", MARK + b"a red ball\r\n\r\na blue cube\n", [RED, BLUE]),
        ("p.txt", "\ufeffa red ball\na blue cube".encode("utf-16-le"), [RED, BLUE]),
        ("p.txt", "a\u2028b\u0085c\x0cd".encode(), [{"prompt": "a\u2028b\u0085c\x0cd"}]),
        ("p.txt", b'prompt\n["a"]', [{"prompt": "prompt"}, {"prompt": '["a"]'}]),
        ("p.jsonl", MARK + b'{"prompt": "a red ball"}\n{"prompt": "a blue cube"}', [RED, BLUE]),
        ("p.jsonl", '{"prompt": "a\u2028b", "id": 1}\r\n'.encode(), [{"prompt": "a\u2028b", "id": 1}]),
        ("p.ndjson", b'{"prompt": "a red ball"}', [RED]),
        ("p.json", b'[\n  {"prompt": "a red ball", "seed": 3},\n  "a blue cube"\n]', [{**RED, "seed": 3}, BLUE]),
        ("p.json", b'{\n  "prompt": "a red ball"\n}', [RED]),
        ("p.list", b'["a red ball", "a blue cube"]', [RED, BLUE]),
        ("p.list", b"[cinematic] a ball\na blue cube", [{"prompt": "[cinematic] a ball"}, BLUE]),
        ("p.csv", MARK + b"prompt\na red ball\n\na blue cube\n", [RED, BLUE]),
        ("p.csv", b'file,prompt\r\na.mp4,"a ball, red\nand ""big"""\r\n,a blue cube\r\n',
         [{"file": "a.mp4", "prompt": 'a ball, red\nand "big"'}, BLUE]),
        ("p.csv", b"prompt;file\na ball, red;a.mp4\n", [{"prompt": "a ball, red", "file": "a.mp4"}]),
        ("p.tsv", b"prompt\tfile\na red ball, big\ta.mp4\n", [{"prompt": "a red ball, big", "file": "a.mp4"}]),
    ],
)  # fmt: skip
def test_what_is_read(tmp_path: Path, name: str, content: bytes, rows: list[dict[str, object]]) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.parquet", b"PAR1", r"\.parquet is a table of columns, which is not supported. Use JSONL"),
        ("p.xlsx", b"PK\x03\x04", r"\.xlsx is a spreadsheet"),
        ("p.yaml", b"- a ball", r"\.yaml is a document"),
        ("p.txt", b"PAR1\x15\x04", "of type Parquet, which is not supported"),
        ("p", b"\x1f\x8b\x08", "of type gzip"),
        ("p.txt", b"a\x00b", "it contains null characters"),
        ("p.txt", "gr\u00f6\u00dfer".encode("latin-1"), r"it is not UTF-8 text \(invalid start byte, byte 2\)"),
        (
            "p.csv",
            b"a red ball\na blue cube\n",
            "must name the columns, all different and one of them `prompt`, got a red ball",
        ),
        ("p.csv", b"prompt,prompt\na,b\n", "all different and one of them `prompt`, got prompt, prompt"),
        ("p.csv", b"prompt\na ball, red\n", "line 2 has 2 values for 1 columns: put quotes around a text"),
        ("p.csv", b'prompt\n"a ball\n', "line 2: unexpected end of data"),
        ("p.csv", b"prompt,file\n,a.mp4\n", "line 2: the prompt is empty"),
        ("p.csv", b"prompt\n", "the file contains no prompt"),
        ("p.json", b'[{"prompt": "a"}, 3]', "entry 2 is 3, it must be an object with a key 'prompt'"),
        ("p.json", b'[{"prompt": "a"}', "it is not valid JSON"),
        ("p.json", b"[" * 100_000, "nested too deeply"),
        ("p.json", b'{"prompts": ["a"]}', "has no column 'prompt', it has prompts"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt"', "line 3: it is not valid JSON"),
    ],
)
def test_what_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        read_prompts(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_training_reads_the_same_files(tmp_path: Path) -> None:
    from postgen.training.prompts import Prompts

    path = tmp_path / "p.csv"
    path.write_bytes(MARK + b"prompt,negative_prompt\na red ball,ugly\na blue cube,\n")
    rows = Prompts(str(path), "train_dataset", seed=0, shuffle=False).rows
    assert rows == [{**RED, "negative_prompt": "ugly"}, {**BLUE, "negative_prompt": None}]
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"train_dataset .*p\.parquet: \.parquet is a table of columns"):
        Prompts(str(tmp_path / "p.parquet"), "train_dataset", seed=0, shuffle=False)


def test_file_names_tell_prompts_apart() -> None:
    assert _file_name("A red ball, rolls left!") == "a-red-ball-rolls-left"
    assert _file_name("\u4e00\u53ea\u732b") == "\u4e00\u53ea\u732b"
    assert (
        _file_name("\u039a\u03cc\u03ba\u03ba\u03b9\u03bd\u03b7 \u03bc\u03c0\u03ac\u03bb\u03b1")
        == "\u03ba\u03cc\u03ba\u03ba\u03b9\u03bd\u03b7-\u03bc\u03c0\u03ac\u03bb\u03b1"
    )
    prompts = [
        "\u4e00\u53ea\u732b",
        "\u4e00\u6761\u72d7",
        "\U0001f642",
        "\U0001f643",
        "a" * 70,
        "a" * 71,
        "\u732b" * 70,
        "\u732b" * 71,
        "\u0915\u093f",
        "\u0915\u093e",
    ]
    names = [_file_name(prompt) for prompt in prompts]
    assert len(set(names)) == len(prompts)
    # The name of the temporary file is about twenty bytes longer.
    assert max(len(name.encode()) for name in names) < 200


def test_the_file_that_may_have_been_meant(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    for name in ("recipes/dancegrpo.yaml", "prompts.txt", ".prompts.txt"):
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    for given, meant in {
        "promts.txt": "prompts.txt",
        "prompts": "prompts.txt",
        "dancegrpo": "recipes/dancegrpo.yaml",
        "DanceGRPO.yaml": "recipes/dancegrpo.yaml",
        "recipes/dancgrpo.yaml": "recipes/dancegrpo.yaml",
    }.items():
        with pytest.raises(UserError, match=rf"No such file or directory. Did you mean '{meant}'\?$"):
            read_text(given, "it cannot be read")
    for given in ("prompts.json", "quite-another.txt", "absent/prompts.txt"):
        with pytest.raises(UserError, match=r"No such file or directory$"):
            read_text(given, "it cannot be read")


def test_a_data_set_that_is_neither_a_file_nor_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped folder is taken as the id of a data set; the message says that there is no such folder."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="train_dataset elsewhere cannot be loaded: there is no such file or folder"):
        made_rows("elsewhere", "train_dataset")
