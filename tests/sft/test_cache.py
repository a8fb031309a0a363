"""The cache of clips and captions: what makes it new, kills, damage, several processes."""

from __future__ import annotations

import os
import re
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from postgen.errors import UserError
from postgen.families import Denoiser
from postgen.sft import cache as cache_module
from postgen.sft.cache import Cache
from postgen.sft.clips import read_clip
from postgen.sft.data import SftData
from postgen.sft.inspection import Inspector
from postgen.sft.items import Item
from postgen.training.run_folder import RunLock
from tests.children import Child, run
from tests.full_disk import files_of_at_most
from tests.sft.media import CPU, built, captioned, folder_of_clips, picture, settings, tiny, video

CHILD = "tests.sft.encode_killed"


@pytest.fixture(scope="module")
def model() -> tuple[Any, Denoiser]:
    return tiny()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kinds of the entries that are written."""
    found: list[str] = []
    write = cache_module.save_file

    def noted(tensors: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
        write(tensors, path, metadata)
        found.append(path.parent.parent.name)

    monkeypatch.setattr(cache_module, "save_file", noted)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}


def same(one: SftData, other: SftData, steps: int = 8) -> bool:
    pairs = [(one.batch(step), other.batch(step)) for step in range(steps)]
    return all(
        a.keys == b.keys
        and torch.equal(a.latents, b.latents)
        and torch.equal(*(x.conditions["prompt"] for x in (a, b)))
        for a, b in pairs
    )


def test_entries_are_made_once(tmp_path: Path, model: Any, clips: Path, written: list[str]) -> None:
    first = built(model, settings(clips), tmp_path)
    assert sorted(set(written)) == ["captions", "latents"]
    assert [written.count(kind) for kind in ("captions", "latents")] == [7, 6], "the empty caption is the seventh"
    again = built(model, settings(clips), tmp_path)
    assert len(written) == 13
    assert same(first, again)


def test_what_changed_is_encoded_again(
    tmp_path: Path, model: Any, written: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder_of_clips(tmp_path / "clips", 2, 0)
    base = settings(source, cache_dir=str(tmp_path / "cache"))

    def new(config: Any = base, other: Any = model) -> list[str]:
        written.clear()
        built(other, config, tmp_path)
        return sorted(set(written))

    assert new() == ["captions", "latents"]
    captioned(source / "clip0.mp4", "another caption")
    assert new() == ["captions"]
    assert len(written) == 1
    video(source / "clip0.mp4", seed=99)
    assert new() == ["latents"]
    assert len(written) == 1
    assert new(settings(source, cache_dir=base.cache_dir, frame_selection="uniform")) == [], "9 frames of 9 are equal"
    assert "other settings" not in capsys.readouterr().err
    assert new(settings(source, cache_dir=base.cache_dir, num_frames=5)) == ["latents"]
    assert "was filled with other settings (num_frames): 2 clips encoded anew" in capsys.readouterr().err
    assert new(settings(source, cache_dir=base.cache_dir, cache_dtype="float16")) == ["latents"]
    os.rename(source / "clip1.mp4", source / "renamed.mp4")
    os.rename(source / "clip1.txt", source / "renamed.txt")
    assert new() == [], "the content is the key, not the name"
    # Other weights of one part make only its entries again.
    other = tiny()
    with torch.no_grad():
        next(other[0].text_encoder.parameters()).add_(0.1)
    assert new(other=other) == ["captions"]
    assert "text encoders): 3 captions encoded anew" in capsys.readouterr().err
    with torch.no_grad():
        next(other[0].vae.parameters()).add_(0.1)
    assert new(other=other) == ["latents"]
    other[0].vae.register_to_config(latents_mean=[0.0] * 4)
    assert new(other=other) == ["latents"]
    other[0].vae.enable_tiling()
    assert new(other=other) == ["latents"]
    other[1].max_sequence_length = 64
    assert new(other=other) == ["captions"]
    assert new() == [], "the entries of the first settings are still there"


def test_a_kill_in_the_middle_resumes_to_the_same_files(tmp_path: Path, model: Any, clips: Path) -> None:
    """After a kill, two runs with one cache write every missing entry once, and all files are as without the kill."""
    built(model, settings(clips), tmp_path / "whole", main=False)
    code, said = run(CHILD, clips, tmp_path / "killed", "4")
    assert code == -9, said
    assert len([*(tmp_path / "killed").rglob(".*.part")]) == 1, "the kill was in the middle of a file"
    children = [Child(CHILD, [clips, tmp_path / "killed", "0"]) for _ in range(2)]
    assert [child.wait(60) for child in children] == [0, 0], children[0].said() + children[1].said()
    counts = [int(re.findall(r"wrote (\d+)", child.said())[0]) for child in children]
    assert sum(counts) == 10, "3 of 13 entries are complete"
    assert "warning" not in children[0].said() + children[1].said()
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_processes_share_the_work(tmp_path: Path) -> None:
    """Each of two processes makes its half; a process that comes later reads."""
    made: list[list[str]] = [[], []]

    def entries(part: int) -> list[Any]:
        def make(key: str) -> dict[str, torch.Tensor]:
            time.sleep(0.02)
            made[part].append(key)
            return {"x": torch.ones(1)}

        return [(key, partial(make, key)) for key in (f"{number:02}" for number in range(20))]

    both = [
        threading.Thread(target=Cache(tmp_path).fill, args=(entries(part),), kwargs={"part": part, "parts": 2})
        for part in range(2)
    ]
    for each in both:
        each.start()
    for each in both:
        each.join(20)
    assert sorted(made[0] + made[1]) == [f"{number:02}" for number in range(20)], "each is made once"
    assert min(map(len, made)) >= 5
    assert Cache(tmp_path).fill(entries(0)) == 0


def test_damaged_entries_are_made_again_with_one_warning(
    tmp_path: Path, model: Any, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = built(model, settings(clips), tmp_path, main=False)
    expected = [first.batch(step).latents for step in range(20)]
    before = files(tmp_path)
    for number, place in enumerate(sorted((tmp_path / "cache" / "latents").rglob("*.safetensors"))):
        content = bytearray(place.read_bytes())
        if number % 2:
            place.write_bytes(content[:-5])  # cut
        else:
            content[-5] ^= 1  # one wrong bit, found by the checksum when the entry is used
            place.write_bytes(content)
    again = built(model, settings(clips), tmp_path, main=False)
    assert all(torch.equal(latents, again.batch(step).latents) for step, latents in enumerate(expected))
    assert capsys.readouterr().err.count("missing or damaged") == 1
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"crc32", b"crc33"), (b"512", b"513"), (b'{\\"crc', b'(\\"crc'), (b"[1,7,64]", b"[7,1,64]"), (b"F32", b"I32")],
)
def test_a_damaged_header_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: bytes, after: bytes
) -> None:
    text = torch.zeros(1, 512, 64)
    text[:, :7] = 1.5
    Cache(tmp_path).fill([("ab", lambda: {"x": text})])
    (place,) = tmp_path.rglob("*.safetensors")
    assert place.read_bytes().count(before) == 1
    place.write_bytes(place.read_bytes().replace(before, after))
    assert torch.equal(Cache(tmp_path).get("ab", lambda: {"x": text})["x"], text)
    assert capsys.readouterr().err.count("missing or damaged") == 1


def test_an_error_begins_its_own_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The progress bar is closed first."""

    def fail() -> dict[str, torch.Tensor]:
        raise UserError("it cannot be made")

    with pytest.raises(UserError, match="it cannot be made"):
        Cache(tmp_path).fill([("ab", fail)], bar="encode clips")
    paths = [picture(tmp_path / f"{number}.png", seed=number) for number in range(9)]
    inspector = Inspector(tmp_path / "cache", shown=True)
    with files_of_at_most(400), pytest.raises(UserError, match="cannot be written"):
        inspector.inspect([Item(path.name, path, "image", "x") for path in paths])
    said = capsys.readouterr().err
    assert "encode clips" in said
    assert "check files" in said
    assert said.endswith("\n")


