"""Commands that depend on each other: order, failures, stops by a deadline or Ctrl-C, and continuation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.job_queue import Job, places_on, run_jobs, told, wanted
from postgen.errors import UserError

SAVES = "import signal; signal.signal(15, lambda *_: (open(f + '/kept', 'w').close(), os._exit(143))); "
DEAF = "import signal; signal.signal(15, signal.SIG_IGN); "
SLEEPS = "open(f + '/begun', 'w').close(); time.sleep(60)"


def job(folder: Path, name: str, code: str, *needs: str, checked: bool = False, **more: Any) -> Job:
    """Return a job that runs code with the folder as `f`; if checked, it is done when a file of its name exists."""
    words = (sys.executable, "-S", "-c", f"import os, time; f = {str(folder)!r}; {code}")
    done: dict[str, Any] = {"check": (folder / name).exists} if checked else {"mark": folder / "done" / name}
    return Job(name=name, command=words, log=folder / f"{name}.log", needs=needs, **done, **more)


def adds(name: str) -> str:
    return f"open(f + '/order', 'a').write('{name} ' + os.environ.get('CUDA_VISIBLE_DEVICES', '-') + '\\n')"


def test_order_places_and_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Required jobs run first. Jobs that need a failed job do not start; all others run."""
    jobs = {
        each.name: each
        for each in (
            job(tmp_path, "grandchild", adds("grandchild"), "orphan"),
            job(tmp_path, "child", adds("child"), "base"),
            job(tmp_path, "orphan", adds("orphan"), "broken"),
            job(tmp_path, "broken", "raise SystemExit(7)"),
            job(tmp_path, "base", adds("base")),
            job(tmp_path, "unasked", adds("unasked")),
        )
    }
    left = run_jobs(wanted(jobs, ["child", "grandchild"]), ["3"])
    assert left == {"broken": "failed", "orphan": "needs broken", "grandchild": "needs orphan"}
    assert (tmp_path / "order").read_text().split() == ["base", "3", "child", "3"]
    assert told(left) == ["broken"]
    said = capsys.readouterr().out
    assert f"broken: failed, see {tmp_path / 'broken.log'} (exit code 7)\n" in said
    assert "s: base begins on GPU 3\n" in said
    assert "base: done\n" in said
    assert "orphan: not done\n" in said
    assert "broken: not done\n" not in said
    # A second call repeats failed jobs, and does not repeat finished jobs.
    assert [each.name for each in wanted(jobs, ["child", "orphan"])] == ["orphan", "broken"]
    assert [each.name for each in wanted(jobs, ["child"])] == []


def test_a_failure_keeps_others_from_beginning_where_that_is_asked(tmp_path: Path) -> None:
    """After a failure, running jobs finish but no job begins. Jobs that need each other in a circle never begin."""
    jobs = [job(tmp_path, "broken", "raise SystemExit(7)"), job(tmp_path, "beside", "time.sleep(0.6)")]
    jobs.append(job(tmp_path, "later", adds("later")))
    assert run_jobs(jobs, ["", ""], go_on=False) == {"broken": "failed", "later": "not begun"}
    assert jobs[1].done
    ring = [job(tmp_path, "hen", adds("hen"), "egg"), job(tmp_path, "egg", adds("egg"), "hen")]
    assert run_jobs(ring, [""]) == {"hen": "not begun", "egg": "not begun"}
    assert not (tmp_path / "order").exists()


