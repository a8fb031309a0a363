"""Blocks are quantised on the outputs of quantised blocks before them; a killed run resumes to the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from postgen.assets import embedded_model
from postgen.errors import UserError
from postgen.families import blocks_of
from postgen.families.recording import replay
from postgen.quant import QuantSpec
from postgen.quant.chain import Chain
from postgen.quant.engine import BlockwiseRun
from postgen.quant.layers import layers_of
from postgen.quant.stages import RECIPES, Stage, recipe_of
from postgen.quant.student import StudentPlan, make_student
from postgen.reconstruct.loss import error
from postgen.training import checkpoint
from tests import children
from tests.quant.blockwise import KILLED, SHORT, layers, same, stages
from tests.reconstruct.killed import POINTS
from tests.reconstruct.toy import pipeline, records_of, settings

W4A4 = ("int4:g8", "int4:token")


class Taught:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pipe, self.size = pipeline("Wan")
        self.model = self.pipe.transformer
        self.blocks = blocks_of(self.model)
        self.records = records_of(self.pipe, self.size, where=folder / "records")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Taught:
    return Taught(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def embedded() -> Taught:
    found = Taught.__new__(Taught)
    found.pipe = WanPipeline.from_pretrained(embedded_model())
    found.model = found.pipe.transformer
    found.blocks = blocks_of(found.model)
    size = {"num_frames": 5, "height": 32, "width": 32}
    found.records = records_of(found.pipe, size, "blocks.0", num_inference_steps=2)
    return found


def rtn_error(wan: Taught, weight: str, act: str | None) -> float:
    """Return the relative error of the last block on held-out records, with both blocks rounded to nearest."""
    plan = StudentPlan(layers=layers(wan.model, weight, act), stage=Stage())
    return chain_error(wan, lambda number: make_student(wan.blocks[number].name, wan.blocks[number].module, plan))


def chain_error(wan: Taught, made: Any, blocks: int = 2) -> float:
    chain = Chain(wan.blocks[:blocks], wan.records, made, torch.device("cpu"))
    chain.reach(blocks - 1)
    last, student, found = wan.blocks[blocks - 1], made(blocks - 1), []
    for call in chain.calls(blocks - 1, held_out=True):
        with torch.no_grad():
            hidden, _ = chain.run(last, student, call)
        found.append(float(error("l2", [hidden], [last.outputs(call.output())[0]])))
    return sum(found) / len(found)


def test_a_chain_of_exact_blocks_gives_the_records(wan: Taught) -> None:
    chain = Chain(wan.blocks, wan.records, lambda number: wan.blocks[number].module, torch.device("cpu"))
    for number, block in enumerate(wan.blocks):
        chain.reach(number)
        for held_out in (False, True):
            recorded = wan.records.calls([block.name], held_out=held_out)
            for (exact,), call in zip(recorded, chain.calls(number, held_out=held_out), strict=True):
                assert torch.equal(call.inputs()[0][0], exact.inputs()[0][0])
                with torch.no_grad():
                    assert torch.equal(replay(block, call), exact.output())


@pytest.mark.parametrize(
    ("recipe", "weight", "act", "values"),
    [
        ("omniquant", "int4", "int4:token", {"max_steps": 16}),
        ("block_ap", "int2:g8:asym", None, {"max_steps": 12, "learning_rate": 8e-3, "learning_rate_new": 8e-3}),
        ("sos", "int4", "int4:token", {"max_steps": 16, "learning_rate": 4e-3}),
        ("gptq", "int3:g8", None, {}),
        ("bpdq", "bp2:g8", None, {}),
    ],
)
def test_recipes_lower_the_error_of_rounding_to_nearest(
    wan: Taught, tmp_path: Path, recipe: str, weight: str, act: str | None, values: dict[str, Any]
) -> None:
    before = copy.deepcopy(wan.model.state_dict())
    done = stages(wan.model, wan.records, tmp_path, recipe, weight, act, save_steps=0, **SHORT, **values)
    for stage in done if values else ():  # finished students compute what the trained ones did
        trained = stage.result.report.blocks[wan.blocks[-1].name].error_after  # type: ignore[attr-defined]
        assert chain_error(wan, stage._finished) == pytest.approx(trained, rel=1e-5)
    error = chain_error(wan, done[-1]._finished)
    assert error < (0.9 if recipe == "block_ap" else 0.98) * rtn_error(wan, weight, act)
    assert all(torch.equal(value, before[name]) for name, value in wan.model.state_dict().items())


@pytest.mark.parametrize(
    ("recipe", "spec", "factor"),
    [
        ("omniquant", QuantSpec(weight="int4:g32", act="int4:token"), 0.97),
        ("block_ap", QuantSpec(weight="int2:g32:asym"), 0.85),
    ],
)
def test_recipes_on_the_embedded_model(
    embedded: Taught, tmp_path: Path, recipe: str, spec: QuantSpec, factor: float
) -> None:
    first = embedded.blocks[0]
    chosen = {
        name: each for name, each in layers_of(embedded.model, spec).items() if name.startswith(f"{first.name}.")
    }
    stage = RECIPES[recipe].stages[0]
    rough = make_student(first.name, first.module, StudentPlan(layers=chosen, stage=Stage()))
    rates = {"learning_rate": 1e-3, "learning_rate_new": 1e-3} if recipe == "block_ap" else {}
    config = settings(tmp_path, loss=stage.loss, max_steps=16, save_steps=0, ema_decay=0.0, **SHORT, **rates)
    run = BlockwiseRun([first], StudentPlan(layers=chosen, stage=stage), embedded.records, config)
    report = run.run().report
    assert report is not None
    assert report.blocks[first.name].error_after < factor * chain_error(embedded, lambda number: rough, blocks=1)


def test_killed_at_each_point(wan: Taught, tmp_path: Path) -> None:
    straight = stages(wan.model, wan.records, tmp_path / "straight", "omniquant", *W4A4, **SHORT)[-1].result  # type: ignore[attr-defined]
    (tmp_path / "records").symlink_to(wan.folder / "records")
    code, said = children.run("tests.quant.blockwise", tmp_path)
    assert code == 0, said
    for point in KILLED:
        name, step = POINTS[point]
        left = [path.name for path in checkpoint.find(tmp_path / point / "0" / "blocks" / name)]
        saved = {3: [], 8: ["checkpoint-5"], 10: ["checkpoint-5"], 12: ["checkpoint-5", "checkpoint-10"]}
        assert left == saved[step], point
        resumed = stages(wan.model, wan.records, tmp_path / point, "omniquant", *W4A4, **SHORT, resume=True)[-1].result  # type: ignore[attr-defined]
        assert same(resumed.layers, straight.layers), point
        for (one, *a), (two, *b) in zip(resumed.folds, straight.folds, strict=True):
            assert one == two
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if x is not None)


def test_solved_blocks_are_read_again(wan: Taught, tmp_path: Path) -> None:
    first = stages(wan.model, wan.records, tmp_path, "gptq", "int3:g8", None)[-1].result  # type: ignore[attr-defined]
    (tmp_path / "0" / "solved" / "blocks.1.safetensors").unlink()  # as if it was killed before
    with pytest.raises(UserError, match=r"earlier run of blocks.0: continue it with resume=True"):
        stages(wan.model, wan.records, tmp_path, "gptq", "int3:g8", None)
    again = stages(wan.model, wan.records, tmp_path, "gptq", "int3:g8", None, resume=True)[-1].result  # type: ignore[attr-defined]
    assert same(first.layers, again.layers)


def test_another_run_in_the_folder_is_refused(wan: Taught, tmp_path: Path) -> None:
    stages(wan.model, wan.records, tmp_path, "omniquant", *W4A4, max_steps=1)
    with pytest.raises(UserError, match="other settings, records or weights"):
        stages(wan.model, wan.records, tmp_path, "omniquant", "int3:g8", None, max_steps=1, resume=True)


def test_several_processes_are_refused(wan: Taught, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started: start one"):
        stages(wan.model, wan.records, tmp_path, "omniquant", *W4A4)


def test_names_of_recipes() -> None:
    assert recipe_of("omniquant+fdda").statistics
    assert not recipe_of("rtn").calibrated
    with pytest.raises(UserError, match="Did you mean 'omniquant'"):
        recipe_of("omniqant")
    with pytest.raises(UserError, match=r"NAME\+fdda"):
        recipe_of("gptq+rtn")
