"""Memory and files of long runs are bounded: curves of the model card, the log in memory, times, threads."""

import json
import random
import sys
import threading
import tracemalloc

import pytest
import torch

from benchmarks import faults_growth
from postgen.grpo.guards import HackingGuard
from postgen.rewards import runner
from postgen.sampling.meter import Meter
from postgen.training import callbacks
from postgen.training import run_curves as curves
from postgen.training.logging import MetricsFile
from postgen.training.run_curves import PIECES, Curve, Curves
from tests.grpo.toy import grpo, lines
from tests.training.tiny import TinyConfig


def written(path, steps):
    rows = [{"step": k, "reward": k / 7, "other": k, **({"eval_reward": k} if k % 10 == 0 else {})} for k in steps]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def peak_mb(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def test_a_short_curve_is_drawn_as_it_is(tmp_path):
    rows = written(tmp_path / "metrics.jsonl", range(PIECES))
    assert Curves(tmp_path / "metrics.jsonl").draw(tmp_path / "here.png") == ["reward", "eval_reward"]
    plots = {
        name: ("step", {"": [(row["step"], row[name]) for row in rows if name in row]})
        for name in ("reward", "eval_reward")
    }
    curves.draw_plots(plots, tmp_path / "plain.png")
    assert (tmp_path / "here.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_a_long_curve_keeps_its_ends_and_all_that_stands_out():
    draw = random.Random(0)
    points = [(step, draw.gauss(0, 1)) for step in range(50_000)]
    points[31_415] = (31_415, 9.0)
    curve = Curve()
    for point in points:
        curve.add(*point)
    kept = curve.points()
    assert PIECES <= len(kept) <= 2 * PIECES + 2
    assert set(kept) <= set(points)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    # Each of a hundred columns keeps its lowest and highest point.
    for low in range(0, 50_000, 512):
        piece = [y for x, y in points if low <= x < low + 512]
        found = [y for x, y in kept if low <= x < low + 512]
        assert (min(found), max(found)) == (min(piece), max(piece))


def test_an_export_reads_what_is_new_alone(tmp_path, monkeypatch):
    path, read = tmp_path / "metrics.jsonl", []
    written(path, range(1000))
    monkeypatch.setattr(json, "loads", lambda text, plain=json.loads: read.append(text) or plain(text))
    drawn = Curves(path)
    drawn.draw(tmp_path / "curves.png")
    assert len(read) == 1000
    with path.open("a") as file:
        file.write('{"step": 1000, "reward": 2.0}\n{"step": 1001, "rew')  # the run writes further lines
    drawn.draw(tmp_path / "curves.png")
    assert len(read) == 1001
    with path.open("a") as file:
        file.write('ard": 3.0}\n')
    drawn.draw(tmp_path / "curves.png")
    assert json.loads(read[-1]) == {"step": 1001, "reward": 3.0}
    # A run that starts again replaces the file.
    MetricsFile(path, 0).append(1, {"reward": 0.5})
    assert drawn.draw(tmp_path / "other.png") == []


def test_reading_a_long_log_takes_little_memory(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = written(path, range(10_000))
    assert path.stat().st_size > 2**19
    Curves(path).draw(tmp_path / "curves.png")  # the first plot of a process loads fonts
    assert peak_mb(lambda: Curves(path).draw(tmp_path / "curves.png")) < 0.4
    assert peak_mb(lambda: MetricsFile(path, 9_000)) < 0.2
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[:9_001]


def test_the_log_in_memory_keeps_the_newest_lines_of_each_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "KEPT", 3)
    seen = []

    class Last(callbacks.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **extra):
            seen.append((state.log_history[-1], {"step": state.global_step, **logs}))

    run = grpo(tmp_path, max_steps=12, eval_steps=3, eval_dataset=[{"prompt": "a"}], callbacks=[Last])
    run.train()
    assert len(seen) == 16
    assert all(newest == told for newest, told in seen)
    history = run.callbacks.state.log_history
    assert isinstance(history, list)
    assert [(line["step"], "eval_reward" in line) for line in history] == [
        (6, True), (9, True), (10, False), (11, False), (12, False), (12, True),
    ]  # fmt: skip
    assert len(lines(run)) == 16


def test_damaged_lines_of_a_log_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [b'{"step": 1, "reward": 0.5}\n', b'{"step": 2,  "reward": 1.5}\n', b'{"step": 3, "reward": "much"}\n']
    bad = [b"\0\0\0\n", b"\xff\xfe\n", b"7\n", b'{"reward": 1.0}\n', b'{"step": null}\n', b'{"step": 2, "re\n']
    path.write_bytes(b"".join([good[0], *bad, *good[1:], b'{"step": 9']))
    assert Curves(path).draw(tmp_path / "curves.png") == ["reward"]
    assert [row["step"] for row in curves.read_metrics(path)] == [1, 2, 3]
    MetricsFile(path, 2)
    assert path.read_bytes() == b"".join(good[:2])


def test_a_callback_may_clear_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "KEPT", 2)
    kept = callbacks.Callbacks([], TinyConfig(output_dir=str(tmp_path), max_steps=9), is_main=True)
    for step in range(3):
        kept.remember(step, {"loss": 1.0})
    kept.state.log_history.clear()
    for step in range(3, 6):
        kept.remember(step, {"loss": 1.0})
    assert [line["step"] for line in kept.state.log_history] == [4, 5]


def test_the_guard_and_checkpoints_keep_the_last_evaluation(tmp_path):
    guard = HackingGuard(2)
    guard.load([[1.0, 5.0], [2.0, 4.0]], 1)  # a state with the whole history, as older checkpoints have it
    assert guard.state() == {"history": [[2.0, 4.0]], "parted": 1}
    assert guard.see(3.0, 3.0)
    assert guard.state()["history"] == [[3.0, 3.0]]


def test_times_on_a_gpu_are_read_before_they_are_too_many(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def elapsed_time(self, other):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    meter = Meter(torch.device("cuda"))
    for _ in range(10_000):
        with meter.time("transformer_seconds"):
            pass
    assert len(meter._open) < 5000
    assert meter.read()["transformer_seconds"] == pytest.approx(20.0)


def test_threads_that_were_left_and_have_ended_are_let_go(monkeypatch):
    monkeypatch.setattr(runner, "_left", {})
    for key in range(5):
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        runner._leave(key, thread)
    assert list(runner._left) == [4]


class Leaks(faults_growth.Readings):
    """A callback that keeps half a MB more after each step."""

    def on_step_begin(self, args, state, control, **extra):
        self.kept = [*getattr(self, "kept", []), torch.ones(2**17)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_the_benchmark_sees_what_grows():
    readings = faults_growth.measured("trainer", 40, every=10, callback=Leaks, report_to=[])
    assert faults_growth.slope(readings.points, 10) == pytest.approx(500, rel=0.2)
