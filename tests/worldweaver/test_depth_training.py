"""The method `world_depth`: its renders, views and losses are exact, and it trains, resumes and exports."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from postgen import world
from postgen.errors import UserError
from postgen.train import main
from postgen.training import load_recipe
from postgen.world.camera import FOCAL, camera_path
from postgen.worldweaver import depth_rooms
from postgen.worldweaver.depth_loss import (
    affine_difference,
    difference_losses,
    known_difference,
    relative_loss,
)
from postgen.worldweaver.depth_net import WorldDepth
from postgen.worldweaver.depth_textures import Textures, make_textures
from postgen.worldweaver.depth_training import WorldDepthConfig, WorldDepthTrainer
from postgen.worldweaver.depth_views import photographed, seen

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TINY = {
    "method": "world_depth",
    "sizes": [32],
    "frames": 2,
    "pool_size": 32,
    "pool_clips": 2,
    "room_clips": 2,
    "textures": 4,
    "eval_clips": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 2e-3,
    "max_steps": 2,
    "eval_steps": 2,
    "save_steps": 1,
    "logging_steps": 1,
    "disable_tqdm": True,
    "report_to": "none",
    "device": "cpu",
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(folder, **more):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**TINY, "output_dir": str(folder / "run"), **more}))
    assert main([str(path)]) == 0
    return folder / "run"


def test_a_room_like_a_scene_has_the_depth_of_the_scene():
    body = world.Body(colour="red", shape="cylinder", position=(0.4, 0.2, 0.9))
    spec = world.Spec(bodies=(body,), camera="orbit left", camera_amount=0.3, num_frames=3)
    want = world.render([spec], size=24).depth_BFHW
    eye, look = camera_path(spec, 0, 3)
    many = (1, depth_rooms._GROUPS, depth_rooms._SOLIDS)
    centres = torch.full((1, 3, *many[1:], 3), 1e3)
    centres[:, :, 0, 0] = torch.tensor(world.render([spec], size=8).positions_BFK3[0, :, 0].tolist())
    planes = torch.tensor([[0.0, 0, 1, 0]] + [[0.0, -1, 0, -1e5]] * 4)[None]
    # A scene of twice the size under a map that halves space equals the original scene.
    maps = torch.eye(3).expand(1, many[1], 3, 3).clone()
    maps[0, 0] *= 0.5
    room = depth_rooms._Room(
        *(eye[None], look[None], torch.tensor([FOCAL]), planes, maps, centres),
        *(torch.full(many, 0.3), torch.full(many, 2), torch.tensor([[0.0, 0, 1]])),
        *(torch.zeros(1, 23, dtype=torch.long), torch.ones(1, 23), torch.ones(1, 23, 3), torch.ones(1, 23)),
        torch.zeros(1),
    )
    _, disparity = depth_rooms._render(room, 24, None)
    torch.testing.assert_close(disparity, 1 / want[0], atol=1e-5, rtol=1e-4)


def test_rooms_follow_from_their_generator():
    textures = make_textures(4, None, seeded())
    rgb, disparity = depth_rooms.rooms(3, 2, 16, textures, seeded(1))
    assert rgb.shape == (3, 2, 3, 16, 16)
    assert disparity.shape == (3, 2, 16, 16)
    again = depth_rooms.rooms(3, 2, 16, textures, seeded(1))
    assert torch.equal(rgb, again[0])
    assert torch.equal(disparity, again[1])
    assert disparity.isfinite().all()
    assert (disparity.flatten(1).amax(1) > disparity.flatten(1).amin(1)).all()


def test_textures_are_looked_up_where_they_are():
    picture = torch.rand(2, 3, 128, 128, generator=seeded())
    textures = Textures(picture)
    place = (torch.arange(128) + 0.5) / 64
    u, v = place[None].expand(128, -1), place[:, None].expand(-1, 128)
    number, fine = torch.ones(128, 128, dtype=torch.long), torch.zeros(128, 128)
    assert torch.equal(textures.look_up(number, u, v, fine), picture[1])
    # Beyond its edge a texture is mirrored. From far away it is its mean, up to the coarsest level of 32 pixels.
    assert torch.equal(textures.look_up(number, 4 - u, v, fine), picture[1])
    far = textures.look_up(number, u, v, fine + 9)
    torch.testing.assert_close(far.mean((1, 2)), picture[1].mean((1, 2)), atol=1e-3, rtol=0)


def test_photos_of_a_folder_are_worn(tmp_path):
    with pytest.raises(UserError, match="has no pictures"):
        make_textures(2, tmp_path, seeded())
    Image.new("RGB", (40, 30), (51, 102, 204)).save(tmp_path / "plain.png")
    worn = make_textures(2, tmp_path, seeded())
    assert len(worn) == 4
    zero = torch.zeros(1)
    colour = worn.look_up(torch.tensor([3]), zero, zero, zero)[:, 0]
    torch.testing.assert_close(colour, torch.tensor([0.2, 0.4, 0.8]))


def test_views_keep_picture_and_disparity_together():
    ramp = torch.linspace(0.2, 0.8, 64) + torch.linspace(0, 0.15, 64)[:, None]
    disparity = ramp.expand(16, 2, 64, 64)
    pictures, maps = seen(ramp.expand(16, 2, 3, 64, 64), disparity, 32, seeded())
    zoom = (maps / pictures[:, :, 0])[..., 4:-4, 4:-4]
    # Each clip has one zoom factor, 1 to 1.8, and disparity is multiplied by it: larger means nearer.
    factor = zoom.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(zoom, factor.expand_as(zoom), atol=0.03, rtol=0)
    assert 4 <= (factor > 1.05).sum() <= 12
    assert factor.max() <= 1.82
    across = pictures[:, 0, 0, 4:-4, 4:-4].diff(dim=-1).mean((1, 2))
    assert 4 <= (across > 0).sum() <= 12
    # Enlarging the ramp by the factor divides its slope by the factor.
    torch.testing.assert_close(across.abs() * factor.flatten(), across.abs().max().expand(16), atol=0, rtol=0.02)


def test_photographed_clips_change_in_part_and_as_a_whole():
    clips = torch.rand(40, 1, 3, 16, 16, generator=seeded()).expand(-1, 2, -1, -1, -1)
    assert torch.equal(photographed(clips, 0.0, seeded()), clips)
    changed = photographed(clips, 0.5, seeded())
    same = (changed == clips).flatten(1).all(1)
    assert 10 <= same.sum() <= 30
    assert changed.min() >= 0
    assert changed.max() <= 1
    # All frames of a clip have the same change of colour, and differ only by noise.
    assert changed.diff(dim=1).mean((1, 2, 3, 4)).abs().max() < 0.01


def test_losses_know_scale_and_shift_only_where_they_are_known():
    true, other = torch.rand(2, 3, 5, 16, 16, generator=seeded()).unbind()
    assert affine_difference(3 * true + 7, true).abs().max() < 1e-4
    torch.testing.assert_close(affine_difference(5 * other - 2, true), affine_difference(other, true))
    # Differences are in units of the spread of the truth: the same scale and shift of both clips changes nothing, and
    # a shift of the estimate alone does.
    known = known_difference(other, true)
    torch.testing.assert_close(known_difference(5 * other - 2, 5 * true - 2), known)
    spread = (true - true.flatten(1).median(1).values.view(-1, 1, 1, 1)).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(known_difference(true + spread, true), torch.ones_like(true))
    assert relative_loss(true + 0.05, true) == pytest.approx(float((0.05 / (true + 0.05)).mean()))
    assert relative_loss(true[:0], true[:0]) == 0


def test_losses_of_a_difference_by_hand():
    ramp = torch.arange(16.0).expand(2, 3, 16, 16)
    value, outline, steady = difference_losses(ramp)
    # At the four scales neighbours differ by 1, 2, 4 and 8.
    assert (value, outline, steady) == (7.5, 15 / 4, 0)
    assert difference_losses(torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 16, 16))[1:] == (0, 1)
    assert difference_losses(ramp[:, :1])[2] == 0
    # A clip has one scale, so another scale in one frame is an error of the change between frames.
    flickers = ramp * torch.tensor([1, 1.2, 1]).view(3, 1, 1)
    assert difference_losses(affine_difference(flickers, ramp))[2] > 0.1


def test_shipped_recipe_is_read():
    trainer, config = load_recipe(RECIPES / "world-depth.yaml", ["--pipeline", str(RECIPES)])
    assert trainer is WorldDepthTrainer
    assert config.sizes == [64, 96, 128, 160]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sizes": [16]}, "sizes.*at least 32"),
        ({"frames": 18}, r"frames.*1\.\.17"),
        ({"room_share": 1.5}, r"room_share.*0\.\.1"),
        ({"photos": "nowhere"}, "photos.*a folder"),
        ({"per_device_train_batch_size": 1}, "room_share is 0.5.* with which 1 samples include both rooms and scenes"),
        ({"eval_clips": 0}, "eval_clips.*at least 1"),
        ({"steady_weight": -1.0}, "steady_weight.*at least 0"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, values, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**TINY, "output_dir": str(tmp_path), **values}))
    with pytest.raises(UserError, match=message):
        load_recipe(path)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_scenes_alone_and_rooms_alone(tmp_path, share):
    words = {key: value for key, value in TINY.items() if key != "method"} | {"room_share": share, "max_steps": 1}
    words |= {"output_dir": str(tmp_path / "run"), "eval_steps": 0}
    WorldDepthTrainer(WorldDepthConfig(**words)).train()
    with pytest.raises(UserError, match=f"pipeline {tmp_path} is not the folder of a diffusers pipeline"):
        WorldDepthTrainer(
            WorldDepthConfig(**{**words, "output_dir": str(tmp_path), "pipeline": str(tmp_path)})
        ).train()
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert (row["relative"] > 0) is (share == 0)
    assert row["value"] > 0


def test_training_resumes_bit_by_bit_and_exports_a_source(tmp_path, tiny_wan):
    (tmp_path / "other").mkdir()
    pipeline = {"pipeline": str(tiny_wan), "reconstructions": 1}
    whole = run(tmp_path, **pipeline)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert all(math.isfinite(loss) for loss in losses)
    last = next(row for row in rows if "eval_abs_rel" in row)
    assert 0 < last["eval_abs_rel"] < 2
    assert -1 <= last["eval_rank"] <= 1
    resumed = run(tmp_path / "other", **pipeline, resume_from_checkpoint=str(whole / "checkpoint-1"))
    exports = [folder / "export" / "diffusion_pytorch_model.safetensors" for folder in (whole, resumed)]
    assert exports[0].read_bytes() == exports[1].read_bytes()
    disparity = WorldDepth(whole / "export")(torch.zeros(2, 32, 32, 3))
    assert disparity.shape == (2, 32, 32)
    assert disparity.isfinite().all()
