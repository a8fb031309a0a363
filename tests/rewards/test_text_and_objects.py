"""OCR on rendered text, ConSE on a real clip, and GenEval's rules, detector and colours."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import Mask2FormerConfig, Mask2FormerModel, SwinConfig
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from postgen.errors import UserError
from postgen.rewards import RewardRunner, get_reward
from postgen.rewards.clip import open_clip_net
from postgen.rewards.conse import Conse, class_sentences
from postgen.rewards.efficientnet import EfficientNetLite0, SameConv
from postgen.rewards.geneval_hf import CLASSES, COLOURS, GenevalHF, Thing, check_record, detected, positions
from postgen.rewards.ocr import OCR, edits, quoted, rapid_reader, readability
from postgen.rewards.pictures import CLIP_MEAN, CLIP_STD
from postgen.rewards.weights import fill
from postgen.video import read_video
from tests.offline_assets import installed
from tests.rewards import open_clip


def written(text, size=28, height=112, width=176):
    picture = Image.new("RGB", (width, height), (240, 240, 230))
    ImageDraw.Draw(picture).text((12, 36), text, font=ImageFont.load_default(size), fill=(20, 20, 90))
    return (
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1) / 255
    )


@pytest.fixture(scope="module")
def reader():
    for name in ("ocr-detection", "ocr-recognition", "ocr-direction"):
        installed(name)
    for package in ("cv2", "onnxruntime", "pyclipper", "shapely"):
        pytest.importorskip(package, reason=f"ocr needs {package}")
    return rapid_reader()


@pytest.mark.parametrize("text", ["Hello World", "OPEN 24", "postgen"])
def test_rendered_text_is_read_exactly(reader, text):
    clip = written(text)[None]
    assert OCR(reader=reader)([f'a sign that says "{text}"'], [clip]) == [1.0]
    assert "".join(reader(clip[0])).replace(" ", "") == text.replace(" ", "")


def test_wrong_and_missing_text(reader):
    clips = [torch.stack([written("GATE 7"), torch.full((3, 112, 176), 0.5)]), written("GATE 9")[None]]
    half, near = OCR(frames=2, reader=reader)(['"GATE 7"', '"GATE 7"'], clips)
    assert half == pytest.approx(0.5)
    assert near == pytest.approx(0.8)
    runner = RewardRunner([OCR(frames=1, reader=reader)])
    assert runner(["any", "no quotes"], clips, text=["GATE 9", None]).values[:, 0].isnan().tolist() == [False, True]


def test_readability_and_quotes():
    assert readability("xx o p e N 24 yy", "OPEN 24") == 1.0
    assert readability("", "abc") == 0.0
    assert readability("abXd", "abcd") == 0.75
    assert readability("a" * 50, "abc") == 0.0
    assert (edits("", "ab"), edits("flaw", "lawn")) == (2, 2)
    assert quoted("a \u201cbig sale\u201d sign") == "big sale"
    assert quoted("don't") is None
    with pytest.raises(UserError, match="frames must be at least 1"):
        OCR(frames=0)


def test_padding_of_tensorflow():
    conv = SameConv(1, 1, 3, 2, bias=False)
    torch.nn.init.ones_(conv.weight)
    assert conv(torch.ones(1, 1, 4, 4))[0, 0].tolist() == [[9, 6], [6, 4]]
    assert conv(torch.ones(1, 1, 5, 5)).shape[-2:] == (3, 3)


def test_the_classifier_has_the_published_names():
    names = set(EfficientNetLite0().state_dict())
    assert {
        "_conv_stem.weight",
        "_blocks.0._depthwise_conv.weight",
        "_blocks.15._expand_conv.weight",
        "_fc.bias",
    } <= names
    assert "_blocks.0._expand_conv.weight" not in names
    assert sum(p.numel() for p in EfficientNetLite0().parameters()) == 4_652_008
    with pytest.raises(UserError, match="another model"):
        fill(EfficientNetLite0(), {"_fc.bias": torch.zeros(1000)}, "x")


@pytest.fixture(scope="module")
def conse():
    for name in ("efficientnet-lite0", "minilm"):
        installed(name)
    reward = Conse(frames=1)
    reward.load()
    return reward


@torch.no_grad()
def test_conse_tells_what_is_in_a_real_clip(conse):
    talker, bunny = (read_video(installed(name), start=10, count=1) for name in ("clip-carphone", "clip-bunny"))
    man, animal = "a man in a suit and a tie", "a furry animal in a meadow"
    assert conse([man, animal], [talker] * 2)[0] > conse([man, animal], [talker] * 2)[1] + 0.2
    assert conse([animal], [bunny])[0] > conse([animal], [talker])[0] + 0.1
    assert conse([man], [talker])[0] > conse([man], [bunny])[0] + 0.1


@torch.no_grad()
def test_conse_is_the_weighted_mean_of_class_sentences(conse):
    clip = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    chances = conse.net["seen"](clip).softmax(-1)[0]
    best = chances.argsort(descending=True)[:10].tolist()
    mixed = sum(chances[k] * conse.sentences([class_sentences()[k]])[0] for k in best)
    want = F.cosine_similarity(mixed, conse.sentences(["a red ball"])[0], dim=0)
    assert conse(["a red ball"], [clip]) == pytest.approx([float(want)], abs=1e-4)
    assert len(class_sentences()) == 1000
    assert class_sentences()[285] == "a photo of a Egyptian cat"


@torch.no_grad()
def test_a_batch_scores_like_single_clips(conse):
    clips = [torch.rand(1, 3, 60, 80, generator=torch.Generator().manual_seed(k)) for k in range(8)]
    prompts = [
        f"{word} ball rolls" for word in ("red", "blue", "green", "a very long prompt about a", "x", "y", "z", "w")
    ]
    together = conse(prompts, clips)
    assert together == pytest.approx([conse([p], [c])[0] for p, c in zip(prompts, clips, strict=True)], abs=1e-4)


def thing(box, score=0.9, size=(64, 64)):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return Thing(tuple(map(float, box)), mask, score)


def test_positions_by_hand():
    left, right, below = thing((0, 20, 10, 30)), thing((40, 20, 50, 30)), thing((2, 50, 12, 60))
    assert positions(left, right) == {"left of"}
    assert positions(right, left) == {"right of"}
    assert positions(below, left) == {"below"}
    assert positions(left, thing((1, 20, 11, 30))) == set()
    assert positions(thing((30, 30, 40, 40)), thing((0, 0, 10, 10))) == {"right of", "below"}


def judged(things, include, exclude=(), graded=False, tag="x"):
    reward = GenevalHF(graded=graded)
    record = {"tag": tag, "include": include, "exclude": list(exclude)}
    check_record(record)
    return reward.judge(torch.rand(3, 64, 64), things, record)


def test_the_rules():
    dogs = [thing((0, 20, 10, 30)), thing((20, 20, 30, 30)), thing((30, 0, 40, 8))]
    cat = [thing((50, 20, 60, 30))]
    one, two, four = ({"class": "dog", "count": n} for n in (1, 2, 4))
    assert judged({"dog": dogs}, [two]) == 1.0
    assert judged({"dog": dogs}, [two], [{"class": "dog", "count": 3}]) == 0.0
    assert judged({"dog": dogs}, [four]) == 0.0
    assert judged({"dog": dogs}, [four], graded=True) == 0.75
    assert judged({"dog": dogs}, [two], graded=True) == 0.5
    assert judged({"dog": dogs}, [one, {"class": "cat", "count": 1}]) == 0.0
    assert judged({"dog": dogs, "cat": cat}, [one, {"class": "cat", "count": 1, "position": ["right of", 0]}]) == 1.0
    assert judged({"dog": dogs, "cat": cat}, [one, {"class": "cat", "count": 1, "position": ["above", 0]}]) == 0.0
    # The target itself is missing.
    assert judged({"cat": cat}, [one, {"class": "cat", "count": 1, "position": ["right of", 0]}]) == 0.0


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A tiny Mask2Former in the published layout."""
    path = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=384,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
        window_size=3,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
        num_labels=80,
    )
    # The class that holds both, but for its loss, which wants SciPy.
    whole = torch.nn.Module()
    whole.model = Mask2FormerModel(config)
    whole.class_predictor = torch.nn.Linear(32, 81)
    torch.nn.init.normal_(whole.class_predictor.weight, std=2.0)
    config.architectures = ["Mask2FormerForUniversalSegmentation"]
    config.save_pretrained(path)
    state = {name: weight.contiguous().clone() for name, weight in whole.state_dict().items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path, whole.eval()


@torch.no_grad()
def test_objects_are_those_of_the_published_processing(detector):
    path, net = detector
    frame = torch.rand(1, 3, 60, 90, generator=torch.Generator().manual_seed(1))
    pixels = F.interpolate(frame, (384, 384), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    raw = net.model((pixels - mean) / std, output_hidden_states=True)
    states = raw.transformer_decoder_intermediate_states[-1].transpose(0, 1)
    answers = SimpleNamespace(
        class_queries_logits=net.class_predictor(states), masks_queries_logits=raw.masks_queries_logits[-1]
    )
    want = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        answers, threshold=0.1, target_sizes=[(60, 90)], return_binary_maps=True
    )[0]
    found = detected(answers.class_queries_logits[0], answers.masks_queries_logits[0], (60, 90), 0.1)
    ours = {(name, round(t.score, 4)): t.mask for name, things in found.items() for t in things}
    theirs = {
        (CLASSES[info["label_id"]], round(info["score"], 4)): want["segmentation"][k] > 0
        for k, info in enumerate(want["segments_info"])
    }
    assert len(theirs) > 3
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[key] == theirs[key]).all()) for key in ours)
    (name, things) = next(iter(found.items()))
    rows = torch.nonzero(things[0].mask.any(1))[:, 0]
    assert things[0].box[1::2] == (float(rows.min()), float(rows.max()) + 1)
    # The whole reward sees the same objects.
    record = {"tag": "single_object", "include": [{"class": name, "count": 1}]}
    there = any(t.score > 0.3 for t in things)
    reward = get_reward("geneval_hf", model=str(path))
    assert reward(["x"], [frame], geneval=[record]) == [float(there)]
    # What is to be counted must be surer.
    unsure = next(k for k, seen in found.items() if 0.3 < max(t.score for t in seen) < 0.9)
    records = [{"tag": tag, "include": [{"class": unsure, "count": 1}]} for tag in ("single_object", "counting")]
    assert reward(["x"] * 2, [frame] * 2, geneval=records) == [1.0, 0.0]


