"""Method sft on tiny models: loss, experts, captions, frames, evaluation, export, bad settings."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.sampling.seeds import normal, seed_of
from postgen.sft.held_out import compared
from postgen.sft.trainer import SftTrainer
from tests.families.tiny_pipelines import tiny_pipeline
from tests.sft.train_clips import lines_of, settings, trained, two_experts, write_clips
from tests.training.tiny import TinyConfig


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips") / "all")


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips") / "held", videos=3, pictures=1)


def pipeline(folder: Path, **words: Any) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, **words)


def started(model: Any, folder: Path, clips: Path, **changes: Any) -> SftTrainer:
    """Return a trainer that is ready for its first step."""
    run = SftTrainer(settings(folder, clips, **changes), model)
    run.args.folder.mkdir(parents=True, exist_ok=True)
    run._setup()
    return run


def test_the_loss_is_that_of_the_model(tiny_wan: Path, clips: Path, tmp_path: Path) -> None:
    """Computed again from the batch, with the formulas of flow matching."""
    run = started(tiny_wan, tmp_path, clips, caption_dropout=0.0, loss_weighting="min_snr")
    batch = run.data.batch(0, 0, 0)
    loss, metrics = run.training_step()
    shape = batch.latents.shape[1:]
    noise = normal(shape, [seed_of(42, "forward", place) for place in (0, 1)], run.device)
    sigma = run.levels.draw([0, 1], shape).float().view(-1, 1, 1, 1, 1)
    x = (1 - sigma) * batch.latents + sigma * noise
    with torch.no_grad():
        velocity = run.policy.denoiser.predict(x, sigma.flatten(), batch.conditions)
    errors = (velocity - (noise - batch.latents)).square().flatten(1).mean(1)
    weight = (((1 - sigma) / sigma) ** 2).clamp(max=5.0) * sigma**2
    torch.testing.assert_close(loss, (errors * weight.flatten()).mean())
    torch.testing.assert_close(metrics["unweighted_loss"], errors.mean())
    assert metrics["noise_level"] == pytest.approx(sigma.mean().item())
    loss.backward()
    assert all(value.grad is not None for value in run.trained().values())
    assert all("lora_" in name for name in run.trained())


@pytest.mark.parametrize("name", ["CogVideoX", "LTX", "Stable Diffusion"])
def test_other_kinds_of_models(name: str, clips: Path, tmp_path: Path) -> None:
    """A v-prediction model, one with a mask of tokens, and a picture model with epsilon prediction."""
    pipe, size = tiny_pipeline(name)
    before = copy.deepcopy((pipe.unet if name == "Stable Diffusion" else pipe.transformer).state_dict())
    run = trained(pipe, tmp_path, clips, **size, max_sequence_length=None, use_peft=name != "LTX", skip_bad=True)
    assert run.global_step == 2
    assert lines_of(tmp_path)[-1]["loss"] > 0
    (network,) = run.policy.modules.values()
    after = network.state_dict()
    if name == "LTX":  # all weights are trained and exported
        assert any(not torch.equal(value, after[key]) for key, value in before.items())
        loaded = type(network).from_pretrained(tmp_path / "export" / "transformer").state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in after.items())
    else:
        kept = {key.replace(".base_layer", ""): value for key, value in after.items()}
        assert all(torch.equal(value, kept[key]) for key, value in before.items())
        fresh, _ = tiny_pipeline(name)
        fresh.load_lora_weights(tmp_path / "export")


def test_it_learns_and_the_evaluation_is_paired(tiny_wan: Path, clips: Path, held: Path, tmp_path: Path) -> None:
    """The held-out loss falls; a second evaluation of the same weights gives bitwise the same losses."""
    words = {"max_steps": 12, "eval_steps": 6, "eval_on_start": True, "eval_dataset": str(held), "use_peft": False}
    run = trained(tiny_wan, tmp_path, clips, **words, caption_dropout=0.0, learning_rate=3e-3)
    rows = [row for row in lines_of(tmp_path) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [0, 6, 12]
    assert rows[0]["eval_loss_change"] == 0
    assert rows[2]["eval_loss"] < rows[1]["eval_loss"] < rows[0]["eval_loss"]
    assert rows[2]["eval_loss_change"] == pytest.approx(rows[2]["eval_loss"] - rows[0]["eval_loss"])
    assert rows[2]["eval_loss_change"] < -3 * rows[2]["eval_loss_change_se"] < 0
    table = [json.loads(line) for line in (tmp_path / "evaluation" / "loss-000012.jsonl").read_text().splitlines()]
    assert len(table) == 4
    assert {row["bucket"] for row in table} == {"16x32x5", "16x32x1"}
    assert all(len(row["losses"]) == len(row["noise_levels"]) == 4 for row in table)
    with run.for_inference():
        again = run.evaluate()
    assert again == {name.removeprefix("eval_"): value for name, value in rows[2].items() if "eval_" in name}


def test_captions_are_dropped(tiny_wan: Path, clips: Path, tmp_path: Path) -> None:
    run = started(tiny_wan, tmp_path, clips)
    batch = run.data.batch(0, 0, 0)
    found = run._without_captions(batch.conditions, torch.tensor([True, False]))
    assert torch.equal(found["prompt"][0], run.data.empty["prompt"][0])
    assert torch.equal(found["prompt"][1], batch.conditions["prompt"][1])
    assert not torch.equal(found["prompt"][0], batch.conditions["prompt"][0])


def test_the_expert_of_the_noise_level_learns(tiny_wan: Path, clips: Path, tmp_path: Path) -> None:
    """Each expert gets gradients of the rows on its side of the boundary only; one expert can be trained alone."""
    run = started(two_experts(tiny_wan), tmp_path / "both", clips, noise_shift=9.0)
    high = run.levels.draw(range(40), (4, 2, 2, 4)) >= 0.9
    for step in range(10):
        run.training_step()[0].backward()
        for name, wanted in (("transformer", high), ("transformer_2", ~high)):
            grads = [value.grad for key, value in run.trained().items() if key.startswith(f"{name}.")]
            assert any(grad is not None for grad in grads) == bool(wanted[2 * step : 2 * step + 2].any())
        run.optimizer.zero_grad(set_to_none=True)
    for side, name in (("high", "transformer"), ("low", "transformer_2")):
        run = trained(two_experts(tiny_wan), tmp_path / side, clips, train_experts=side)
        assert {key.split(".")[0] for key in run.trained()} == {name}
        level = lines_of(tmp_path / side)[-1]["noise_level"]
        assert (level >= 0.9) == (side == "high")
        pipe = two_experts(tiny_wan)  # the export has both, so that it loads like that of both
        pipe.load_lora_weights(tmp_path / side / "export" / "transformer")
        pipe.load_lora_weights(tmp_path / side / "export" / "transformer_2", load_into_transformer_2=True)


def test_levels_of_frames(tmp_path: Path, clips: Path) -> None:
    """A clean first frame does not count in the loss, and pictures have one level."""
    pipe, size = tiny_pipeline("SkyReels-V2")
    run = started(pipe, tmp_path, clips, **size, frame_noise="first_frame")
    seen: list[tuple[Any, ...]] = []
    for micro in range(6):
        batch = run.data.batch(micro, 0, 0)
        loss, _ = run.training_step()
        assert loss.isfinite()
        seen.append((batch.bucket.num_frames, len(batch.latents[0, 0])))
    assert {frames for frames, _ in seen} == {1, 5}
    clean, noise = torch.randn(2, 1, 4, 2, 2, 4)
    sigma = torch.tensor([[0.0, 0.5]], dtype=torch.float64)
    told = {name: value[:1] for name, value in run.data.batch(0, 0, 0).conditions.items()}
    errors, counted = run._errors(clean, noise, sigma, told)
    assert errors.shape == counted.shape == (1, 2)
    assert counted.tolist() == [[0, 1]]


def test_first_frames_of_image_to_video(tiny_wan_image: Path, clips: Path, held: Path, tmp_path: Path) -> None:
    words = {"eval_dataset": str(held), "eval_steps": 2, "eval_samples": 2, "eval_guidance_scale": 2.0}
    run = trained(tiny_wan_image, tmp_path, clips, **words)
    assert "image_latents" in run.data.batch(0, 0, 0).conditions
    assert (tmp_path / "samples" / "step-000002.png").is_file()


def test_samples_and_their_rewards(tiny_wan: Path, clips: Path, held: Path, tmp_path: Path) -> None:
    words = {"eval_dataset": str(held), "eval_on_start": True, "eval_steps": 2, "eval_samples": 3}
    words |= {"eval_reward_funcs": ["tests.sft.test_trainer:brightness"], "eval_guidance_scale": 3.0, "ema_decay": 0.5}
    run = trained(tiny_wan, tmp_path, clips, **words, fps=8.0, gradient_checkpointing=True)
    rows = [row for row in lines_of(tmp_path) if "eval_loss" in row]
    assert all(0 < row["eval_rewards/brightness/mean"] < 1 for row in rows)
    assert all(row["eval_rewards/brightness/failed"] == 0 for row in rows)
    assert {path.name for path in (tmp_path / "samples").glob("*.png")} == {"step-000000.png", "step-000002.png"}
    card = (tmp_path / "export" / "README.md").read_text()
    assert "after 2 updates of SftTrainer" in card
    assert "- Clips: 6 of" in card
    assert "- Held out: 4" in card
    assert "before.png" in card
    assert '"caption_dropout": 0.1' in card
    assert "decay 0.5" in card
    # Plain diffusers with the LoRA file computes what the trained model computes.
    pipe = pipeline(tiny_wan)
    before = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(tmp_path / "export")
    x, told = torch.randn(1, 4, 2, 2, 4), run.data.batch(0, 0, 0).conditions["prompt"][:1]
    call = {"hidden_states": x, "timestep": torch.tensor([500.0]), "encoder_hidden_states": told}
    with run.for_inference():
        wanted = run.unwrap("transformer")(**call).sample
        torch.testing.assert_close(pipe.transformer(**call).sample, wanted)
        pipe.unload_lora_weights()
        assert not torch.allclose(pipe.transformer(**call).sample, wanted)
    assert all(torch.equal(value, before[key]) for key, value in pipe.transformer.state_dict().items())


def test_the_last_checkpoints_are_merged_on_request(tiny_wan: Path, clips: Path, held: Path, tmp_path: Path) -> None:
    """The held-out loss decides; the table is that of the weights before the merge, not of the trial."""
    words = {"eval_dataset": str(held), "save_steps": 1, "max_steps": 2, "merge_last": 2}
    trained(tiny_wan, tmp_path, clips, **words, merge_metric="eval_loss", merge_keep="always")
    rows = [json.loads(line) for line in (tmp_path / "evaluation" / "loss-000002.jsonl").read_text().splitlines()]
    losses = torch.tensor([row["losses"] for row in rows], dtype=torch.float64)
    assert losses.mean().item() == pytest.approx(lines_of(tmp_path)[-1]["merge/last"])
    assert (tmp_path / "export" / "merge_last.json").is_file()
    assert "merge/merged" in lines_of(tmp_path)[-1]
    pipeline(tiny_wan).load_lora_weights(tmp_path / "export")


def brightness(completions: list[Tensor]) -> list[float]:
    """Return the mean of each clip."""
    return [float(clip.mean()) for clip in completions]


def test_a_change_has_the_error_of_pairs() -> None:
    first = {"a": [1.0, 3.0], "b": [4.0, 6.0], "c": [0.0, 0.0]}
    now = {"a": [1.0, 2.0], "b": [4.0, 4.0], "d": [7.0, 7.0]}
    found = compared(now, first)
    assert found == {"loss": pytest.approx(12.5 / 3), "loss_change": -0.75, "loss_change_se": pytest.approx(0.25)}
    assert compared({"a": [1.0]}, {}) == {"loss": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_dataset": None}, "there is nothing to train on: give train_dataset"),
        ({"eval_steps": 1}, "need held-out clips: give eval_dataset or eval_share"),
        (
            {"merge_last": 2, "merge_metric": "eval_loss", "save_steps": 1},
            "need held-out clips: give eval_dataset or eval_share",
        ),
        ({"eval_samples": 1}, "need held-out clips: give eval_dataset or eval_share"),
        ({"eval_samples": 1, "eval_share": 0.5}, "eval_samples are drawn in evaluations: set eval_steps"),
        ({"eval_reward_funcs": ["sharpness"]}, "eval_samples is 0, it must be at least 1 with eval_reward_funcs"),
        ({"eval_noise_levels": 0}, "eval_noise_levels is 0, it must be at least 1"),
        ({"eval_num_inference_steps": 1}, "eval_num_inference_steps is 1, it must be at least 2"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], message: str, clips: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        SftTrainer(settings(tmp_path, clips, **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damaged", "changes", "message"),
    [
        ("0.txt", {}, r"1 of 6 files or rows cannot be used: 0\.mp4: its caption 0\.txt is empty"),
        ("0.mp4", {}, r"1 of 6 files or rows cannot be used: 0\.mp4: "),
        ("", {"num_frames": 9}, "it has 5 frames, the shortest bucket has 9"),
        ("", {"weight_column": "weight"}, "weight_column: no row has a column 'weight'"),
        ("5.png", {"skip_bad": True, "image_share": 1.0, "repeats_column": "x"}, "no row has a column 'x'"),
        ("", {"train_dataset": "./nowhere"}, "there is no file or folder nowhere"),
    ],
)
def test_data_are_checked_before_the_model_is_loaded(
    damaged: str, changes: dict[str, Any], message: str, clips: Path, tmp_path: Path
) -> None:
    shutil.copytree(clips, tmp_path / "clips")
    if damaged:
        (tmp_path / "clips" / damaged).write_text(" ")
    with pytest.raises(UserError, match=message):
        trained("no/such-model", tmp_path / "run", tmp_path / "clips", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_min": 0.9999999, "noise_levels": "logit_normal"}, "draws no level from 1 to 1"),
        ({"buckets": ["16x32x5", "16x24x5"]}, "bucket 16x24x5 does not suit"),
    ],
)
def test_settings_are_checked_before_clips_are_encoded(
    changes: dict[str, Any], message: str, tiny_wan: Path, clips: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        trained(tiny_wan, tmp_path / "run", clips, **changes)
    assert not (tmp_path / "run" / "cache" / "latents").exists()
    with pytest.raises(UserError, match=message):
        trained(tiny_wan, tmp_path / "run", clips, **changes, dry_run=True)


def test_held_out_clips_come_from_one_place(clips: Path, tmp_path: Path) -> None:
    row = {"video": str(clips / "0.mp4"), "prompt": "a wall"}
    with pytest.raises(UserError, match=r"eval_share is 0\.5, it must be 0 with eval_dataset"):
        SftTrainer(settings(tmp_path, clips, eval_share=0.5), eval_dataset=[row])


def test_other_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="SftTrainer needs args, a SftConfig"):
        SftTrainer(TinyConfig(output_dir=str(tmp_path)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "message"), [("float16", "torch.float16"), ("bfloat16", "set bf16: true")])
def test_half_precision_needs_autocast(tiny_wan: Path, clips: Path, tmp_path: Path, dtype: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        trained(tiny_wan, tmp_path, clips, dtype=dtype)
    if dtype == "bfloat16":
        trained(tiny_wan, tmp_path / "with", clips, dtype=dtype, bf16=True, max_steps=1)
