"""Attention transfer: its targets, the trained weights, the resulting pipeline and folder, and resuming."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from postgen.errors import UserError
from postgen.families import denoiser_for
from postgen.kernels.attention.ops import attention
from postgen.lit import LitConfig, convert, layers_of, load
from postgen.lit.attention_transfer import attention_tasks, grid_of, trained_tensors, transfer
from postgen.reconstruct import RecordsConfig, Share, collect
from postgen.reconstruct.task import Call
from postgen.training.run_folder import RunLock
from tests.children import run
from tests.lit.distil import PICTURES, VIDEO, conversion, prompts, teacher, transferred
from tests.reconstruct.toy import PROMPTS, settings


class Softmax(nn.Module):
    """A layer that computes exact softmax attention, which new layers approximate."""

    kind = "softmax"

    def forward(self, tokens: Any) -> Any:
        query, key, value = tokens.rotated()
        return attention(query[:, tokens.video_rows], key, value, key_lengths=tokens.key_lengths)


@pytest.mark.parametrize("name", [*VIDEO, *PICTURES])
def test_the_target_is_what_softmax_gives(name: str) -> None:
    """In every kind of block the target is the output of softmax, so a softmax layer has no error."""
    pipe, size = teacher(name)
    denoiser = denoiser_for(pipe)
    config = RecordsConfig(num_inference_steps=2, levels_per_prompt=1, batch_size=2, **size)
    texts = prompts(name)[:3]
    tasks = attention_tasks(denoiser, LitConfig.from_json(conversion(name)), grid_of(denoiser, texts[0], size))
    records = collect(denoiser, [m for task in tasks for m in task.modules], texts, config, progress=False)
    for task in tasks:
        student: Any = task.build()
        student.layer = Softmax()
        for recorded in records.calls(task.modules, held_out=False):
            calls = [Call(each, torch.device("cpu"), widen=True) for each in recorded]
            with torch.no_grad():
                torch.testing.assert_close(task.run(student, calls), task.target(calls), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Wan", "HunyuanVideo"])
def test_transfer(name: str, tmp_path: Path) -> None:
    """Errors fall, the base weights stay bitwise equal, and the written folder has the trained layers."""
    before = {key: value.clone() for key, value in teacher(name)[0].transformer.state_dict().items()}
    pipe, report = transferred(tmp_path, name, max_steps=20)
    assert not report.unfinished
    assert len(report.blocks) == 2
    for block in report.blocks.values():
        assert block.error_after < block.error_before
        assert block.new == block.parameters
    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    tensors = trained_tensors(report)
    assert {key for key in after if key not in before} <= tensors.keys()
    assert all(torch.equal(after[key], value) for key, value in tensors.items())
    loaded = load(tmp_path / "transformer").state_dict()
    assert loaded.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in loaded.items())


def test_what_is_inherited_is_trained_where_asked(tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in teacher("Wan")[0].transformer.state_dict().items()}
    pipe, _ = transferred(tmp_path / "a", inherited=True)
    after = pipe.transformer.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(after[key], value)}
    layers = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
    assert {key.split(".")[3] for key in changed} == {*layers}
    assert all(".attn1." in key for key in changed)
    pipe, report = transferred(tmp_path / "b", conversion={"inherit": "output"})
    after = pipe.transformer.state_dict()
    fresh = {key for key in after if ".fresh." in key}
    assert len(fresh) == 2 * 3 * 2
    assert all(torch.equal(after[key], trained_tensors(report)[key]) for key in fresh)
    # The fresh weights were initialised with this seed and then trained.
    untrained = teacher("Wan")[0].transformer
    convert(untrained, LitConfig.from_json(conversion("Wan", inherit="output")))
    assert not torch.equal(after[min(fresh)], untrained.state_dict()[min(fresh)])


def test_killed_and_a_few_blocks_at_a_time(tmp_path: Path) -> None:
    """The weights are bitwise equal after a kill and resume, with few blocks at a time, and with two processes."""
    straight, _ = transferred(tmp_path / "straight")
    expected = straight.transformer.state_dict()
    folder = tmp_path / "killed"
    code, said = run("tests.lit.distil", folder)
    assert code == -signal.SIGKILL, said
    assert not (folder / "run" / "transformer").exists()
    with pytest.raises(UserError, match=r"holds an earlier run of blocks\.0\.attn1"):
        transferred(folder / "run", where=folder / "records")
    pipe, report = transferred(folder / "run", where=folder / "records", resume=True)
    assert not report.unfinished
    found = [pipe.transformer.state_dict(), load(folder / "run" / "transformer").state_dict()]
    pipe, _ = transferred(tmp_path / "few", where=tmp_path / "few-records", blocks_at_a_time=1)
    assert not [*(tmp_path / "few-records").iterdir()]
    found.append(pipe.transformer.state_dict())
    for rank in (1, 0):
        share = Share(rank=rank, processes=2)  # all records exist, so neither process waits for the other
        pipe, report = transferred(tmp_path / "shared", where=folder / "records", share=share)
        assert report.unfinished == (("blocks.0.attn1",) if rank else ())
        assert hasattr(pipe.transformer.blocks[1].attn1, "postgen_lit") != bool(rank)
    found.append(pipe.transformer.state_dict())
    for state in found:
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_refused(tmp_path: Path) -> None:
    pipe, size = teacher("Wan")
    train, records = settings(tmp_path), RecordsConfig(**size)

    def given(config: LitConfig, prompts: Any = PROMPTS) -> None:
        transfer(pipe, config, prompts, records=records, train=train)

    with pytest.raises(UserError, match="leaves every block softmax"):
        given(LitConfig(layers="all:softmax"))
    with pytest.raises(UserError, match=r"window_delta layer of blocks.1.attn1 equals softmax on 3 latent frames"):
        given(LitConfig(layers="1:window_delta"))
    with pytest.raises(UserError, match="must be a list of texts"):
        given(LitConfig(layers="1:lit"), "a ball")
    with RunLock(tmp_path), pytest.raises(UserError, match=rf"where {tmp_path} is in use by process {os.getpid()}"):
        transferred(tmp_path / "run", where=tmp_path, blocks_at_a_time=1)  # would remove records in `where`
    convert(pipe.transformer, LitConfig(layers="1:lit"))
    assert layers_of(pipe.transformer)
    with pytest.raises(UserError, match="revert the conversion first"):
        given(LitConfig(layers="1:lit"))
