"""Training of students: exact students stay unchanged, known solutions are found, and losses are correct."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families import blocks_of
from postgen.families.recording import replay
from postgen.reconstruct import Call, ReconstructTask, Share, block_task, reconstruct
from postgen.reconstruct.loss import distance, error
from tests.families.test_blocks import same
from tests.reconstruct.toy import LAYERS, pipeline, records_of, settings, tasks

FAMILIES = ("Wan", "CogVideoX")


class Taught:
    """A teacher and its records."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pipe, self.size = pipeline(name)
        self.transformer = self.pipe.transformer
        self.records = records_of(self.pipe, self.size)


@pytest.fixture(scope="module")
def teachers() -> dict[str, Taught]:
    return {name: Taught(name) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def taught(teachers: dict[str, Taught], request: pytest.FixtureRequest) -> Taught:
    return teachers[request.param]


@pytest.fixture
def wan(teachers: dict[str, Taught]) -> Taught:
    return teachers["Wan"]


def test_a_teacher_replayed_gives_its_records(taught: Taught) -> None:
    for block in blocks_of(taught.transformer):
        for held_out in (False, True):
            for (call,) in taught.records.calls([block.name], held_out=held_out):
                with torch.no_grad():
                    assert same(replay(block, call), call.output())


def test_a_student_that_is_the_teacher_stays(taught: Taught, tmp_path: Path) -> None:
    block = blocks_of(taught.transformer)[0]
    report = reconstruct([block_task(block, lambda same: same)], taught.records, settings(tmp_path, max_steps=3))
    result = report.blocks[block.name]
    assert (result.error_before, result.error_after, result.l1_before, result.l1_after) == (0, 0, 0, 0)
    weights = report.weights(block.name)
    assert all(torch.equal(weights[name], value) for name, value in block.module.state_dict().items())
    assert (result.new, result.parameters) == (0, sum(each.numel() for each in block.module.parameters()))


class Scaled(nn.Module):
    """A layer with a trained output gain; the gain of the teacher is 1."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.gain = layer, nn.Parameter(torch.full((), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.layer(x)


def scaled(name: str) -> Any:
    def change(block: nn.Module) -> nn.Module:
        block.requires_grad_(False)
        parent, _, child = LAYERS[name].rpartition(".")
        setattr(block.get_submodule(parent), child, Scaled(block.get_submodule(LAYERS[name])))
        return block

    return change


LOSSES = {"Wan": ("centred_l1", "centred_l2", "relative_l1", "relative_l2", "mse"), "CogVideoX": ("centred_l2",)}


@pytest.mark.parametrize(("family", "loss"), [(name, loss) for name, losses in LOSSES.items() for loss in losses])
def test_a_known_solution_is_found(teachers: dict[str, Taught], tmp_path: Path, family: str, loss: Any) -> None:
    taught = teachers[family]
    block = blocks_of(taught.transformer)[0]
    task = block_task(block, scaled(taught.name), is_new=lambda name: name.endswith(".gain"))
    config = settings(
        tmp_path, loss=loss, max_steps=60, learning_rate_new=0.1, lr_scheduler_type="cosine", ema_decay=0.0,
        gradient_accumulation_steps=1,
    )  # fmt: skip
    report = reconstruct([task], taught.records, config)
    result = report.blocks[block.name]
    gain = next(value for name, value in report.weights(block.name).items() if name.endswith(".gain"))
    assert gain.item() == pytest.approx(1, abs=0.02)
    assert result.error_after < 0.05 * result.error_before
    assert (result.parameters, result.new) == (1, 1)


def test_low_rank_layers_come_nearer(taught: Taught, tmp_path: Path) -> None:
    config = settings(tmp_path, max_steps=60, lr_scheduler_type="cosine", ema_decay=0.0)
    report = reconstruct(tasks(taught.transformer, taught.name)[:1], taught.records, config)
    (result,) = report.blocks.values()
    assert 0 < result.error_after < 0.8 * result.error_before
    assert result.name in report.table()
    assert f"{result.error_after:.4f}" in report.table()


def test_new_and_inherited_parameters_have_rates_of_their_own(wan: Taught, tmp_path: Path) -> None:
    """The first step of Adam changes each weight by its learning rate."""
    task = tasks(wan.transformer, "Wan")[0]
    config = settings(tmp_path, max_steps=1, warmup_steps=0, ema_decay=0.0, learning_rate_new=1e-2, learning_rate=1e-3)
    trained = reconstruct([task], wan.records, config).weights("blocks.0")
    first = task.build().state_dict()
    moved = {name: (trained[name] - first[name]).abs().max().item() for name in first}
    assert moved.pop("ffn.net.0.proj.bias") == pytest.approx(1e-3, rel=0.01)
    assert moved.pop("ffn.net.0.proj.up") == pytest.approx(1e-2, rel=0.01)
    assert moved.pop("ffn.net.0.proj.down") == pytest.approx(1e-2, rel=0.01)
    assert set(moved.values()) == {0}


def test_a_part_of_a_block(wan: Taught, tmp_path: Path) -> None:
    """A task can train self-attention before its output projection, as attention transfer does."""
    names = ("blocks.0.attn1", "blocks.0.attn1.to_out.0")
    records = records_of(wan.pipe, wan.size, *names)
    attention = wan.transformer.blocks[0].attn1

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.gain = copy.deepcopy(attention).requires_grad_(False), nn.Parameter(torch.ones(()))
            self.attention.to_out = nn.ModuleList([nn.Identity(), nn.Identity()])

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return self.gain * self.attention(*args, **kwargs)

    def run(student: nn.Module, calls: Sequence[Call]) -> tuple[Tensor]:
        args, kwargs = calls[0].inputs()
        return (student(*args, **kwargs),)

    task = ReconstructTask(
        name="blocks.0.attn1", reads=names, build=Inner, run=run, target=lambda calls: (calls[1].inputs()[0][0],)
    )
    report = reconstruct([task], records, settings(tmp_path, max_steps=2))
    assert report.blocks["blocks.0.attn1"].error_after == 0
    projected = [(call[1].output(), call[0].output()) for call in records.calls(names, held_out=True)]
    assert all(map(torch.equal, *zip(*projected, strict=True)))


def test_records_of_other_blocks_do_not_matter(wan: Taught, tmp_path: Path) -> None:
    """Training a block needs only its own records; records of other blocks may be missing or damaged."""
    both = records_of(wan.pipe, wan.size, where=tmp_path / "both")
    for record in both.plan["records"]:
        (tmp_path / "both" / record / "000001.safetensors").write_bytes(b"spoilt")
    with pytest.raises(UserError, match="is not a complete recording"):
        reconstruct(tasks(wan.transformer, "Wan")[1:], both, settings(tmp_path / "second"))
    alone = records_of(wan.pipe, wan.size, "blocks.0")
    assert alone.identity == both.identity
    found = []
    for name, records in (("spoilt", both), ("alone", alone)):
        config = settings(tmp_path / name, max_steps=4)
        found.append(reconstruct(tasks(wan.transformer, "Wan")[:1], records, config).weights("blocks.0"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_half_precision_is_trained_in_single(tmp_path: Path) -> None:
    pipe, size = pipeline("Wan")
    pipe.transformer.to(torch.bfloat16)
    records = records_of(pipe, size, "blocks.0")
    assert records.calls(["blocks.0"], held_out=True)[0][0].inputs()[0][0].dtype == torch.bfloat16
    block = blocks_of(pipe.transformer)[0]
    for bf16 in (False, True):
        config = settings(tmp_path / str(bf16), bf16=bf16, max_steps=20, learning_rate_new=0.1, ema_decay=0.0)
        report = reconstruct([block_task(block, scaled("Wan"), is_new=lambda name: True)], records, config)
        result = report.blocks["blocks.0"]
        assert result.error_after < 0.3 * result.error_before
        assert {value.dtype for value in report.weights("blocks.0").values()} == {torch.float32}


def test_the_launcher_says_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Share.launched().of("abcde") == list("abcde")
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert Share.launched() == Share(rank=5, processes=8, local_rank=1)
    dealt = [Share(rank=rank, processes=3).of(range(8)) for rank in range(3)]
    assert dealt == [[0, 3, 6], [1, 4, 7], [2, 5]]
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UserError, match="must be whole numbers, one is 'first'"):
        Share.launched()


def test_losses_by_hand() -> None:
    target = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])  # the mean over tokens is (2, 0)
    output = target + torch.tensor([0.0, 1.0])
    expected = {"centred_l1": 2 / 2, "centred_l2": 2 / 2, "relative_l1": 2 / 4, "relative_l2": 2 / 10, "mse": 2 / 4}
    for kind, value in expected.items():
        assert distance(kind, [output], [target]).item() == pytest.approx(value), kind  # type: ignore[arg-type]
        # Both streams have the same weight, and so do rows.
        two = distance(kind, [output, target], [target, target])  # type: ignore[arg-type]
        assert two.item() == pytest.approx(value / 2), kind
    assert error("l2", [target + 2], [target]).item() == pytest.approx((16 / 2) ** 0.5)
    constant = torch.ones(1, 3, 2, requires_grad=True)
    distance("centred_l2", [constant], [torch.ones(1, 3, 2)]).backward()
    assert constant.grad is not None
    assert not constant.grad.any()
    assert distance("centred_l2", [torch.zeros(1, 3, 2)], [torch.ones(1, 3, 2)]).isinf()
    with pytest.raises(UserError, match=r"shapes \[\(1, 2\)\], those of the teacher \[\(1, 1\)\]"):
        distance("mse", [torch.zeros(1, 2)], [torch.zeros(1, 1)])


def test_wrong_tasks_are_refused(wan: Taught, tmp_path: Path) -> None:
    first, second = tasks(wan.transformer, "Wan")
    run = settings(tmp_path / "run")
    with pytest.raises(UserError, match="nothing to reconstruct"):
        reconstruct([], wan.records, run)
    with pytest.raises(UserError, match=r"two tasks have the name blocks\.0"):
        reconstruct([first, first], wan.records, run)
    with pytest.raises(UserError, match=r"the settings of blocks\.0 must be JSON values: Object of type method"):
        reconstruct([dataclasses.replace(first, settings={"from": Path.cwd})], wan.records, run)
    alone = records_of(wan.pipe, wan.size, "blocks.0")
    with pytest.raises(UserError, match=r"blocks.1 was not recorded. Recorded: blocks.0"):
        reconstruct([first, second], alone, run)
    assert not (tmp_path / "run").exists()
    block = blocks_of(wan.transformer)[0]
    with pytest.raises(UserError, match=r"blocks\.0: no parameter of the student requires a gradient"):
        reconstruct([block_task(block, lambda copy: copy.requires_grad_(False))], wan.records, run)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="rank 2 of 2 processes"):
        Share(rank=2, processes=2)


def test_a_loss_that_is_not_finite_ends_the_run(wan: Taught, tmp_path: Path) -> None:
    block = blocks_of(wan.transformer)[0]

    def change(copied: nn.Module) -> nn.Module:
        with torch.no_grad():
            copied.ffn.net[0].proj.bias.fill_(float("inf"))
        return copied

    with pytest.raises(FloatingPointError, match=r"the loss or gradient of blocks\.0 is not finite, up to step 4"):
        reconstruct([block_task(block, change)], wan.records, settings(tmp_path))
    assert not list(tmp_path.glob("blocks/*/finished"))


@pytest.mark.parametrize("held_out", [True, False])
def test_targets_that_are_not_finite_are_no_matter_of_rates(wan: Taught, tmp_path: Path, held_out: bool) -> None:
    block = blocks_of(wan.transformer)[0]
    task = block_task(block, lambda copy: copy)
    bad = Call(wan.records.calls(task.modules, held_out=held_out)[0][0], torch.device("cpu"), widen=True).output()

    def target(calls: Any) -> Any:
        found = task.target(calls)
        return tuple(each * torch.nan for each in found) if torch.equal(calls[0].output(), bad) else found

    with pytest.raises(
        UserError, match=r"1 of 6 records of blocks\.0 hold outputs of the teacher that are not finite"
    ):
        reconstruct([dataclasses.replace(task, target=target)], wan.records, settings(tmp_path))
    assert not list(tmp_path.glob("blocks/*/finished"))
