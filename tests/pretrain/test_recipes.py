"""The shipped recipes, and both methods for a few steps at a tiny size."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import WanPipeline
from safetensors import safe_open

from postgen.assets import embedded_model, model_folder
from postgen.errors import UserError
from postgen.pretrain.autoencoder import AutoencoderTrainer, new_autoencoder
from postgen.pretrain.joint_pass import JointPass
from postgen.pretrain.other_patch import take_over, with_patch
from postgen.pretrain.pipeline_folder import new_transformer
from postgen.pretrain.text import new_text_encoder
from postgen.pretrain.text_to_video import TextToVideoTrainer
from postgen.train import main
from postgen.training import load_recipe
from postgen.training.tokenizers import word_tokenizer
from postgen.training.weights import initialise
from postgen.world.wording import world_words

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
PLAIN = {
    "size": 32,
    "per_device_train_batch_size": 1,
    "logging_steps": 1,
    "disable_tqdm": True,
    "report_to": "none",
    "device": "cpu",
}
PARTS = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "rank-0.safetensors", "rank-0.json")


def recipe(folder, **values):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**PLAIN, "output_dir": str(folder / "run"), **values}))
    return path


def text_to_video(folder, autoencoder):
    values = {
        "method": "text_to_video",
        "autoencoder": str(autoencoder),
        "pool_clips": 8,
        "lengths": [17, 5],
        "length_weights": [0.5, 0.5],
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "num_layers": 1,
        "num_heads": 2,
        "head_dim": 12,
        "ffn_dim": 32,
        "text_width": 16,
        "text_layers": 1,
        "eval_prompts": 2,
        "eval_steps": 4,
        "eval_num_inference_steps": 2,
        "save_steps": 2,
        "save_total_limit": None,
        "ema_decay": 0.9,
        "learning_rate": 1e-2,
    }
    return recipe(folder, **values)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoder")
    new_autoencoder(8, [1, 2, 2], 4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_run(tmp_path_factory, autoencoder):
    folder = tmp_path_factory.mktemp("text")
    assert main([str(text_to_video(folder, autoencoder))]) == 0
    return folder / "run"


def test_the_recipe_of_the_autoencoder_is_read():
    trainer, config = load_recipe(RECIPES / "tiny-autoencoder.yaml")
    assert trainer is AutoencoderTrainer
    assert (config.size, config.dim_mult, config.lengths[0], config.max_steps) == (128, [2, 2, 2], 33, 29500)


def test_the_recipe_of_the_denoiser_builds_the_shipped_model():
    trainer, config = load_recipe(RECIPES / "tiny-wan.yaml")
    assert trainer is TextToVideoTrainer
    assert (config.size, config.lengths[0], config.noise_shares) == (128, 33, [0.7, 0.15, 0.15])
    assert {96, 128, 160} == set(config.sizes)
    assert {17, 33, 49} == set(config.lengths)
    folder = embedded_model()
    assert model_folder(config.autoencoder) == folder
    with torch.device("meta"):
        denoiser = new_transformer(config, json.loads((folder / "vae" / "config.json").read_text())["z_dim"])
        text = new_text_encoder(len(word_tokenizer(world_words())), config.text_width, config.text_layers, 4)
    for module, path in (
        (denoiser, folder / "transformer" / "diffusion_pytorch_model.safetensors"),
        (text, folder / "text_encoder" / "model.safetensors"),
    ):
        with safe_open(path, "pt") as file:
            shipped = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        built = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        # Tied embeddings are written once.
        assert shipped.items() <= built.items()
        assert len(shipped) >= len(built) - 1
    facts = json.loads((folder / "postgen.json").read_text())
    assert (facts["width"], facts["num_frames"], facts["guidance_scale"]) == (128, 33, config.eval_guidance_scale)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("sizes", [32], "sizes.*as many numbers as lengths"),
        ("sizes", [16, 32], "sizes.*the first one size"),
        ("lengths", [16, 33], "lengths.*4n"),
        ("pool_shares", [0.5, 0.5], "pool_shares.*the first 1"),
        ("length_weights", [0.0, 0.0], "length_weights.*not all 0"),
        ("image_share", 1.0, "image_share"),
        ("edge_weight", -1.0, "edge_weight.*at least 0"),
        ("first_frame_weight", 0.0, "first_frame_weight.*above 0"),
        ("gradient_scales", 5, "gradient_scales.*from 1 to 4"),
        ("decoder_base_dim", 0, "decoder_base_dim"),
    ],
)
def test_an_autoencoder_out_of_range_is_refused(tmp_path, key, value, text):
    with pytest.raises(UserError, match=text):
        load_recipe(recipe(tmp_path, method="autoencoder", **{key: value}))


def test_graphs_of_the_autoencoder_need_a_gpu(tmp_path):
    path = recipe(tmp_path, method="autoencoder", cuda_graphs=True)
    for words, text in (
        (["--gradient_accumulation_steps", "2"], "gradient_accumulation_steps.*1 with cuda_graphs"),
        (["--compile", "true"], "compile.*false with cuda_graphs"),
    ):
        with pytest.raises(UserError, match=text):
            load_recipe(path, words)
    trainer, config = load_recipe(path)
    with pytest.raises(UserError, match=r"cuda_graphs needs a GPU, not cpu\. Leave it out"):
        trainer(config).train()


def test_a_recipe_without_its_autoencoder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no autoencoder\. Train one with recipes/tiny-autoencoder\.yaml"):
        load_recipe(RECIPES / "tiny-wan.yaml", ["--autoencoder", str(tmp_path)])


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [("size", "30", "size.*of 16"), ("lengths", "[16]", "lengths.*4n"), ("shift", "0.5", "shift.*at least 1")],
)
def test_values_out_of_range_are_refused(tmp_path, autoencoder, key, value, text):
    path = text_to_video(tmp_path, autoencoder)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), key: yaml.safe_load(value)}))
    with pytest.raises(UserError, match=text):
        load_recipe(path)


def test_graphs_that_cannot_be_recorded_are_refused(tmp_path, autoencoder):
    path = text_to_video(tmp_path, autoencoder)
    with pytest.raises(UserError, match=r"gradient_accumulation_steps.*1 with cuda_graphs"):
        load_recipe(path, ["--cuda_graphs", "true", "--gradient_accumulation_steps", "2"])
    trainer, config = load_recipe(path, ["--cuda_graphs", "true"])
    with pytest.raises(UserError, match=r"cuda_graphs needs a GPU, not cpu\. Leave it out"):
        trainer(config).train()


def test_the_autoencoder_is_trained_and_exported(tmp_path):
    from diffusers import AutoencoderKLWan

    values = {
        "method": "autoencoder",
        "base_dim": 8,
        "decoder_base_dim": 12,
        "z_dim": 4,
        "lengths": [17, 9],
        "sizes": [32, 16],
        "edge_weight": 1.0,
        "first_frame_weight": 2.0,
        "pool_clips": 8,
        "max_steps": 3,
        "image_until": 0.3,
        "short_until": 0.6,
        "eval_steps": 3,
        "eval_clips": 2,
    }
    assert main([str(recipe(tmp_path, **values))]) == 0
    run = tmp_path / "run"
    vae = AutoencoderKLWan.from_pretrained(run / "export")
    assert (vae.config.base_dim, vae.config.decoder_base_dim, vae.config.z_dim) == (8, 12, 4)
    assert all(value > 0 for value in vae.config.latents_std)
    assert vae.config.latents_std != [1.0] * 4
    with torch.no_grad():
        clip = torch.zeros(1, 3, 5, 32, 32)
        z = vae.encode(clip).latent_dist.mode()
        assert z.shape == (1, 4, 2, 4, 4)
        assert vae.decode(z).sample.shape == clip.shape
    assert (run / "reconstructions.png").is_file()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = next(row for row in rows if "eval_psnr_objects" in row)
    gap = measured["eval_psnr_objects_rest"] - measured["eval_psnr_objects_first"]
    assert measured["eval_first_frame_gap_db"] == pytest.approx(gap)


def test_the_export_is_a_plain_pipeline(text_run):
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(text_run / "export")
    pipe.set_progress_bar_config(disable=True)
    defaults = json.loads((text_run / "export" / "postgen.json").read_text())
    assert (defaults["width"], defaults["num_frames"], defaults["num_inference_steps"]) == (32, 17, 2)
    frames = pipe(
        "a red ball", height=32, width=32, num_frames=5, num_inference_steps=2, guidance_scale=3.0, output_type="pt"
    ).frames
    assert frames.shape == (1, 5, 3, 32, 32)
    assert frames.isfinite().all()
    assert (text_run / "samples.png").is_file()


def test_a_resumed_run_is_the_same_bit_by_bit(text_run, autoencoder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(text_run / "checkpoint-2", run / "checkpoint-2")
    assert main([str(text_to_video(tmp_path, autoencoder)), "--resume"]) == 0
    for name in PARTS:
        assert (run / "checkpoint-4" / name).read_bytes() == (text_run / "checkpoint-4" / name).read_bytes(), name
    weights = (text_run / "checkpoint-2" / PARTS[0]).read_bytes()
    assert weights != (run / "checkpoint-4" / PARTS[0]).read_bytes()


def test_a_run_of_both_models_as_one_goes_on_from_an_export(text_run):
    export = text_run / "export"
    pipe = WanPipeline.from_pretrained(export, dtype=torch.float32)
    models = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
    wanted = {
        name: {key: value.clone() for key, value in model.state_dict().items()} for name, model in models.items()
    }
    for model in models.values():
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
    joint = JointPass(lambda *inputs: inputs[2], *models.values(), graphs=False)
    initialise({"joint": joint}, export)
    for name, model in models.items():
        torch.testing.assert_close(dict(model.state_dict()), wanted[name], rtol=0, atol=0)
    with pytest.raises(UserError, match=r"no \*\.safetensors in .*joint"):
        initialise({"joint": torch.nn.Linear(2, 2)}, export)


def test_the_fine_teacher_begins_with_the_blocks_of_the_embedded_model():
    """A latent pixel whose whole patch is like it gives the token that the patch gave, and heads give means."""
    trainer, config = load_recipe(RECIPES / "tiny-wan-fine.yaml")
    assert trainer is TextToVideoTrainer
    folder = embedded_model()
    trained = WanPipeline.from_pretrained(folder).transformer.float()
    fine = new_transformer(config, trained.config.in_channels)
    text = new_text_encoder(len(word_tokenizer(world_words())), config.text_width, config.text_layers, 4)
    take_over(fine, text, word_tokenizer(world_words()), folder)
    pixel = torch.randn(1, 16, 1, 1, 1)
    assert torch.allclose(
        fine.patch_embedding(pixel), trained.patch_embedding(pixel.expand(1, 16, 1, 2, 2)), atol=1e-5
    )
    hidden = torch.randn(3, 256)
    assert torch.allclose(fine.proj_out(hidden), trained.proj_out(hidden).view(3, 4, 16).mean(1), atol=1e-5)
    taken, own = trained.blocks.state_dict(), fine.blocks.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in taken.items())
    assert (math.prod(config.lengths), config.patch) == (33, 1)
    assert 9 * (config.size // 8) ** 2 == 1296


def test_what_cannot_be_taken_over_is_refused(tmp_path):
    tokenizer = word_tokenizer(world_words())
    with pytest.raises(UserError, match="has no transformer and no text_encoder and no tokenizer"):
        take_over(None, None, tokenizer, tmp_path)
    with pytest.raises(UserError, match="another vocabulary"):
        take_over(None, None, word_tokenizer(["red"]), embedded_model())
    _, config = load_recipe(RECIPES / "tiny-wan-fine.yaml", ["--num_layers", "2"])
    with pytest.raises(UserError, match=r"blocks_from.*blocks\.2.*is missing in one of the two"):
        take_over(new_transformer(config, 16), None, tokenizer, embedded_model())
    _, config = load_recipe(RECIPES / "tiny-wan-fine.yaml", ["--ffn_dim", "64"])
    with pytest.raises(UserError, match=r"blocks_from.*there and .* here: use its widths"):
        take_over(new_transformer(config, 16), None, tokenizer, embedded_model())
    with pytest.raises(UserError, match=r"blocks_from: .* is not a pipeline folder"):
        load_recipe(RECIPES / "tiny-wan-fine.yaml", ["--blocks_from", str(tmp_path)])
    trained = new_transformer(config, 16)
    assert with_patch(trained, (1, 1, 1)).keys() == trained.state_dict().keys()
    with pytest.raises(UserError, match=r"fit patches of \(1, 1, 1\) and \(1, 1, 1\) only"):
        with_patch(trained, (1, 2, 2))
