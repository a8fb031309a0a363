"""Records of a teacher: recorded states, frequency of noise levels, sizes, refusals."""

from __future__ import annotations

import os
import resource
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from postgen.errors import UserError
from postgen.families import denoiser_for
from postgen.families.recording import capture, recorded_bytes
from postgen.reconstruct import Records, RecordsConfig, Share, collect
from postgen.reconstruct.collect import LOCK
from postgen.reconstruct.teacher import Teacher
from postgen.sampling.sampler import Sample, Sampler, Sampling
from postgen.sampling.schedule import schedule_of
from postgen.sampling.seeds import seed_of
from postgen.training.run_folder import RunLock
from tests.families.tiny_models import tiny_model
from tests.families.tiny_pipelines import drawn
from tests.reconstruct.toy import PROMPTS, pipeline, records_of
from tests.tiny_wan import wan_components

STEPS = 4


@pytest.fixture(scope="module")
def wan() -> tuple[Any, dict[str, int]]:
    return pipeline("Wan")


def teacher(
    pipe: Any, size: dict[str, int], prompts: int = 5, transformer: str = "transformer", **values: Any
) -> Teacher:
    config = RecordsConfig(**{"num_inference_steps": STEPS, **size, **values})
    return Teacher(denoiser_for(pipe), ["blocks.0"], transformer, config, [f"ball {n}" for n in range(prompts)])


@torch.no_grad()
def levels(made: Teacher, *, held_out: bool = False) -> Counter[int]:
    plan = made.plan()
    chunks = [chunk for chunk in made.chunks if chunk.held_out == held_out]
    rows = [rows for chunk in chunks for rows in zip(*made.steps(plan, chunk), strict=True)]
    assert all(len(set(row)) == len(row) for row in rows)  # every prompt has different levels
    return Counter(step for row in rows for step in row)


def test_noise_levels_come_equally_often(wan: tuple[Any, dict[str, int]]) -> None:
    assert levels(teacher(*wan, prompts=9, levels_per_prompt=2, batch_size=3)) == dict.fromkeys(range(STEPS), 4)
    assert levels(teacher(*wan, prompts=5)) == dict.fromkeys(range(STEPS), 4)
    uneven = levels(teacher(*wan, prompts=8, levels_per_prompt=3, held_out_prompts=3))
    assert (max(uneven.values()), min(uneven.values())) == (4, 3)
    assert sum(levels(teacher(*wan, prompts=8, levels_per_prompt=3, held_out_prompts=3), held_out=True).values()) == 9


@torch.no_grad()
def test_records_are_the_forwards_of_the_teachers_trajectories(wan: tuple[Any, dict[str, int]]) -> None:
    """Records equal captures of forward passes along the trajectory of the sampler, prompt by prompt."""
    pipe, size = wan
    records = records_of(pipe, size, "blocks.0", batch_size=1, guidance_scale=3.0, levels_per_prompt=3)
    denoiser, made = denoiser_for(pipe), teacher(pipe, size, levels_per_prompt=3)
    schedule = schedule_of(denoiser, STEPS, denoiser.latent_shape(**size))
    sampler = Sampler(denoiser, schedule, Sampling(guidance=3.0, size=size))
    found = records.calls(["blocks.0"], held_out=True)
    assert len(found) == 3 * 2  # each with and without the prompt
    told = denoiser.encode_prompt(PROMPTS[-1:], [""])
    sample = Sample(index=0, prompt=0, initial=seed_of(0, "initial", 0, 4), step_seed=int, start=0)
    states = list(sampler.states([sample], lambda numbers: told))
    calls = iter(found)
    for (step,) in made.steps(records.plan, made.chunks[-1]):
        recording = capture(
            pipe.transformer,
            "blocks.0",
            lambda x=states[step].x, at=step: sampler.predict(x, torch.tensor([at]), told),
        )
        for expected in recording["blocks.0"]:
            assert torch.equal(next(calls)[0].output(), expected.output())


