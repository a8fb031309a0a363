"""The training method `quant`: what is trained, inputs of both networks, exact resume, branches, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families.loading import inspect_model, load_pipeline
from postgen.quant.layers import quantized_layers
from postgen.quant.train_config import QuantTrainingConfig
from postgen.quant.trained_scales import SCALE, scale_layers
from postgen.training import load_recipe
from postgen.training.distillation import with_network
from tests.quant.trained import JOBS, SPEC, STAGES, exact, trained
from tests.training.pair import run_pair

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A finished run on the tiny Wan with the default settings of these tests, and its folder."""
    folder = tmp_path_factory.mktemp("wan")
    return trained(folder), folder


def student_of(run: Any) -> Any:
    return run.unwrap("distillation").student


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def loaded(folder: Path) -> Any:
    found: Any = diffusers.AutoModel.from_pretrained(str(folder / "export" / "transformer"), torch_dtype=torch.float32)
    return found.eval()


def predictions(run: Any, *networks: Any) -> list[Tensor]:
    x = run.denoiser.initial_latents(1, **run.args.size, generator=torch.Generator().manual_seed(0))
    told, sigma = run._condition(run.rows[:1]), torch.tensor([0.5])
    with torch.no_grad():
        return [with_network(run.denoiser, "transformer", each).predict(x, sigma, told) for each in networks]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("name", ["Wan", "CogVideoX", "HunyuanVideo", "LTX", "FLUX"])
def test_every_family(name: str, tmp_path: Path, wan: tuple[Any, Path]) -> None:
    """Scales change and nothing else does; the export predicts bitwise what the student predicts."""
    before = {key: value.clone() for key, value in exact(name)[0].transformer.state_dict().items()}
    run, folder = wan if name == "Wan" else (trained(tmp_path, name), tmp_path)
    student, teacher = student_of(run), run.unwrap("distillation").teacher
    assert same(dict(teacher.state_dict()), before)
    assert {key.rpartition(".")[2] for key in run.trained()} == {SCALE}
    layers = scale_layers(student)
    # `QLinear.quantized` of the layer has the scales at the start.
    changed = [
        not torch.equal(layer.trained_scale, super(type(layer), layer).quantized().scales.scale)
        for layer in layers.values()
    ]
    assert changed
    assert all(changed)
    whole = loaded(folder)
    assert quantized_layers(whole).keys() == layers.keys()
    ours, theirs, teachers = predictions(run, student, whole, teacher)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, teachers)


