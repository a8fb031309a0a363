"""Runs that are killed or interrupted at any point and resumed end with the weights of an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from postgen.errors import UserError
from postgen.reconstruct import Share, read_report, reconstruct
from postgen.training import Reason, checkpoint
from tests import children
from tests.reconstruct.killed import POINTS
from tests.reconstruct.toy import pipeline, records_of, settings, tasks

NAMES = ("blocks.0", "blocks.1")


class Straight:
    """An uninterrupted run with its teacher and records."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pipe, self.size = pipeline("Wan")
        self.records = records_of(self.pipe, self.size, where=folder / "records")
        self.report = reconstruct(self.tasks(), self.records, settings(folder / "run"))

    def tasks(self) -> list[Any]:
        return tasks(self.pipe.transformer, "Wan")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    return Straight(tmp_path_factory.mktemp("straight"))


def weights(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "blocks" / name / "finished" / "student.safetensors").read_bytes() for name in NAMES}


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [line for name in NAMES for line in (folder / "blocks" / name / "metrics.jsonl").read_text().splitlines()]
    rows = map(json.loads, lines)
    return [{key: value for key, value in row.items() if key not in ("step_time", "seconds")} for row in rows]


def test_killed_at_each_point(straight: Straight, tmp_path: Path) -> None:
    (tmp_path / "records").symlink_to(straight.folder / "records")
    code, said = children.run("tests.reconstruct.killed", tmp_path)
    assert code == 0, said
    for point, (name, step) in POINTS.items():
        run = tmp_path / point
        left = [path.name for path in checkpoint.find(run / "blocks" / name)]
        saved = {3: [], 8: ["checkpoint-5"], 10: ["checkpoint-5"], 12: ["checkpoint-5", "checkpoint-10"]}
        assert left == saved[step], point
        untouched = {path: path.stat().st_mtime_ns for path in run.glob("blocks/*/finished/*")}
        report = reconstruct(straight.tasks(), straight.records, settings(run, resume=True))
        assert weights(run) == weights(straight.folder / "run"), point
        assert metrics(run) == metrics(straight.folder / "run"), point
        assert all(path.stat().st_mtime_ns == before for path, before in untouched.items()), point
        assert [(block.error_before, block.error_after) for block in report.blocks.values()] == [
            (block.error_before, block.error_after) for block in straight.report.blocks.values()
        ]
        assert not list(run.glob("blocks/*/checkpoint-*")) + list(run.glob("blocks/*/.*.part"))


def test_interrupted(straight: Straight, tmp_path: Path) -> None:
    first, second = straight.tasks()
    calls = 0

    def interrupts(*words: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 + 2 * 7:  # two held-out calls, then two per step: this is in step 7
            os.kill(os.getpid(), signal.SIGTERM)
        return second.run(*words)

    report = reconstruct([first, replace(second, run=interrupts)], straight.records, settings(tmp_path))
    assert (report.reason, report.signal) == (Reason.INTERRUPTED, signal.SIGTERM)
    assert (list(report.blocks), report.unfinished) == (["blocks.0"], ("blocks.1",))
    left = [path.name for path in checkpoint.find(tmp_path / "blocks" / "blocks.1")]
    assert left == ["checkpoint-5", "checkpoint-7"]
    with pytest.raises(UserError, match=r"blocks\.1 is not finished"):
        report.weights("blocks.1")
    # If the newest checkpoint is damaged, the one before it is used.
    (tmp_path / "blocks" / "blocks.1" / "checkpoint-7" / "optimizer.safetensors").write_bytes(b"")
    report = reconstruct(straight.tasks(), straight.records, settings(tmp_path, resume=True))
    assert (report.reason, report.signal, report.unfinished) == (Reason.DONE, 0, ())
    assert weights(tmp_path) == weights(straight.folder / "run")


def test_blocks_are_dealt_out(straight: Straight, tmp_path: Path) -> None:
    """Two processes train different blocks, and the weights equal those of one process."""
    reports = [
        reconstruct(straight.tasks(), straight.records, settings(tmp_path), share=Share(rank=rank, processes=2))
        for rank in (1, 0)
    ]
    assert [(list(report.blocks), report.unfinished) for report in reports] == [
        (["blocks.1"], ("blocks.0",)),
        (["blocks.0", "blocks.1"], ()),
    ]
    assert weights(tmp_path) == weights(straight.folder / "run")
    assert read_report(tmp_path) == reports[1]


def test_a_run_leaves_the_random_states_of_the_program(straight: Straight, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    reconstruct(straight.tasks()[:1], straight.records, settings(tmp_path, max_steps=1))
    assert torch.equal(torch.rand(3), expected)


def test_another_run_is_refused(straight: Straight, tmp_path: Path) -> None:
    run, records = straight.folder / "run", straight.records
    with pytest.raises(UserError, match=r"holds an earlier run of blocks.0: continue it with resume=True"):
        reconstruct(straight.tasks(), records, settings(run))
    with pytest.raises(UserError, match=r"other settings, records or weights: learning_rate: 0.001 -> 0.5. Resume"):
        reconstruct(straight.tasks(), records, settings(run, resume=True, learning_rate=0.5))
    with pytest.raises(UserError, match=r"task.rank: 4 -> 3\. Resume"):
        reconstruct(tasks(straight.pipe.transformer, "Wan", 3), records, settings(run, resume=True))
    others = records_of(straight.pipe, straight.size, seed=1)
    with pytest.raises(UserError, match=r"records: \w+ -> \w+\. Resume with"):
        reconstruct(straight.tasks(), others, settings(run, resume=True))
    # Settings that do not affect the weights may change.
    reconstruct(straight.tasks(), records, settings(run, resume=True, logging_steps=1, save_steps=0))


def test_weights_of_another_teacher_are_refused(straight: Straight, tmp_path: Path) -> None:
    task, sent = straight.tasks()[0], []

    def stops(*words: Any) -> Any:
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return task.run(*words)

    reconstruct([replace(task, run=stops)], straight.records, settings(tmp_path))
    assert [path.name for path in checkpoint.find(tmp_path / "blocks" / "blocks.0")] == ["checkpoint-1"]
    other, _ = pipeline("Wan")
    with torch.no_grad():
        other.transformer.blocks[0].attn1.to_q.bias[0] += 1e-6
    with pytest.raises(UserError, match=r"checkpoint-1 is from a run with .*: student: \w+ -> \w+\. Resume with"):
        reconstruct(tasks(other.transformer, "Wan"), straight.records, settings(tmp_path, resume=True))
