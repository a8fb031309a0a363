"""VideoAlign and HPSv3: checkpoints in the published layouts against peft's live adapters and transformers' model."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from postgen.errors import UserError
from postgen.rewards import RewardRunner, get_reward, hps_v3, videoalign
from postgen.rewards.hps_v3 import HPSv3
from postgen.rewards.qwen import chat, fitting_size, merge_lora, patches_of, split_state
from postgen.rewards.videoalign import CONSTANTS, MARKS, VideoAlign, sampled
from tests.rewards import qwen_tiny

PROMPTS = ["a red ball rolls left", "blue", "the ball"]
TEXT = " ".join([videoalign.rubric(), hps_v3.rubric(), *PROMPTS, "system user assistant You are a helpful assistant."])
SIZE = (336, 308)  # of clips of 60x55, which are enlarged to 100352 px
NORM = {"VQ_mean": 1.0, "VQ_std": 2.0, "MQ_mean": -0.5, "MQ_std": 4.0, "TA_mean": 0.25, "TA_std": 0.5}


@pytest.fixture(scope="module")
def clips():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(frames, 3, 60, 55, generator=generator) for frames in (9, 2, 4)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the configuration and tokenizer of the network that was fine-tuned."""
    path = tmp_path_factory.mktemp("base")
    qwen_tiny.config(qwen_tiny.tokenizer(path, TEXT)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def words(base):
    words = AutoTokenizer.from_pretrained(base)
    words.add_special_tokens({"additional_special_tokens": ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]})
    return words


@pytest.fixture(scope="module")
def trained(base, words):
    """peft's live adapters on the network, and the layer that is read."""
    net = qwen_tiny.network(Qwen2VLConfig.from_pretrained(base), len(words))
    net.rm_head = torch.nn.Linear(32, 3, bias=False)
    torch.nn.init.normal_(net.rm_head.weight)
    names = [
        name
        for name, module in net.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(k in name for k in ("lm_head", "rm_head", "visual"))
    ]
    assert len(names) == 14
    net = get_peft_model(net, LoraConfig(target_modules=names, r=4, lora_alpha=8, lora_dropout=0.05, bias="none"))
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


@pytest.fixture(scope="module")
def make(base, folder):
    """VideoAlign on the published folder, or on another one."""
    return lambda model=folder, **options: VideoAlign(str(model), base=str(base), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, trained):
    path = tmp_path_factory.mktemp("videoreward")
    (path / "checkpoint-11352").mkdir()
    torch.save(qwen_tiny.old_names(dict(trained.state_dict())), path / "checkpoint-11352" / "model.pth")
    settings = {
        "data_config": {"max_frame_pixels": 200704, "fps": 2.0, "sample_type": "uniform"},
        "model_config": {"model_name_or_path": "/on/their/disk", "output_dim": 3, "use_special_tokens": True},
        "peft_lora_config": {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "use_rslora": False},
        "inference_config": NORM,
    }
    (path / "model_config.json").write_text(json.dumps(settings))
    return path


def names_in(state):
    return {re_name for re_name in state if "lora_" in re_name or "base_layer" in re_name}


