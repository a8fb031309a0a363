"""Method `worldweaver`: trained weights, exact resume, the exported adapter, clips of the world and of users."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from postgen.errors import UserError
from postgen.families import denoiser_for
from postgen.tensor_files import read_tensors
from postgen.training import load_recipe
from postgen.training.run_folder import RunLock
from postgen.video import write_video
from postgen.worldweaver.adapter import load_adapter
from postgen.worldweaver.corruption import blurred, corrupted
from postgen.worldweaver.depth import DisparityRange
from postgen.worldweaver.embedding import LevelEmbedder
from postgen.worldweaver.levels import FrameLevels, Role
from postgen.worldweaver.model import WorldWeaverModel
from postgen.worldweaver.self_depth import SelfDepth
from postgen.worldweaver.texts import Texts
from postgen.worldweaver.train_config import WorldWeaverConfig
from postgen.worldweaver.trainer import WorldWeaverTrainer
from postgen.worldweaver.video_clips import video_pool
from postgen.worldweaver.widen import widened
from postgen.worldweaver.windows import Layout
from tests.families.test_frame_levels import MAKERS
from tests.families.tiny_pipelines import tiny_pipeline
from tests.worldweaver.training import log_of, settings, trained

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture(scope="module")
def flowing(tmp_path_factory: pytest.TempPathFactory) -> WorldWeaverTrainer:
    """Return a run with all modalities and memory policy `camera`. Tests must not change it."""
    return trained(tmp_path_factory.mktemp("run"), aux=["depth", "flow"], memory_policy="camera", max_steps=1)


def state_of(run: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.unwrap("worldweaver").state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def model_of_rgb() -> WorldWeaverModel:
    pipe = MAKERS["Wan"]()
    widened(pipe, ("rgb",))
    return WorldWeaverModel(denoiser_for(pipe), LevelEmbedder.for_transformer(pipe))


def says(model: WorldWeaverModel, run: WorldWeaverTrainer) -> Tensor:
    """Return the prediction of a model for a fixed random window."""
    source = torch.Generator().manual_seed(1)
    z = torch.randn(1, 4 * len(model.modalities), 3, 4, 4, generator=source)
    sigma = torch.rand(1, 3, len(model.modalities), generator=source)
    levels = FrameLevels(sigma=sigma, role=torch.tensor([Role.LONG, Role.SHORT, Role.PREDICT]))
    with torch.no_grad():
        return model.predict(z, levels, run.texts.of([1]))


def test_gradients_reach_what_is_new_and_the_lora_only(tmp_path: Path) -> None:
    run = trained(tmp_path, max_steps=3, learning_rate_new=3e-2)
    new, rest = {}, {}
    for name, parameter in run.trained().items():
        (rest if "lora_" in name else new)[name.removeprefix("worldweaver.")] = parameter
    assert new.keys() == {
        *(f"transformer.{layer}.{kind}" for layer in ("patch_embedding", "proj_out") for kind in ("weight", "bias")),
        *(f"level_embedder.{layer}.{kind}" for layer in ("inner", "outer") for kind in ("weight", "bias")),
    }
    assert len(rest) == 2 * 2 * 4 * 2  # blocks x attentions x layers x LoRA matrices
    stock = MAKERS["Wan"]().transformer.state_dict()
    wide = run.unwrap("worldweaver").transformer.state_dict()
    kept = {name.replace(".base_layer.", "."): value for name, value in wide.items() if "lora_" not in name}
    changed = {
        name for name, value in kept.items() if stock[name].shape != value.shape or (stock[name] != value).any()
    }
    assert changed == {f"{layer}.{kind}" for layer in ("patch_embedding", "proj_out") for kind in ("weight", "bias")}
    # Initially the columns of depth are 0, and its rows are copies of the RGB rows.
    assert wide["patch_embedding.weight"][:, 4:].abs().min() > 0
    rows = wide["proj_out.weight"].unflatten(0, (4, 8))
    assert not torch.equal(rows[:, 4:], rows[:, :4])
    assert all(parameter.any() for parameter in run.trained().values())
    rates = {id(parameter): group["lr"] for group in run.parameter_groups() for parameter in group["params"]}
    assert {rates[id(parameter)] for parameter in new.values()} == {3e-2}
    assert {rates[id(parameter)] for parameter in rest.values()} == {1e-2}


def test_resume_is_exact(tmp_path: Path) -> None:
    """With random windows, the model's own memory and EMA: 4 steps equal 2 steps, a resume and 2 steps."""
    values = {"ema_decay": 0.9, "max_steps": 4, "save_steps": 2, "save_total_limit": None, "own_from": 0.2}
    values |= {"own_share": 1.0, "gradient_accumulation_steps": 2, "eval_clips": 2, "eval_steps": 2}
    run = trained(tmp_path / "a", **values)
    again = trained(tmp_path / "b", **values, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert same(state_of(run), state_of(again))
    for name in ("worldweaver.safetensors", "pytorch_lora_weights.safetensors"):
        assert same(*(read_tensors(tmp_path / run / "export" / name) for run in "ab"))
    rows = [{key: row[key] for key in row if "loss" in key} for row in log_of(tmp_path / "a")]
    later = [{key: row[key] for key in row if "loss" in key} for row in log_of(tmp_path / "b")]
    assert rows[-len(later) :] == later
    assert any("eval_depth_loss" in row for row in later)


@pytest.mark.parametrize("name", ["Wan", "LTX"])
def test_the_adapter_is_the_trained_model(name: str, tmp_path: Path) -> None:
    """With the adapter, the base model predicts bitwise what the trained model predicts."""
    clips = {"num_frames": 33, "height": 32, "width": 32, "flow_shift": 3.0} if name == "LTX" else {}
    window = {"groups": 2, "num_inference_steps": 4, "history_sizes": [1, 1]} if name == "LTX" else {}
    run = trained(tmp_path, name, **clips, **window, guidance_scale=1.5)
    pipe = MAKERS[name]()
    loaded = load_adapter(pipe, tmp_path / "export")
    model = WorldWeaverModel(denoiser_for(pipe), loaded.embedder)
    assert (loaded.settings["ar_step"], loaded.settings["guidance_scale"]) == (2, 1.5)
    assert loaded.settings["history_sizes"] == run.args.history_sizes
    assert torch.equal(says(model, run), says(run.unwrap("worldweaver").model, run))


def test_all_weights(tmp_path: Path) -> None:
    """With `use_peft: false` the export has a trained base model, into which the adapter is loaded."""
    run = trained(tmp_path, use_peft=False, max_steps=1, ema_decay=0.9)
    assert len(run.trained()) == len(list(run.unwrap("worldweaver").parameters()))
    pipe = MAKERS["Wan"]()
    pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path / "export" / "transformer")
    with pytest.raises(UserError, match="was trained on another model"):
        load_adapter(MAKERS["Wan"](), tmp_path / "export")
    loaded = load_adapter(pipe, tmp_path / "export")
    with run.for_inference():
        expected = says(run.unwrap("worldweaver").model, run)
    assert torch.equal(says(WorldWeaverModel(denoiser_for(pipe), loaded.embedder), run), expected)


