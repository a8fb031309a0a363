"""A DiT of pixels on stills of the world: its parts exactly, a few steps of its training, and what it exports."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DiTPipeline
from torch.distributions import Normal, kl_divergence

from postgen.errors import UserError
from postgen.families import denoiser_for
from postgen.lit import LitConfig, LitOptions, convert, layers_of, save
from postgen.lit.student import read_student
from postgen.pretrain.class_to_image import ClassToImageConfig, ClassToImageTrainer, judged, new_dit, sample_pictures
from postgen.pretrain.pixels import pixel_autoencoder
from postgen.pretrain.stills import labels, pool_of, render_stills, still
from postgen.pretrain.variance import variance_bound
from postgen.train import main
from postgen.training import TrainingConfig, load_recipe
from postgen.training.run_folder import RunLock
from postgen.world.parse import read

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TINY: dict[str, Any] = {
    "method": "class_to_image",
    "size": 32,
    "patch": 8,
    "pool_pictures": 64,
    "num_layers": 1,
    "num_heads": 2,
    "head_dim": 16,
    "max_steps": 60,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-2,
    "ema_decay": 0.5,
    "eval_pictures": 2,
    "eval_steps": 60,
    "eval_num_inference_steps": 2,
    "logging_steps": 10,
    "report_to": "none",
    "disable_tqdm": True,
    "device": "cpu",
}


def test_pixels_go_through_the_autoencoder() -> None:
    vae = pixel_autoencoder()
    torch.manual_seed(0)
    x = torch.cat([torch.rand(2, 3, 16, 24) * 2 - 1, torch.zeros(1, 3, 16, 24), torch.ones(1, 3, 16, 24)])
    latents = vae.encode(x).latent_dist
    torch.testing.assert_close(latents.mode(), x, atol=1e-5, rtol=0)
    assert float(latents.std.max()) < 1e-6
    # Latents on the way are larger than pictures.
    torch.testing.assert_close(vae.decode(3 * x).sample, 3 * x, atol=1e-4, rtol=0)
    torch.testing.assert_close(vae.bfloat16().decode(x.bfloat16()).sample.float(), x, atol=0.02, rtol=0)


def test_the_bound_is_the_divergence_of_the_posteriors() -> None:
    bars = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear").alphas_cumprod.double()
    torch.manual_seed(0)
    x0, noise, predicted = torch.randn(3, 4, 3, 8, 8, dtype=torch.float64)
    v = torch.rand(4, 3, 8, 8, dtype=torch.float64) * 2 - 1
    steps = torch.tensor([1, 40, 500, 999])
    bar, before = (table[steps].view(-1, 1, 1, 1) for table in (bars, torch.cat([bars.new_ones(1), bars[:-1]])))
    beta = 1 - bar / before
    x = bar.sqrt() * x0 + (1 - bar).sqrt() * noise

    def mean(clean: torch.Tensor) -> torch.Tensor:
        return (before.sqrt() * beta * clean + (bar / before).sqrt() * (1 - before) * x) / (1 - bar)

    true_variance = beta * (1 - before) / (1 - bar)
    share = (v + 1) / 2
    own = (share * beta.log() + (1 - share) * true_variance.log()).exp()
    guess = (x - (1 - bar).sqrt() * predicted) / bar.sqrt()
    wanted = kl_divergence(Normal(mean(x0), true_variance.sqrt()), Normal(mean(guess), own.sqrt())).mean((1, 2, 3))
    found = variance_bound(noise, predicted, v, steps, bars, x)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
    # Timestep 0 is left out; nothing moves the noise.
    leaf = predicted.clone().requires_grad_()
    last = variance_bound(noise, leaf, v.requires_grad_(), torch.zeros(4, dtype=torch.long), bars, x)
    assert not last.any()
    last.sum().backward()
    assert leaf.grad is None
    assert v.grad is not None
    assert bool(v.grad.isfinite().all())


def test_the_judge_knows_true_stills() -> None:
    """All right at 64 px for their own class, and never for the class with the bodies exchanged."""
    numbers = [k * 577 for k in range(6)]
    assert all(still(number) == still(number) for number in numbers[:2])
    names = [labels()[number % 576] for number in numbers]
    assert len(set(names)) == 6
    assert all(reading is not None and reading.places == ("left", "right") for reading in map(read, names))
    pictures = render_stills(numbers, 64, "cpu").float() / 2 + 0.5
    assert judged(pictures, names)["all_right"] == 1
    other = [(number + 24 * 5 + 3) % 576 for number in numbers]
    assert judged(pictures[:2], [labels()[number] for number in other[:2]])["all_right"] == 0


def test_stills_of_one_body() -> None:
    """48 classes, all right for their own class and wrong on the other side."""
    numbers = [k * 49 for k in range(1, 7)]
    names = [labels(1)[number % 48] for number in numbers]
    assert len({*labels(1)}) == len(labels(1)) == 48
    assert all(reading is not None and reading.places == ("left",) for reading in map(read, names))
    pictures = render_stills(numbers, 64, "cpu", 1).float() / 2 + 0.5
    assert judged(pictures, names)["all_right"] == 1
    assert judged(pictures, [labels(1)[(number + 24) % 48] for number in numbers])["all_right"] == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dit")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**TINY, "output_dir": str(folder / "run"), "pool_dir": str(folder / "pool")}))
    assert main([str(recipe)]) == 0
    return folder


def test_it_learns(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["noise_loss"] for row in rows if "noise_loss" in row]
    assert losses[-1] < 0.95 * losses[0]
    assert all(row["variance_loss"] >= 0 for row in rows if "loss" in row)
    assert 0 <= rows[-1]["eval_all_right"] <= 1
    assert (run / "run" / "samples.png").is_file()


def test_the_export_is_a_plain_pipeline(run: Path) -> None:
    """Classes by their names, guidance, and the same pictures as postgen's sampler."""
    pipe = DiTPipeline.from_pretrained(run / "run" / "export")
    pipe.set_progress_bar_config(disable=True)
    name = "a red ball stays on the left and a blue cube stays on the right"
    assert pipe.get_label_ids([name]) == [labels().index(name)]
    guided = pipe(
        pipe.get_label_ids([name]), guidance_scale=3.0, num_inference_steps=2, output_type="pt",
        generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    own = sample_pictures(denoiser_for(pipe), [name], [5], steps=2, guidance=3.0)
    torch.testing.assert_close(own, guided, atol=1e-4, rtol=0)


def test_stills_are_rendered_once(run: Path, tmp_path: Path) -> None:
    """The pool of the first run is read; one of other stills is refused before anything is trained."""
    before = (run / "pool" / "latents.safetensors").stat().st_mtime_ns
    given = {**TINY, "output_dir": str(tmp_path), "pool_dir": str(run / "pool"), "max_steps": 1}
    given = {key: value for key, value in given.items() if key != "method"}
    trainer = ClassToImageTrainer(ClassToImageConfig.from_dict({**given, "eval_steps": 0}))
    trainer.train()
    assert (run / "pool" / "latents.safetensors").stat().st_mtime_ns == before
    torch.testing.assert_close(trainer.latents[3:5], render_stills([3, 4], 32, "cpu"), atol=2e-3, rtol=0)
    assert trainer.classes[3] == 3
    with pytest.raises(UserError, match="does not have 65 stills of 32 px"):
        ClassToImageTrainer(
            ClassToImageConfig.from_dict({**given, "pool_pictures": 65, "output_dir": str(tmp_path / "other")})
        ).train()


def test_one_process_renders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another one renders at the moment is waited for, and read."""
    made, folder, device = tmp_path / "made", tmp_path / "pool", torch.device("cpu")
    stills, _ = pool_of(made, 3, 32, device)
    folder.mkdir()

    def fails(*given: Any) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr("postgen.pretrain.stills.render_stills", fails)
    with ThreadPoolExecutor(1) as pool, RunLock(folder, ".stills.lock", "pool_dir"):
        waits = pool.submit(pool_of, folder, 3, 32, device)
        time.sleep(0.2)
        assert not waits.done()
        for name in ("prompts.jsonl", "latents.safetensors"):
            shutil.copy(made / name, folder)
    assert torch.equal(waits.result()[0], stills)


def test_a_run_goes_on_with_its_stills_elsewhere(run: Path, tmp_path: Path) -> None:
    """Where stills are kept is no other run, and neither are a picture more or other sampler steps of evaluation."""
    shutil.copytree(run / "run", tmp_path / "run")
    shutil.copytree(run / "pool", tmp_path / "stills")
    words = ["--output_dir", str(tmp_path / "run"), "--pool_dir", str(tmp_path / "stills"), "--eval_pictures", "1"]
    assert main([str(run / "recipe.yaml"), *words, "--max_steps", "61", "--resume"]) == 0
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 61


@pytest.mark.parametrize("inherit", ["all", "output"])
def test_what_a_student_inherits(inherit: str) -> None:
    """Every weight, or every one but queries, keys and values; without linear blocks it is the teacher, bit by bit."""
    torch.manual_seed(0)
    given = {key: value for key, value in TINY.items() if key != "method"}
    teacher = new_dit(ClassToImageConfig.from_dict({**given, "output_dir": "x", "num_layers": 2}))
    torch.nn.init.normal_(teacher.proj_out_2.weight)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    x, told = torch.randn(2, 3, 32, 32), {"timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([0, 9])}
    with torch.no_grad():
        wanted = teacher(x, **told).sample
        student = new_dit(ClassToImageConfig.from_dict({**given, "output_dir": "x", "num_layers": 2}))
        student.load_state_dict(before)
        convert(student, LitConfig(layers="all:softmax"))
        assert torch.equal(student(x, **told).sample, wanted)
    linear = new_dit(ClassToImageConfig.from_dict({**given, "output_dir": "x", "num_layers": 2}))
    linear.load_state_dict(before)
    options = LitOptions(merge_heads=2, conv_time=0)
    convert(linear, LitConfig(layers="all:lit", first_block=True, inherit=inherit, lit=options))
    after = linear.state_dict()
    missing = {name.rsplit(".", 1)[0].rsplit(".", 1)[-1] for name in before.keys() - after.keys()}
    assert missing == (set() if inherit == "all" else {"to_q", "to_k", "to_v"})
    assert all(torch.equal(before[name], after[name]) for name in before.keys() & after.keys())
    assert all(layer.options.merge_heads == 2 for layer in layers_of(linear).values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 2}, "from another model than the teacher"),
        ({"num_heads": 4, "head_dim": 8}, "num_attention_heads 4 and not 2, attention_head_dim 8 and not 16"),
        ({"size": 64}, "sample_size 64 and not 32"),
    ],
)
def test_a_student_of_another_teacher(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Its weights may have the shapes of this teacher's, and mean something else."""
    given = {key: value for key, value in TINY.items() if key != "method"} | {"output_dir": "x"}
    student, teacher = (new_dit(ClassToImageConfig.from_dict({**given, **more})) for more in (changes, {}))
    options = LitOptions(merge_heads=2, conv_time=0)
    convert(student, LitConfig(layers="all:lit", first_block=True, inherit="output", lit=options))
    save(student, tmp_path / "student")
    with pytest.raises(UserError, match=said):
        read_student(tmp_path / "student", teacher)


def test_recipes_and_refusals(tmp_path: Path) -> None:
    trainer, config = load_recipe(RECIPES / "tiny-dit.yaml")
    assert trainer is ClassToImageTrainer
    assert (config.size // config.patch) ** 2 == 256
    for changes, said in (
        ({"size": 30, "patch": 8}, "a multiple of patch"),
        ({"class_dropout": 1.0}, "class_dropout"),
        ({"class_dropout": 0.0, "eval_guidance_scale": 2.0}, "class_dropout is 0.0, it must be above 0 with"),
        ({"eval_num_inference_steps": 1001}, "at most 1,000"),
        ({"eval_pictures": 0, "eval_steps": 5}, "at least 1 to evaluate"),
        ({"eval_pictures": 0, "merge_last": 2, "merge_metric": "eval_right"}, "at least 1 to evaluate"),
        ({"eval_pictures": 0, "evaluate_only": True}, "at least 1 to evaluate"),
        ({"pool_dir": ""}, "the name of a folder"),
        ({"cuda_graphs": True, "gradient_accumulation_steps": 2}, "1 with cuda_graphs"),
    ):
        with pytest.raises(UserError, match=said):
            ClassToImageConfig(output_dir=str(tmp_path), **changes)
    given = {key: value for key, value in TINY.items() if key != "method"}
    for args in (None, given, TrainingConfig(output_dir="x")):
        with pytest.raises(UserError, match="ClassToImageTrainer needs args, a ClassToImageConfig, got"):
            ClassToImageTrainer(args)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cuda_graphs needs one GPU"):
        ClassToImageTrainer(
            ClassToImageConfig.from_dict({**given, "output_dir": str(tmp_path), "cuda_graphs": True})
        ).train()
