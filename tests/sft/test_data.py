"""Training data as a whole: faults, what is held out, image-to-video models, image models, resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from postgen.errors import UserError
from postgen.families import Denoiser, denoiser_for
from postgen.sft.buckets import Bucket
from postgen.sft.clips import read_clip
from postgen.sft.data_config import SftDataConfig
from tests.families.tiny_pipelines import tiny_pipeline
from tests.sft.media import built, captioned, folder_of_clips, picture, settings, tiny, video


@pytest.fixture(scope="module")
def model() -> tuple[Any, Denoiser]:
    return tiny()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_clips(tmp_path_factory.mktemp("clips"))


def test_batches_have_latents_captions_and_one_bucket(tmp_path: Path, model: Any, clips: Path) -> None:
    data = built(model, settings(clips), tmp_path, seed=3)
    seen = set()
    for step in range(12):
        batch = data.batch(step)
        still = batch.bucket.num_frames == 1
        assert tuple(batch.latents.shape) == (2, 4, 1 if still else 3, 4, 4)
        assert batch.captions == [
            key.partition(".")[0].replace("clip", "clip ").replace("picture", "picture ") for key in batch.keys
        ]
        assert {key.startswith("picture") for key in batch.keys} == {still}
        assert batch.conditions["prompt"].shape == (2, 512, 16)
        seen.update(batch.keys)
    assert len(seen) == 6
    assert data.empty["prompt"].shape == (1, 512, 16)
    assert data.eval_count == 0


def test_a_batch_depends_on_seed_and_position_only(tmp_path: Path, model: Any, clips: Path) -> None:
    one = built(model, settings(clips), tmp_path, seed=3, accumulation=2)
    again = built(model, settings(clips), tmp_path, seed=3, processes=2, rank=1, main=False)
    assert one.inputs() == again.inputs()
    for step in (7, 0, 31):
        a, b = one.batch(step, 1), again.batch(step)
        assert a.keys == b.keys
        assert torch.equal(a.latents, b.latents)
    other = built(model, settings(clips), tmp_path, seed=4)
    assert any(one.batch(step).keys != other.batch(2 * step).keys for step in range(6))


def test_all_faults_are_told_before_anything_is_encoded(tmp_path: Path, model: Any) -> None:
    source = tmp_path / "clips"
    for number, frames in enumerate((9, 9, 4)):
        captioned(video(source / f"{number}.mp4", frames, seed=number), f"clip {number}")
    captioned(video(source / "cut.mp4", 30), "damaged")
    (source / "cut.mp4").write_bytes((source / "cut.mp4").read_bytes()[:-3000])
    captioned(source / "text.mp4", "not a video").write_text("hello")
    captioned(source / "text.png", "").write_text("hello")
    video(source / "silent.mp4")
    with pytest.raises(UserError) as error:
        built(model, settings(source), tmp_path / "run")
    said = str(error.value)
    assert "\n" not in said
    assert said.startswith("train_dataset: 5 of 7 files or rows cannot be used: ")
    assert not [*(tmp_path / "run").rglob("*.safetensors")], "nothing was encoded"
    data = built(model, settings(source, skip_bad=True), tmp_path / "run")
    assert {clip.key for clip in data.clips} == {"0.mp4", "1.mp4"}
    rows = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    reasons = {row["key"]: row["reason"] for row in rows}
    assert sorted(reasons) == ["2.mp4", "cut.mp4", "silent.mp4", "text.mp4", "text.png"]
    assert "it has 4 frames, the shortest bucket has 9" in reasons["2.mp4"]
    assert "no caption" in reasons["silent.mp4"]
    assert "same name" in reasons["text.png"]
    for name in ("cut.mp4", "silent.mp4", "text.mp4", "text.png", "2.mp4"):
        (source / name).unlink()
    built(model, settings(source, skip_bad=True), tmp_path / "run")
    assert not (tmp_path / "run" / "skipped.jsonl").exists()
    for name in ("0.mp4", "1.mp4"):
        (source / name).write_text("hello")
    with pytest.raises(UserError, match="2 of 2 files"):
        built(model, settings(source, skip_bad=True), tmp_path / "run")


def test_held_out_files_depend_on_their_keys(tmp_path: Path, model: Any, clips: Path) -> None:
    data = built(model, settings(clips, eval_share=0.4), tmp_path)
    held = {clip.key for clip in data.held_out}
    assert held
    assert held.isdisjoint(clip.key for clip in data.clips)
    assert len(data.held_out) + len(data.clips) == 6
    batches = [data.eval_batch(number) for number in range(data.eval_count)]
    assert sorted(key for batch in batches for key in batch.keys) == sorted(held)
    assert torch.equal(data.eval_batch(0).latents, data.eval_batch(0).latents)
    # A further file does not move the others to the other side, and a copy of a file stays on its side.
    more = shutil.copytree(clips, tmp_path / "more")
    captioned(video(more / "later.mp4", seed=50), "later")
    for name in sorted(held)[:1]:
        shutil.copy(more / name, more / f"zcopy.{name.partition('.')[2]}")
        captioned(more / "zcopy.mp4", "a copy")
    again = built(model, settings(more, eval_share=0.4), tmp_path)
    assert held <= {clip.key for clip in again.held_out}
    assert {"zcopy"} == {clip.key.partition(".")[0] for clip in again.held_out if clip.key not in held} - {"later"}


def test_shots_of_one_video_are_on_the_same_side(tmp_path: Path, model: Any, clips: Path) -> None:
    """The rows are those of `postgen curate`."""
    rows = [
        {"video": str(clips / f"clip{n}.mp4"), "prompt": f"{n}", "source": f"film{n % 2}", "first_frame": 9 * n}
        for n in range(4)
    ]
    data = built(model, settings(None, eval_share=0.01), tmp_path, train=rows)
    assert {clip.item.row["source"] for clip in data.held_out}.isdisjoint(c.item.row["source"] for c in data.clips)
    assert len(data.held_out) == 2
    with pytest.raises(UserError, match="at least two different files"):
        built(model, settings(None, eval_share=0.5), tmp_path, train=rows[::2])


def test_eval_dataset(tmp_path: Path, model: Any, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    captioned(video(other / "a.mp4", seed=77), "held out")
    data = built(model, settings(clips, eval_dataset=str(other)), tmp_path / "run")
    assert [data.eval_batch(n).keys for n in range(data.eval_count)] == [["a.mp4"]]
    assert "warning" not in capsys.readouterr().err
    built(model, settings(clips, eval_dataset=str(clips)), tmp_path / "run")
    assert "6 clips of eval_dataset are also in train_dataset" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"eval_share is 0\.1, it must be 0 with eval_dataset"):
        settings(clips, eval_dataset="x", eval_share=0.1)


def test_weights_and_repeats_of_rows(tmp_path: Path, model: Any, clips: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"video": str(clips / f"clip{number}.mp4"), "prompt": f"{number}", "weight": [1, 0, "2", 0.5][number]}
        for number in range(4)
    ]
    data = built(model, settings(None, weight_column="weight"), tmp_path, train=rows, batch_size=1)
    counts = [sum(data.batch(step).captions == [str(n)] for step in range(35)) for n in range(4)]
    same_names = tmp_path / "others"
    captioned(video(same_names / "clip0.mp4", seed=9), "held out")
    more = {"weight_column": "weight", "eval_dataset": str(same_names)}
    with_others = built(model, settings(None, **more), tmp_path, train=rows, batch_size=1)
    assert [with_others.batch(step).keys for step in range(9)] == [data.batch(step).keys for step in range(9)]
    assert counts[1] == 0
    assert all(abs(found - wanted) <= 1 for found, wanted in zip(counts, (10, 0, 20, 5), strict=True)), counts
    for row, repeats in zip(rows, (1, 1, 3, 1), strict=True):
        row["repeats"] = repeats
    data = built(model, settings(None, repeats_column="repeats"), tmp_path, train=rows, batch_size=1)
    assert sum(data.batch(step).captions == ["2"] for step in range(24)) == 12
    given = torch.tensor([0.0, 0.0, 0.0, 1.0])
    data = built(model, settings(None), tmp_path, train=rows, weights=given)
    assert data.batch(0).captions == ["3", "3"]
    with pytest.raises(UserError, match="weights has 2 values for 4 rows"):
        built(model, settings(None), tmp_path, train=rows, weights=torch.ones(2))
    rows[1]["weight"] = -1
    with pytest.raises(UserError, match=r"1 of 4 .*its weight is -1, it must be a number of at least 0"):
        built(model, settings(None, weight_column="weight"), tmp_path, train=rows)
    del rows[1]["weight"]
    with pytest.raises(UserError, match=r"1 of 4 .*it has no column weight, which weight_column names"):
        built(model, settings(None, weight_column="weight"), tmp_path, train=rows)
    rows[1]["repeats"] = 0.5
    with pytest.raises(UserError, match=r"its repeats is 0.5, it must be a whole number"):
        built(model, settings(None, repeats_column="repeats"), tmp_path, train=rows)


def test_sizes_of_files_choose_buckets_and_long_videos_are_cut(tmp_path: Path, model: Any) -> None:
    source = tmp_path / "clips"
    captioned(video(source / "wide.mp4", 23, 32, 64, seed=1), "wide")
    captioned(video(source / "tall.mp4", 9, 64, 32, seed=2), "tall")
    captioned(picture(source / "still.png", 40, 90), "still")
    config = settings(
        source, width=48, aspects=["2:1", "1:2", "1:1"], frame_selection="chunks", frame_buckets=[5], image_share=0.5
    )
    data = built(model, config, tmp_path / "run", batch_size=1)
    found = {clip.key: clip.bucket for clip in data.clips}
    assert [clip.frames[0] for clip in data.clips if clip.item.key == "wide.mp4"] == [0, 9, 18]
    assert [clip.bucket.num_frames for clip in data.clips if clip.item.key == "wide.mp4"] == [9, 9, 5]
    assert found["wide.mp4"].width > found["wide.mp4"].height
    assert found["tall.mp4"].width < found["tall.mp4"].height
    assert found["still.png"].num_frames == 1
    assert sum(data.batch(step).bucket.num_frames == 1 for step in range(40)) == pytest.approx(20, abs=2)
    given = built(model, settings(source, buckets=["32x64x9", "64x32x5"]), tmp_path / "run", batch_size=1)
    assert {clip.key: clip.bucket for clip in given.clips} == {
        "wide.mp4": Bucket(32, 64, 9),
        "tall.mp4": Bucket(64, 32, 5),
        "still.png": Bucket(32, 64, 1),
    }


def test_first_frames_of_image_to_video_models(tmp_path: Path, clips: Path) -> None:
    model = tiny("WanImageToVideoPipeline")
    data = built(model, settings(clips, image_share=0.0), tmp_path)
    batch = data.batch(0)
    rows = {clip.key: clip for clip in data.clips}
    first = torch.stack([read_clip(rows[key])[0] for key in batch.keys])
    with torch.no_grad():
        expected = model[1].encode_image(first, 9)
    assert set(batch.conditions) == {"prompt", "image_latents"}
    assert torch.allclose(batch.conditions["image_latents"], expected["image_latents"], atol=1e-5)
    sigma = torch.full((2,), 0.5)
    assert model[1].predict(batch.latents, sigma, batch.conditions).shape == batch.latents.shape


@pytest.mark.parametrize("name", ["Stable Diffusion", "CogVideoX"])
def test_other_families(tmp_path: Path, clips: Path, name: str) -> None:
    pipe, size = tiny_pipeline(name)
    denoiser = denoiser_for(pipe)
    stills = [{"image": str(clips / f"picture{n}.png"), "prompt": f"{n}"} for n in range(2)]
    videos = [{"video": str(clips / f"clip{n}.mp4"), "prompt": f"{n}"} for n in range(2)]
    rows = stills if denoiser.frame_axis is None else videos
    data = built((pipe, denoiser), settings(None, **{**size, "width": 16}), tmp_path, train=rows)
    batch = data.batch(0)
    assert batch.latents.shape[1:] == denoiser.latent_shape(size["num_frames"], 16, 16)
    assert denoiser.predict(batch.latents, torch.full((2,), 0.5), batch.conditions).shape == batch.latents.shape
    if denoiser.frame_axis is None:
        with pytest.raises(UserError, match="it is a video, but all buckets have one frame"):
            built((pipe, denoiser), settings(None, **{**size, "width": 16}), tmp_path, train=videos)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eval_share": 1.0}, "eval_share is 1.0, it must be at least 0 and below 1"),
        ({"image_share": 1.5}, "image_share is 1.5"),
        ({"height": 0}, "height is 0"),
        ({"frame_buckets": [0]}, "frame_buckets"),
        ({"target_fps": 0.0}, "target_fps is 0.0, it must be above 0"),
        ({"buckets": ["1x1"]}, "HEIGHTxWIDTHxFRAMES"),
        ({"aspects": ["wide"]}, "WIDTH:HEIGHT"),
        ({"frame_selection": "last"}, "Allowed: first, uniform, chunks"),
        ({"cache_dir": ""}, "cache_dir"),
        ({"buckets": ["32x32x9"], "frame_buckets": [5]}, "it must be left out with buckets"),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SftDataConfig(**values)


def test_bad_runs(tmp_path: Path, model: Any, clips: Path) -> None:
    with pytest.raises(UserError, match="train_dataset is missing"):
        built(model, settings(None), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image or video"):
        built(model, settings(tmp_path / "empty"), tmp_path)
    one = [{"video": str(clips / "clip0.mp4"), "prompt": "x"}]
    with pytest.raises(UserError, match="at least two different files"):
        built(model, settings(None, eval_share=0.5), tmp_path, train=one)
    with pytest.raises(UserError, match="has no images"):
        built(model, settings(None, image_share=0.5), tmp_path, train=one)
    with pytest.raises(UserError, match="repeats_column: no row has a column 'repeat'"):
        built(model, settings(None, repeats_column="repeat"), tmp_path, train=one)
    with pytest.raises(UserError, match="caption_column 'title': all captions are text files"):
        built(model, settings(clips, caption_column="title"), tmp_path)