def test_a_model_of_one_timestep_without_depth(tmp_path: Path) -> None:
    pipe, size = tiny_pipeline("HunyuanVideo")
    values = {"num_frames": 17, "height": size["height"], "aux": [], "groups": 2, "num_inference_steps": 4}
    run = WorldWeaverTrainer(settings(tmp_path, **values, history_sizes=[1, 1], max_steps=1), pipe)
    run.train()
    assert run.unwrap("worldweaver").model.mean_level
    assert "depth_loss" not in log_of(tmp_path)[-1]


def test_memory_of_the_models_own(flowing: WorldWeaverTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model generates the group before the window in one shift; an exact network reproduces the clip."""
    run = flowing
    batch = run._batch(run.pool, Layout(ages=(2, 1, 0), start=4), torch.Generator().manual_seed(0), 2)
    before, wrong = batch.latents.clone(), batch.wrong.clone()

    class Exact:
        calls = 0

        def __call__(self, z: Tensor, levels: FrameLevels, told: Any) -> tuple[Tensor, dict[str, Tensor]]:
            self.calls += 1
            memory = int((levels.role != Role.PREDICT).sum())
            velocity = torch.full_like(z, 1e6)  # the velocity of memory frames must not be used
            sigma = levels.rgb[:, None, memory:, None, None]
            velocity[:, :, memory:] = (z[:, :, memory:] - before[:, :, 3:6].float()) / sigma
            return velocity, {}

    exact = Exact()
    monkeypatch.setattr(run, "unaveraged", lambda name: exact)
    run._remember_own(Layout(ages=(2, 1, 0), start=4), batch, torch.Generator().manual_seed(0))
    assert exact.calls == run.windows.segments.length
    assert torch.allclose(batch.latents[:, :, 3].float(), before[:, :, 3].float(), atol=2e-3)
    assert torch.equal(batch.wrong[:, :, 3], batch.latents[:, :4, 3])
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(batch.latents[:, :, others], before[:, :, others])
    assert torch.equal(batch.wrong[:, :, others], wrong[:, :, others])
    for layout in (Layout(ages=(1, 0), start=4), Layout(ages=(2, 1, 0), start=0)):
        run._remember_own(layout, batch, torch.Generator().manual_seed(0))
    assert exact.calls == run.windows.segments.length


def test_scenes_are_encoded_once(tmp_path: Path) -> None:
    """The next run reads the clips in `pool_dir`, and trains the same weights."""
    values = {"pool_dir": str(tmp_path / "pool"), "max_steps": 1}
    first = trained(tmp_path / "a", **values)
    kept = sorted(tmp_path.joinpath("pool").glob("*.safetensors"))
    assert [path.name.split("-")[0] for path in kept] == ["corrupted", "depth", "rgb"]
    times = [path.stat().st_mtime_ns for path in kept]
    second = trained(tmp_path / "b", **values)
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert same(state_of(first), state_of(second))
    save_file({"other": torch.zeros(1)}, kept[0])
    with pytest.raises(UserError, match="has no latents: delete the file"):
        trained(tmp_path / "c", **values)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"pool_dir .*file cannot be written: File exists"):
        trained(tmp_path / "d", **{**values, "pool_dir": str(tmp_path / "file")})


def test_scenes_that_another_run_renders_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run renders the clips; the other prints that it waits, and then reads the files."""
    values = {"pool_dir": str(tmp_path / "pool"), "max_steps": 1}
    first = trained(tmp_path / "a", **values)
    kept = sorted(tmp_path.joinpath("pool").glob("*.safetensors"))
    saved = [path.rename(tmp_path / path.name) for path in kept]
    (name,) = (path.name for path in tmp_path.joinpath("pool").glob(".*.lock"))
    lock = RunLock(tmp_path / "pool", name)
    lock.acquire()

    def end_of_the_other(seconds: float) -> None:
        for path, place in zip(saved, kept, strict=True):
            path.rename(place)
        lock.release()

    monkeypatch.setattr("postgen.locks.time.sleep", end_of_the_other)
    monkeypatch.setattr("postgen.worldweaver.world_clips._rendered", None)
    capsys.readouterr()
    second = trained(tmp_path / "b", **values)
    said = capsys.readouterr().err
    assert said.count("renders the same scenes, waiting for it") == 1
    assert f"process {os.getpid()} on" in said
    assert same(state_of(first), state_of(second))


def test_every_modality_and_the_camera(flowing: WorldWeaverTrainer) -> None:
    assert flowing.pool.joint(torch.tensor([0, 2]), torch.device("cpu")).shape == (2, 12, 8, 2, 2)
    assert {"rgb_loss", "depth_loss", "flow_loss"} <= log_of(flowing.args.folder)[-1].keys()
    assert flowing.pool.poses is not None
    assert flowing.pool.poses.shape == (3, 8, 3, 4)
    told = set(flowing.pool.texts[0].tolist())
    texts = [text for text, number in flowing.texts.numbers.items() if number in told]
    assert all(texts)


def test_videos_of_a_user(tmp_path: Path) -> None:
    """Depth comes from tensors, pictures or an estimator, and windows are cut from the right clips."""
    made = torch.rand(2, 29, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    depth = torch.rand(29, 16, 16, generator=torch.Generator().manual_seed(1))
    rows = []
    for number, clip in enumerate(made):
        write_video(tmp_path / f"{number}", clip, fps=8, format="frames")
        rows.append({"prompt": f"clip {number}", "video": str(tmp_path / f"{number}")})
    save_file({"disparity": depth}, tmp_path / "depth.safetensors")
    rows[0]["depth"] = str(tmp_path / "depth.safetensors")
    write_video(tmp_path / "depth", depth[:, None].expand(-1, 3, -1, -1), fps=8, format="frames")
    rows[1]["depth"] = str(tmp_path / "depth")
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Every row has depth, so the missing estimator is not loaded.
    values = {"train_dataset": str(tmp_path / "clips.jsonl"), "max_steps": 1, "depth_model": str(tmp_path / "absent")}
    run = trained(tmp_path / "run", **values)
    model = run.unwrap("worldweaver").model
    with torch.no_grad():
        expected = model.encode(DisparityRange.of(depth[None]).picture(depth[None]))
    assert torch.equal(run.pool.latents["depth"][:1], expected.half())
    assert (run.pool.latents["depth"][1] - expected[0]).abs().max() < 0.1
    assert run.pool.texts[:, 0].tolist() == [run.texts.numbers[f"clip {number}"] for number in (0, 1)]

    def bright(frames: Tensor) -> Tensor:
        return frames.mean(-1)

    bare = [{key: row[key] for key in ("prompt", "video")} for row in rows]
    pool = video_pool(run.args, model, run.texts, bare, "rows", wrong=False, depth_source=bright)
    assert not torch.equal(pool.latents["depth"], run.pool.latents["depth"])
    for other, said in (
        (bare, "row 0 of rows has no depth: add a column depth, or set depth_model"),
        ([{"prompt": "x"}], "row 0 of rows: video must be .* got None"),
        ([{**rows[0], "depth": str(tmp_path / "0")}, rows[1] | {"depth": 3}], "row 1 of rows: depth must be .* got 3"),
    ):
        with pytest.raises(UserError, match=said):
            video_pool(settings(num_frames=29), model, run.texts, other, "rows", wrong=False)
    with pytest.raises(UserError, match="absent cannot be loaded, name a folder or a Hub id"):
        video_pool(run.args, model, run.texts, bare, "rows", wrong=False)
    with pytest.raises(UserError, match="29 frames but num_frames is 33: give longer videos"):
        video_pool(settings(num_frames=33), model, run.texts, rows, "rows", wrong=False)


def test_texts_are_what_the_denoiser_says() -> None:
    denoiser = denoiser_for(MAKERS["Wan"]())
    texts = Texts(denoiser, torch.device("cpu"))
    texts.add(["a red ball", "a", "a red ball"])
    assert texts.numbers == {"": 0, "a red ball": 1, "a": 2}
    with torch.no_grad():
        expected = denoiser.encode_prompt(["a", "", "a red ball"], guidance=False)
    found = texts.of([2, 0, 1])
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in found)
    assert sum(row["prompt"].shape[0] for row in texts._encoded) < 20
    texts.add(["a box"])
    assert all(torch.equal(texts.of([2, 0, 1])[name], found[name]) for name in found)


def test_corruption() -> None:
    clips = torch.rand(8, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = corrupted(clips, torch.Generator().manual_seed(1))
    assert made.shape == clips.shape
    assert 0 <= made.min() <= made.max() <= 1
    grey = torch.full((1, 2, 3, 8, 8), 0.5)
    torch.testing.assert_close(corrupted(grey, torch.Generator()), grey)
    edge = (torch.arange(32) >= 16).float().expand(1, 3, 32, 32)
    soft = blurred(edge, 2.0)
    torch.testing.assert_close(soft.mean(), edge.mean())
    assert (soft[0, 0, 0].diff() >= 0).all()
    assert float(soft[0, 0, 0].diff().max()) == pytest.approx(0.197, abs=0.01)
    assert torch.equal(blurred(edge, 0.1), edge)


def test_self_depth(flowing: WorldWeaverTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """`SelfDepth` reads clean RGB and samples depth window by window, for clips of any length."""
    model = flowing.unwrap("worldweaver").model
    frames = torch.rand(12, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    source = SelfDepth(model, window=2, memory=1, steps=3)
    depth = source(frames)
    assert depth.shape == (12, 16, 16)
    assert 0 <= depth.min() <= depth.max() <= 1
    assert torch.equal(depth, source(frames))
    calls: list[tuple[Tensor, FrameLevels]] = []
    predict = model.predict

    def watched(z: Tensor, levels: FrameLevels, condition: Any, guidance: float = 1.0) -> Tensor:
        calls.append((z, levels))
        return predict(z, levels, condition, guidance)

    monkeypatch.setattr(model, "predict", watched)
    source(frames)
    with torch.no_grad():
        rgb = model.encode(torch.cat([frames, frames[-1:]]).movedim(-1, 1)[None])
    assert len(calls) == 2 * 3  # four latent frames
    z, levels = calls[3]
    assert torch.equal(z[:, :4], rgb[:, :, 1:4])
    assert levels.role.tolist() == [Role.SHORT, Role.PREDICT, Role.PREDICT]
    assert not levels.rgb.any()
    assert levels.sigma[0, :, 1].tolist() == [0, 1, 1]
    assert (levels.sigma[..., 2] == 1).all()
    with pytest.raises(UserError, match="the model has no depth, only rgb"):
        SelfDepth(model_of_rgb())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate_new": 0.0}, "learning_rate_new is 0.0, it must be above 0"),
        ({"own_share": 2.0}, "own_share is 2.0, it must be from 0 to 1"),
        ({"fully_shard": True}, "the adapter is written from whole weights"),
        ({"init_from": "x"}, "an adapter is trained from its base"),
        ({"lora_path": "x"}, "merge the LoRA into the model before training"),
        ({"eval_steps": 1}, "eval_clips is 0, it must be at least 1 to evaluate"),
        (
            {"merge_last": 2, "merge_metric": "eval_loss", "save_steps": 1},
            "eval_clips is 0, it must be at least 1 to evaluate",
        ),
        ({"pool_dir": ""}, "the name of a folder, or left out"),
        ({"depth_model": "x"}, "the world has exact depth"),
        ({"train_dataset": "x", "memory_policy": "camera"}, "another policy than camera"),
        ({"train_dataset": "x", "aux": ["depth", "flow"]}, "without flow: videos have no flow"),
        ({"train_dataset": "x", "eval_steps": 1}, "eval_dataset is None, it must be given to evaluate"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        settings(**changes)


def test_models_that_are_refused(tmp_path: Path) -> None:
    run = WorldWeaverTrainer(settings(tmp_path), tiny_pipeline("CogVideoX")[0])
    with pytest.raises(UserError, match="predicts v_prediction: method worldweaver needs a flow model"):
        run.train()
    run = WorldWeaverTrainer(settings(tmp_path, width=32), MAKERS["Wan"]())
    with pytest.raises(UserError, match="width 32 with height 16: scenes of the world are square"):
        run.train()
    run = WorldWeaverTrainer(settings(tmp_path, num_frames=5, train_dataset="absent.jsonl"), MAKERS["Wan"]())
    with pytest.raises(UserError, match="latent frames are too short for"):  # checked before the videos are opened
        run.train()
    pipe = MAKERS["Wan"]()
    pipe.transformer.to(torch.bfloat16)
    run = WorldWeaverTrainer(settings(tmp_path), pipe)
    with pytest.raises(UserError, match=r"are torch\.bfloat16, but trained weights are float32: set bf16"):
        run.train()


def test_recipes() -> None:
    for name in ("worldweaver-tiny", "worldweaver-wan"):
        trainer, args = load_recipe(RECIPES / f"{name}.yaml", ["--max_steps", "3"])
        assert trainer.__name__ == "WorldWeaverTrainer"
        assert isinstance(args, WorldWeaverConfig)
        assert args.lora_r == {"worldweaver-tiny": 48, "worldweaver-wan": 64}[name]