def test_the_loss_falls(tmp_path: Path) -> None:
    run = trained(tmp_path, max_steps=12, learning_rate=1e-2, weight="int2:g8:asym", act=None, eval_steps=12,
                  eval_on_start=True)  # fmt: skip
    losses = [row["eval_loss"] for row in log_of(tmp_path) if "eval_loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    # The exact part of the student shares the memory of the teacher.
    theirs = {id(each) for each in run.unwrap("distillation").teacher.parameters()}
    own = [name for name, each in student_of(run).named_parameters() if id(each) not in theirs]
    assert {name.rpartition(".")[2] for name in own} == {"weight", SCALE, "bias"}


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    runs = [trained(tmp_path / str(on), gradient_checkpointing=on, rotate=8) for on in (False, True)]
    assert same(*(dict(student_of(run).state_dict()) for run in runs))


def test_resume_is_exact(tmp_path: Path) -> None:
    """With branches, an average and dropped captions: 4 steps equal 2 steps, a resume and 2 steps."""
    values = {**STAGES, "ema_decay": 0.9, "save_steps": 2, "eval_steps": 2, "save_total_limit": None}
    run = trained(tmp_path / "a", **values)
    again = trained(tmp_path / "b", **values, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert same(dict(student_of(run).state_dict()), dict(student_of(again).state_dict()))
    assert same(*(dict(loaded(tmp_path / name).state_dict()) for name in "ab"))
    rows = [{key: row[key] for key in row if "loss" in key} for row in log_of(tmp_path / "a")]
    after = [{key: row[key] for key in row if "loss" in key} for row in log_of(tmp_path / "b")]
    assert rows[-len(after) :] == after
    with pytest.raises(UserError, match="is not the one of the run that wrote this checkpoint"):
        trained(
            tmp_path / "c", **values, solver="ls", allow_changed=["solver"],
            resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"),
        )  # fmt: skip


def test_branches(tmp_path: Path, wan: tuple[Any, Path]) -> None:
    """A branch whose rank falls is gone in the export; another one stays as an exact low-rank branch."""
    run = trained(tmp_path / "gone", **STAGES)
    assert not any(float(layer.aux_gain.max()) for layer in scale_layers(student_of(run)).values())
    assert all(layer.spec.rank == 0 for layer in quantized_layers(loaded(tmp_path / "gone")).values())
    run = trained(tmp_path / "kept", branch_rank=3)
    whole = loaded(tmp_path / "kept")
    assert {layer.spec.rank for layer in quantized_layers(whole).values()} == {3}
    ours, theirs = predictions(run, student_of(run), whole)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # The branch begins as what rounding has lost, so the first loss is smaller.
    first = [log_of(folder)[0]["loss"] for folder in (tmp_path / "kept", wan[1])]
    assert first[0] < 0.9 * first[1]


def test_a_quantised_model_is_trained_further(tmp_path: Path, wan: tuple[Any, Path]) -> None:
    run, folder = wan
    student = str(folder / "export" / "transformer")
    after = trained(tmp_path / "b", student=student, branch_rank=2, max_steps=1, learning_rate=1e-9)
    theirs = dict(loaded(folder).state_dict())
    for name, value in loaded(tmp_path / "b").state_dict().items():
        if not name.endswith(("branch_up", "branch_down", "weight_scale")):
            assert torch.equal(value, theirs[name])
    teacher = after.unwrap("distillation").teacher
    assert student_of(after).patch_embedding.weight is teacher.patch_embedding.weight
    ours, before = predictions(run, student_of(after), student_of(run))
    torch.testing.assert_close(ours, before, rtol=1e-3, atol=1e-4)
    # The folder of the whole export is accepted too; another model is not.
    trained(tmp_path / "c", student=str(folder / "export"), max_steps=1)
    with pytest.raises(UserError, match="was quantised from another model than the teacher"):
        trained(tmp_path / "d", "CogVideoX", student=student)
    exact("Wan")[0].transformer.save_pretrained(tmp_path / "stock")
    with pytest.raises(UserError, match="has no layers that postgen has quantised"):
        trained(tmp_path / "d", student=str(tmp_path / "stock"))
    with pytest.raises(UserError, match="holds no quantised network"):
        trained(tmp_path / "d", student=str(tmp_path))


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Two processes, also with sharded weights, train the scales of one process with twice the accumulation."""
    run_pair("tests.quant.trained:JOBS", tmp_path)
    assert len(JOBS) == 2
    trained(tmp_path / "one", **STAGES, gradient_accumulation_steps=2)
    trained(tmp_path / "whole", ema_decay=0.9, gradient_accumulation_steps=2)
    for pair, one in (("two", "one"), ("cut", "whole")):
        found, wanted = (quantized_layers(loaded(tmp_path / name)) for name in (pair, one))
        assert found.keys() == wanted.keys()
        for name, layer in wanted.items():
            assert torch.equal(found[name].weight, layer.weight)
            torch.testing.assert_close(found[name].effective_weight(), layer.effective_weight(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weight": "int9"}, "number format 'int9' is unknown"),
        ({"weight": None, "act": "int8"}, "weight is None, it must be a format"),
        ({"weight": "mxint4"}, "powers of two and cannot be trained"),
        ({"overrides": {".*ffn.*": {"weight": "mxint8"}}}, "powers of two and cannot be trained"),
        ({"student": "x"}, "weight is 'int3:g8:asym', it must be left out with student"),
        ({"student": "x", "weight": None, "act": None, "solver": "ls"}, "solver is 'ls', it must be left out"),
        ({"output_weight": 0.0}, "output_weight is 0.0, it must be above 0"),
        ({"rank": 4, "branch_rank": 2}, "branch_rank is 2, it must be 0 with a rank"),
        ({"branch_rank": 2, "branch_decay_steps": 2000}, "at most max_steps"),
        ({"branch_decay_steps": 2}, "0 without a branch"),
        ({"branch_learning_rate": 1e-3}, "above 0, with a branch_rank"),
        ({"init_from": "x"}, "name a quantised model as student"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        QuantTrainingConfig(output_dir="x", num_frames=1, height=8, width=8, **{**SPEC, **changes})


def test_refused(tmp_path: Path) -> None:
    for changes, said in (
        ({"weight": "int4:g64"}, "groups 64 input channels, but the layer has 24"),
        ({"overrides": {"nothing": {"act": None}}}, "matches no layer"),
    ):
        with pytest.raises(UserError, match=said):
            trained(tmp_path / "run", **changes)


def test_the_export_is_a_model(tmp_path: Path, tiny_wan: Path) -> None:
    """`inspect_model` and `load_pipeline` accept the folder of an export."""
    pipe = load_pipeline(inspect_model(tiny_wan), device="cpu")
    run = trained(tmp_path / "run", pipe=pipe, num_frames=5, width=32)
    again = load_pipeline(inspect_model(tmp_path / "run" / "export"), device="cpu")
    assert torch.equal(*predictions(run, student_of(run), again.transformer))


def test_recipe() -> None:
    trainer, args = load_recipe(RECIPES / "quant-tiny.yaml", ["--branch_rank", "0", "--branch_decay_steps", "0",
                                                              "--branch_learning_rate", "null"])  # fmt: skip
    assert trainer.__name__ == "QuantTrainer"
    assert isinstance(args, QuantTrainingConfig)
    assert (args.weight, args.solver) == ("int3:g32:asym", "ls")
    _, args = load_recipe(RECIPES / "quant-tiny.yaml", ["--student", "x", "--weight", "null", "--solver", "rtn"])
    assert isinstance(args, QuantTrainingConfig)
    assert args.student == "x"
