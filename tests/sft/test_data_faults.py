"""Wrong data on the command line: one line on standard error and exit code 2, before anything is encoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from postgen.cli import main
from tests.sft.media import captioned, picture, video


def _no_captions(folder: Path) -> None:
    for number in range(5):
        video(folder / f"{number}.mp4", seed=number)


def _corrupt(folder: Path) -> None:
    captioned(video(folder / "good.mp4"), "good")
    captioned(video(folder / "cut.mp4", 30), "cut")
    (folder / "cut.mp4").write_bytes((folder / "cut.mp4").read_bytes()[:-3000])
    captioned(picture(folder / "still.png"), "still").write_bytes(b"no picture")


def _short(folder: Path) -> None:
    captioned(video(folder / "short.mp4", 4), "short")


def _fine(folder: Path) -> None:
    captioned(video(folder / "a.mp4"), "a")


CASES: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "missing captions": (
        _no_captions,
        [],
        "5 of 5 files or rows cannot be used: 0.mp4: it has no caption: write 0.txt",
    ),
    "damaged files": (_corrupt, [], "2 of 3 files or rows cannot be used: cut.mp4: "),
    "short videos": (_short, [], "short.mp4: it has 4 frames, the shortest bucket has 9: lower num_frames"),
    "all files are bad": (_short, ["--skip_bad", "true"], "1 of 1 files or rows cannot be used"),
    "empty folder": (lambda folder: folder.mkdir(), [], "holds no image or video"),
    "no folder": (_fine, ["--train_dataset", "./absent"], "train_dataset: there is no file or folder absent"),
    "other length": (_fine, ["--num_frames", "8"], "bucket 32x32x8 does not suit"),
    "no images": (_fine, ["--image_share", "0.5"], "the data set has no images"),
    "cache is a file": (_fine, ["--cache_dir", "recipe.yaml"], "cache_dir recipe.yaml cannot be written"),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_data_is_one_line(
    name: str, tmp_path: Path, tiny_wan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words, message = CASES[name]
    make(tmp_path / "clips")
    (tmp_path / "recipe.yaml").write_text(
        f"method: sft\noutput_dir: run\nmodel: {tiny_wan}\ntrain_dataset: clips\nheight: 32\nwidth: 32\n"
        "num_frames: 9\naspects: []\nmax_steps: 1\ndevice: cpu\nreport_to: []\nlora_r: 2\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["train", "recipe.yaml", *words])
    said = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]
    assert ended.value.code == 2, said
    assert message in said[-1]
    assert len(said) == 1, said
    assert not [*tmp_path.rglob("cache/latents/*/*.safetensors")], "nothing was encoded"