@torch.no_grad()
def test_colours_are_clips_nearest(tmp_path):
    cfg = open_clip.TINY | {"quick_gelu": True}
    state = open_clip.random_state(cfg)
    open_clip.save_tokenizer(tmp_path)
    torch.save(state, tmp_path / "net.pt")
    open_clip_net(tmp_path / "net.pt", cfg).save_pretrained(tmp_path)
    reward = GenevalHF(clip=str(tmp_path))
    frame, found = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(2)), thing((4, 6, 36, 34))
    found.mask[6:20, 4:20] = False
    told = reward.colours(frame, [found], "dog")
    crop = torch.where(found.mask, frame, torch.tensor(0.6))[:, 6:34, 4:36]
    pixels = F.interpolate(crop[None], (28, 32), mode="bicubic", antialias=True).clamp(0, 1)[..., 2:30]
    pixels = (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    seen = open_clip.image_features(state, cfg, pixels)[0]
    scores = []
    for colour in COLOURS:
        texts = [f"a photo of a {colour} dog", f"a photo of a {colour}-colored dog", f"a photo of a {colour} object"]
        mean = reward.clip.text_features(texts).mean(0)
        scores.append(float(seen @ mean / mean.norm()))
    assert told == [COLOURS[scores.index(max(scores))]]


def test_records_are_checked():
    good = {"include": [{"class": "tv remote", "count": 2, "color": "red", "position": ["above", 0]}]}
    check_record(json.loads(json.dumps(good)))
    for change, message in (
        ({"class": "unicorn"}, "unknown class 'unicorn'"),
        ({"count": 0}, "at least 1"),
        ({"color": "beige"}, "known are red"),
        ({"position": ["near", 0]}, "position 'near'"),
    ):
        with pytest.raises(UserError, match=message):
            check_record({"include": [good["include"][0] | change]})
    assert (len(CLASSES), CLASSES[64], CLASSES[-1]) == (80, "computer mouse", "toothbrush")
    assert GenevalHF().model == "facebook/mask2former-swin-small-coco-instance"
    with pytest.raises(UserError, match="needs the column 'geneval'"):
        RewardRunner(["geneval_hf"])(["x"], [torch.rand(1, 3, 8, 8)])
