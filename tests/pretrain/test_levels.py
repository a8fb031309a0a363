"""Mixed noise levels: what each kind draws, what counts in the loss, and a training step of each kind."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter

import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file

from postgen import world
from postgen.assets import embedded_model
from postgen.errors import UserError
from postgen.families.loading import inspect_model
from postgen.pretrain.autoencoder import new_autoencoder
from postgen.pretrain.levels import KINDS, draw_kind, draw_sigma, flow_error, noised
from postgen.pretrain.pipeline_folder import EXAMPLES
from postgen.pretrain.text_to_video import TextToVideoTrainer
from postgen.training import load_recipe
from postgen.training.tokenizers import unknown_words
from tests.pretrain.test_recipes import text_to_video

SHARES = [0.7, 0.15, 0.15]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trainer after six steps over all kinds, two sizes and two lengths."""
    folder = tmp_path_factory.mktemp("levels")
    new_autoencoder(8, [1, 2, 2], 4).save_pretrained(folder / "vae")
    path = text_to_video(folder, folder)
    changes = {
        "lengths": [9, 5, 9],
        "sizes": [32, 32, 16],
        "length_weights": [0.4, 0.3, 0.3],
        "even_cost": True,
        "noise_shares": [0.4, 0.3, 0.3],
        "pool_clips": 12,
        "whole_words": True,
        "synonym_share": 0.3,
        "unknown_share": 0.05,
        "max_steps": 6,
        "eval_prompts": 0,
        "save_steps": 0,
    }
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))
    trainer, config = load_recipe(path)
    made = trainer(config)
    made.train()
    made.recipe = path
    return made


def test_what_each_kind_draws():
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    one, first, each = (draw_sigma(kind, 64, 5, 2.5, generator, cpu) for kind in KINDS)
    assert one.shape == (64,)
    assert first.shape == each.shape == (64, 5)
    assert (first[:, 0] == 0).all()
    assert (first[:, 1:] == first[:, 1:2]).all()
    assert len(each.unique()) == 320
    for sigma in (one, first[:, 1], each):
        assert 0 < sigma.min() < sigma.max() < 1
        # The shifted logit-normal of shift 2.5: its median is 2.5 / 3.5.
        assert abs(sigma.median() - 2.5 / 3.5) <= 0.1


def test_kinds_come_with_their_shares():
    counts = Counter(draw_kind(SHARES, random.Random(step)) for step in range(4000))
    for kind, share in zip(KINDS, SHARES, strict=True):
        assert abs(counts[kind] / 4000 - share) <= 0.025


def test_a_given_latent_is_clean_and_does_not_count():
    torch.manual_seed(0)
    x0, noise, sigma = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2), torch.tensor([[0.0, 0.5, 0.5]] * 2)
    assert torch.equal(noised(x0, noise, sigma)[:, :, 0], x0[:, :, 0])
    prediction = torch.randn_like(x0, requires_grad=True)
    error = flow_error(prediction, x0, noise, sigma)
    torch.testing.assert_close(error, (prediction - noise + x0)[:, :, 1:].square().mean(dim=(1, 2, 3, 4)))
    error.sum().backward()
    assert prediction.grad[:, :, 0].abs().max() == 0
    assert prediction.grad[:, :, 1:].abs().min() > 0


@pytest.mark.parametrize("kind", range(3))
def test_a_step_of_each_kind_has_gradients(run, kind):
    run.args.noise_shares = [float(i == kind) for i in range(3)]
    loss, metrics = run.training_step()
    for model in run.models.values():
        model.zero_grad()
    loss.backward()
    assert loss.isfinite()
    # What is logged for text-to-video is of batches with one level a clip only.
    assert ("loss_noisy" in metrics) == (kind == 0)
    assert (f"loss_{KINDS[kind]}" in metrics) == (kind > 0)
    for model in run.models.values():
        assert sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None) > 0


def test_equal_levels_per_latent_are_one_level(run):
    x0, ids = run.pools[0].draw(2, run.generator)
    noise, one = torch.randn_like(x0), torch.tensor([0.4, 0.9])
    each, given = one[:, None].expand(-1, 3).clone(), torch.tensor([[0.0, 0.4, 0.4], [0.0, 0.9, 0.9]])
    x = noised(x0, noise, one)
    with torch.no_grad():
        predictions = [run.predict(x, sigma, ids) for sigma in (one, each, given)]
    torch.testing.assert_close(predictions[0], predictions[1])
    assert (predictions[0] - predictions[2]).abs().max() > 1e-5
    errors = [flow_error(p, x0, noise, sigma) for p, sigma in zip(predictions, (one, each), strict=False)]
    torch.testing.assert_close(*errors)


