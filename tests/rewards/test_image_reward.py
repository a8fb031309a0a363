"""ImageReward against BLIP written out straight from the published weights."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, BertTokenizer, BlipTextModel, BlipVisionModel

from postgen.errors import UserError
from postgen.rewards.image_reward import LARGE, MEAN, STD, TEXT_LENGTH, ImageReward, blip_configs, from_published
from postgen.rewards.pictures import CLIP_MEAN, CLIP_STD

TINY = {
    "vision": {
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 32,
        "patch_size": 16,
    },
    "text": {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "ball", "rolls", "left"]
PROMPTS = ["a red ball rolls left", "blue", " ".join(["red ball"] * 30)]


def shapes(sizes):
    """Every weight of the published checkpoint, as the official package names and shapes it."""
    v, t = sizes["vision"], sizes["text"]
    width, ffn, wide, tffn = v["hidden_size"], v["intermediate_size"], t["hidden_size"], t["intermediate_size"]
    start = "blip.visual_encoder."
    found = {
        f"{start}cls_token": (1, 1, width),
        f"{start}pos_embed": (1, (v["image_size"] // v["patch_size"]) ** 2 + 1, width),
        f"{start}patch_embed.proj.weight": (width, 3, v["patch_size"], v["patch_size"]),
        f"{start}patch_embed.proj.bias": (width,),
    }
    for layer in range(v["num_hidden_layers"]):
        for name, out, into in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", ffn, width),
            ("mlp.fc2", width, ffn),
        ):
            found |= linear(f"{start}blocks.{layer}.{name}", out, into)
        for name in ("norm1", "norm2"):
            found |= norm(f"{start}blocks.{layer}.{name}", width)
    found |= norm(f"{start}norm", width)
    start = "blip.text_encoder."
    found |= {
        f"{start}embeddings.position_ids": (1, 512),
        f"{start}embeddings.word_embeddings.weight": (t["vocab_size"], wide),
        f"{start}embeddings.position_embeddings.weight": (512, wide),
    }
    found |= norm(f"{start}embeddings.LayerNorm", wide)
    for layer in range(t["num_hidden_layers"]):
        for kind, source in (("attention", wide), ("crossattention", width)):
            name = f"{start}encoder.layer.{layer}.{kind}"
            found |= linear(f"{name}.self.query", wide, wide)
            found |= linear(f"{name}.self.key", wide, source)
            found |= linear(f"{name}.self.value", wide, source)
            found |= linear(f"{name}.output.dense", wide, wide)
            found |= norm(f"{name}.output.LayerNorm", wide)
        found |= linear(f"{start}encoder.layer.{layer}.intermediate.dense", tffn, wide)
        found |= linear(f"{start}encoder.layer.{layer}.output.dense", wide, tffn)
        found |= norm(f"{start}encoder.layer.{layer}.output.LayerNorm", wide)
    found |= linear("blip.vision_proj", 256, width) | linear("blip.text_proj", 256, wide)
    for place, out, into in ((0, 1024, wide), (2, 128, 1024), (4, 64, 128), (6, 16, 64), (7, 1, 16)):
        found |= linear(f"mlp.layers.{place}", out, into)
    return found


def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def random_state():
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes(TINY).items():
        scale = 1 / shape[-1] ** 0.5 if name.startswith("mlp.") else 0.3
        state[name] = torch.randn(shape, generator=generator) * scale
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    return state


def affine(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def normed(state, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(q, k, v, heads, mask=None):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores = scores if mask is None else scores.masked_fill(mask[:, None, None] == 0, -1e9)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def picture_states(state, pixels):
    start, sizes = "blip.visual_encoder.", TINY["vision"]
    x = F.conv2d(pixels, state[f"{start}patch_embed.proj.weight"], state[f"{start}patch_embed.proj.bias"], stride=16)
    x = torch.cat([state[f"{start}cls_token"].expand(len(pixels), -1, -1), x.flatten(2).mT], 1)
    x = x + state[f"{start}pos_embed"]
    for layer in range(sizes["num_hidden_layers"]):
        name = f"{start}blocks.{layer}."
        q, k, v = affine(state, f"{name}attn.qkv", normed(state, f"{name}norm1", x, 1e-6)).chunk(3, -1)
        x = x + affine(state, f"{name}attn.proj", attend(q, k, v, sizes["num_attention_heads"]))
        y = F.gelu(affine(state, f"{name}mlp.fc1", normed(state, f"{name}norm2", x, 1e-6)))
        x = x + affine(state, f"{name}mlp.fc2", y)
    return normed(state, f"{start}norm", x, 1e-6)


def raw_score(state, pixels, tokens, mask):
    seen, heads = picture_states(state, pixels), TINY["text"]["num_attention_heads"]
    start = "blip.text_encoder.embeddings."
    x = (
        state[f"{start}word_embeddings.weight"][tokens]
        + state[f"{start}position_embeddings.weight"][: tokens.shape[1]]
    )
    x = normed(state, f"{start}LayerNorm", x, 1e-12)
    for layer in range(TINY["text"]["num_hidden_layers"]):
        name = f"blip.text_encoder.encoder.layer.{layer}"
        for kind, source, hidden in (("attention", None, mask), ("crossattention", seen, None)):
            source = x if source is None else source
            q = affine(state, f"{name}.{kind}.self.query", x)
            k, v = (affine(state, f"{name}.{kind}.self.{part}", source) for part in ("key", "value"))
            y = affine(state, f"{name}.{kind}.output.dense", attend(q, k, v, heads, hidden))
            x = normed(state, f"{name}.{kind}.output.LayerNorm", x + y, 1e-12)
        y = affine(state, f"{name}.output.dense", F.gelu(affine(state, f"{name}.intermediate.dense", x)))
        x = normed(state, f"{name}.output.LayerNorm", x + y, 1e-12)
    x = x[:, 0]
    for place in (0, 2, 4, 6, 7):
        x = affine(state, f"mlp.layers.{place}", x)
    return x[:, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("blip")
    torch.save(random_state(), path / "ImageReward.pt")
    (path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def clips():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(2, 3, 40, 57, generator=generator) for _ in PROMPTS]


def reward(folder, **options):
    return ImageReward(str(folder), shape=TINY, tokenizer=str(folder), frames=2, **options)


def test_the_score_is_that_of_the_published_network(folder, clips):
    state = random_state()
    tokens = AutoTokenizer.from_pretrained(folder)(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    assert tokens["input_ids"].shape == (3, 35)
    assert tokens["input_ids"][0, :7].tolist() == [2, 5, 6, 8, 9, 10, 3]
    want = []
    for row, clip in enumerate(clips):
        # 40x57: shorter side to 32, then torchvision's crop of 45 at round(6.5) = 6, half to even
        sized = F.interpolate(clip, (32, 45), mode="bicubic", antialias=True).clamp(0, 1)[..., 6:38]
        x = (sized - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
        raw = raw_score(state, x, *(tokens[k][row : row + 1].expand(2, -1) for k in ("input_ids", "attention_mask")))
        want.append(float(((raw - 0.16717362830052426) / 1.0333394966054072).mean()))
    assert reward(folder)(PROMPTS, clips) == pytest.approx(want, abs=1e-4)
    assert len({round(value, 3) for value in want}) == 3


def test_a_batch_scores_like_single_clips(folder, clips):
    model, prompts, eight = reward(folder), (PROMPTS * 3)[:8], (clips * 3)[:8]
    apart = [model([p], [c])[0] for p, c in zip(prompts, eight, strict=True)]
    assert model(prompts, eight) == pytest.approx(apart, abs=1e-4)


def test_the_full_size_network_takes_the_published_names():
    published = {name: torch.empty(shape, device="meta") for name, shape in shapes(LARGE).items()}
    parts, (vision, text) = from_published(published), blip_configs(LARGE)
    with torch.device("meta"):
        nets = {"vision": BlipVisionModel(vision), "text": BlipTextModel(text, add_pooling_layer=False)}
    for name, net in nets.items():
        assert {k: v.shape for k, v in parts[name].items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert sorted(parts["head"]) == [f"{k}.{kind}" for k in range(5) for kind in ("bias", "weight")]
    assert not parts["rest"]


def test_the_published_constants():
    assert (MEAN, STD, TEXT_LENGTH) == (0.16717362830052426, 1.0333394966054072, 35)
    model = ImageReward()
    assert (model.model, model.file, model.tokenizer) == ("THUDM/ImageReward", "ImageReward.pt", "bert-base-uncased")


def test_errors(tmp_path, folder, clips):
    with pytest.raises(UserError, match=r"does not contain ImageReward\.pt"):
        ImageReward(str(tmp_path)).load()
    torch.save(random_state() | {"blip.extra": torch.zeros(1)}, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match=r"another model: they include blip\.extra"):
        reward(tmp_path).load()
    BertTokenizer(vocab={w: i for i, w in enumerate([*WORDS, *map(str, range(40)), "green"])}).save_pretrained(
        tmp_path
    )
    model = ImageReward(str(folder), shape=TINY, tokenizer=str(tmp_path))
    with pytest.raises(UserError, match="is not BERT's"):
        model(["green"], clips[:1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.backends.cudnn.flags(allow_tf32=False)
@torch.no_grad()
def test_the_gpu_gives_the_same(folder, clips):
    here, there = (reward(folder, device=device)(PROMPTS, clips) for device in ("cpu", "cuda"))
    assert there == pytest.approx(here, abs=1e-3)
