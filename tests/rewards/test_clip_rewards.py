"""The rewards on CLIP: each against a straight computation from its published weights, their pixels against PIL."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from postgen.errors import UserError
from postgen.rewards import get_reward
from postgen.rewards.aesthetic import HEAD, Aesthetic
from postgen.rewards.clip import VIT_H_14, clip_config, from_open_clip, open_clip_net
from postgen.rewards.clip_score import ClipScore
from postgen.rewards.hps_v2_1 import HPSv21
from postgen.rewards.pickscore import PickScore
from postgen.rewards.pictures import CLIP_MEAN, CLIP_STD, centre_crop, clip_pixels, padded_pixels
from postgen.rewards.weights import find_file, read_state
from tests.rewards import open_clip
from tests.rewards.open_clip import TINY

QUICK = TINY | {"quick_gelu": True}
PROMPTS = ["A red ball on the table", "blue", "red blue on on on on on on on on on on on on on on on on"]


@pytest.fixture(scope="module")
def clips():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(frames, 3, 40, 56, generator=generator) for frames in (5, 1, 9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder with a network in both layouts and its tokenizer; L/14's activation, as OpenAI published it."""
    path = tmp_path_factory.mktemp("clip")
    state = open_clip.random_state(QUICK)
    open_clip.save_tokenizer(path)
    torch.save({"state_dict": state}, path / "net.pt")
    save_file(state, path / "open_clip_model.safetensors")
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": QUICK}))
    open_clip_net(path / "net.pt", QUICK).save_pretrained(path)
    return path


def tokens(folder):
    return AutoTokenizer.from_pretrained(folder)(
        PROMPTS, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )["input_ids"]


