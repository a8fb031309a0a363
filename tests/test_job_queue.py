"""Commands that need one another: order, what failed, what a deadline stops, and going on afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import job_queue
from benchmarks.job_queue import Job, run_jobs, wanted


def job(folder: Path, name: str, code: str, *needs: str, marked: bool = True) -> Job:
    """A command of Python that knows the folder as `f`."""
    words = (sys.executable, "-S", "-c", f"import os, time; f = {str(folder)!r}; {code}")
    mark = folder / "done" / name if marked else folder / name
    return Job(name=name, command=words, mark=mark, log=folder / f"{name}.log", needs=needs, marked=marked)


def adds(name: str) -> str:
    return f"open(f + '/order', 'a').write('{name} ' + os.environ.get('CUDA_VISIBLE_DEVICES', '-') + '\\n')"


def test_order_places_and_failures(tmp_path: Path) -> None:
    """What is needed comes first; of what failed nothing that needs it is begun, the rest is."""
    jobs = {
        each.name: each
        for each in (
            job(tmp_path, "child", adds("child"), "base"),
            job(tmp_path, "orphan", adds("orphan"), "broken"),
            job(tmp_path, "broken", "raise SystemExit(7)"),
            job(tmp_path, "base", adds("base")),
            job(tmp_path, "unasked", adds("unasked")),
        )
    }
    left = run_jobs(wanted(jobs, ["child", "orphan"]), ["3"])
    assert left == {"broken": "failed", "orphan": "needs broken"}
    assert (tmp_path / "order").read_text().split() == ["base", "3", "child", "3"]
    # A second call does what failed again and leaves alone what is done.
    assert [each.name for each in wanted(jobs, ["child", "orphan"])] == ["orphan", "broken"]
    assert [each.name for each in wanted(jobs, ["child"])] == []


def test_a_deadline_and_what_comes_after_it(tmp_path: Path) -> None:
    """What runs is told to stop and may save; the next call goes on; a mark that the command writes is enough."""
    saves = "import signal; signal.signal(15, lambda *_: (open(f + '/kept', 'w').close(), os._exit(143)));"
    slow = job(tmp_path, "slow", f"{saves} os.path.exists(f + '/kept') or time.sleep(60)")
    later = job(tmp_path, "later", "open(f + '/later', 'w').close()", "slow", marked=False)
    ticks: list[float] = []
    began = time.monotonic()
    left = run_jobs([slow, later], [""], seconds=1.5, tick=lambda: ticks.append(time.monotonic()))
    assert time.monotonic() - began < 30
    assert left == {"slow": "stopped", "later": "not begun"}
    assert ticks
    assert (tmp_path / "kept").exists()
    assert not slow.done
    assert run_jobs([slow, later], ["", ""]) == {}
    assert slow.done
    assert later.done


def test_what_cannot_begin_and_what_cannot_be_written(tmp_path: Path) -> None:
    """Neither a job that cannot be prepared, nor a look that fails on the way, stops the others."""

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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_queue, "TICK", 0.1)
        left = run_jobs(jobs, [""], tick=tick)
    assert left == {"odd": "failed", "lost": "failed", "child": "needs odd"}
    assert long.done
    assert len(looks) > 1


@pytest.mark.parametrize(("number", "whole_group"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_lets_commands_save(number: int, whole_group: bool, tmp_path: Path) -> None:
    """Ctrl-C in a terminal goes to a whole group, SIGTERM to one process: a command gets one signal, and may save."""
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
        os.kill(process.pid, number)  # a second one ends nothing before it has saved
    assert process.wait(20) == 128 + number
    assert (tmp_path / "got").read_text() == "1"
    assert (tmp_path / "looked").exists()
    assert not (tmp_path / "mark").exists()
