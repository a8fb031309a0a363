"""Brakes: guards against hand numbers and finite differences, the loss on clips against pretraining, resume, input."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from postgen import world
from postgen.errors import UserError
from postgen.families import denoiser_for, register_denoiser
from postgen.families.loading import inspect_model, load_pipeline
from postgen.grpo.brakes import Guards, beyond, norm_excess, norm_ratio, temporal_log_ratio
from postgen.grpo.nft import DiffusionNFTConfig, DiffusionNFTTrainer
from postgen.grpo.trainer import DanceGRPOConfig, DanceGRPOTrainer
from postgen.pretrain.levels import flow_error
from postgen.pretrain.levels import noised as noised_in_pretraining
from postgen.sampling.seeds import normal, seed_of
from postgen.training.latent_files import LatentFiles
from postgen.video import write_video
from tests.grpo.toy import ROWS, grpo, lines, near, settings
from tests.sampling.toy import FrameDenoiser, PointPipeline

TRAINERS = (DanceGRPOTrainer, DiffusionNFTTrainer)
GUARDS = {"norm_guard": 10.0, "temporal_guard": 10.0, "temporal_guard_tau": 0.0}
DATA = {"data_beta": 0.5, "data_source": "samples", "data_clips": 6}
PARTS = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors")


class ClipPipeline(PointPipeline):
    """The toy with four latent frames."""


register_denoiser("ClipPipeline", FrameDenoiser)


def clips(folder: Path, kind: type, **changes: Any) -> Any:
    config = DiffusionNFTConfig if kind is DiffusionNFTTrainer else DanceGRPOConfig
    eval_dataset = changes.pop("eval_dataset", None)
    return kind(ClipPipeline(), near, settings(folder, config, **changes), ROWS, eval_dataset)


def weights(run: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in run.trained().items()}


# The guards.


def test_guards_by_hand() -> None:
    reference = torch.tensor([[[1e3, 2e3, 4e3]]] * 3, dtype=torch.float64)
    own = reference * torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64).view(3, 1, 1)
    assert norm_ratio(own, reference).tolist() == pytest.approx([2, 0.5, 1])
    assert norm_excess(norm_ratio(own, reference)).tolist() == pytest.approx([1, 0, 0])
    change = temporal_log_ratio(own, reference, 2)
    assert change.tolist() == pytest.approx([math.log(2), -math.log(2), 0])
    outside = (math.log(2) - 0.1) ** 2
    assert beyond(change, 0.1).tolist() == pytest.approx([outside, outside, 0])
    assert beyond(change, 0.7).tolist() == [0, 0, 0]
    # The motion guard does not see what all frames share. A still clip has a finite loss, and two of them the ratio 1.
    assert temporal_log_ratio(own + 5, own, 2).abs().max() < 1e-9
    assert beyond(temporal_log_ratio(torch.zeros_like(own), own, 2), 0.1).isfinite().all()
    assert temporal_log_ratio(own * 1e-9, own * 2e-9, 2).abs().max() < 1e-6
    moved = torch.tensor([[[0.0, 0.04]]], dtype=torch.float64)
    assert temporal_log_ratio(moved, 0 * moved, 2).item() == pytest.approx(math.log(5 / 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_guards_are_zero_with_zero_gradient_at_the_reference(dtype: torch.dtype) -> None:
    config = settings("unused", **GUARDS)
    reference = torch.randn(4, 3, 5, 2, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
    own = reference.clone().requires_grad_()
    loss, metrics = Guards(config, 2, 5)(own, reference, own, reference)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    assert own.grad is not None
    assert loss == 0
    assert torch.equal(own.grad, torch.zeros_like(own))
    assert [float(metrics[name]) for name in ("norm_ratio", "temporal_ratio")] == [1, 1]


@pytest.mark.parametrize("frame_axis", [1, 2])
def test_gradients_of_guards_equal_finite_differences(frame_axis: int) -> None:
    source = torch.Generator().manual_seed(1)
    reference = torch.randn(3, 3, 4, 2, dtype=torch.float64, generator=source)
    scale = torch.tensor([1.5, 0.6, 1.02], dtype=torch.float64).view(3, 1, 1, 1)
    own = (
        reference * scale + 0.1 * torch.randn(reference.shape, dtype=torch.float64, generator=source)
    ).requires_grad_()
    guards = Guards(settings("unused", norm_guard=2.0, temporal_guard=3.0, temporal_guard_tau=0.05), frame_axis, 4)
    assert torch.autograd.gradcheck(lambda v: guards(v, reference, 0.7 * v, reference)[0], own)


@pytest.mark.parametrize("kind", TRAINERS)
def test_guards_change_nothing_in_the_first_update_and_hold_afterwards(tmp_path: Path, kind: type) -> None:
    first = {"learning_rate": 1e-2, "max_steps": 1, "beta": 0.0}
    free, held = clips(tmp_path / "a", kind, **first), clips(tmp_path / "b", kind, **first, **GUARDS)
    free.train()
    held.train()
    assert all(torch.equal(value, weights(held)[name]) for name, value in weights(free).items())
    assert {"norm_ratio", "norm_guard", "temporal_ratio", "temporal_guard"} <= lines(held)[0].keys()
    assert not {"norm_ratio", "temporal_ratio", "kl"} & lines(free)[0].keys()
    assert "kl" not in lines(held)[0]
    later = {**first, "max_steps": 12}
    strong = {"norm_guard": 1e3, "temporal_guard": 1e3, "temporal_guard_tau": 0.0}
    drift = []
    for name, changes in (("c", {"temporal_guard": 1e-9}), ("d", strong)):
        run = clips(tmp_path / name, kind, **later, **changes)
        run.train()
        drift.append((lines(run)[-1]["norm_ratio"] - 1, abs(math.log(lines(run)[-1]["temporal_ratio"]))))
    assert drift[1][0] < 0.5 * drift[0][0]
    assert drift[1][1] < 0.5 * drift[0][1]


def test_a_reference_pass_measures_the_ratios_without_guards(tmp_path: Path) -> None:
    run = clips(tmp_path, DanceGRPOTrainer, beta=0.1, max_steps=1)
    run.train()
    assert (lines(run)[0]["norm_ratio"], lines(run)[0]["temporal_ratio"], lines(run)[0]["kl"]) == (1, 1, 0)


# The loss on clips.


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimiser step."""

    def __init__(self) -> None:
        self.run: Any = None
        self.found: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        run, step = self.run, self.run.optimizer.step

        def looking(*words: Any) -> None:
            self.found |= {name: value.grad.clone() for name, value in run.trained().items()}
            step(*words)

        run.optimizer.step = looking