def pixels(frames, left=5):
    """Shorter side to 28 px, centre square, normalised: written out for the clips of 40x56."""
    sized = F.interpolate(frames, (28, 39), mode="bicubic", antialias=True).clamp(0, 1)[..., left : left + 28]
    return (sized - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def cosines(folder, clips, frames_of, make_pixels=pixels, cfg=QUICK):
    state = open_clip.random_state(cfg)
    texts = open_clip.text_features(state, cfg, tokens(folder))
    found = []
    for clip, text in zip(clips, texts, strict=True):
        features = open_clip.image_features(state, cfg, make_pixels(clip[frames_of(len(clip))]))
        found.append(float((features @ text).mean()))
    return torch.tensor(found)


def three(length):
    return sorted({0, (length - 1) // 2, length - 1})


@pytest.mark.parametrize("weights", [None, "open_clip_model.safetensors", "net.pt"])
def test_clip_score_is_the_cosine(folder, clips, weights):
    reward = ClipScore(str(folder), open_clip=weights, frames=3)
    scores = torch.tensor(reward(PROMPTS, clips))
    # Of 11 px too many, open_clip crops 6 to the left (half to even), the processor of transformers 5.
    seen = pixels if weights is None else lambda frames: pixels(frames, left=6)
    assert scores == pytest.approx(cosines(folder, clips, three, seen).tolist(), abs=1e-5)
    assert scores.std() > 1e-3


def test_open_clips_own_preparation_of_pictures(tmp_path, folder, clips):
    seen = {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash", "interpolation": "bicubic"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": QUICK, "preprocess_cfg": seen}))
    torch.save(open_clip.random_state(QUICK), tmp_path / "net.bin")
    reward = ClipScore(str(tmp_path), open_clip="net.bin", tokenizer=str(folder), frames=3)

    def squashed(frames):
        return (F.interpolate(frames, (28, 28), mode="bicubic", antialias=True).clamp(0, 1) - 0.5) / 0.25

    want = cosines(folder, clips, three, squashed)
    assert reward(PROMPTS, clips) == pytest.approx(want.tolist(), abs=1e-5)
    seen["resize_mode"] = "longest"
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": QUICK, "preprocess_cfg": seen}))
    with pytest.raises(UserError, match="resize_mode='longest': supported are shortest, squash"):
        ClipScore(str(tmp_path), open_clip="net.bin").load()


def test_pickscore_scales_the_cosine(folder, clips):
    reward = get_reward("pickscore", model=str(folder), tokenizer=None, frames=3)
    want = torch.tensor(3.0).exp() * cosines(folder, clips, three)
    assert reward(PROMPTS, clips) == pytest.approx(want.tolist(), abs=1e-4)


def test_hps_pads_and_does_not_clamp(tmp_path, folder, clips):
    torch.save({"epoch": 1, "state_dict": open_clip.random_state(TINY)}, tmp_path / "HPS_v2.1_compressed.pt")
    reward = HPSv21(str(tmp_path), shape=TINY, tokenizer=str(folder), frames=3)

    def padded(frames):
        sized = F.interpolate(frames, (20, 28), mode="bicubic", antialias=True)
        canvas = torch.zeros(len(frames), 3, 28, 28)
        canvas[:, :, 4:24] = sized
        return (canvas - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)

    want = cosines(folder, clips, three, padded, TINY)
    assert reward(PROMPTS, clips) == pytest.approx(want.tolist(), abs=1e-5)


def test_aesthetic_is_a_linear_chain_on_the_unit_feature(tmp_path, folder, clips):
    generator = torch.Generator().manual_seed(2)
    sizes, places = (12, 1024, 128, 64, 16, 1), (0, 2, 4, 6, 7)
    head = {}
    for place, before, after in zip(places, sizes, sizes[1:], strict=False):
        head[f"layers.{place}.weight"] = torch.randn(after, before, generator=generator) / before**0.5
        head[f"layers.{place}.bias"] = torch.randn(after, generator=generator)
    torch.save(head, tmp_path / "head.pth")
    scores = Aesthetic(str(folder), head=str(tmp_path / "head.pth"), frames=3)(PROMPTS, clips)
    state = open_clip.random_state(QUICK)
    for clip, score in zip(clips, scores, strict=True):
        # torchvision crops 39 -> 28 at round(5.5) = 6, half to even
        sized = F.interpolate(clip[three(len(clip))], (28, 39), mode="bicubic", antialias=True).clamp(0, 1)[..., 6:34]
        x = (sized - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
        x = open_clip.image_features(state, QUICK, x)
        for place in places:
            x = x @ head[f"layers.{place}.weight"].T + head[f"layers.{place}.bias"]
        assert score == pytest.approx(float(x.mean()), abs=1e-3)


def test_a_batch_scores_like_single_clips(folder):
    generator = torch.Generator().manual_seed(3)
    clips = [torch.rand(3, 3, 30 + 2 * (k % 2), 32, generator=generator) for k in range(8)]
    prompts = [PROMPTS[k % 3] for k in range(8)]
    for reward in (ClipScore(str(folder)), PickScore(str(folder), tokenizer=str(folder))):
        together = reward(prompts, clips)
        apart = [reward([p], [c])[0] for p, c in zip(prompts, clips, strict=True)]
        assert together == pytest.approx(apart, abs=1e-4)


def test_reductions_of_frames(folder, clips):
    by_name = {name: ClipScore(str(folder), frames=9, reduce=name)(PROMPTS, clips)[2] for name in ("mean", "min")}
    assert by_name["min"] < by_name["mean"]


def test_the_full_size_network_takes_the_published_names():
    published = {name: torch.empty(shape, device="meta") for name, shape in open_clip.shapes(VIT_H_14).items()}
    with torch.device("meta"):
        net = CLIPModel(clip_config(VIT_H_14))
    renamed = from_open_clip(published)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert sum(v.numel() for v in renamed.values()) == 986_109_441


def test_the_published_constants():
    assert clip_config(VIT_H_14).text_config.eos_token_id == 49407
    assert clip_config(VIT_H_14).vision_config.hidden_act == "gelu"
    assert clip_config(QUICK).text_config.hidden_act == "quick_gelu"
    assert (ClipScore().model, PickScore().model, HPSv21().model) == (
        "openai/clip-vit-large-patch14",
        "yuvalkirstain/PickScore_v1",
        "xswu/HPSv2",
    )
    assert HPSv21().file == "HPS_v2.1_compressed.pt"
    assert HEAD.endswith("sac%2Blogos%2Bava1-l14-linearMSE.pth")


@pytest.mark.parametrize("size", [(300, 400), (231, 224), (100, 180)])
def test_pixels_are_those_of_the_published_processor(size):
    """The processor of CLIP and PickScore works on 8-bit pictures through PIL: equal but for its rounding."""
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    picture = torch.stack((torch.sin(x / 9), torch.cos(y / 7), torch.sin((x + y) / 23))).mul(0.5).add(0.5)
    levels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
    want = CLIPImageProcessorPil()(Image.fromarray(levels), return_tensors="pt")["pixel_values"][0]
    got = clip_pixels(torch.tensor(levels.astype(np.float32) / 255).permute(2, 0, 1)[None])[0]
    assert got.shape == want.shape
    assert float((got - want).abs().max()) < 0.02


def test_padding_of_hps():
    wide, square = torch.ones(1, 3, 20, 50), torch.ones(1, 3, 40, 40)
    rows = padded_pixels(wide, 25)[0, 0, :, 12] > 0
    assert rows.tolist() == [False] * 7 + [True] * 10 + [False] * 8
    assert padded_pixels(square, 40).shape == (1, 3, 40, 40)
    bars = padded_pixels(wide, 50)[0, 0, :, 0] > 0  # of the right length already
    assert bars.tolist() == [False] * 15 + [True] * 20 + [False] * 15
    assert float(padded_pixels(square, 20).std()) < 1


def test_odd_margins():
    strip = torch.arange(7.0).expand(1, 3, 4, 7)
    assert centre_crop(strip, 4)[0, 0, 0].tolist() == [1, 2, 3, 4]
    assert centre_crop(strip, 4, half_even=True)[0, 0, 0].tolist() == [2, 3, 4, 5]


def test_errors(tmp_path, folder):
    clip = torch.rand(1, 3, 32, 32)
    with pytest.raises(UserError, match=r"the folder .*nowhere does not exist"):
        ClipScore(str(tmp_path / "nowhere")).load()
    with pytest.raises(UserError, match=r"does not contain HPS_v2.1_compressed.pt"):
        HPSv21(str(tmp_path)).load()
    torch.save({"state_dict": open_clip.random_state(QUICK)}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(UserError, match=r"those of another model: they lack .* more"):
        HPSv21(str(tmp_path)).load()
    wider = TINY | {"embed_dim": 20}
    with pytest.raises(UserError, match=r"visual_projection.weight is \(12, 16\), expected \(20, 16\)"):
        HPSv21(str(tmp_path), shape=wider).load()
    torch.save({"epoch": 3}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(UserError, match="does not contain plain weights"):
        HPSv21(str(tmp_path), shape=TINY).load()
    with pytest.raises(UserError, match="hf_model_name"):
        clip_config(TINY | {"text_cfg": TINY["text_cfg"] | {"hf_model_name": "x"}})
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        ClipScore(str(folder), tokenizer=str(tmp_path))(["red"], [clip])


def test_damaged_and_missing_files(tmp_path, folder):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot load .*header.*\. Give a local folder"):
        ClipScore(str(tmp_path)).load()
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read as weights: .*header"):
        read_state(tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"projection_dim": 20}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"cannot load .*mismatch"):
        ClipScore(str(tmp_path)).load()
    with pytest.raises(UserError, match=r"the folder .*nowhere does not exist"):
        find_file(str(tmp_path / "nowhere"), "model.pth")


def test_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"cannot load nobody/nothing: .*Give a local folder or file"):
        ClipScore("nobody/nothing").load()
    with pytest.raises(
        UserError, match=r"cannot load HPS_v2\.1_compressed\.pt of nobody/nothing: .*Give a local folder"
    ):
        HPSv21("nobody/nothing").load()
    with pytest.raises(UserError, match=r"cannot load https://localhost:1/head\.pth"):
        find_file("https://localhost:1/head.pth")
    with pytest.raises(UserError, match=r"there is no file head\.pth: give a local path"):
        find_file("head.pth")
    assert not list(tmp_path.rglob("*.pth"))


def test_a_pickle_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"state_dict": Trap()}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(UserError, match="cannot be read as weights"):
        HPSv21(str(tmp_path)).load()


def test_offloaded_networks_come_back(folder, clips):
    reward = ClipScore(str(folder))
    before = reward(PROMPTS, clips)
    reward.offload()
    assert reward(PROMPTS, clips) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.backends.cudnn.flags(allow_tf32=False)
@torch.no_grad()
def test_the_gpu_gives_the_same(tmp_path, folder, clips):
    torch.save({"state_dict": open_clip.random_state(TINY)}, tmp_path / "HPS_v2.1_compressed.pt")
    options = {"tokenizer": str(folder), "frames": 3}
    for cls, more in ((ClipScore, {"model": str(folder)}), (HPSv21, {"model": str(tmp_path), "shape": TINY})):
        here, there = (cls(**more, **options, device=device)(PROMPTS, clips) for device in ("cpu", "cuda"))
        assert there == pytest.approx(here, abs=1e-3)