def test_a_deadline_and_what_comes_after_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Running jobs receive a signal and can save, and the next call continues from the files of the command."""
    slow = job(tmp_path, "slow", f"{SAVES} os.path.exists(f + '/kept') or time.sleep(60)")
    later = job(tmp_path, "later", "open(f + '/later', 'w').close()", "slow", checked=True)
    ticks: list[float] = []
    began = time.monotonic()
    left = run_jobs([slow, later], [""], seconds=1.5, tick=lambda: ticks.append(time.monotonic()))
    assert time.monotonic() - began < 30
    assert left == {"slow": "stopped", "later": "not begun"}
    assert told(left) == []
    assert "slow: not done\nlater: not done\n" in capsys.readouterr().out
    assert len(ticks) == 1  # at the end
    assert (tmp_path / "kept").exists()
    assert not slow.done
    assert run_jobs([slow, later], ["", ""]) == {}
    assert slow.done
    assert later.done


def test_what_ends_well_or_not_at_all_after_a_deadline(tmp_path: Path) -> None:
    """A job that finishes after the signal is done; a job that ignores the signal is killed."""
    ends = f"import signal; signal.signal(15, lambda *_: os._exit(0)); {SLEEPS}"
    jobs = [job(tmp_path, "ends", ends), job(tmp_path, "deaf", DEAF + SLEEPS.replace("begun", "deaf-begun"))]
    jobs.append(job(tmp_path, "early", ends.replace("begun", "early-begun"), checked=True))
    began = time.monotonic()
    left = run_jobs(jobs, places_on([], 3), seconds=1.5, grace=1.0)
    assert left == {"deaf": "stopped", "early": "stopped"}
    assert 2.5 <= time.monotonic() - began < 30
    assert jobs[0].done


def test_an_interrupt_stops_what_runs(tmp_path: Path) -> None:
    """Ctrl-C ends the call: its commands can save, and existing results are collected."""
    ticks: list[float] = []

    def tick() -> None:
        ticks.append(time.monotonic())
        if (tmp_path / "begun").exists() and not (tmp_path / "kept").exists():
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_jobs([job(tmp_path, "slow", SAVES + SLEEPS)], [""], tick=tick, every=0.0)
    assert (tmp_path / "kept").exists()
    assert len(ticks) > 1


def test_logs_threads_and_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log is continued or begun anew. A command has two threads by default."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    shown = "print(os.environ['OMP_NUM_THREADS'], os.environ.get('MINE'))"
    kept, anew = job(tmp_path, "kept", shown), job(tmp_path, "anew", shown, keep_log=False)
    assert run_jobs([kept, anew], ["", ""]) == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert run_jobs([kept, anew], ["", ""], environment={"MINE": "1"}) == {}
    assert kept.log.read_text() == "2 None\n5 1\n"
    assert anew.log.read_text() == "5 1\n"
    assert run_jobs([kept], [""], environment={"OMP_NUM_THREADS": "3"}) == {}
    assert kept.log.read_text().endswith("3 None\n")
    assert places_on(["0", "1"], 2) == ["0", "1", "0", "1"]
    assert places_on([], 2) == ["", ""]
    for gpus, each, said in (
        (["0"], 0, "--each must be at least 1"),
        (["0,1"], 1, "separate the numbers by spaces"),
        (["1", "1"], 1, "--gpus must not repeat a value, got 1 1"),
    ):
        with pytest.raises(UserError, match=said):
            places_on(gpus, each)
    assert run_jobs([anew], []) == {"anew": "not begun"}


def test_what_cannot_begin_and_what_cannot_be_written(tmp_path: Path) -> None:
    """Other jobs run even if a job cannot be prepared or a check fails."""

    def broken() -> None:
        raise RuntimeError("no room")

    odd = replace(job(tmp_path, "odd", "pass"), prepare=broken)
    lost = replace(job(tmp_path, "lost", "pass"), command=(str(tmp_path / "no-such-program"),))
    long = job(tmp_path, "long", "time.sleep(0.6)")
    jobs = [odd, lost, job(tmp_path, "child", "pass", "odd"), long]
    looks: list[int] = []

    def tick() -> None:
        looks.append(1)
        if not long.done:
            broken()

    left = run_jobs(jobs, [""], tick=tick, every=0.1)
    assert left == {"odd": "failed", "lost": "failed", "child": "needs odd"}
    assert long.done
    assert len(looks) > 1


@pytest.mark.parametrize(("number", "whole_group"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_lets_commands_save(number: int, whole_group: bool, tmp_path: Path) -> None:
    """Ctrl-C reaches a whole process group, SIGTERM one process: a command receives one signal and can save."""
    command = f"""if True:
        import signal, time
        came, f = [], {str(tmp_path)!r}
        for number in (2, 15):
            signal.signal(number, lambda *_: came.append(1))
        open(f + "/on", "w").close()
        while not came:
            time.sleep(0.05)
        time.sleep(1)
        open(f + "/got", "w").write(str(len(came)))
        raise SystemExit(143)
    """
    code = f"""if True:
        import sys
        from pathlib import Path
        from benchmarks.job_queue import Job, run_jobs
        from postgen.interrupts import stoppable
        f = Path({str(tmp_path)!r})
        words = (sys.executable, "-S", "-c", {command!r})
        job = Job(name="slow", command=words, mark=f / "mark", log=f / "log")
        with stoppable() as stop:
            try:
                run_jobs([job], [""], tick=(f / "looked").touch)
            except KeyboardInterrupt:
                stop.end()
                raise SystemExit(stop.code)
    """
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    while not (tmp_path / "on").exists():
        time.sleep(0.05)
        assert process.poll() is None
    (os.killpg if whole_group else os.kill)(process.pid, number)
    time.sleep(0.3)
    if process.poll() is None:
        os.kill(process.pid, number)  # a second signal does not end a command before it has saved
    assert process.wait(20) == 128 + number
    assert (tmp_path / "got").read_text() == "1"
    assert (tmp_path / "looked").exists()
    assert not (tmp_path / "mark").exists()
