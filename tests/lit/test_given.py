"""Training on the user's own latents instead of latents that the teacher samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from postgen.errors import UserError
from postgen.lit.train_config import LitTrainingConfig
from tests.lit.distil import ROWS, distilled


def test_the_same_latents_train_the_same_student(tmp_path: Path) -> None:
    """The teacher's latents from a file train an equal student, other latents another one; nothing is sampled."""
    drawn = distilled(tmp_path / "drawn", "DiT")
    finished = drawn.drawn["train"].finished(range(len(ROWS)), torch.device("cpu"))
    states = []
    for number, latents in enumerate((finished, finished + 0.5)):
        place = tmp_path / f"{number}.safetensors"
        save_file({"latents": latents}, place)
        run = distilled(tmp_path / f"given-{number}", "DiT", latents=str(place))
        assert not (tmp_path / f"given-{number}" / "latents" / "train").exists()
        states.append(student(run))
    assert all(torch.equal(value, states[0][key]) for key, value in student(drawn).items())
    assert not all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def student(run: Any) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = run.unwrap("distillation").student.state_dict()
    return state


def test_refused(tmp_path: Path) -> None:
    place = tmp_path / "own.safetensors"
    shape = (len(ROWS), 4, 8, 8)
    for content, said in (
        ({"other": torch.zeros(shape)}, "holds no tensor named latents"),
        ({"latents": torch.zeros(1, *shape[1:])}, r"has the shape \(1, 4, 8, 8\)"),
        ({"latents": torch.full(shape, torch.nan)}, "values that are not finite"),
    ):
        save_file(content, place)
        with pytest.raises(UserError, match=said):
            distilled(tmp_path / "run", "DiT", latents=str(place))
    with pytest.raises(UserError, match=r"none\.safetensors cannot be read"):
        distilled(tmp_path / "run", "DiT", latents=str(tmp_path / "none.safetensors"))
    with pytest.raises(UserError, match="states is 'trajectory', it must be noised with latents"):
        LitTrainingConfig(
            output_dir="x", num_frames=1, height=8, width=8, latents="x", states="trajectory", task_weight=0.0
        )