def test_zeros_at_the_end_of_an_encoding_are_not_stored(tmp_path: Path) -> None:
    text = torch.zeros(1, 512, 64)
    text[:, :7] = 1.5
    made = {"prompt": text.bfloat16(), "mask": torch.arange(512)[None] < 7, "pooled": torch.zeros(1, 8)}
    cache = Cache(tmp_path)
    cache.fill([("ab12", lambda: made)])
    assert cache.place("ab12").stat().st_size < 4000
    found = cache.get("ab12", lambda: made)
    assert all(torch.equal(found[name], made[name]) and found[name].dtype == made[name].dtype for name in made)
    empty = {"prompt": torch.zeros(1, 5, 3)}
    assert torch.equal(cache.get("cd34", lambda: empty)["prompt"], empty["prompt"])


def test_the_last_used_entries_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_MEMORY", 2 * 400)  # two entries of 100 values
    cache, made = Cache(tmp_path), list[int]()

    def make(number: int) -> dict[str, torch.Tensor]:
        made.append(number)
        return {"x": torch.full((100,), float(number))}

    entries = [(f"{number:02}", partial(make, number)) for number in range(3)]
    cache.fill(entries)
    for number in (0, 1, 0, 2):
        assert float(cache.get(*entries[number])["x"][0]) == number
    for key, _ in entries:
        cache.place(key).unlink()
    assert [float(cache.get(*entries[number])["x"][0]) for number in (0, 2)] == [0, 2]
    assert made == [0, 1, 2], "both are in memory"
    cache.get(*entries[1])
    assert made == [0, 1, 2, 1], "the one used the longest time ago is not"


