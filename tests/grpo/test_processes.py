"""Two processes (gloo) do what one does with twice the accumulation, and hold the same weights."""

import pytest
import torch
from safetensors.torch import load_file

from postgen.train import main
from postgen.training import checkpoint
from tests.grpo.toy import SETTINGS, lines_of
from tests.training.test_processes import launch

RUN = {
    **SETTINGS,
    "method": "tests.grpo.killed:WitnessGRPO",
    "per_device_train_batch_size": 6,
    # Groups of 4 in parts of 6: they span processes.
    "num_generations": 4,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "sde_window_size": 2,
    "max_steps": 3,
    "save_steps": 0,
    "eval_steps": 3,
    "ema_decay": 0.0,
    "bf16": False,
    "report_to": "none",
}


def alone(folder, **changes):
    import yaml

    folder.mkdir()
    path = folder / "recipe.yaml"
    values = {**RUN, "output_dir": str(folder / "run"), **changes}
    path.write_text(yaml.safe_dump(values))
    assert main([str(path)]) == 0
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("two", "one"),
    [
        ({}, {"gradient_accumulation_steps": 2, "steps_per_generation": 4}),
        (
            {"per_device_train_batch_size": 4, "best_of_n": 2, "sde_window_per": "sample"},
            {"per_device_train_batch_size": 8, "best_of_n": 2, "sde_window_per": "sample"},
        ),
    ],
    ids=["groups span processes", "best of n"],
)
def test_grpo_two_processes_do_what_one_does(tmp_path, two, one):
    _, done = launch(tmp_path / "two", **{**RUN, **two})
    assert done.returncode == 0, done.stderr
    run = tmp_path / "two" / "run"
    zero, other = (load_file(run / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(zero[name], other[name]) for name in zero)
    single = alone(tmp_path / "one", **one)
    expected = load_file(single / "rank-0.safetensors")
    start = load_file(alone(tmp_path / "still", max_steps=1, learning_rate=1e-12) / "rank-0.safetensors")
    assert max((zero[name] - expected[name]).abs().max() for name in zero) <= 1e-6
    assert max((start[name] - expected[name]).abs().max() for name in zero) >= 1e-3
    assert [found.name for found in checkpoint.find(run)] == ["checkpoint-3"]
    rows, lone = lines_of(run), lines_of(single)
    for name in ("reward", "eval_reward", "frac_reward_zero_std"):
        both = ([row[name] for row in found if name in row] for found in (rows, lone))
        assert next(both) == pytest.approx(next(both), abs=1e-5), name
