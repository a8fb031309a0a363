"""Placed memory in training: equal to that of rollouts, no effect at first, and saved with the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.worldweaver import load_arm, make_clips
from postgen import world
from postgen.errors import UserError
from postgen.families import denoiser_for
from postgen.worldweaver.adapter import load_adapter
from postgen.worldweaver.depth import DisparityRange
from postgen.worldweaver.embedding import LevelEmbedder
from postgen.worldweaver.levels import FrameLevels
from postgen.worldweaver.memory import MemoryBank
from postgen.worldweaver.model import WorldWeaverModel
from postgen.worldweaver.placed import PlacedMemory
from postgen.worldweaver.placed_clips import Placing, disturbed, sights_of
from postgen.worldweaver.placed_rollout import PlacedRollout, check_streams
from postgen.worldweaver.rollout import Step
from postgen.worldweaver.sights import gathered
from postgen.worldweaver.state import RolloutState
from postgen.worldweaver.trainer import WorldWeaverTrainer
from postgen.worldweaver.widen import widen_transformer
from postgen.worldweaver.window_config import WindowConfig
from postgen.worldweaver.windows import Layout, Windows
from tests.families.test_frame_levels import MAKERS
from tests.families.tiny_pipelines import tiny_pipeline
from tests.worldweaver.oracle import Mixer, Oracle, begun, rollout, schedule
from tests.worldweaver.test_trainer import same, says, state_of
from tests.worldweaver.training import log_of, settings, trained

PLACED: dict[str, Any] = {"placed_memory": True, "max_steps": 1, "pool_clips": 2, "num_frames": 29, "height": 32}
PLACED |= {"width": 32, "no_memory_share": 0.0, "first_frame_share": 0.0, "fill_share": 0.0, "placed_drop_share": 0.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> WorldWeaverTrainer:
    """Return a run with placed memory. Tests must not change it."""
    return trained(tmp_path_factory.mktemp("run"), **PLACED)


class Scenes:
    """Latents of two scenes for a tiny model, with depth pictures and exact depth."""

    def __init__(self) -> None:
        pipe = MAKERS["Wan"]()
        widen_transformer(pipe, placed=True)
        self.model = WorldWeaverModel(denoiser_for(pipe), LevelEmbedder.for_transformer(pipe), latent_scale=[1, 0.5])
        specs = [world.sample_long(seed, num_frames=45) for seed in (3, 4)]
        frames = world.render(specs, num_frames=45, size=32)
        disparity = frames.disparity_BFHW
        self.limits = DisparityRange.of(disparity)
        self.poses = frames.pose_BF34[:, ::4]
        with torch.no_grad():
            rgb = self.model.encode(frames.rgb_BF3HW)
            depth = self.model.denoiser.encode_video(self.limits.picture(disparity))
        # A model with random weights would predict grey depth pictures, so the video has the encoded true disparity.
        self.video = torch.cat([rgb, 0.5 * depth], 1)
        self.depth, self.exact = depth, frames.depth_BFHW[:, ::4]


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes()


@pytest.mark.parametrize("warp", [True, False])
def test_training_is_told_what_a_rollout_is_told(scenes: Scenes, warp: bool) -> None:
    """In every shift of a rollout of a known video, placed memory is bitwise that of the training window."""
    config = WindowConfig(
        causal_block_size=2, groups=3, num_inference_steps=6, history_sizes=[3, 2], placed_memory=True,
        placed_warp=warp, mem_noise=0.0,
    )  # fmt: skip
    model, video, poses = scenes.model, scenes.video, scenes.poses
    placing = Placing(ahead=6, warp=warp, depth_noise=0.0)
    sights = placing.sights(model, scenes.depth, scenes.limits, poses, range(2))
    placed = PlacedRollout(model, lambda start, stop: poses[:, start:stop], scenes.limits, mem_noise=0.0, warp=warp)
    told: list[Tensor | None] = []

    def extras(start: int, stop: int) -> dict[str, Tensor]:
        found = placed.extras(start, stop)
        told.append(found.get("placed"))
        return found

    oracle = Oracle(video)
    made = rollout(oracle, extras=extras)
    state = oracle.state = begun(made, rows=2, bank=config.bank(), num_latents=12, shape=tuple(video[0, :, 0].shape))

    def exact(step: Step) -> Tensor:
        """Replace clean latents by the exact video, to remove the rounding of the oracle."""
        z, at = step.latents.clone(), step.start_frame
        done = step.index == 5
        z[:, :, done] = video[:, :, at : at + len(step.index)][:, :, done]
        return z

    for _ in made.groups(state, on_step=exact, on_group=placed.on_group):
        pass
    windows = Windows(config, schedule(6), 12)
    shifts, masks = list(windows.segments.shifts(6)), []
    assert len(told) == len(shifts)
    for shift, found in zip(shifts, told, strict=True):
        layout = Layout(ages=shift.ages, start=2 * shift.oldest)
        window = windows.at(layout, video, 0.0, torch.zeros(2), None, sights)
        if found is None:
            assert layout.start == 0
            assert window.placed is None
            continue
        assert window.placed is not None
        assert torch.equal(window.placed.noised(torch.Generator()), found)
        masks.append(found[:, -1].mean())
    assert 0.05 < torch.stack(masks).mean() <= 1


def test_sights_are_those_of_the_memory(scenes: Scenes) -> None:
    """With exact depth, batch rows are independent, and gathered latents equal those that `read` returns."""
    video, depth, poses = scenes.video, scenes.exact, scenes.poses
    grid = tuple(video.shape[-2:])
    sights = sights_of(depth, poses, grid, 2)  # type: ignore[arg-type]
    alone = sights_of(depth[1:], poses[1:], grid, 2)  # type: ignore[arg-type]
    assert torch.equal(sights[1:], alone)
    memory = PlacedMemory(mem_noise=0.0)
    memory.add(video[:, :, :7], depth[:, :7], poses[:, :7], 0)
    seen = gathered(video, sights[:, 7])
    read = memory.read(poses[:, 7:9], 7)
    assert read is not None
    assert torch.equal(seen, read)
    assert 0.3 < seen[:, -1].mean() < 1
    assert (sights[:, 0, :, 0] == -1).all()
    assert sights[:, 7, :, 0].max() == 6
    # Without warping, all cells come from one frame.
    whole = sights_of(depth, poses, grid, 2, warp=False)[:, 7]  # type: ignore[arg-type]
    for row in range(2):
        source = whole[row, 0, 0].unique()
        assert len(source) == 1
        assert torch.equal(gathered(video, whole)[row, :-1, 0], video[row, :, int(source)])


def test_it_begins_as_nothing(tmp_path: Path, run: WorldWeaverTrainer) -> None:
    """The new weight columns are zero, so the first loss equals that without placed memory; training changes them."""
    plain = trained(tmp_path / "plain", **PLACED | {"placed_memory": False})
    assert plain.pool.sights is None
    losses = [
        {key: row[key] for key in row if "loss" in key}
        for row in (log_of(each.args.folder)[0] for each in (run, plain))
    ]
    assert losses[0].keys() >= {"rgb_loss", "depth_loss"}
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    weight = run.unwrap("worldweaver").transformer.patch_embedding.weight
    assert weight.shape[1] == 8 + 9
    assert weight[:, 8:].flatten(2).any(2).any(0).all()


def test_rows_and_blocks_are_left_out(run: WorldWeaverTrainer) -> None:
    layout, video = Layout(ages=(2, 1, 0), start=4), torch.ones(2000, 2, 8, 4, 4)
    sights = torch.zeros(2000, 8, 3, 3, 4, 4)
    made = Windows(settings(**PLACED | {"placed_drop_share": 0.2}), schedule(6), 8)
    window = made.draw(layout, video, torch.Generator().manual_seed(0), sights=sights)
    assert window.placed is not None
    mask = window.placed.clean[:, -1]
    assert torch.equal(mask[:, :1].expand_as(mask), mask)
    assert torch.equal(window.placed.clean[:, :-1], mask[:, None].expand(-1, 2, -1, -1, -1))
    share = mask[:, 0].mean((1, 2))
    # `placed_drop_share` .2, and the .1 of `drop_share` whose depth is unknown.
    assert float((share == 0).float().mean()) == pytest.approx(0.28, abs=0.03)
    assert float(share[share > 0].mean()) == pytest.approx(0.75, abs=0.03)
    assert float(window.placed.level.max()) == pytest.approx(0.3, abs=0.01)
    noised = window.placed.noised(torch.Generator().manual_seed(0))
    assert torch.equal(noised[:, 1:], window.placed.clean[:, 1:])
    assert not noised[:, :1][mask[:, None] == 0].any()


def test_depth_is_disturbed_by_the_clip() -> None:
    depth = torch.full((400, 2, 16, 16), 8.0)
    made = disturbed(depth, 0.1, range(400))
    error = (made / depth).log()
    assert torch.equal(disturbed(depth[7:8], 0.1, [7]), made[7:8])
    amount = error.flatten(1).std(1)
    assert amount.max() < 0.15
    # Interpolation between the values of the field reduces the deviation.
    assert float(error.std()) == pytest.approx(0.1 / 3**0.5, rel=0.35)
    assert torch.equal(disturbed(depth, 0.0, range(400)), depth)
    assert torch.equal(disturbed(depth / 0, 0.1, range(400)), depth / 0)


def test_the_adapter_brings_it_back_and_an_arm_uses_it(run: WorldWeaverTrainer) -> None:
    folder = run.args.folder / "export"
    pipe = MAKERS["Wan"]()
    loaded = load_adapter(pipe, folder)
    assert (loaded.settings["placed_memory"], loaded.settings["placed_warp"]) == (True, True)
    model = WorldWeaverModel(denoiser_for(pipe), loaded.embedder)
    assert model.shown == 9
    assert torch.equal(says(model, run), says(run.unwrap("worldweaver").model, run))
    arm = load_arm("j", folder, torch.device("cpu"), MAKERS["Wan"](), guidance=1.0)
    specs = [world.sample_long(seed, num_frames=21) for seed in (1, 2)]
    truth = world.render(specs, num_frames=21, size=32)
    told, predict = [], arm.model.predict

    def watched(z: Tensor, levels: FrameLevels, condition: Any, guidance: float) -> Tensor:
        told.append(condition["placed"])
        return predict(z, levels, condition, guidance)

    arm.model.predict = watched  # type: ignore[method-assign]
    made = make_clips(arm, specs, truth, given=9)
    assert made.frames.shape == truth.rgb_BF3HW.shape
    assert told[0].shape == (2, 9, 1, 4, 4)
    assert all(each.shape[:2] == (2, 9) for each in told)


def test_a_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Resuming is exact with the model's own memory and with sights from `pool_dir`."""
    values = PLACED | {"max_steps": 2, "save_steps": 1, "save_total_limit": None, "own_from": 0.0, "own_share": 1.0}
    values |= {"pool_dir": str(tmp_path / "pool")}
    whole = trained(tmp_path / "a", **values)
    assert {path.name.split("-")[0] for path in (tmp_path / "pool").glob("*.safetensors")} == {
        "corrupted",
        "depth",
        "rgb",
        "placed",
    }
    again = trained(tmp_path / "b", **values, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert same(state_of(whole), state_of(again))
    # Sights for another number of coming frames have their own file.
    trained(tmp_path / "c", **values | {"groups": 1, "save_steps": 0, "max_steps": 1})
    assert len(list((tmp_path / "pool").glob("placed-*"))) == 2
    assert len(list((tmp_path / "pool").glob("*.safetensors"))) == 5


def test_a_rollout_goes_on_to_the_bit(scenes: Scenes, tmp_path: Path) -> None:
    """The saved state contains the stored frames and the decoder cache."""

    class Seeing(Mixer):
        def predict(self, z: Tensor, levels: FrameLevels, condition: dict[str, Tensor], guidance: float) -> Tensor:
            answer = super().predict(z, levels, condition, guidance)
            if (placed := condition.get("placed")) is not None:
                answer[:, :, -placed.shape[2] :] += 0.1 * placed[:, :-1]
            return answer

    def go(state: RolloutState | None, groups: int) -> tuple[list[Tensor], RolloutState]:
        placed = PlacedRollout(scenes.model, lambda start, stop: scenes.poses[:, start:stop], scenes.limits)
        made = rollout(Seeing(), extras=placed.extras)
        if state is None:
            given, bank = scenes.video[:, :, :3], MemoryBank(long=3, short=2, capacity=9)
            shape = tuple(given[0, :, 0].shape)
            state = begun(made, rows=2, shape=shape, num_latents=8, given=given, bank=bank)
            placed.store(given, 0)
        else:
            placed.load_state_dict(state.extra)
        found = []
        for group in made.groups(state, on_group=placed.on_group):
            state.extra |= placed.state_dict()
            found.append(group.latents)
            if len(found) == groups:
                break
        return found, state

    whole, _ = go(None, 9)
    first, state = go(None, 2)
    state.save(tmp_path)
    rest, _ = go(RolloutState.load(tmp_path), 9)
    assert all(torch.equal(a, b) for a, b in zip([*first, *rest], whole, strict=True))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"aux": []}, "placed_memory is True, it must be false without depth in memory"),
        ({"depth_in_memory": False}, "placed_memory is True, it must be false without depth in memory"),
        ({"history_sizes": [0, 0]}, "it must be above 0 with placed_memory"),
        (
            {"placed_memory": False, "placed_warp": False},
            "placed_warp is False, it must be true without placed_memory",
        ),
        ({"placed_holes": 2.0}, "placed_holes is 2.0, it must be from 0 to 1"),
        ({"train_dataset": "x"}, "placed_memory is True, it must be false: videos have no cameras"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        settings(**{"placed_memory": True, **changes})


def test_models_that_are_refused(scenes: Scenes) -> None:
    with pytest.raises(UserError, match="as soon as the group is finished, but AutoencoderKLLTX"):
        check_streams(tiny_pipeline("LTX")[0].vae)
    pipe = MAKERS["Wan"]()
    widen_transformer(pipe)
    model = WorldWeaverModel(denoiser_for(pipe), LevelEmbedder.for_transformer(pipe))
    with pytest.raises(UserError, match="has no inputs for placed memory, or no depth"):
        PlacedRollout(model, lambda start, stop: scenes.poses[:, start:stop], scenes.limits)
