"""Files of long videos after errors: video and state match each other, or neither exists."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from postgen import long_files, probe
from postgen.errors import UserError
from postgen.generate_long import LongRequest, prepare_long
from postgen.locks import FolderLock
from postgen.request import GenerateConfig
from postgen.worldweaver.state import RolloutState
from tests.full_disk import files_of_at_most

SMALL = ["--size", "32x32", "--steps", "3", "--fps", "8"]


@pytest.fixture
def long(cli: Any, tiny_wan: Path, tmp_path: Path) -> Any:
    """Run `postgen generate` on the tiny model in an empty folder: `long("a ball", "--long", "4")`."""

    def call(*words: str | Path, guidance: str = "1") -> Any:
        if "--continue" in words:
            return cli("generate", *words)
        out = ["-o", tmp_path / "a.mp4"]
        return cli("generate", *words, *out, "--model", tiny_wan, *SMALL, "--guidance", guidance)

    return call


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_disk_that_is_full_leaves_nothing_half_written(long: Any, tmp_path: Path) -> None:
    with files_of_at_most(20_000):  # the disk has room for the video, but not for its state
        done = long("a ball", "--long", "4")
    assert done.code == 2
    assert "a.state: File too large" in done.err
    assert "Traceback" not in done.err
    assert names(tmp_path) == []


@pytest.mark.parametrize("chunk", [1, 2])
def test_ctrl_c_before_the_state_is_saved(
    long: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """The chunk that was already written to the video is removed, or the whole video if it was the first chunk."""
    save, saved = RolloutState.save, []

    def stop(state: RolloutState, folder: Path) -> None:
        saved.append(folder)
        if len(saved) == chunk:
            raise KeyboardInterrupt
        save(state, folder)

    with monkeypatch.context() as patch:
        patch.setattr(RolloutState, "save", stop)
        done = long("a ball", "--long", "4")
    assert done.code == 130
    if chunk == 1:
        assert "the first chunk was not finished, and nothing was written" in done.err
        assert names(tmp_path) == []
        return
    assert f"{probe(tmp_path / 'a.mp4').frames} frames" in done.err
    assert long("--continue", tmp_path / "a.state").code == 0
    assert probe(tmp_path / "a.mp4").frames == 33


def test_what_decoders_remember_is_not_saved_where_it_is_much(
    long: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder cache is rebuilt from the last latents: the bytes of the video are those of an uninterrupted run."""
    assert long("a ball", "--long", "4").code == 0
    expected, whole = (tmp_path / "a.mp4").read_bytes(), RolloutState.load(tmp_path / "a.state")
    assert whole.decoder_bytes > 0
    monkeypatch.setattr(long_files, "WHOLE_UP_TO", whole.decoder_bytes - 1)
    save, saved = RolloutState.save, []

    def stop(state: RolloutState, folder: Path) -> None:
        saved.append(state)
        if len(saved) == 3:
            raise KeyboardInterrupt
        save(state, folder)

    with monkeypatch.context() as patch:
        patch.setattr(RolloutState, "save", stop)
        assert long("a ball", "--long", "4").code == 130
    assert not any("cache" in name for name in RolloutState.load(tmp_path / "a.state").extra)
    assert long("--continue", tmp_path / "a.state").code == 0
    assert (tmp_path / "a.mp4").read_bytes() == expected


def test_a_second_process_is_kept_out(long: Any, tmp_path: Path) -> None:
    assert long("a ball", "--long", "1").code == 0
    video = (tmp_path / "a.mp4").read_bytes()
    with FolderLock(tmp_path / "a.state"):
        for words in (["a ball", "--long", "1"], ["--continue", tmp_path / "a.state", "--long", "3"]):
            done = long(*words)
            assert (done.code, "a.state is in use by process" in done.err) == (2, True)
    assert (tmp_path / "a.mp4").read_bytes() == video


def test_a_state_of_an_older_version_is_one_line(long: Any, tmp_path: Path) -> None:
    assert long("a ball", "--long", "1").code == 0
    state = RolloutState.load(tmp_path / "a.state")
    state.extra["written.video"] = state.extra["written.video"][:2]
    state.save(tmp_path / "a.state")
    done = long("--continue", tmp_path / "a.state", "--long", "3")
    assert (done.code, "is of an older version of postgen" in done.err) == (2, True)


def test_an_old_state_does_not_go_on_with_another_video(long: Any, tmp_path: Path) -> None:
    """A process that is killed between the first chunk of a new video and its state leaves the old state."""
    assert long("a ball", "--long", "1").code == 0
    shutil.copytree(tmp_path / "a.state", tmp_path / "old")
    assert long("a ball", "--long", "4", "--seed", "5").code == 0
    shutil.rmtree(tmp_path / "a.state")
    shutil.move(tmp_path / "old", tmp_path / "a.state")
    for more in ([], ["-o", tmp_path / "b.mp4"]):
        done = long("--continue", tmp_path / "a.state", "--long", "3", *more)
        assert (done.code, "its content has changed" in done.err) == (2, True)
    assert probe(tmp_path / "a.mp4").frames == 33