@pytest.mark.parametrize("kind", TRAINERS)
def test_data_beta_alone_trains_as_pretraining_does(tmp_path: Path, kind: type) -> None:
    """With equal rewards the policy loss has no gradient, and the rest is the loss of `postgen.pretrain`."""
    look = Gradients()
    changes = {"kind": kind, "beta": 0.0, "max_grad_norm": 0.0, "per_device_train_batch_size": 8}
    accumulated = {"gradient_accumulation_steps": 2, "max_steps": 1}
    run = grpo(
        tmp_path,
        reward=lambda completions: [0.5] * len(completions),
        callbacks=[look],
        **DATA,
        **changes,
        **accumulated,
    )
    look.run = run
    run.train()
    model, pool, total = PointPipeline().transformer, run._clips["train"], torch.zeros(())
    (folder,) = tmp_path.glob("data/train-*")
    latents = LatentFiles(folder, 6, 8, {}).read()
    assert torch.equal(latents, pool.latents)
    for sample in range(16):
        seed = seed_of(run.args.seed, "data", 0, 0, sample)
        x0, noise = latents[seed % 6][None], normal(latents.shape[1:], [seed], torch.device("cpu"))
        sigma = run.sampler.schedule.sigmas[seed // 6 % 8][None].float()
        prediction = model(noised_in_pretraining(x0, noise, sigma), sigma)
        total = total + flow_error(prediction, x0, noise, sigma).mean() / 16
    (0.5 * total).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(look.found[f"transformer.{name}"], parameter.grad, rtol=1e-4, atol=1e-7)
    assert lines(run)[0]["data_loss"] == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_data_beta_supports_models_with_alpha_bars(tmp_path: Path, prediction_type: str) -> None:
    run = grpo(tmp_path, prediction_type=prediction_type, sde_type="ddim", noise_level=1.0, **DATA)
    run.train()
    assert 0 < lines(run)[-1]["data_loss"] < 1.5


def test_samples_are_those_of_the_model_before_training(tmp_path: Path) -> None:
    """They come from fixed noise, one for each clip, and are drawn once; a resumed run reads them."""
    run = grpo(tmp_path, **{**DATA, "data_clips": 10}, max_steps=1)
    run.train()
    latents = run._clips["train"].latents
    assert latents.shape == (10, 3, 1, 2, 2)
    assert [row["number"] for row in run._clips["train"].rows] == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]
    assert not torch.equal(latents[0], latents[8])
    other = grpo(tmp_path / "other", **{**DATA, "data_clips": 4}, max_steps=1, rollout_batch_size=4)
    other.train()
    torch.testing.assert_close(other._clips["train"].latents, latents[:4])


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("kept", [True, False])
def test_resume_with_brakes_is_exact(tmp_path: Path, kind: type, kept: bool) -> None:
    """Also when the folder of the clips was deleted: they are drawn again from the weights before training."""

    def run(name: str, **changes: Any) -> None:
        values = {"steps_per_generation": 2, "save_steps": 1, "save_total_limit": None, "ema_decay": 0.9, "beta": 0.0}
        clips(tmp_path / name, kind, max_steps=4, **values, **DATA, **GUARDS, **changes).train()

    run("straight")
    shutil.copytree(tmp_path / "straight" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    if kept:
        shutil.copytree(tmp_path / "straight" / "data", tmp_path / "resumed" / "data")
    run("resumed", resume_from_checkpoint="latest")
    for part in PARTS:
        one, other = (tmp_path / name / "checkpoint-4" / part for name in ("straight", "resumed"))
        assert one.read_bytes() == other.read_bytes(), part


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_dry_run_counts_the_brakes(tmp_path: Path, kind: type) -> None:
    changes = {"kind": kind, "beta": 0.0, "norm_guard": 1.0, "num_iterations": 2, "guidance_scale": 3.0, **DATA}
    guess = grpo(tmp_path / "guess", dry_run=True, **changes).train()
    run = grpo(tmp_path / "run", **changes)
    run.train()
    assert guess.metrics["forward_equivalents/run"] == pytest.approx(run.meter.forward_equivalents)
    copies = 1 + int(kind is DiffusionNFTTrainer)
    assert guess.metrics["bytes/training"] == (3 + copies) * guess.metrics["trained_parameters"] * 4
    assert not (tmp_path / "guess" / "data").exists()


def test_evaluation_measures_the_loss_on_held_out_clips(tmp_path: Path) -> None:
    """The loss is that of fixed noise, so it only changes with the weights, and rises if the model is damaged."""
    values = {"eval_dataset": ROWS, "eval_fm_clips": 5, "data_source": "samples", "eval_on_start": True}
    run = grpo(tmp_path, eval_steps=1, max_steps=2, learning_rate=0.3, **values)
    run.train()
    losses = [row["eval_fm_loss"] for row in lines(run) if "eval_fm_loss" in row]
    assert len(losses) == 3
    assert losses[2] > 1.1 * losses[0]
    assert run.meter.totals["forwards"] == grpo_forwards(tmp_path / "plain")
    assert not list(tmp_path.glob("data/train-*"))
    pool = run._clips["eval"]
    parts = [pool.mean_error(0, batch, 0, 1) for batch in (1, 3, 20)]
    assert parts == pytest.approx([parts[0]] * 3, rel=1e-6)


def test_held_out_samples_do_not_depend_on_data_beta(tmp_path: Path) -> None:
    values = {
        "eval_dataset": ROWS,
        "eval_fm_clips": 3,
        "data_source": "samples",
        "eval_on_start": True,
        "max_steps": 1,
    }
    runs = [clips(tmp_path / str(beta), DanceGRPOTrainer, data_beta=beta, **values) for beta in (0.0, 0.5)]
    for run in runs:
        run.train()
    assert len({lines(run)[0]["eval_fm_loss"] for run in runs}) == 1


def grpo_forwards(folder: Path) -> float:
    """Return the forward passes of two steps without evaluation."""
    run = grpo(folder, max_steps=2, learning_rate=0.3)
    run.train()
    return float(run.meter.totals["forwards"])


def test_data_beta_holds_the_loss_on_clips(tmp_path: Path) -> None:
    """Samples of the model before training hold it; the reward alone moves it away from them."""
    values = {"eval_dataset": ROWS, "eval_fm_clips": 16, "data_source": "samples", "eval_on_start": True}
    rise = []
    for name, changes in (("free", {}), ("held", {"data_beta": 1.0, "data_clips": 64})):
        run = grpo(tmp_path / name, eval_steps=30, max_steps=30, **values, **changes)
        run.train()
        losses = [row["eval_fm_loss"] for row in lines(run) if "eval_fm_loss" in row]
        rise.append(losses[1] / losses[0] - 1)
    assert rise[0] > 0.02
    assert rise[1] < 0.5 * rise[0]


# Scenes and videos, with a real pipeline.

WORLD = [{"prompt": "a red ball moves left"}, {"prompt": "a blue cube falls and a green ball stays still"}]
WAN = {
    "height": 16, "width": 16, "num_frames": 5, "num_generations": 2, "per_device_train_batch_size": 2,
    "num_inference_steps": 3, "max_sequence_length": 16, "use_peft": True, "lora_r": 2, "share_initial_noise": True,
    "max_steps": 1, "sde_window_size": 1,
}  # fmt: skip


def wan(model: Path, folder: Path, rows: Any = WORLD, **changes: Any) -> Any:
    eval_dataset = changes.pop("eval_dataset", None)
    return DanceGRPOTrainer(str(model), near, settings(folder, **{**WAN, **changes}), rows, eval_dataset)


def test_scenes_of_the_world_are_rendered_and_encoded(tiny_wan: Path, tmp_path: Path) -> None:
    held = [{"prompt": "a yellow cylinder moves right"}]
    measured = {"eval_dataset": held, "eval_fm_clips": 3, "eval_steps": 1}
    run = wan(tiny_wan, tmp_path, data_beta=1.0, norm_guard=1.0, temporal_guard=1.0, **measured)
    run.train()
    row = lines(run)[0]
    assert (row["norm_ratio"], row["temporal_ratio"], row["norm_guard"], row["temporal_guard"]) == (1, 1, 0, 0)
    assert row["data_loss"] > 0
    assert lines(run)[-1]["eval_fm_loss"] > 0
    denoiser = denoiser_for(load_pipeline(inspect_model(tiny_wan), dtype="auto", device="cpu"))
    for name, rows in (("train", WORLD), ("eval", held)):
        specs = [world.parse(each["prompt"]) for each in rows]
        rgb = world.render(specs, num_frames=5, size=16, geometry=False).rgb_BF3HW
        with torch.no_grad():
            expected = denoiser.encode_video(rgb)
        (file,) = tmp_path.glob(f"data/{name}-*/00000.safetensors")
        stored = load_file(file)["states"]
        torch.testing.assert_close(stored, expected, rtol=1e-4, atol=1e-4)


def test_videos_are_read_and_their_own_prompts_are_used(tiny_wan: Path, tmp_path: Path) -> None:
    rows = []
    for number in range(3):
        clip = torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(number))
        write_video(tmp_path / f"{number}", clip, fps=8, format="frames")
        rows.append({"prompt": f"clip {number}", "video": str(tmp_path / f"{number}")})
    place = tmp_path / "videos.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": "a cat"}]
    words = {"precompute_prompt_embeds": True, "data_beta": 1.0, "data_source": str(place)}
    run = wan(tiny_wan, tmp_path / "run", prompts, **words)
    run.train()
    assert [row["prompt"] for row in run._clips["train"].rows] == ["clip 0", "clip 1", "clip 2"]
    assert lines(run)[0]["data_loss"] > 0
    place.write_text(json.dumps({"prompt": "no video"}) + "\n")
    with pytest.raises(UserError, match="row 1 of data_source: video must be the path of a file"):
        wan(tiny_wan, tmp_path / "bad", prompts, **words)


