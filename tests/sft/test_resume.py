"""A run of method sft that is killed and resumed ends with the bits of an uninterrupted one; one or two processes."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from postgen.errors import UserError
from postgen.sft.trainer import SftTrainer
from postgen.train import main
from tests.children import Child
from tests.sft.train_clips import RUN, lines_of, settings, trained, write_clips
from tests.training.pair import run_pair

PARTS = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors")
STEPS = 6
CHANGES: dict[str, Any] = {
    **{"max_steps": STEPS, "save_steps": 2, "save_total_limit": None, "ema_decay": 0.9, "eval_steps": 3},
    **{"gradient_accumulation_steps": 2, "caption_dropout": 0.3, "per_device_train_batch_size": 1},
    **{"noise_levels": "logit_normal", "image_share": 0.4, "eval_on_start": True},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_wan: Path) -> Path:
    """Return a folder with clips, and a finished run in `straight`."""
    folder = tmp_path_factory.mktemp("resume")
    write_clips(folder / "clips")
    write_clips(folder / "held", videos=2, pictures=1)
    shutil.copytree(tiny_wan, folder / "model")
    assert main([str(recipe(folder, "straight"))]) == 0
    return folder


def recipe(folder: Path, name: str, **changes: Any) -> Path:
    data = {"train_dataset": str(folder / "clips"), "eval_dataset": str(folder / "held")}
    whole = {**RUN, **CHANGES, **data, "method": "tests.sft.train_clips:KilledSft", "model": str(folder / "model")}
    whole |= {"output_dir": str(folder / name), "cache_dir": str(folder / "cache"), "report_to": "none", **changes}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(whole))
    return path


def parts(folder: Path, step: int = STEPS) -> dict[str, bytes]:
    return {name: (folder / f"checkpoint-{step}" / name).read_bytes() for name in PARTS}


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize(("point", "step"), [("step", 3), ("checkpoint", 4)])
def test_a_killed_run_is_resumed_exactly(place: Path, point: str, step: int) -> None:
    path = recipe(place, point, kill_at=point, kill_step=step)
    child = Child("postgen.train", (path,))
    assert child.wait() == -signal.SIGKILL, child.said()
    assert main([str(path), "--resume", "--kill_at", "none"]) == 0
    assert parts(place / point) == parts(place / "straight")
    resumed, straight = exported(place / point), exported(place / "straight")
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(value, straight[name]) for name, value in resumed.items())
    rows = {row["step"]: row for row in lines_of(place / point) if "eval_loss" in row}
    assert rows == {row["step"]: row for row in lines_of(place / "straight") if "eval_loss" in row}


def test_other_clips_are_refused_on_resume(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(place / "straight", place / "other")
    (place / "fewer").mkdir()
    for path in sorted((place / "clips").iterdir())[:-2]:
        shutil.copyfile(path, place / "fewer" / path.name)
    words = ["--resume", "--max_steps", "8", "--train_dataset", str(place / "fewer")]
    assert main([str(recipe(place, "other")), *words]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("postgen: error: ")
    assert "was trained on other clips, captions or buckets: give the same data" in last


def test_another_number_of_processes_needs_equal_steps(place: Path) -> None:
    """One process continues the steps of two, with twice the accumulation; other numbers are refused."""
    run = SftTrainer(settings(place / "new", place / "clips", gradient_accumulation_steps=4))
    before = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    state = {"micro": 6, "data": "x", "first_losses": {}}
    assert run.state_of_others([state, state], before)["micro"] == 12
    for changes, message in (
        ({"gradient_accumulation_steps": 2}, "set per_device_train_batch_size 2 and gradient_accumulation_steps 4"),
        ({"per_device_train_batch_size": 4}, "its steps have 4 micro-batches of 2 clips"),
    ):
        run = SftTrainer(settings(place / "new", place / "clips", **changes))
        with pytest.raises(UserError, match=message):
            run.state_of_others([state, state], before)


def two(folder: Path) -> None:
    """Train in two processes; write the weights of each."""
    run = trained(str(folder / "model"), folder / "pair", folder / "clips", **pair_changes(folder, 1))
    assert run.accelerator.num_processes == 2


def pair_changes(folder: Path, parts: int) -> dict[str, Any]:
    held = {"eval_dataset": str(folder / "held"), "eval_steps": 3, "cache_dir": str(folder / "cache")}
    return {**held, "max_steps": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": parts}


JOBS = [two]


def test_two_processes_train_like_one(place: Path) -> None:
    """Two processes draw the clips, noise and levels of one process with twice the gradient accumulation."""
    run_pair("tests.sft.test_resume:JOBS", place, seconds=100)
    trained(str(place / "model"), place / "alone", place / "clips", **pair_changes(place, 2))
    pair, alone = (
        load_file(place / name / "export" / "pytorch_lora_weights.safetensors") for name in ("pair", "alone")
    )
    assert pair.keys() == alone.keys()
    for name, value in pair.items():
        assert (value - alone[name]).abs().max() < 1e-5, name
    losses = [[row["eval_loss"] for row in lines_of(place / name) if "eval_loss" in row] for name in ("pair", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