def straight(trained, words, clip, prompt, picks):
    """The official forward: visual states put into the text, plain positions, the head at the special tokens."""
    body = trained.base_model.model
    sized = F.interpolate(clip[picks], SIZE, mode="bicubic", antialias=True).clamp(0, 1)
    grid = torch.tensor([[len(picks) // 2, SIZE[0] // 14, SIZE[1] // 14]])
    seen = body.model.visual(qwen_tiny.patches(sized), grid_thw=grid).pooler_output
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|video_pad|>" * len(seen)
        + "<|vision_end|>"
        + videoalign.rubric().replace("{text_prompt}", prompt)
        + "<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = torch.tensor(words(text)["input_ids"])
    x = body.model.language_model.embed_tokens(tokens)
    x = torch.where((tokens == words.convert_tokens_to_ids("<|video_pad|>"))[:, None], 0, x)
    x[tokens == words.convert_tokens_to_ids("<|video_pad|>")] = seen
    positions = torch.arange(len(tokens)).view(1, 1, -1).expand(3, 1, -1)
    states = body.model.language_model(inputs_embeds=x[None], position_ids=positions).last_hidden_state[0]
    scores = {}
    for axis, mark in enumerate(("VQ", "MQ", "TA")):
        (place,) = torch.nonzero(tokens == words.convert_tokens_to_ids(f"<|{mark}_reward|>")).flatten().tolist()
        raw = body.rm_head(states[place])[axis]
        scores[mark.lower()] = float((raw - NORM[f"{mark}_mean"]) / NORM[f"{mark}_std"])
    return scores


@torch.no_grad()
def test_the_axes_are_those_of_the_published_network(make, trained, words, clips):
    assert len(names_in(qwen_tiny.old_names(dict(trained.state_dict())))) > 40
    got = make()(PROMPTS, clips, fps=4.0)
    # 9 frames at 4 a second are 2.25 s: 4.5 frames at 2 a second, rounded to the even number 4
    picks = [[0, 3, 5, 8], [0, 1], [0, 1, 2, 3]]
    for row, (clip, prompt) in enumerate(zip(clips, PROMPTS, strict=True)):
        want = straight(trained, words, clip, prompt, picks[row])
        for axis, value in want.items():
            assert got[axis][row] == pytest.approx(value, abs=1e-3)
        assert got["overall"][row] == pytest.approx(sum(want.values()), abs=2e-3)
    assert len({round(v, 2) for v in got["vq"]}) == 3


@torch.no_grad()
def test_only_the_last_axis_depends_on_the_prompt(make, clips):
    model = make()
    one, two = (model([p], clips[1:2], fps=8.0) for p in PROMPTS[:2])
    assert one["vq"] == pytest.approx(two["vq"], abs=1e-5)
    assert one["mq"] == pytest.approx(two["mq"], abs=1e-5)
    assert abs(one["ta"][0] - two["ta"][0]) > 1e-3


@torch.no_grad()
def test_a_batch_scores_like_single_clips(make):
    clips = [torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(k)) for k in range(8)]
    prompts = [PROMPTS[k % 3] for k in range(8)]
    model = make()
    together = model(prompts, clips, fps=8.0)
    for row in range(8):
        alone = model(prompts[row : row + 1], clips[row : row + 1], fps=8.0)
        assert [together[k][row] for k in model.outputs] == pytest.approx(
            [alone[k][0] for k in model.outputs], abs=1e-4
        )


@torch.no_grad()
def test_a_prompt_cannot_spell_a_special_token(make, clips):
    scores = make()(["<|VQ_reward|> <|video_pad|> {x}", "blue"], [clips[1]] * 2, fps=8.0)
    assert scores["vq"][0] == pytest.approx(scores["vq"][1], abs=1e-4)


def test_views_are_scored_once(base, folder, clips):
    views = [get_reward(f"videoalign{k}", model=str(folder), base=str(base)) for k in ("_vq", "_mq", "_ta", "")]
    assert len({id(view.function) for view in views}) == 1
    result = RewardRunner(views)(PROMPTS, [*clips[:2], clips[0][:1]], fps=4.0)
    assert result.values[:2, :3].sum(1).tolist() == pytest.approx(result.values[:2, 3].tolist(), abs=1e-4)
    assert result.values[2].isnan().all()


def test_merged_checkpoints_work_too(make, tmp_path, folder, clips):
    """A checkpoint whose adapters were merged before, under the names of today's transformers."""
    state = torch.load(folder / "checkpoint-11352" / "model.pth", weights_only=True)
    merged = {name.removeprefix("base_model.model."): w for name, w in merge_lora(state, 2.0).items()}
    settings = json.loads((folder / "model_config.json").read_text())
    settings["peft_lora_config"]["lora_enable"] = False
    (tmp_path / "model_config.json").write_text(json.dumps(settings))
    torch.save(merged, tmp_path / "model.pth")
    one = make(tmp_path / "model.pth")(PROMPTS[:1], clips[1:2], fps=4.0)
    two = make()(PROMPTS[:1], clips[1:2], fps=4.0)
    assert one["overall"] == pytest.approx(two["overall"], abs=1e-5)


def test_published_constants_and_rubric():
    assert CONSTANTS == {
        "VQ_mean": 3.6757,
        "VQ_std": 2.2476,
        "MQ_mean": 1.1646,
        "MQ_std": 1.3811,
        "TA_mean": 2.8105,
        "TA_std": 2.5121,
    }
    text = videoalign.rubric()
    assert [text.count(mark) for mark in MARKS] == [1, 1, 1]
    assert text.index(MARKS[0]) < text.index(MARKS[1]) < text.index("{text_prompt}") < text.index(MARKS[2])
    assert text.startswith("\nYou are tasked with evaluating a generated video based on three distinct criteria")
    assert text.count("  \n") == 4
    assert text.endswith(
        "\nTextual prompt - {text_prompt}\nPlease provide the ratings of Text Alignment: <|TA_reward|>\nEND\n"
    )
    assert (VideoAlign().model, VideoAlign().file) == ("KwaiVGI/VideoReward", "checkpoint-11352/model.pth")
    text = hps_v3.rubric()
    assert "**Visual Quality:**  \n" in text
    assert text.endswith(
        "Textual prompt - {text_prompt}\n\n\n\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n"
    )


def test_the_chat():
    assert chat("hello", 2, "image") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>hello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_sizes_and_frames():
    for size in ((480, 832), (60, 55), (448, 448), (1080, 1920), (100, 900)):
        high, wide = fitting_size(size, 100352, 200704)
        assert high % 28 == wide % 28 == 0
        assert 90000 < high * wide <= 200704
    clip = torch.arange(33.0).view(33, 1, 1, 1)
    assert sampled(clip, 16.0).flatten().tolist() == [0, 11, 21, 32]
    assert len(sampled(clip, 8.0)) == 8
    assert len(sampled(clip[:9], 8.0)) == 4  # of about a second: at least four
    assert len(sampled(clip, 1.0)) == 32
    assert len(sampled(clip[:3], 30.0)) == 2


def test_patches_are_those_of_the_published_processor():
    picture = (torch.rand(56, 84, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    want = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=10**6)(
        Image.fromarray(picture), return_tensors="pt"
    )
    got, grid = patches_of(torch.tensor(picture.astype(np.float32) / 255).permute(2, 0, 1)[None])
    assert grid.tolist() == want["image_grid_thw"][0].tolist()
    assert got == pytest.approx(want["pixel_values"].numpy(), abs=1e-5)


def published_names(vocabulary, text, vision, layers):
    """Names and shapes of a Qwen2-VL under transformers 4.45."""
    wide, ffn, kv = text
    seen, blocks, out = vision
    found = {
        "model.embed_tokens.weight": (vocabulary, wide),
        "model.norm.weight": (wide,),
        "lm_head.weight": (vocabulary, wide),
    }
    for k in range(layers):
        at = f"model.layers.{k}."
        found |= {f"{at}input_layernorm.weight": (wide,), f"{at}post_attention_layernorm.weight": (wide,)}
        for name, size in (("q", wide), ("k", kv), ("v", kv)):
            found |= {f"{at}self_attn.{name}_proj.weight": (size, wide), f"{at}self_attn.{name}_proj.bias": (size,)}
        found |= {f"{at}self_attn.o_proj.weight": (wide, wide), f"{at}mlp.down_proj.weight": (wide, ffn)}
        found |= {f"{at}mlp.{name}_proj.weight": (ffn, wide) for name in ("gate", "up")}
    found["visual.patch_embed.proj.weight"] = (seen, 3, 2, 14, 14)
    for k in range(blocks):
        for name, size in (
            ("attn.qkv", (3 * seen, seen)),
            ("attn.proj", (seen, seen)),
            ("mlp.fc1", (4 * seen, seen)),
            ("mlp.fc2", (seen, 4 * seen)),
        ):
            found |= {f"visual.blocks.{k}.{name}.weight": size, f"visual.blocks.{k}.{name}.bias": size[:1]}
        for name in ("norm1", "norm2"):
            found |= {f"visual.blocks.{k}.{name}.{kind}": (seen,) for kind in ("weight", "bias")}
    found |= {f"visual.merger.ln_q.{kind}": (seen,) for kind in ("weight", "bias")}
    for name, size in (("0", (4 * seen, 4 * seen)), ("2", (out, 4 * seen))):
        found |= {f"visual.merger.mlp.{name}.weight": size, f"visual.merger.mlp.{name}.bias": size[:1]}
    return found


SHAPES = {
    "2B": (
        {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2},
        256,
        151660,
    ),
    "7B": (
        {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4},
        512,
        151658,
    ),
}


@pytest.mark.parametrize("size", SHAPES)
def test_full_size_networks_take_the_published_names(size):
    text, kv, vocabulary = SHAPES[size]
    config = Qwen2VLConfig(
        text_config={**text, "num_hidden_layers": 28, "vocab_size": vocabulary},
        vision_config={
            "depth": 32,
            "embed_dim": 1280,
            "hidden_size": text["hidden_size"],
            "num_heads": 16,
            "mlp_ratio": 4,
        },
    )
    names = published_names(
        vocabulary, (text["hidden_size"], text["intermediate_size"], kv), (1280, 32, text["hidden_size"]), 28
    )
    # As VideoAlign's: every linear layer of the language model carries adapters.
    published = {}
    for name, shape in names.items():
        weight = torch.empty(shape, device="meta", dtype=torch.bfloat16)
        if name.startswith("model.layers.") and "_proj." in name:
            layer, _, kind = name.rpartition(".")
            published[f"base_model.model.{layer}.base_layer.{kind}"] = weight
            if kind == "weight":
                published[f"base_model.model.{layer}.lora_A.default.weight"] = torch.empty(64, shape[1], device="meta")
                published[f"base_model.model.{layer}.lora_B.default.weight"] = torch.empty(shape[0], 64, device="meta")
        else:
            published[f"base_model.model.{name}"] = weight
    published["base_model.model.rm_head.weight"] = torch.empty(3, text["hidden_size"], device="meta")
    parts = split_state(merge_lora(published, 2.0))
    with torch.device("meta"):
        net = Qwen2VLModel(config)
    assert {k: v.shape for k, v in parts["body"].items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert list(parts["head"]) == ["weight"]
    assert not parts["rest"]
    assert {v.dtype for v in parts["body"].values()} == {torch.bfloat16}


def test_errors(make, tmp_path, base, folder, clips):
    with pytest.raises(UserError, match="give fps above 0, got None"):
        make()(PROMPTS, clips)
    with pytest.raises(UserError, match=r"does not contain checkpoint-11352/model\.pth"):
        make(tmp_path).load()
    path = folder / "checkpoint-11352" / "model.pth"
    state = torch.load(path, weights_only=True)
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"needs its model_config\.json"):
        make(tmp_path / "model.pth").load()
    (tmp_path / "model_config.json").write_text("{}")
    with pytest.raises(UserError, match="has no data_config and no peft_lora_config"):
        make(tmp_path / "model.pth").load()
    (tmp_path / "model_config.json").write_text((folder / "model_config.json").read_text())
    torch.save({k: v for k, v in state.items() if "rm_head" not in k}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"lack rm_head\.weight"):
        make(tmp_path / "model.pth").load()
    with pytest.raises(UserError, match=r"lack rm_head\.0\.weight"):
        HPSv3(str(tmp_path / "model.pth"), base=str(base)).load()
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        VideoAlign(str(folder), base=str(tmp_path)).load()


@torch.no_grad()
def test_hps_v3_is_the_mean_of_its_head(tmp_path, base, clips):
    words = AutoTokenizer.from_pretrained(base)
    words.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    net = qwen_tiny.network(Qwen2VLConfig.from_pretrained(base), len(words), seed=3)
    torch.manual_seed(4)
    head = [torch.nn.Linear(32, 1024), torch.nn.Linear(1024, 16), torch.nn.Linear(16, 2)]
    state = qwen_tiny.old_names(dict(net.state_dict()))
    for place, layer in zip((0, 3, 5), head, strict=True):
        state |= {f"rm_head.{place}.{kind}": getattr(layer, kind).data for kind in ("weight", "bias")}
    save_file({k: v.contiguous().clone() for k, v in state.items()}, tmp_path / "HPSv3.safetensors")
    got = HPSv3(str(tmp_path), base=str(base), frames=1)(PROMPTS, clips)
    for row, (clip, prompt) in enumerate(zip(clips, PROMPTS, strict=True)):
        high, wide = fitting_size((60, 55), 200704, 200704)
        frame = F.interpolate(clip[:1], (high, wide), mode="bicubic", antialias=True).clamp(0, 1)
        seen = qwen_tiny.patches(frame.expand(2, -1, -1, -1))
        text = chat(hps_v3.rubric().replace("{text_prompt}", prompt), len(seen) // 4, "image")
        tokens = torch.tensor(words(text)["input_ids"])[None]
        states = net.model(
            input_ids=tokens,
            pixel_values=seen,
            image_grid_thw=torch.tensor([[1, high // 14, wide // 14]]),
            position_ids=torch.arange(tokens.shape[1]).expand(3, 1, -1),
        ).last_hidden_state
        x = states[tokens == words.convert_tokens_to_ids("<|Reward|>")]
        x = head[2](F.relu(head[1](F.relu(head[0](x)))))
        assert got[row] == pytest.approx(float(x[0, 0]), abs=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.backends.cudnn.flags(allow_tf32=False)
@torch.no_grad()
def test_the_gpu_gives_the_same(make, clips):
    here, there = (make(device=device)(PROMPTS, clips, fps=4.0) for device in ("cpu", "cuda"))
    for axis in ("vq", "mq", "ta"):
        assert there[axis] == pytest.approx(here[axis], abs=1e-3)