def test_what_the_state_holds_need_not_be_there(long: Any, tmp_path: Path) -> None:
    """The image of the first frame is missing, and the contact sheet too if the process was killed at the end."""
    from PIL import Image

    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "first.png")
    assert long("a ball", "--long", "1", "--image", tmp_path / "first.png").code == 0
    (tmp_path / "first.png").unlink()
    (tmp_path / "a.png").unlink()
    assert long("--continue", tmp_path / "a.state").code == 0
    assert (tmp_path / "a.png").is_file()
    assert "is complete" in long("--continue", tmp_path / "a.state").err
    assert long("--continue", tmp_path / "a.state", "--long", "2").code == 0


def test_a_branch_is_written_when_it_has_something_of_its_own(long: Any, tmp_path: Path) -> None:
    """If a video is complete or cannot become shorter, nothing is copied, and an existing video is not changed."""
    assert long("a ball", "--long", "1").code == 0
    (tmp_path / "b.mp4").write_bytes(b"old")
    for words in ([], ["--long", "0.5"], ["--format", "frames"]):
        out = tmp_path / ("b" if "frames" in words else "b.mp4")
        assert long("--continue", tmp_path / "a.state", "-o", out, *words).code == 2
    assert names(tmp_path) == ["a.mp4", "a.png", "a.state", "b.mp4"]
    assert (tmp_path / "b.mp4").read_bytes() == b"old"
    with files_of_at_most(20_000):
        assert long("--continue", tmp_path / "a.state", "-o", tmp_path / "c.mp4", "--long", "4").code == 2
    assert names(tmp_path) == ["a.mp4", "a.png", "a.state", "b.mp4"]


def test_another_prompt_keeps_what_was_not_to_be_shown(long: Any, tmp_path: Path) -> None:
    assert long("a ball", "--long", "1", "--negative-prompt", "dark", guidance="3").code == 0
    before = RolloutState.load(tmp_path / "a.state").prompts[0][1]
    for words in (["a cube"], ["--guidance", "4"], ["--negative-prompt", "red"]):
        done = long("--continue", tmp_path / "a.state", "-o", tmp_path / "b.mp4", "--long", "3", *words)
        assert done.code == 0, done.err
        told = RolloutState.load(tmp_path / "b.state").prompts[0][1]
        assert torch.equal(told["prompt"], before["prompt"]) == (words != ["a cube"])
        assert torch.equal(told["negative"], before["negative"]) == (words[0] != "--negative-prompt")


def test_two_experts_are_refused_before_their_weights_are_read(tiny_wan: Path, tmp_path: Path) -> None:
    index = json.loads((tiny_wan / "model_index.json").read_text())
    for change in ({"boundary_ratio": 0.9}, {"transformer_2": ["diffusers", "WanTransformer3DModel"]}):
        folder = tmp_path / next(iter(change))
        shutil.copytree(tiny_wan, folder)
        (folder / "model_index.json").write_text(json.dumps(index | change))
        request = LongRequest(
            config=GenerateConfig(prompt="a ball", model=str(folder), width=32, height=32),
            schedule=((0, "a ball"),), seconds=1.0, adapter=None, depth=False,
        )  # fmt: skip
        with pytest.raises(UserError, match="has two experts"):
            prepare_long(request)


def test_an_autoencoder_that_looks_ahead_gives_its_frames_later(cli: Any, tmp_path: Path) -> None:
    """The first chunks of LTX contain no frames."""
    from postgen.worldweaver.adapter import save_adapter
    from postgen.worldweaver.embedding import LevelEmbedder
    from postgen.worldweaver.widen import widen_transformer
    from tests.families.tiny_pipelines import ltx

    pipe = ltx()
    pipe.save_pretrained(tmp_path / "ltx")
    widen_transformer(pipe)
    settings = {"flow_shift": 3.0, "num_inference_steps": 3, "ar_step": 1, "causal_block_size": 1}
    save_adapter(pipe, tmp_path / "adapter", LevelEmbedder.for_transformer(pipe), settings=settings)
    words = ["--model", tmp_path / "ltx", *SMALL, "--guidance", "1", "-o", tmp_path / "a.mp4"]
    done = cli("generate", "a ball", "--long", "4", "--depth", "--adapter", tmp_path / "adapter", *words)
    assert done.code == 0, done.err
    assert probe(tmp_path / "a.mp4").frames == probe(tmp_path / "a-depth.mp4").frames == 33
    assert "give flow_shift, or load an adapter" in cli("generate", "a ball", "--long", "4", *words).err
