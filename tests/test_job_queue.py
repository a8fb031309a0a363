"""Commands that need one another: order, what failed, what a deadline stops, and going on afterwards."""

from __future__ import annotations

import sys
import time
from pathlib import Path

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
