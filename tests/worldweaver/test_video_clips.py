"""A user's videos: one process encodes each clip, all others read it, and frames are resized while reading."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from postgen.errors import UserError
from postgen.families import denoiser_for
from postgen.training import video_rows
from postgen.training.run_folder import RunLock
from postgen.video import write_video
from postgen.worldweaver.clips import ClipPool
from postgen.worldweaver.embedding import LevelEmbedder
from postgen.worldweaver.model import WorldWeaverModel
from postgen.worldweaver.texts import Texts
from postgen.worldweaver.video_clips import video_pool
from postgen.worldweaver.widen import widen_transformer
from tests.families.test_frame_levels import MAKERS
from tests.worldweaver.training import settings


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    found = []
    for number in range(3):
        source = torch.Generator().manual_seed(number)
        write_video(tmp_path / f"{number}", torch.rand(9, 3, 20, 24, generator=source), fps=8, format="frames")
        save_file({"disparity": torch.rand(9, 8, 8, generator=source)}, tmp_path / f"{number}.safetensors")
        depth = str(tmp_path / f"{number}.safetensors")
        found.append({"prompt": f"clip {number}", "video": str(tmp_path / f"{number}"), "depth": depth})
    return found


@pytest.fixture(scope="module")
def model() -> WorldWeaverModel:
    pipe = MAKERS["Wan"]()
    widen_transformer(pipe)
    return WorldWeaverModel(denoiser_for(pipe), LevelEmbedder.for_transformer(pipe))


def pool(model: WorldWeaverModel, rows: Any, folder: Path | None, **words: Any) -> ClipPool:
    texts = Texts(model.denoiser, torch.device("cpu"))
    place = None if folder is None else str(folder)
    args = settings(num_frames=5, train_dataset="x", pool_dir=place, height=16, width=16)
    return video_pool(args, model, texts, rows, "rows", wrong=True, **words)


def same(one: ClipPool, other: ClipPool) -> bool:
    pairs = [(one.corrupted, other.corrupted), *((one.latents[name], other.latents[name]) for name in one.latents)]
    return all(torch.equal(a, b) for a, b in pairs)  # type: ignore[arg-type]


def test_processes_share_the_work_and_read_the_rest(
    model: WorldWeaverModel, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared clips are bitwise equal to those of a single process, and a second run opens no video."""
    alone, folder = pool(model, rows, None), tmp_path / "pool"
    assert same(pool(model, rows[:1], folder), pool(model, rows[:1], None))
    (first,) = folder.glob("video-rgb-*")
    assert len([*folder.iterdir()]) == 3, "a file for each modality, and no lock is left"
    first.unlink()
    # Another process holds the lock of the first clip.
    lock, found = RunLock(folder, f".{first.stem}.lock", "pool_dir"), list[ClipPool]()
    with lock:
        other = threading.Thread(target=lambda: found.append(pool(model, rows, folder, part=1, parts=2)))
        other.start()
        while len([*folder.glob("video-*.safetensors")]) < 8:
            assert other.is_alive()
            time.sleep(0.02)
        time.sleep(0.2)
        assert other.is_alive()
        assert not first.exists()
    other.join()
    assert first.exists()
    assert same(found[0], alone)
    with monkeypatch.context() as patch:
        patch.setattr(video_rows, "iter_video", None)
        assert same(pool(model, rows, folder, part=0, parts=2), alone)
    # Changed depth creates a new file of depth only, and rows in another order find their files.
    save_file({"disparity": torch.rand(9, 8, 8)}, rows[2]["depth"])
    changed = pool(model, rows[::-1], folder)
    assert torch.equal(changed.latents["rgb"], alone.latents["rgb"].flip(0))
    assert not torch.equal(changed.latents["depth"][0], alone.latents["depth"][2])
    assert len([*folder.iterdir()]) == 10


def test_a_pool_that_cannot_be_is_one_line(model: WorldWeaverModel, rows: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, words, said in (
        (tmp_path / "file", {}, "file cannot be written"),
        (
            tmp_path / "pool",
            {"depth_source": lambda frames: frames.mean(-1)},
            "give depth_model instead, or omit pool_dir",
        ),
    ):
        with pytest.raises(UserError, match=said):
            pool(model, rows, folder, **words)
    missing = [{**rows[0], "video": str(tmp_path / "absent")}]
    with pytest.raises(UserError, match=r"row 0 of rows: .*absent cannot be read: No such file"):
        pool(model, missing, tmp_path / "pool")
    short = [rows[0] | {"depth": None}]
    with pytest.raises(UserError, match="row 0 of rows has no depth"):
        pool(model, short, tmp_path / "pool")
    assert not [*tmp_path.glob("pool/video-*")]


def test_a_large_video_is_sized_as_it_is_read(
    model: WorldWeaverModel, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resizing a video in pieces of a few frames equals resizing it as a whole."""
    whole, read = pool(model, rows, None), video_rows.iter_video
    monkeypatch.setattr(video_rows, "iter_video", lambda path, count: read(path, count=count, chunk=2))
    assert same(pool(model, rows, None), whole)
