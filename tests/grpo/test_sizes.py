"""Training uses the size and frame rate of `postgen generate`, for folders and for pipelines in memory."""

import json

import diffusers
import pytest
import torch

from postgen.errors import UserError
from postgen.families.loaded import defaults_of, sizes_of_pipeline
from postgen.families.loading import inspect_model
from postgen.grpo.nft import DiffusionNFTConfig, DiffusionNFTTrainer
from postgen.grpo.trainer import DanceGRPOConfig, DanceGRPOTrainer
from postgen.training.lora import AdapterConfig
from postgen.training.policy import ModelConfig, Policy
from postgen.video import probe
from tests.families.tiny_pipelines import PIPELINES, tiny_pipeline
from tests.families.tiny_videos import VIDEOS, save_tiny_video
from tests.grpo.toy import lines, near

ROWS = [{"prompt": "a ball"}]


def trainer(model, folder, *, nft=False, **size):
    kind, config = (DiffusionNFTTrainer, DiffusionNFTConfig) if nft else (DanceGRPOTrainer, DanceGRPOConfig)
    args = config(output_dir=str(folder), num_generations=2, per_device_train_batch_size=2, report_to=[], **size)
    return kind(model, near, args, ROWS)


@pytest.mark.parametrize("name", VIDEOS)
def test_a_pipeline_in_memory_is_known_as_its_folder_is(name, tmp_path):
    save_tiny_video(name, tmp_path)
    facts = inspect_model(tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert sizes_of_pipeline(pipe) == facts.multiples
    assert defaults_of(pipe).fps == facts.defaults.fps
    (tmp_path / "postgen.json").write_text(json.dumps({"fps": 5, "height": 64}))
    assert (defaults_of(pipe).fps, defaults_of(pipe).height) == (5, 64)


def test_subclasses_have_the_rate_of_their_family():
    pipe, _ = tiny_pipeline("LTX")
    own = type("MyLTX", (diffusers.LTXPipeline,), {})(**pipe.components)
    assert Policy(own, ModelConfig(), AdapterConfig(use_peft=False)).defaults.fps == 25


@pytest.mark.parametrize("name", [name for name, (_, size) in PIPELINES.items() if size["num_frames"] > 1])
@pytest.mark.parametrize("nft", [False, True])
def test_trainers_refuse_what_generate_refuses_before_anything_is_loaded(name, nft, tmp_path):
    pipe, size = tiny_pipeline(name)
    pipe.save_pretrained(tmp_path / "model")
    for change in ({"num_frames": 4}, {"height": size["height"] + 1}, {"width": size["width"] + 1}):
        wrong = {**size, **change}
        with pytest.raises(UserError) as refused:
            inspect_model(tmp_path / "model").check_size(wrong["num_frames"], wrong["height"], wrong["width"])
        for model in (pipe, str(tmp_path / "model")):
            with pytest.raises(UserError) as caught:
                trainer(model, tmp_path / "run", nft=nft, **wrong)
            assert str(caught.value) == str(refused.value)
    trainer(pipe, tmp_path / "run", nft=nft, **size)


def test_samples_of_a_pipeline_in_memory_play_at_the_rate_of_its_family(tmp_path):
    pipe, size = tiny_pipeline("LTX")
    told = []

    def noting(completions, fps):
        told.append(fps)
        return near(completions)

    args = DanceGRPOConfig(
        output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2, num_inference_steps=2,
        device="cpu", evaluate_only=True, max_sequence_length=16, disable_tqdm=True, report_to=[], **size,
    )  # fmt: skip
    DanceGRPOTrainer(pipe, noting, args, ROWS, ROWS).train()
    assert probe(tmp_path / "samples" / "step-000000.mp4").fps == 25
    assert told == [25.0]


@torch.no_grad()
def test_a_network_that_is_told_the_rate_is_told_that_of_the_recipe(tmp_path):
    pipe, size = tiny_pipeline("LTX")
    drawn = []
    for fps in (None, 25.0, 12.0):
        run = trainer(pipe, tmp_path, fps=fps, max_sequence_length=16, device="cpu", use_peft=False, **size)
        run.build()
        x = torch.ones(1, *run.policy.denoiser.latent_shape(**size))
        drawn.append(run.policy.denoiser.predict(x, torch.tensor([0.5]), run.conditions(0)([0])))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_cogvideox_is_trained_on_8n_plus_1_frames(tmp_path):
    pipe, size = tiny_pipeline("CogVideoX")
    with pytest.raises(UserError, match=r"the number of frames must be 8n\+1, got 5: use 1 or 9"):
        trainer(pipe, tmp_path, **{**size, "num_frames": 5})


def test_cogvideox_15_is_trained_on_the_frames_it_was_asked_for(tmp_path):
    pipe, size = tiny_pipeline("CogVideoX")
    config = {**pipe.transformer.config, "patch_size_t": 2, "patch_bias": False, "_use_default_values": []}
    pipe.transformer = diffusers.CogVideoXTransformer3DModel.from_config(config)
    seen = []

    def noting(completions):
        seen.extend(len(clip) for clip in completions)
        return near(completions)

    args = DanceGRPOConfig(
        output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2, num_inference_steps=3, lora_r=2,
        max_steps=1, sde_type="ddim", sde_window_size=1, check_on_policy_ratio="raise", logging_steps=1, device="cpu",
        disable_tqdm=True, report_to=[], save_steps=0, **size,
    )  # fmt: skip
    run = DanceGRPOTrainer(pipe, noting, args, ROWS)
    run.train()
    assert seen == [9, 9]
    assert run.fps == 16
    assert lines(run)[0]["grad_norm"] > 0
