"""Files are measured once: again only if they change, and whatever another process has left in the ledger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from postgen.sft import inspection
from postgen.sft.inspection import Inspector, MediaInfo
from postgen.sft.items import Item, Kind
from tests.sft.media import picture, video

KINDS: tuple[Kind, ...] = ("image", "video")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are opened."""
    found: list[str] = []
    inspect: Callable[[tuple[str, str]], MediaInfo | str] = inspection._inspected

    def noted(file: tuple[str, str]) -> MediaInfo | str:
        found.append(Path(file[0]).name)
        return inspect(file)

    monkeypatch.setattr(inspection, "_inspected", noted)
    return found


def test_files_are_measured_once(tmp_path: Path, measured: list[str]) -> None:
    paths = [video(tmp_path / "a.mp4", 9, 32, 48), picture(tmp_path / "b.png", 32, 48), video(tmp_path / "c", 5)]
    kinds = ("video", "image", "video")
    items = [Item(path.name, path, kind, "x") for path, kind in zip(paths, kinds, strict=True)]  # type: ignore[arg-type]
    found = Inspector(tmp_path / "cache").inspect(items)
    told = [(info.height, info.width, info.frames, round(info.fps)) for info in found if isinstance(info, MediaInfo)]
    assert told == [(32, 48, 9, 8), (32, 48, 1, 0), (32, 32, 5, 8)]
    assert measured == ["a.mp4", "b.png", "c"]
    ledger = tmp_path / "cache" / "files.jsonl"
    with ledger.open("ab") as file:
        file.write(b'{"file": "killed in the midd')
    assert Inspector(tmp_path / "cache").inspect(items) == found
    assert len(measured) == 3
    (tmp_path / "c" / "frame_00004.png").unlink(missing_ok=True)
    next(iter(sorted((tmp_path / "c").glob("*.png")))).unlink()
    video(tmp_path / "a.mp4", 9, 32, 48, seed=5)
    again = Inspector(tmp_path / "cache").inspect(items)
    assert measured[3:] == ["a.mp4", "c"]
    assert again[1] == found[1]
    assert again[0] != found[0]
    # A second process takes what the first has noted.
    both = [Inspector(tmp_path / "cache", processes=2, rank=rank) for rank in range(2)]
    assert [each.inspect(items) for each in both] == [again, again]
    assert len(measured) == 5


def test_damaged_files_are_described(tmp_path: Path) -> None:
    cut = video(tmp_path / "cut.mp4", 30)
    cut.write_bytes(cut.read_bytes()[:-2000])
    frames = video(tmp_path / "frames", 5)
    sorted(frames.glob("*.png"))[2].write_bytes(b"no picture")
    text = tmp_path / "text.png"
    text.write_text("no picture")
    paths = [cut, frames, text, tmp_path / "gone.mp4"]
    items = [Item(path.name, path, "image" if path == text else "video", "x") for path in paths]
    found = Inspector(tmp_path / "cache").inspect(items)
    assert all(isinstance(reason, str) and "\n" not in reason for reason in found), found


def test_a_file_may_be_an_image_and_a_video(tmp_path: Path) -> None:
    """In one data set, and in two runs with one cache."""
    video(tmp_path / "a.gif", 12)
    image, clip = (Item("a", tmp_path / "a.gif", kind, "x") for kind in KINDS)
    both = Inspector(tmp_path / "cache").inspect([image, clip])
    assert [info.frames for info in both if isinstance(info, MediaInfo)] == [1, 12]
    for item in (image, clip):
        assert Inspector(tmp_path / "another").inspect([item]) == Inspector(tmp_path / "cache").inspect([item])