def test_both_models_train_as_one_module(run, tmp_path):
    class Joint(TextToVideoTrainer):
        def _joint(self):
            return True

    values = {"output_dir": str(tmp_path / "run"), "max_steps": 2}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(run.recipe.read_text()), **values}))
    joint = Joint(load_recipe(path)[1])
    joint.train()
    assert [*joint.models] == ["joint"]
    shapes = {(tuple(x.shape), sigma.dim(), tuple(ids.shape)) for x, sigma, ids in joint._samples()}
    assert len(shapes) == 6
    for index, pool in enumerate(joint.pools):
        x, ids = pool.draw(joint._batch(index), joint.generator)
        for dims, sigma in ((1, torch.full((len(x),), 0.4)), (2, torch.full((len(x), x.shape[2]), 0.4))):
            assert (tuple(x.shape), dims, tuple(ids.shape)) in shapes
            apart = joint._velocity(joint.transformer, joint.text_encoder, x, sigma, ids)
            torch.testing.assert_close(joint.predict(x, sigma, ids), apart, rtol=0, atol=0)
    again = load_file(tmp_path / "run" / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {name for name, _ in joint.transformer.named_parameters()} <= set(again)


def test_the_network_is_told_what_image_to_video_tells_it(run):
    parts = {**run.components(), "image_encoder": None, "image_processor": None, "expand_timesteps": True}
    pipe = WanImageToVideoPipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0), **parts)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    hook = run.transformer.register_forward_pre_hook(lambda _, __, told: seen.append(told), with_kwargs=True)
    try:
        with run.stock_attention():
            size = {"height": 32, "width": 32, "num_frames": 9}
            pipe(Image.new("RGB", (32, 32), "red"), "a red ball", **size, num_inference_steps=1)
    finally:
        hook.remove()
    sigma = pipe.scheduler.sigmas[:1].expand(3).clone()[None]
    sigma[:, 0] = 0
    told = run.denoiser.network_timestep(run.denoiser.timestep(sigma), seen[0]["hidden_states"])
    assert told.shape == (1, 12)
    torch.testing.assert_close(seen[0]["timestep"].float(), told, atol=0, rtol=1e-6)


def test_each_size_and_length_has_its_pool(run):
    assert [tuple(pool.latents.shape[2:]) for pool in run.pools] == [(3, 4, 4), (2, 4, 4), (3, 2, 2)]
    assert [len(pool.latents) for pool in run.pools] == [5, 4, 4]
    assert [run._batch(index) for index in range(3)] == [2, 3, 8]


def test_the_log_tells_the_kinds_apart(run):
    rows = [json.loads(line) for line in (run.args.folder / "metrics.jsonl").read_text().splitlines()]
    found = [[kind for kind in KINDS if f"loss_{kind}" in row] for row in rows if "loss" in row]
    assert len(found) == 6
    # From seed and step alone, so the same in every process.
    chances = [random.Random(f"kind-{run.args.seed}-{step}") for step in range(6)]
    for chance in chances:
        chance.choices(range(3), [0.4, 0.3, 0.3])
    assert found == [[draw_kind([0.4, 0.3, 0.3], chance)] for chance in chances]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("sizes", "[32]", "sizes.*as many numbers as lengths"),
        ("sizes", "[16,32,32]", "sizes.*the first one size"),
        ("sizes", "[32,24,32]", "sizes.*multiples of 16"),
        ("length_weights", "[0,0,0]", "length_weights.*not all 0"),
        ("noise_shares", "[1,0]", "noise_shares.*three shares"),
        ("noise_shares", "[0,0,0]", "noise_shares.*not all 0"),
        ("fully_shard", "true", "fully_shard.*false with cuda_graphs"),
        ("synonym_share", "1.5", "synonym_share.*in"),
        ("whole_words", "false", "unknown_share.*0 without whole_words"),
    ],
)
def test_values_out_of_range_are_refused(run, key, value, text):
    values = {**yaml.safe_load(run.recipe.read_text()), key: yaml.safe_load(value)}
    values["cuda_graphs"] = key == "fully_shard"
    path = run.recipe.with_name("wrong.yaml")
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=text):
        load_recipe(path)


def test_the_command_line_names_words_that_the_model_does_not_know(run, cli, tmp_path):
    words = ["-o", tmp_path / "clip.gif", "--model", run.args.folder / "export", "--steps", "1"]
    done = cli("generate", "a cat and a red ball on a sofa", *words)
    assert done.code == 0, done.err
    lines = [line for line in done.err.splitlines() if "does not know" in line]
    assert len(lines) == 1
    assert "export does not know: cat, sofa. It knows prompts like" in lines[0]
    assert all(f'"{text}"' in lines[0] for text in EXAMPLES)
    done = cli("generate", "a red ball rolls left", *words)
    assert (done.code, "unknown" in done.err) == (0, False)


def test_examples_are_prompts_of_the_world(run):
    facts = inspect_model(run.args.folder / "export")
    assert facts.closed_vocabulary == EXAMPLES
    assert len(EXAMPLES) == 3
    assert inspect_model(embedded_model()).closed_vocabulary == EXAMPLES
    for text in EXAMPLES:
        assert world.parse(text) is not None
        assert not unknown_words(run.tokenizer, text)


def test_a_damaged_list_of_examples_is_refused(run, tmp_path):
    folder = shutil.copytree(run.args.folder / "export", tmp_path / "model")
    (folder / "postgen.json").write_text('{"closed_vocabulary": "a red ball"}')
    with pytest.raises(UserError, match="closed_vocabulary must be a list of example prompts"):
        inspect_model(folder)
