"""VBench's dimensions against straight computations, on networks saved as published."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import ViTConfig

from postgen.errors import UserError
from postgen.rewards import get_reward
from postgen.rewards.clip import open_clip_net
from postgen.rewards.pictures import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, vbench_resize
from postgen.rewards.vbench import (
    AESTHETIC_HEAD,
    AestheticQuality,
    BackgroundConsistency,
    SubjectConsistency,
    consistency,
    dino_positions,
    temporal_flickering,
)
from tests.rewards import open_clip

TINY = open_clip.TINY | {"quick_gelu": True}
WIDTH, HEADS, LAYERS = 16, 2, 2


def dino_shapes():
    """Every weight of the published DINO, under the names of its file."""
    found = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.position_embeddings": (1, 14 * 14 + 1, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, 16, 16),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        "layernorm.weight": (WIDTH,),
        "layernorm.bias": (WIDTH,),
    }
    for k in range(LAYERS):
        at = f"encoder.layer.{k}."
        sizes = {f"attention.attention.{name}": (WIDTH, WIDTH) for name in ("query", "key", "value")}
        sizes |= {
            "attention.output.dense": (WIDTH, WIDTH),
            "intermediate.dense": (64, WIDTH),
            "output.dense": (WIDTH, 64),
        }
        for name, size in sizes.items():
            found |= {f"{at}{name}.weight": size, f"{at}{name}.bias": size[:1]}
        for name in ("layernorm_before", "layernorm_after"):
            found |= {f"{at}{name}.weight": (WIDTH,), f"{at}{name}.bias": (WIDTH,)}
    return found


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    path = tmp_path_factory.mktemp("dino")
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in dino_shapes().items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=64,
        image_size=224,
        patch_size=16,
        layer_norm_eps=1e-12,
    ).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["ViTModel"]}))
    return path, state


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    state = open_clip.random_state(TINY)
    torch.save(state, path / "net.pt")
    open_clip_net(path / "net.pt", TINY).save_pretrained(path)
    return path, state


@pytest.fixture(scope="module")
def clips():
    generator = torch.Generator().manual_seed(1)
    start = torch.rand(1, 3, 60, 84, generator=generator)
    return [start + 0.2 * torch.rand(frames, 3, 60, 84, generator=generator) for frames in (5, 3)]


def cubic(t):
    t = abs(t)
    if t <= 1:
        return 1.25 * t**3 - 2.25 * t**2 + 1
    return -0.75 * t**3 + 3.75 * t**2 - 6 * t + 3 if t < 2 else 0.0


def stretched(grid, rows, columns):
    """Cubic convolution by loops at DINO's sampling points, grid (side,side,D), borders repeated."""
    side = len(grid)
    found = torch.zeros(rows, columns, grid.shape[-1])
    for r in range(rows):
        y = (r + 0.5) * side / (rows + 0.1) - 0.5
        for c in range(columns):
            x = (c + 0.5) * side / (columns + 0.1) - 0.5
            for dy in range(-1, 3):
                for dx in range(-1, 3):
                    v, u = int(y // 1) + dy, int(x // 1) + dx
                    weight = cubic(y - v) * cubic(x - u)
                    found[r, c] += weight * grid[min(max(v, 0), side - 1), min(max(u, 0), side - 1)]
    return found


def dino_features(state, pixels):
    """A vision transformer written out from the published weights."""
    patches = F.conv2d(
        pixels,
        state["embeddings.patch_embeddings.projection.weight"],
        state["embeddings.patch_embeddings.projection.bias"],
        stride=16,
    )
    positions = state["embeddings.position_embeddings"]
    grid = stretched(positions[0, 1:].view(14, 14, WIDTH), *patches.shape[-2:]).flatten(0, 1)
    first = state["embeddings.cls_token"].expand(len(pixels), -1, -1)
    x = torch.cat([first, patches.flatten(2).mT], 1) + torch.cat([positions[0, :1], grid])
    for k in range(LAYERS):
        at = f"encoder.layer.{k}."
        y = norm(state, f"{at}layernorm_before", x)
        q, key, v = (
            affine(state, f"{at}attention.attention.{name}", y).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        y = ((q @ key.mT / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + affine(state, f"{at}attention.output.dense", y)
        y = F.gelu(affine(state, f"{at}intermediate.dense", norm(state, f"{at}layernorm_after", x)))
        x = x + affine(state, f"{at}output.dense", y)
    return norm(state, "layernorm", x)[:, 0]


def affine(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state, name, x):
    return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)


def by_frames(features):
    """The formula of both consistencies, frame by frame."""
    x, total = F.normalize(features, dim=-1), 0.0
    for k in range(1, len(x)):
        total += (max(0.0, float(x[k] @ x[k - 1])) + max(0.0, float(x[k] @ x[0]))) / 2
    return total / (len(x) - 1)


def resized(clip, size, mode):
    levels = (clip.clamp(0, 1) * 255).round()
    return F.interpolate(levels, size, mode=mode, align_corners=False).clamp(0, 255).round() / 255


def norm_pixels(frames, mean, std):
    return (frames - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@torch.no_grad()
def test_subject_consistency(dino, clips):
    path, state = dino
    scores = SubjectConsistency(str(path))(["", ""], clips)
    for clip, score in zip(clips, scores, strict=True):
        pixels = norm_pixels(resized(clip, (224, 313), "bilinear"), IMAGENET_MEAN, IMAGENET_STD)
        assert score == pytest.approx(by_frames(dino_features(state, pixels)), abs=1e-4)
    scaled = SubjectConsistency(str(path), scale=True)(["", ""], clips)
    assert scaled == pytest.approx([(s - 0.1462) / (1 - 0.1462) for s in scores])


def test_a_square_grid_of_positions_stays():
    positions = torch.rand(1, 17, 3)
    assert dino_positions(positions, 4, 4) is positions
    assert dino_positions(positions, 4, 6).shape == (1, 25, 3)


def test_other_grids_are_stretched_by_dinos_factors():
    positions = torch.rand(1, 17, 3)
    for rows, columns in ((4, 6), (7, 4), (3, 9)):
        want = stretched(positions[0, 1:].view(4, 4, 3), rows, columns).flatten(0, 1)
        torch.testing.assert_close(dino_positions(positions, rows, columns)[0, 1:], want, atol=1e-5, rtol=0)


def clip_pixels(clip):
    # 60x84 to 28 px: 39 px wide, cropped at round(5.5) = 6, half to even
    return norm_pixels(resized(clip, (28, 39), "bicubic")[..., 6:34], CLIP_MEAN, CLIP_STD)


@torch.no_grad()
def test_background_consistency(clip_folder, clips):
    path, state = clip_folder
    scores = BackgroundConsistency(str(path))(["", ""], clips)
    want = [by_frames(open_clip.image_features(state, TINY, clip_pixels(clip))) for clip in clips]
    assert scores == pytest.approx(want, abs=1e-4)


@torch.no_grad()
def test_aesthetic_quality(tmp_path, clip_folder, clips, monkeypatch):
    path, state = clip_folder
    monkeypatch.setattr("postgen.rewards.vbench.PASS", 3)
    head = {"weight": torch.randn(1, 12), "bias": torch.tensor([5.0])}
    torch.save(head, tmp_path / "sa_0_4_vit_l_14_linear.pth")
    scores = AestheticQuality(str(path), head=str(tmp_path / "sa_0_4_vit_l_14_linear.pth"))(["", ""], clips)
    want = [
        float(F.linear(open_clip.image_features(state, TINY, clip_pixels(c)), head["weight"], head["bias"]).mean())
        / 10
        for c in clips
    ]
    assert scores == pytest.approx(want, abs=1e-4)
    assert AESTHETIC_HEAD.endswith("sa_0_4_vit_l_14_linear.pth")


def test_temporal_flickering():
    clip = torch.zeros(3, 3, 4, 4)
    clip[1] = 51 / 255
    assert temporal_flickering([""], [clip]) == pytest.approx([1 - 0.2])
    assert temporal_flickering([""], [clip], scale=True) == pytest.approx([(0.8 - 0.6293) / (1 - 0.6293)])
    assert temporal_flickering([""], [clip[:1]]) == [None]


def test_single_frames_are_not_scored(dino, clip_folder, clips):
    for reward in (SubjectConsistency(str(dino[0])), BackgroundConsistency(str(clip_folder[0]))):
        assert reward(["", ""], [clips[0][:1], clips[0]])[0] is None
        frozen = clips[0][:1].expand(4, -1, -1, -1)
        assert reward([""], [frozen]) == pytest.approx([1.0], abs=1e-5)


def test_negative_cosines_count_as_zero():
    assert float(consistency(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))) == 0.0
    assert float(consistency(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]]))) == pytest.approx(0.25)