def test_a_folder_is_completed(
    wan: tuple[Any, dict[str, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = records_of(*wan)
    folder = tmp_path / "records"
    records_of(*wan, where=folder)
    shutil.rmtree(folder / "00001-001")
    with pytest.raises(UserError, match="has only 5 of 6 records: call collect again with the same settings"):
        Records.read(folder)
    kept = (folder / "00000-000" / "000000.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    again = records_of(*wan, where=folder)
    assert "5 exist already" in capsys.readouterr().err
    assert (folder / "00000-000" / "000000.safetensors").stat().st_mtime_ns == kept
    assert again.identity == memory.identity
    for held_out in (False, True):
        pairs = zip(
            memory.calls(["blocks.1"], held_out=held_out), again.calls(["blocks.1"], held_out=held_out), strict=True
        )
        assert all(torch.equal(one[0].output(), other[0].output()) for one, other in pairs)
    with pytest.raises(UserError, match="holds records with other values of settings, records: choose another folder"):
        records_of(*wan, where=folder, levels_per_prompt=1)
    other, size = pipeline("Wan")
    with torch.no_grad():
        other.transformer.proj_out.weight.mul_(1.001)
    with pytest.raises(UserError, match="holds records with other values of teacher"):
        records_of(other, size, where=folder)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="notes holds no records"):
        records_of(*wan, where=tmp_path / "notes")


def test_processes_share_a_folder(
    wan: tuple[Any, dict[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, size = wan
    config = RecordsConfig(**size, num_inference_steps=2)

    def one(rank: int) -> Records:
        share = Share(rank=rank, processes=2)
        return collect(
            denoiser_for(pipe), "blocks.0", PROMPTS, config, where=tmp_path / "r", share=share, progress=False
        )

    # The second process collects its part while the first one waits.
    monkeypatch.setattr("time.sleep", lambda seconds: one(1))
    assert len(one(0).calls(["blocks.0"], held_out=False)) == 8


def test_the_size_is_told_and_held_to(
    wan: tuple[Any, dict[str, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = records_of(*wan, where=tmp_path / "records", batch_size=1, levels_per_prompt=1)
    size = sum(path.stat().st_size for path in (tmp_path / "records").rglob("*.safetensors"))
    told = capsys.readouterr().err
    assert told.startswith("5 records of 2 modules take ")
    stated = float(told.split(" take ")[1].split()[0]) * 1e9
    assert stated == pytest.approx(size, rel=0.1)  # files also have headers
    assert len(records.calls(["blocks.0"], held_out=True)) == 1
    with pytest.raises(UserError, match=r"5 records of 2 modules take .* GB, but max_gb is 1e-05: raise it"):
        records_of(*wan, where=tmp_path / "small", batch_size=1, levels_per_prompt=1, max_gb=1e-5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # simulates a full disk
    try:
        with pytest.raises(UserError, match=r"records\.json cannot be written .*: make room") as refused:
            records_of(*wan, where=tmp_path / "full", batch_size=1, levels_per_prompt=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "full").exists()
    assert not (tmp_path / "small").exists()


def test_a_recording_is_measured_before_it_is_made(tmp_path: Path) -> None:
    tiny = tiny_model("Wan", batch=2)
    recording = capture(tiny.transformer, ["blocks.0", "blocks.1.attn1"], tiny)
    store: Any = recording["blocks.0"][0].store
    kept = sum(tensor.nbytes for tensor in store._kept.values())
    assert recorded_bytes(tiny.transformer, ["blocks.0", "blocks.1.attn1"], tiny) == kept
    assert list(recording) == ["blocks.0", "blocks.1.attn1"]


def test_the_expert_of_each_level_is_recorded() -> None:
    """For Wan 2.2, each of the two experts is recorded at the levels at which it runs."""
    from diffusers import WanTransformer3DModel

    parts = wan_components()
    second = WanTransformer3DModel.from_config(parts["transformer"].config)
    pipe = drawn(WanPipeline(**parts, transformer_2=second.eval(), boundary_ratio=0.7))
    size = {"num_frames": 5, "height": 16, "width": 32}
    with torch.no_grad():
        found = {
            name: teacher(pipe, size, transformer=name).plan()["levels"] for name in ("transformer", "transformer_2")
        }
    assert found == {"transformer": [0, 1], "transformer_2": [2, 3]}
    config = RecordsConfig(**size, num_inference_steps=STEPS)
    records = collect(
        denoiser_for(pipe), "blocks.1", PROMPTS[:3], config, transformer="transformer_2", progress=False
    )  # fmt: skip
    assert len(records.calls(["blocks.1"], held_out=False)) == 2 * 2
    with pytest.raises(UserError, match=r"has no transformer named 'unet'\. It has: transformer, transformer_2"):
        teacher(pipe, size, transformer="unet")


def test_what_cannot_be_recorded_is_said(wan: tuple[Any, dict[str, int]]) -> None:
    pipe, size = wan
    with pytest.raises(UserError, match="there are 2 prompts, and held_out_prompts=2"):
        teacher(pipe, size, prompts=2, held_out_prompts=2)
    with pytest.raises(UserError, match=r"no block blocks\.9"):
        records_of(pipe, size, "blocks.9")
    with pytest.raises(UserError, match="levels_per_prompt is 5, it must be from 1 to num_inference_steps, 4"):
        RecordsConfig(**size, num_inference_steps=4, levels_per_prompt=5)
    with pytest.raises(UserError, match="prompts must be a list of texts or rows, got 'a ball'"):
        collect(denoiser_for(pipe), "blocks.0", "a ball", RecordsConfig(**size))


def test_one_process_records_into_a_folder(wan: tuple[Any, dict[str, int]], tmp_path: Path) -> None:
    pipe, size = wan
    made = records_of(pipe, size, "blocks.0", where=(place := tmp_path / "records"))
    shutil.rmtree(place / "00000-000")
    with (
        RunLock(place, LOCK.format(rank=0), "where"),
        pytest.raises(UserError, match=rf"where {place} is in use by process {os.getpid()} on .* give another where"),
    ):
        records_of(pipe, size, "blocks.0", where=place)
    # The lock file of a killed process is no lock, and the lock of another rank belongs to the same run.
    with RunLock(place, LOCK.format(rank=1), "where"):
        records_of(pipe, size, "blocks.0", where=place)
    with RunLock(place, LOCK.format(rank=0), "where"):
        # All records exist, so the lock is not needed.
        assert records_of(pipe, size, "blocks.0", where=place).identity == made.identity


def test_a_teacher_that_is_not_finite(tmp_path: Path) -> None:
    pipe, size = pipeline("Wan")
    with torch.no_grad():
        pipe.transformer.proj_out.bias[0] = torch.inf
    with pytest.raises(
        UserError, match=r"latents are not finite for prompt 0 \(counted from 0\) and 1 more: the teacher overflows"
    ):
        records_of(pipe, size, "blocks.0")
