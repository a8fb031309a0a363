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
from tests.sft.train_clips import RUN, lines_of, settings, trained, two_experts, write_clips
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


def exported(folder: Path, part: str = ".") -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / part / "pytorch_lora_weights.safetensors")


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
    assert "was trained on other clips, captions, weights or buckets: give the same data" in last
    path = recipe(place, "other")
    assert main([str(path), *words, "--evaluate_only", "true"]) == 0, "its clips do not matter"
    assert main([str(path), *words, "--allow_changed", "train_dataset"]) == 0
    # The advice of the refusal works: other latents are other clips, too.
    words = [*words, "--max_steps", "9", "--cache_dtype", "float16"]
    assert main([str(path), *words]) == 2
    assert "--allow_changed cache_dtype" in capsys.readouterr().err
    assert main([str(path), *words, "--allow_changed", "cache_dtype"]) == 0


def test_other_weights_are_refused_on_resume(place: Path) -> None:
    """Weights decide which clips a step has."""
    rows = [{"video": str(place / "clips" / f"{n}.mp4"), "prompt": "a wall", "weight": n + 1} for n in range(3)]
    words: dict[str, Any] = {"weight_column": "weight", "save_steps": 1, "train_dataset": None}
    for steps, weight in ((1, 1), (2, 1), (3, 9)):
        rows[0]["weight"] = weight
        resume = {} if steps == 1 else {"resume_from_checkpoint": True}
        args = settings(place / "weighed", place, **words, **resume, max_steps=steps)
        run = SftTrainer(args, place / "model", train_dataset=rows)
        if weight == 9:
            with pytest.raises(UserError, match="other clips, captions, weights or buckets"):
                run.train()
        else:
            run.train()


def test_other_held_out_clips_begin_a_new_comparison(place: Path) -> None:
    shutil.copytree(place / "straight", place / "again")
    write_clips(place / "others", videos=1, pictures=1)
    words = ["--resume", "--max_steps", "7", "--eval_dataset", str(place / "others"), "--eval_steps", "7"]
    assert main([str(recipe(place, "again")), *words]) == 0
    last = [row for row in lines_of(place / "again") if "eval_loss" in row][-1]
    assert (last["step"], last["eval_loss_change"], last["eval_loss_change_se"]) == (7, 0, 0)


def test_another_number_of_processes_needs_equal_steps(place: Path) -> None:
    """One process continues the steps of two, with twice the accumulation; other numbers are refused."""
    run = SftTrainer(settings(place / "new", place / "clips", gradient_accumulation_steps=4))
    before = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    state = {"micro": 6, "data": "x", "held_out": "y", "first_losses": {}}
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


def sharded(folder: Path) -> None:
    """Train with sharded weights, whose evaluation all processes share."""
    words = {"fully_shard": True, "eval_samples": 2, "eval_guidance_scale": 2.0}
    run = trained(str(folder / "model"), folder / "sharded", folder / "clips", **pair_changes(folder, 1), **words)
    assert run.sharded


def experts(folder: Path) -> None:
    """Train two experts, of which a process calls only those that its noise levels need."""
    trained(str(folder / "two"), folder / "experts", folder / "clips", **pair_changes(folder, 1), noise_shift=9.0)


def refused(folder: Path) -> None:
    with pytest.raises(UserError, match="set train_experts high or low, or train without fully_shard"):
        trained(str(folder / "two"), folder / "refused", folder / "clips", **pair_changes(folder, 1), fully_shard=True)


JOBS = [two, sharded, experts, refused]


def test_two_processes_train_like_one(place: Path) -> None:
    """Two processes draw the clips, noise and levels of one process with twice the gradient accumulation."""
    two_experts(place / "model").save_pretrained(place / "two")
    run_pair("tests.sft.test_resume:JOBS", place, seconds=100)
    words = {"eval_samples": 2, "eval_guidance_scale": 2.0}
    trained(str(place / "model"), place / "alone", place / "clips", **pair_changes(place, 2), **words)
    trained(str(place / "two"), place / "experts-alone", place / "clips", **pair_changes(place, 2), noise_shift=9.0)
    for name, other in (("pair", "alone"), ("sharded", "alone"), ("experts", "experts-alone")):
        for part in ("transformer", "transformer_2") if name == "experts" else (".",):
            found, alone = exported(place / name, part), exported(place / other, part)
            assert found.keys() == alone.keys()
            for key, value in found.items():
                assert (value - alone[key]).abs().max() < 1e-5, (name, key)
        losses = [[row["eval_loss"] for row in lines_of(place / run) if "eval_loss" in row] for run in (name, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