def test_a_batch_scores_like_single_clips(dino, clip_folder):
    clips = [torch.rand(2 + k % 3, 3, 40, 40, generator=torch.Generator().manual_seed(k)) for k in range(8)]
    for reward in (SubjectConsistency(str(dino[0])), BackgroundConsistency(str(clip_folder[0])), temporal_flickering):
        assert reward([""] * 8, clips) == pytest.approx([reward([""], [c])[0] for c in clips], abs=1e-5)


def test_resizing_keeps_8_bits():
    frames = torch.rand(1, 3, 30, 50)
    levels = vbench_resize(frames, 15, "bicubic") * 255
    assert levels.shape[-2:] == (15, 25)
    assert float((levels - levels.round()).abs().max()) < 1e-3


def test_names_and_errors(tmp_path):
    assert SubjectConsistency().model == "facebook/dino-vitb16"
    assert BackgroundConsistency().model == "openai/clip-vit-base-patch32"
    assert [get_reward(f"vbench_{k}").name for k in ("subject", "background", "flicker", "aesthetic")]
    with pytest.raises(UserError, match="cannot load"):
        SubjectConsistency(str(tmp_path)).load()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.backends.cudnn.flags(allow_tf32=False)
@torch.no_grad()
def test_the_gpu_gives_the_same(dino, clip_folder, clips):
    for cls, (path, _) in ((SubjectConsistency, dino), (BackgroundConsistency, clip_folder)):
        here, there = (cls(str(path), device=device)(["", ""], clips) for device in ("cpu", "cuda"))
        assert there == pytest.approx(here, abs=1e-3)
