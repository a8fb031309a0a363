"""The filters of the curation as pure functions: bars, cuts, text, hashes, duplicates, densities and overlaps."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from postgen.errors import UserError
from postgen.sft.curation import (
    FILTERS,
    Box,
    CurationConfig,
    Duplicates,
    Meta,
    densities,
    density_weights,
    find_bars,
    find_cuts,
    ngram_embeddings,
    overlaps,
    perceptual_hash,
    picked,
    pipeline_embedder,
    read_config,
    text_mask,
    thumbnail_embedding,
    thumbnails,
)
from postgen.sft.curation.bars import enlarged
from postgen.sft.curation.config import BANDS
from postgen.sft.curation.hashes import embedder, packed, read_back, signs, written
from tests.rewards import open_clip
from tests.sft.curated_clips import barred, scene


@pytest.fixture(scope="module")
def clips():
    return [scene(seed) for seed in (3, 6, 12, 13)]


def cloud(height, width, seed):
    """A picture with the spectrum of photographs."""
    g = torch.Generator().manual_seed(seed)
    power = torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.fftfreq(width)[None] ** 2
    power[0, 0] = 1
    raw = torch.fft.ifft2(torch.fft.fft2(torch.randn(3, height, width, generator=g)) / power.sqrt()).real
    return ((raw - raw.mean()) / raw.std() * 0.2 + 0.5).clamp(0, 1)


def lettered(picture, size, fill):
    drawn = Image.fromarray((picture.permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    font = ImageFont.load_default(size)
    ImageDraw.Draw(drawn).text((20, 60), "Subscribe to this", fill=fill, font=font)
    left, top, right, bottom = font.getbbox("Subscribe to this")
    share = (min(right, 460) - left) * (bottom - top) / picture[0].numel()
    return torch.from_numpy(np.array(drawn)).permute(2, 0, 1).float() / 255, share


def test_text_area_is_about_the_box_of_the_letters():
    ground = cloud(240, 480, 0)
    assert not text_mask(ground[None]).any()
    for size in (14, 20, 32, 56):
        for fill in ("white", "black"):
            picture, share = lettered(ground, size, fill)
            mask = text_mask(picture[None])[0]
            assert 0.4 * share < float(mask.float().mean()) < 2 * share, (size, fill)
            assert not mask[: 60 - size].any()  # nothing above the line


def test_textures_and_scenes_are_no_text(clips):
    g = torch.Generator().manual_seed(0)
    noise = torch.rand(3, 200, 300, generator=g)
    grain = (cloud(200, 300, 1) + 0.1 * torch.randn(3, 200, 300, generator=g)).clamp(0, 1)
    stripes = ((torch.arange(300) // 6) % 2).float().expand(3, 200, 300)
    assert not text_mask(torch.stack((noise, grain, stripes))).any()
    assert all(float(text_mask(clip).float().mean()) < 0.05 for clip in clips)
    # What the measure cannot tell from letters.
    board = ((torch.arange(200)[:, None] // 8 + torch.arange(300)[None] // 8) % 2).float().expand(3, 200, 300)
    assert text_mask(board[None]).float().mean() > 0.9


def test_text_of_a_small_picture_is_unknown():
    meta = Meta(kind="image", height=60, width=200)
    assert FILTERS["text_area"](torch.rand(1, 3, 60, 200), meta) is None


def test_values_of_simple_pictures():
    meta = Meta(kind="video", height=32, width=48, frames=20, fps=10, indices=(0, 1))
    frames = torch.full((2, 3, 32, 48), 0.25)
    assert FILTERS["brightness"](frames, meta) == pytest.approx(0.25)
    assert FILTERS["contrast"](frames, meta) == pytest.approx(0)
    assert FILTERS["sharpness"](frames, meta) == pytest.approx(0)
    frames[..., 24:] = 0.75
    assert FILTERS["contrast"](frames, meta) == pytest.approx(0.25)
    assert FILTERS["seconds"](frames, meta) == 2
    assert FILTERS["flow"](frames, meta) == pytest.approx(0)
    image = Meta(kind="image", height=32, width=48)
    assert {name for name, apply in FILTERS.items() if apply(frames[:1], image) is None} == {
        *("frames", "seconds", "fps", "flow", "text_area")
    }


def test_flow_is_the_speed_whatever_the_size_and_the_gaps():
    pytest.importorskip("cv2")
    wide = cloud(64, 256, 2)
    frames = torch.stack([wide[:, :, 2 * t : 2 * t + 96] for t in range(12)])
    meta = Meta(kind="video", height=64, width=96, frames=12, fps=8, indices=tuple(range(12)))
    assert FILTERS["flow"](frames, meta) == pytest.approx(2 / 64 * 8, rel=0.1)
    # Frames 1 and 8 are no neighbours: their flow does not count.
    some = Meta(kind="video", height=64, width=96, frames=12, fps=8, indices=(0, 1, 8, 9))
    assert FILTERS["flow"](frames[[0, 1, 8, 9]], some) == pytest.approx(2 / 64 * 8, rel=0.1)


def test_picked_frames_are_pairs():
    assert picked(100, 2) == (0, 1, 98, 99)
    assert picked(2, 8) == (0, 1)
    assert all(0 <= index < 7 for index in picked(7, 3))


def test_bars_are_found_and_a_dark_scene_has_none(clips):
    clip = clips[0]
    assert find_bars(clip) is None
    assert find_bars(barred(clip, 14)) == Box(14, 0, 68, 96)
    assert find_bars(barred(clip, 14).transpose(-1, -2)) == Box(0, 14, 96, 68)
    assert find_bars(torch.zeros(3, 3, 40, 40)) is None
    line = torch.ones(2, 3, 200, 200)
    line[..., :1, :] = 0
    assert find_bars(line) is None
    night = torch.zeros(3, 3, 40, 40)
    night[..., 18:24, 20:25] = 1  # a lamp in the dark
    assert find_bars(night) is None


def test_bars_of_small_frames_in_the_pixels_of_the_file():
    # 1080 rows with bars of 138 rows, seen at 360: the cut is inside the picture, at most one small row too deep.
    box = enlarged(Box(46, 0, 268, 640), (360, 640), (1080, 1920))
    assert 138 <= box.top <= 144
    assert 936 <= box.top + box.height <= 942
    assert (box.left, box.width, box.height % 2) == (0, 1920, 0)


def test_cuts_but_no_flash_no_pan_no_dissolve(clips):
    a, b, c, _ = clips
    assert find_cuts(thumbnails(torch.cat((a, 1 - b, c))), change=0.05) == [17, 34]
    flash = a.clone()
    flash[8] = 1
    assert find_cuts(thumbnails(flash)) == []
    wide = cloud(48, 700, 3)
    pan = torch.stack([wide[:, :, 16 * t : 16 * t + 64] for t in range(30)])
    sudden = torch.cat((pan[:1].expand(9, -1, -1, -1), pan, pan[-1:].expand(9, -1, -1, -1)))
    assert find_cuts(thumbnails(sudden)) == []
    share = torch.linspace(0, 1, 17)[:, None, None, None]
    assert find_cuts(thumbnails(a * (1 - share) + (1 - b) * share)) == []  # known: not found
    assert find_cuts(thumbnails(a[:1])) == []


def test_hash_survives_what_files_do_and_separates_scenes(clips):
    share = torch.nn.functional
    hashes = torch.stack([signs(packed(perceptual_hash(clip))) for clip in clips])
    apart = (1 - hashes @ hashes.T) / 2
    assert float(apart.fill_diagonal_(1).min()) > 0.15
    small = share.interpolate(clips[0], (50, 60), mode="bicubic", antialias=True).clamp(0, 1)
    darker = (clips[0] * 0.8 + 0.02 * torch.randn(clips[0].shape, generator=torch.Generator().manual_seed(0))).clamp(
        0, 1
    )
    for other in (small, darker):
        assert float((1 - hashes[0] @ signs(packed(perceptual_hash(other)))) / 2) < 0.06
    near = thumbnail_embedding(clips[0]) @ thumbnail_embedding(darker)
    assert near > 0.97 > thumbnail_embedding(clips[0]) @ thumbnail_embedding(clips[1])
    assert torch.allclose(read_back(written(thumbnail_embedding(clips[0]))), thumbnail_embedding(clips[0]), atol=1e-3)


def test_clip_embeddings_of_a_tiny_model(clips, tmp_path):
    from postgen.rewards.clip import open_clip_net

    open_clip.save_tokenizer(tmp_path)
    torch.save({"state_dict": open_clip.random_state(open_clip.TINY)}, tmp_path / "net.pt")
    open_clip_net(tmp_path / "net.pt", open_clip.TINY).save_pretrained(tmp_path)
    embed = embedder("clip", str(tmp_path))
    vector = embed(clips[0])
    assert vector.shape == (12,)
    assert float(vector.norm()) == pytest.approx(1)
    assert torch.equal(vector, embed(clips[0]))


def test_duplicates_are_those_of_a_plain_search():
    g = torch.Generator().manual_seed(0)
    words = torch.randint(0, 2, (30, 64), generator=g).float() * 2 - 1
    rows = words[torch.randint(0, 30, (2500,), generator=g)]
    rows = torch.where(torch.rand(rows.shape, generator=g) < 0.06, -rows, rows) / 8
    near = rows @ rows.T
    kept, gone = [], set()
    for row in range(len(rows)):
        if kept and float(near[row, kept].max()) >= 0.8 - 1e-6:
            gone.add(row)
        else:
            kept.append(row)
    search = Duplicates(0.8)
    found = [place for part in rows.split(700) for place in search.add(part)]
    assert {row for row, place in enumerate(found) if place is not None} == gone
    assert all(float(near[row, place]) >= 0.8 - 1e-6 for row, place in enumerate(found) if place is not None)
    assert len(search) == len(kept)


def test_density_weights_give_each_group_the_same_share():
    texts = ["a dog runs over the grass"] * 9 + ["the lights of a city at night"]
    vectors = ngram_embeddings(texts)
    assert torch.allclose(densities(vectors), torch.tensor([9.0] * 9 + [1.0]), atol=0.05)
    weights = density_weights(vectors)
    assert float(weights[:9].sum()) == pytest.approx(float(weights[9]), rel=0.02)
    assert float(weights.mean()) == pytest.approx(1)
    capped = density_weights(vectors, cap=3)
    assert float(capped.max() / capped.min()) == pytest.approx(3)
    assert torch.equal(density_weights(vectors, power=0), torch.ones(10))
    assert density_weights(ngram_embeddings([])).tolist() == []


def test_overlaps_by_text_and_by_distance():
    prompts = ["A red ball, rolling!", "two cats sleep on a warm roof in the sun"]
    captions = ["a red  ball rolling", "a blue cube", "two cats sleep on a warm roof in the evening sun"]
    found = overlaps(captions, prompts, distance=0.2)
    assert [(one.caption, one.prompt) for one in found] == [(0, 0), (2, 1)]
    assert found[0].distance == 0
    assert [one.caption for one in overlaps(captions, prompts, distance=0)] == [0]
    assert overlaps([], prompts) == overlaps(captions, []) == []


def test_captions_by_the_text_encoder_of_the_embedded_model():
    from postgen.assets import embedded_model

    embed = pipeline_embedder(str(embedded_model()), "cpu")
    vectors = embed(["a red ball rolls", "a red ball rolls", "two cubes fall down", "a cylinder slides"])
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-4)
    near = vectors @ vectors.T
    assert float(near[0, 1]) == pytest.approx(1, abs=1e-4)
    assert float(near[0, 2:].max()) < 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side": 8}, "side must be at least 32"),
        ({"flow": [1]}, "flow is \\[1\\], it must be \\[least, greatest\\]"),
        ({"flow": [2, 1]}, "its least value is above its greatest"),
        ({"flow": ["a", 1]}, "flow must be at least 0"),
        ({"cuts": "merge"}, "Allowed: split, drop, keep"),
        ({"hash_distance": 0.9}, "hash_distance must be at least 0 and at most 0.5"),
        ({"embedding_model": "x"}, "use it with embedding 'clip'"),
        ({"brightnes": [0, 1]}, "Did you mean 'brightness'"),
        ({"embedding": 3}, "embedding is 3, it must be a text"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        read_config(None, settings)


def test_only_some_settings_change_what_is_measured(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("flow: [0.1, null]\ntext_area: null\nside: 128\n")
    config = read_config(file, {"seconds": [2, None]})
    assert (config.flow, config.text_area, config.seconds, config.side) == (
        (0.1, None),
        (None, None),
        (2.0, None),
        128,
    )
    assert config.measured() == CurationConfig(side=128).measured() != CurationConfig().measured()


def test_the_page_tells_every_setting_with_its_default():
    page = (Path(__file__).parents[2] / "docs" / "curation.md").read_text()
    names = [field.name for field in dataclasses.fields(CurationConfig)]
    assert [name for name in names if f"`{name}`" not in page] == []
    for name in BANDS:
        low, high = (f"{end:g}" if end is not None else "null" for end in getattr(CurationConfig(), name))
        assert (low, high) == ("null", "null") or f"| `{name}` | `[{low}, {high}]` |" in page, name
