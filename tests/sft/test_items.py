"""Sources of clips with captions, and what is said about files that cannot be used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from postgen.errors import UserError
from postgen.sft.faults import Fault
from postgen.sft.items import read_items
from tests.sft.media import captioned, picture, video


def told(source: Any, **words: Any) -> list[tuple[str, str, str]]:
    return [(item.key, item.kind, item.caption) for item in read_items(source, **words)]


def empty(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_folder_with_captions_beside_the_files(tmp_path: Path) -> None:
    captioned(empty(tmp_path / "b.mp4"), "a ball\n")
    captioned(empty(tmp_path / "a.PNG"), "a cube")
    captioned(empty(tmp_path / "more" / "c.webm"), "two balls")
    captioned(empty(tmp_path / "more" / "d.OGV"), "a puck")
    empty(tmp_path / ".hidden.mp4")
    (tmp_path / "notes.txt").write_text("not a caption")
    assert (
        told(tmp_path)
        == told(tmp_path, caption_column="title")
        == [
            ("a.PNG", "image", "a cube"),
            ("b.mp4", "video", "a ball"),
            ("more/c.webm", "video", "two balls"),
            ("more/d.OGV", "video", "a puck"),
        ]
    )


def test_links(tmp_path: Path) -> None:
    """A folder that links lead to again is read once, under its own name; a file may be a link."""
    captioned(empty(tmp_path / "clips" / "b" / "c.mp4"), "a ball")
    captioned(empty(tmp_path / "stored"), "a cube")
    (tmp_path / "clips" / "d.mp4").symlink_to(tmp_path / "stored")
    (tmp_path / "clips" / "d.txt").symlink_to(tmp_path / "stored.txt")
    for name, target in (("a", "b"), ("also", "b"), ("loop", "."), ("b/up", "..")):
        (tmp_path / "clips" / name).symlink_to(target)
    assert told(tmp_path / "clips") == [("d.mp4", "video", "a cube"), ("b/c.mp4", "video", "a ball")]


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(captioned(tmp_path / "a.mp4", "a ball"))
    with pytest.raises(UserError, match=r"a\.mp4: it is not a file"):
        read_items(tmp_path)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_folder_with_metadata_as_datasets_reads_it(tmp_path: Path, name: str) -> None:
    for place in ("a.mp4", "sub/a.png"):
        empty(tmp_path / place)
    rows = [{"file_name": "a.mp4", "text": "a, ball", "weight": 2}, {"file_name": "sub/a.png", "text": "a cube"}]
    lines = [json.dumps(row) for row in rows]
    if name.endswith("csv"):
        lines = ["file_name,text,weight", 'a.mp4,"a, ball",2', "sub/a.png,a cube,"]
    (tmp_path / name).write_text("\n".join(lines))
    items = read_items(tmp_path)
    assert [(item.key, item.caption) for item in items] == [("a.mp4", "a, ball"), ("sub/a.png", "a cube")]
    assert str(items[0].row["weight"]) == "2"


def test_rows_of_a_file_name_their_clips_relative_to_it(tmp_path: Path) -> None:
    empty(tmp_path / "in" / "a.mp4")
    empty(tmp_path / "in" / "b.png")
    (tmp_path / "frames").mkdir()
    file = tmp_path / "rows.jsonl"
    rows = [
        {"video": "in/a.mp4", "prompt": "a ball", "caption": "other"},
        {"image": "in/b.png", "caption": "a cube"},
        {"video": str(tmp_path / "frames"), "text": "frames"},
        {"video": "in/a.mp4", "prompt": "the same with another caption"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert told(file) == [
        ("in/a.mp4", "video", "a ball"),
        ("in/b.png", "image", "a cube"),
        (str(tmp_path / "frames"), "video", "frames"),
        ("in/a.mp4@2", "video", "the same with another caption"),
    ]
    assert told(rows[2:3]) == [(str(tmp_path / "frames"), "video", "frames")]
    with pytest.raises(UserError, match=r"2 of 4 .*no caption: add a column caption"):
        read_items(file, caption_column="caption")


def test_faults_are_told_together(tmp_path: Path) -> None:
    """One line has the count and the first files; with a list, reading continues without them."""
    empty(tmp_path / "a.mp4")
    captioned(empty(tmp_path / "b.mp4"), " \n")
    captioned(empty(tmp_path / "c.mp4"), "a ball")
    empty(tmp_path / "c.png")
    captioned(empty(tmp_path / "d.mp4"), "fine")
    with pytest.raises(UserError) as error:
        read_items(tmp_path)
    said = str(error.value)
    assert "\n" not in said
    assert said.startswith("train_dataset: 4 of 5 files or rows cannot be used: a.mp4: it has no caption: write a.txt")
    assert "b.txt is empty" in said
    assert "c.mp4 and c.png have the same name" in said
    assert "and 1 more" in said
    assert "skip_bad: true" in said
    faults: list[Fault] = []
    assert [item.key for item in read_items(tmp_path, faults=faults)] == ["d.mp4"]
    assert [fault.key for fault in faults] == ["a.mp4", "b.mp4", "c.mp4", "c.png"]


def _rows(*rows: Any) -> Any:
    def write(folder: Path) -> Path:
        empty(folder / "a.mp4")
        file = folder / "rows.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        return file

    return write


def _folder(**files: str) -> Any:
    def write(folder: Path) -> Path:
        for name, text in files.items():
            (folder / name.replace("_", ".")).write_text(text)
        return folder

    return write


BAD: dict[str, tuple[Any, str]] = {
    "empty folder": (_folder(), "holds no image or video"),
    "only captions": (_folder(a_txt="x"), "holds no image or video"),
    "no file": (lambda folder: folder / "absent.jsonl", "cannot be read: No such file"),
    "one clip": (lambda folder: video(folder / "a.mp4"), "is one file: give its folder"),
    "empty rows": (_rows(), "holds no image or video"),
    "no clip column": (_rows({"prompt": "x"}), "no column video, image or file_name"),
    "no caption": (_rows({"video": "a.mp4"}), "no caption: add a column prompt or caption or text"),
    "caption is a number": (_rows({"video": "a.mp4", "prompt": 3}), "its prompt is 3, it must be a text"),
    "caption is empty": (_rows({"video": "a.mp4", "prompt": " "}), "its prompt is empty"),
    "clip is missing": (_rows({"video": "b.mp4", "prompt": "x"}), "there is no such file"),
    "clip has a very long name": (_rows({"video": "b" * 5000, "prompt": "x"}), "there is no such file"),
    "clip is a number": (_rows({"video": 5, "prompt": "x"}), "video is 5, it must be the path"),
    "unknown suffix": (_rows({"file_name": "rows.jsonl", "prompt": "x"}), "not the suffix of an image or a video"),
    "listed twice": (_rows(*[{"video": "a.mp4", "prompt": "x"}] * 2), "listed twice with the same caption"),
    "listed under two names": (
        _rows({"video": "a.mp4", "prompt": "x"}, {"video": "./a.mp4", "prompt": "x"}),
        "1 of 2 files or rows .* listed twice",
    ),
    "not an object": (_rows(3), "it must be an object"),
    "not JSON": (_folder(rows_jsonl="{"), "holds no image or video"),
    "metadata without file_name": (_folder(a_mp4="", metadata_jsonl='{"text": "x"}'), "file_name is None"),
    "metadata of a missing file": (
        _folder(metadata_csv="file_name,text\nb.mp4,x\n"),
        r"metadata.csv, line 2: there is no file b.mp4",
    ),
    "metadata twice": (_folder(metadata_csv="a,b\n", metadata_jsonl=""), "metadata.jsonl and metadata.csv: keep one"),
    "metadata lists a file twice": (
        _folder(a_mp4="", metadata_csv="file_name,text\na.mp4,x\na.mp4,y\n"),
        "a.mp4 is listed twice",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sources(tmp_path: Path, name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(UserError, match=message) as error:
        read_items(make(tmp_path))
    assert "\n" not in str(error.value)


def test_broken_json_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"video": "a.mp4", "prompt": "x"}\n{"video"\n')
    with pytest.raises(UserError, match="line 2"):
        read_items(tmp_path / "rows.jsonl")


def test_datasets_objects_and_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = tmp_path / "files"
    image = Image.open(picture(tmp_path / "a.png")).copy()
    rows = datasets.Dataset.from_dict({"image": [image, image], "text": ["a cube", "a ball"]}).cast_column(
        "image", datasets.Image()
    )
    items = read_items(rows, files=files)
    assert [(item.kind, item.caption) for item in items] == [("image", "a cube"), ("image", "a ball")]
    assert items[0].path == items[1].path, "equal contents share a file"
    assert items[0].key == items[0].path.name, "the key does not depend on the folder"
    assert list(Image.open(items[0].path).getdata()) == list(image.getdata())
    rows.save_to_disk(str(tmp_path / "saved"))
    assert len(read_items(tmp_path / "saved", files=files)) == 2
    (tmp_path / "tables").mkdir()
    rows.to_parquet(str(tmp_path / "tables" / "train.parquet"))
    assert len(read_items(tmp_path / "tables", files=files)) == 2
    assert len(read_items(datasets.DatasetDict(train=rows), files=files)) == 2
    with pytest.raises(UserError, match="without files: give a folder"):
        read_items(rows)
    with pytest.raises(UserError, match="has the splits test: give one"):
        read_items(datasets.DatasetDict(test=rows), files=files)
    paths = datasets.Dataset.from_dict({"video": [str(video(tmp_path / "b.mp4"))], "prompt": ["x"]})
    assert read_items(paths)[0].path == tmp_path / "b.mp4"
