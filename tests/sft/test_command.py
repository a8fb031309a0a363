"""`postgen train` with method sft: every wrong input is one line with exit code 2; the dry run; a nested recipe."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.sft.train_clips import RUN, lines_of, write_clips


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips") / "all", videos=2, pictures=1)


@pytest.fixture
def call(cli: Any, tiny_wan: Path, clips: Path, tmp_path: Path) -> Any:
    """Run a recipe with other values, and return the outcome."""

    def run(*words: str | Path, **changes: Any) -> Any:
        values = {**RUN, "method": "sft", "model": str(tiny_wan), "train_dataset": str(clips)}
        values |= {"output_dir": str(tmp_path / "run"), "report_to": "none", **changes}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
        return cli("train", path, *words)

    return run


def changed(clips: Path, folder: Path, change: Any) -> Path:
    shutil.copytree(clips, folder)
    change(folder)
    return folder


DATA: dict[str, tuple[Any, str]] = {
    "a missing caption": (lambda folder: (folder / "0.txt").unlink(), "0.mp4"),
    "an empty caption": (lambda folder: (folder / "0.txt").write_text(" \n"), "0.mp4"),
    "a damaged video": (lambda folder: (folder / "0.mp4").write_bytes(b"no video"), "0.mp4"),
    "a damaged picture": (lambda folder: (folder / "2.png").write_bytes(b"no picture"), "2.png"),
    "an empty folder": (lambda folder: [path.unlink() for path in folder.iterdir()], "holds no image or video"),
    "no folder": (lambda folder: shutil.rmtree(folder), "train_dataset"),
}


@pytest.mark.parametrize("name", DATA)
def test_wrong_clips(name: str, call: Any, clips: Path, tmp_path: Path) -> None:
    change, message = DATA[name]
    ended = call(train_dataset=str(changed(clips, tmp_path / "clips", change)))
    errors = [line for line in ended.err.splitlines() if line.startswith("postgen: error: ")]
    assert (ended.code, len(errors)) == (2, 1), ended.err
    assert ended.err.splitlines()[-1] == errors[0]
    assert message in errors[0]
    assert not (tmp_path / "run" / "export").exists()


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no clips": ({"train_dataset": None}, "there is nothing to train on: give train_dataset"),
    "no held-out clips": ({"eval_steps": 1}, "need held-out clips: give eval_dataset or eval_share"),
    "a size of no model": ({"height": 17}, "height"),
    "a wrong key": ({"noise_level": "mode"}, "Unknown key 'noise_level'"),
    "a wrong part": ({"noise": {"shfit": 3}}, "Did you mean 'shift'?"),
    "a wrong word": ({"frame_noise": "frame"}, "Allowed: clip, first_frame, each"),
    "experts": ({"train_experts": "low"}, "has one network, leave train_experts out"),
    "an unknown reward": (
        {"eval_share": 0.5, "eval_samples": 1, "eval_reward_funcs": ["sharpnes"], "eval_steps": 1},
        "sharpnes",
    ),
    "a layer that does not exist": (
        {"lora_target_modules": ["to_qq"]},
        "lora_target_modules: 'to_qq' matches no layer",
    ),
    "a LoRA that does not exist": ({"lora_path": "nowhere.safetensors"}, "nowhere.safetensors"),
    "half precision": ({"dtype": "float16"}, "weights are torch.float16, but trained weights are float32"),
    "images only": ({"image_share": 1.5}, "image_share is 1.5, it must be from 0 to 1"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_wrong_settings(name: str, call: Any) -> None:
    changes, message = SETTINGS[name]
    ended = call(**changes)
    assert ended.code == 2
    assert ended.out == ""
    (line,) = [line for line in ended.err.splitlines() if line and "check files" not in line]  # a progress bar
    assert line.startswith("postgen: error: ")
    assert message in line


def test_a_nested_recipe(call: Any, clips: Path, tmp_path: Path) -> None:
    """Parts may be nested; a bad file is left out on request and listed."""
    broken = changed(clips, tmp_path / "clips", lambda folder: (folder / "0.mp4").write_bytes(b"no video"))
    data = {name: RUN[name] for name in ("height", "width", "num_frames", "aspects")}
    ended = call(
        "--max_steps",
        "1",
        **dict.fromkeys((*data, "train_dataset", "lora_r", "lora_alpha")),
        data={**data, "train_dataset": str(broken), "skip_bad": True},
        lora={"r": 2, "alpha": 2},
        noise={"levels": "logit_normal", "shift": 3.0},
        held_out={"eval_clips": 1, "eval_noise_levels": 1},
        eval_share=0.3,
        eval_steps=1,
    )
    assert ended.code == 0, ended.err
    assert "0.mp4" in (tmp_path / "run" / "skipped.jsonl").read_text()
    (line,) = [line for line in lines_of(tmp_path / "run") if "eval_loss" in line]
    assert line["eval_loss_change"] == 0


def test_a_dry_run_prints_the_memory(call: Any, tmp_path: Path) -> None:
    ended = call("--dry-run")
    assert ended.code == 0
    assert "trained_parameters" in ended.out
    assert "bytes/step" in ended.out
    assert "peak memory" in ended.out
    assert not (tmp_path / "run").exists()
