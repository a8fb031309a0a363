"""Stage 1: new layers learn what softmax gave, block by block, by the engine of reconstruction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from postgen.families import Grid, blocks_of
from postgen.lit import LiTConfig, WindowOptions, convert, layers_of, revert, set_grid, take_weights, transfer_tasks
from postgen.reconstruct import reconstruct
from tests.reconstruct.toy import pipeline, records_of, settings


def test_new_layers_learn_what_softmax_gave(tmp_path: Path) -> None:
    pipe, size = pipeline("Wan")
    model = pipe.transformer
    names = [block.name for block in blocks_of(model)]
    records = records_of(pipe, size, *names)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    frames = (size["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1
    side = pipe.vae_scale_factor_spatial * model.config.patch_size[1]
    grid = Grid(frames=frames, height=size["height"] // side, width=size["width"] // side)
    config = LiTConfig(layers=f"{len(names) - 1}:window_delta", window=WindowOptions(radius=0, conv=False))
    convert(model, config)
    (task,) = transfer_tasks(model, grid)
    assert task.name == names[-1]
    given = {"max_steps": 40, "learning_rate_new": 1e-3, "save_steps": 0, "ema_decay": 0.0}
    set_grid(model, Grid(frames=1, height=1, width=1))  # as a call of another size does
    report: Any = reconstruct([task], records, settings(tmp_path / "stage-1", **given))
    (row,) = report.blocks.values()
    assert row.error_after < 0.95 * row.error_before
    take_weights(model, report)
    (layer,) = layers_of(model).values()
    assert layer.mix.weight.any()
    revert(model)
    # What is the base's was not touched.
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
