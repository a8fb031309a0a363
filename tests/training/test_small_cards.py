"""The benchmark of small cards at the size of its `--tiny`: a row, its gates, and the rows that a machine skips."""

import torch

from benchmarks.small_cards import ROWS, line, named, one
from benchmarks.small_cards_model import write_model


def test_a_row_trains_with_its_settings_and_has_the_estimate(tmp_path):
    cpu = torch.device("cpu")
    model = write_model(tmp_path / "model", cpu, tiny=True)
    settings = named({**ROWS["all"], "optim": "adafactor"}, 2)
    assert settings["offload_blocks"] == 2
    row = one(tmp_path, model, settings, {"num_frames": 5, "height": 32, "width": 32}, cpu)
    assert row["base_quant"] == "int8"
    assert 0 < row["activations_gb"] < row["estimated_gb"] <= row["needed_gb"]
    assert row["seconds_per_step"] > 0
    assert "measured       -" in line({"name": "all", **row})
    assert not (tmp_path / "run").exists()


def test_every_row_has_valid_settings():
    assert named(ROWS["+ half of the blocks"], 30)["offload_blocks"] == 15
    assert all(settings.get("gradient_checkpointing") for name, settings in ROWS.items() if name != "no saving")
