"""Two processes, with averaged gradients or sharded weights, train the weights of one process (gloo, CPU)."""

import json

import pytest
import torch
from safetensors.torch import load_file

from postgen.pretrain.autoencoder import new_autoencoder
from tests.training.distill import CUT, MERGED, distill, nft
from tests.training.pair import run_pair

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    new_autoencoder(8, [1, 2, 2], 4).save_pretrained(folder / "vae")
    run_pair("tests.training.distill:JOBS", folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    distill(folder / "plain")
    distill(folder / "cut", **CUT)
    distill(folder / "merged", **MERGED)
    nft(folder / "nft", gradient_accumulation_steps=2, steps_per_generation=4)
    return folder


def saved(run, step, name="weights"):
    return load_file(run / f"checkpoint-{step}" / f"{name}.safetensors")


def difference(left, right):
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def test_losses_of_a_wrapper_have_the_gradient_of_one_process(pair, alone):
    """With SGD, consecutive checkpoints differ by a gradient times the learning rate, plus momentum."""
    runs = (pair / "averaged", alone / "plain")
    steps = [{name: value - saved(run, 3)[name] for name, value in saved(run, 4).items()} for run in runs]
    assert {name.split(".")[1] for name in steps[0]} == {"student"}
    largest = max(float(step.abs().max()) for step in steps[1].values())
    assert difference(*steps) < 1e-5 * largest < 1e-5


def test_cut_weights_of_a_wrapper_learn_the_same(pair, alone):
    """Sharded weights, momentum and EMA equal those of one process, with EMA swapped in between all steps."""
    pieces = [json.loads((pair / f"pieces-{rank}.json").read_text()) for rank in (0, 1)]
    assert pieces[0] == ["", *(f"{part}.blocks.{n}" for part in ("student", "teacher") for n in (0, 1))] == pieces[1]
    for name in ("weights", "ema", "optimizer"):
        assert difference(saved(pair / "cut", 4, name), saved(alone / "cut", 4, name)) < 1e-6, name
    assert difference(saved(pair / "cut", 3), saved(pair / "cut", 4)) > 1e-3


def test_accelerate_cuts_a_wrapper_at_the_same_blocks(pair):
    blocks = [
        [f"{part}.{name}.{n}" for part in ("student", "teacher") for n in (0, 1)]
        for name in ("blocks", "transformer_blocks")
    ]
    for rank in (0, 1):
        assert json.loads((pair / f"accelerate-{rank}.json").read_text()) == ["", *blocks[0], "", *blocks[1]]


def test_cut_weights_resume_exactly(pair):
    for run, other in (("cut", "resumed"), ("nft", "nft-resumed")):
        for path in (pair / run / "checkpoint-4").glob("*.safetensors"):
            assert path.read_bytes() == (pair / other / "checkpoint-4" / path.name).read_bytes(), path


def test_a_cut_model_is_exported_whole(pair):
    from diffusers import WanTransformer3DModel

    student = WanTransformer3DModel.from_pretrained(pair / "cut" / "export" / "student")
    average = saved(pair / "cut", 4, "ema")
    assert all(torch.equal(value, average[f"distillation.student.{key}"]) for key, value in student.named_parameters())


def test_checkpoints_of_cut_weights_are_merged(pair, alone):
    found, wanted = (load_file(next((run / "merged/export/student").glob("*.safetensors"))) for run in (pair, alone))
    assert difference(found, wanted) < 1e-6
    mean = [saved(pair / "merged", step) for step in (2, 3, 4)]
    for name, value in found.items():
        torch.testing.assert_close(value, sum(each[f"distillation.student.{name}"] for each in mean) / 3)
    reports = [json.loads((run / "merged/export/merge_last.json").read_text()) for run in (pair, alone)]
    assert reports[0]["merged"] == pytest.approx(reports[1]["merged"], rel=1e-4)
    assert reports[0]["last"] == pytest.approx(reports[1]["last"], rel=1e-4)


def test_cut_weights_are_rescued(pair):
    mean = [saved(pair / "rescued", step) for step in (3, 6)]
    found = saved(pair / "rescued", 8)
    assert difference(found, {name: sum(each[name] for each in mean) / 2 for name in found}) < 1e-6
    assert saved(pair / "rescued", 8, "optimizer") == {}


def test_two_cut_models_are_exported_as_one_pipeline(pair):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(pair / "two" / "export")
    average = saved(pair / "two", 2, "ema")
    for name, kind in (("transformer", torch.float16), ("text_encoder", torch.float32)):
        found = {f"{name}.{key}": value for key, value in getattr(pipe, name).named_parameters()}
        assert all(torch.equal(value.to(kind), average[key].to(kind)) for key, value in found.items()), name


def test_policies_of_cut_weights_take_turns_as_whole_ones_do(pair, alone):
    """With sharded weights, the old policy, the reference and EMA are swapped as with whole weights."""
    for name in ("weights", "ema", "copies"):
        assert difference(saved(pair / "nft", 4, name), saved(alone / "nft", 4, name)) < 1e-6, name
    old, new = saved(pair / "nft", 4, "copies"), saved(pair / "nft", 4)
    assert difference({name.removeprefix("old|"): value for name, value in old.items()}, new) > 1e-3