# Wrong input.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_beta": -1.0}, "data_beta is -1.0, it must be at least 0"),
        ({"norm_guard": -1.0}, "norm_guard is -1.0, it must be at least 0"),
        ({"temporal_guard_tau": -0.1}, "temporal_guard_tau is -0.1, it must be at least 0"),
        ({"data_beta": 1.0, "data_clips": 0}, "data_clips is 0, it must be at least 1"),
        ({"data_source": "world"}, "data_source is 'world', it must be left out without data_beta and eval_fm_clips"),
        ({"eval_data_source": "world"}, "eval_data_source is 'world', it must be left out without eval_fm_clips"),
        (
            {"data_beta": 1.0, "data_source": "a.jsonl", "eval_fm_clips": 2},
            "eval_data_source is None, it must be given, with videos that are not trained on",
        ),
        ({"eval_fm_clips": 2}, "eval_fm_clips needs held-out prompts: give eval_dataset"),
        (
            {"data_beta": 1.0},
            "row 1 of train_dataset is 'a', which does not describe a scene of the synthetic world .no body.: set"
            " data_source to samples",
        ),
        (
            {"data_beta": 1.0, "rows": [{"prompt": "a red ball moves left and a cat sleeps"}]},
            "does not describe a scene of the synthetic world .unknown: cat, sleeps.",
        ),
        (
            {"data_beta": 1.0, "data_source": "absent.jsonl"},
            "data_source absent.jsonl cannot be read.* Give a file with prompt and video in each row: --data_source",
        ),
        (
            {"data_beta": 1.0, "data_source": "wrld"},
            "data_source is 'wrld', it must be world or samples, or a data set. Did you mean 'world'",
        ),
        ({"data_clips": 8}, "data_clips is 8, it must be left out without data_beta"),
        ({"temporal_guard_tau": 0.2}, "temporal_guard_tau is 0.2, it must be left out without temporal_guard"),
        (
            {"data_beta": 1.0, "rows": [{"prompt": "a red ball moves left"}]},
            "data_source: the denoiser of this model cannot encode clips: set data_source to samples",
        ),
        ({"temporal_guard": 1.0}, "temporal_guard compares latent frames, but these clips have one latent frame"),
        ({"norm_guard": 1.0, "init_from": "."}, "init_from with beta or a guard above 0"),
    ],
)
def test_bad_input(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grpo(tmp_path, **changes).train()
    assert not (tmp_path / "data").exists()


def test_clips_that_cannot_be_made_are_refused(tiny_wan: Path, tiny_wan_image: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scenes of the world are square, but the clips have 16 x 32 pixels"):
        wan(tiny_wan, tmp_path / "a", data_beta=1.0, width=32).train()
    pictured = [{"prompt": "a red ball moves left", "image": torch.zeros(3, 16, 16)}]
    with pytest.raises(UserError, match="has an image, and only data_source samples supports first frames"):
        wan(tiny_wan_image, tmp_path / "b", pictured, data_beta=1.0)
    wan(tiny_wan_image, tmp_path / "samples", pictured, **DATA).train()


def test_a_resumed_run_may_evaluate_on_other_clips(tmp_path: Path) -> None:
    values = {"eval_dataset": ROWS, "data_source": "samples", "eval_steps": 1, "save_steps": 1}
    grpo(tmp_path, max_steps=1, eval_fm_clips=2, **values).train()
    grpo(tmp_path, max_steps=2, eval_fm_clips=3, resume_from_checkpoint="latest", **values).train()
    assert sorted(len(load_file(file)["states"]) for file in tmp_path.glob("data/eval-*/*.safetensors")) == [2, 3]