def test_a_held_entry_is_waited_for(tmp_path: Path) -> None:
    """Another process makes an entry: this one makes the others first and then waits."""
    cache, order = Cache(tmp_path), list[str]()
    (tmp_path / "aa").mkdir()
    lock = RunLock(tmp_path / "aa", ".lock", "cache_dir")
    lock.acquire()

    def make(name: str) -> dict[str, torch.Tensor]:
        order.append(name)
        return {"x": torch.ones(1)}

    entries = [(key, lambda key=key: make(key)) for key in ("aa1", "bb1")]
    filling = threading.Thread(target=cache.fill, args=(entries,))
    filling.start()
    while order != ["bb1"]:
        assert filling.is_alive()
    lock.release()
    filling.join(10)
    assert order == ["bb1", "aa1"]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, model: Any, clips: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache_dir .*file cannot be written") as error:
        built(model, settings(clips, cache_dir=str(tmp_path / "file")), tmp_path)
    assert "\n" not in str(error.value)


def test_latents_that_are_not_finite_are_refused(tmp_path: Path, clips: Path) -> None:
    pipe, denoiser = tiny()
    with torch.no_grad():
        next(pipe.vae.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=r"clip0.mp4: the mean of its latents is not finite in float32"):
        built((pipe, denoiser), settings(clips), tmp_path)


def test_sampled_latents_are_those_of_the_autoencoder(tmp_path: Path, model: Any, clips: Path) -> None:
    """The mode equals `encode_video`; a sample differs at each use and is the same in each run."""
    modes = built(model, settings(clips, sample_latents=False), tmp_path)
    batch = modes.batch(0)
    rows = {clip.key: clip for clip in modes.clips}
    pixels = torch.stack([read_clip(rows[key]) for key in batch.keys])
    with torch.no_grad():
        assert torch.allclose(batch.latents, model[1].encode_video(pixels), atol=1e-5)
        expected = model[1].encode_prompt(batch.captions, guidance=False)
    assert torch.allclose(batch.conditions["prompt"], expected["prompt"], atol=1e-5)
    sampled = built(model, settings(clips), tmp_path)
    found = [sampled.batch(step) for step in range(12)]
    by_key = [(key, row) for batch in found for key, row in zip(batch.keys, batch.latents, strict=True)]
    one = [row for key, row in by_key if key == "clip0.mp4"]
    assert len(one) >= 2
    assert not torch.equal(one[0], one[1])
    assert sampled.batch(0).latents.device == CPU
