"""The judge in several processes: equal reports, errors reach the caller, and no process is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from postgen import world
from postgen.errors import UserError
from postgen.rewards import get_reward
from postgen.world.check import check_batch, workers
from postgen.world.check.events import large
from postgen.world.check.look import look
from postgen.world.check.report import judge


@pytest.fixture(scope="module")
def scenes():
    """Return five scenes with one to three bodies, and clips; the last clip ends with frames of another scene."""
    specs = [world.sample(k, num_frames=9, num_bodies=1 + k % 3, camera="static") for k in range(5)]
    clips = world.render(specs, num_frames=9, size=64, geometry=False).rgb_BF3HW.clone()
    clips[4, 5:] = clips[0, 5:]
    return specs, clips


@pytest.fixture(scope="module")
def sight(scenes):
    with torch.no_grad():
        return look(scenes[1])


@pytest.fixture(scope="module", autouse=True)
def _leave_nothing():
    yield
    workers.close_pools()


def test_reports_are_the_same(scenes):
    specs, clips = scenes
    here = check_batch(clips, specs)
    assert len({repr(report) for report in here}) == 5
    for count in (2, 2, 7):
        # `repr` is compared too, so floats are equal in all digits.
        assert list(map(repr, check_batch(clips, specs, workers=count))) == list(map(repr, here))


def test_the_reward_takes_it_as_an_option(scenes):
    specs, clips = scenes
    reward = get_reward("world(workers=2)")
    assert reward.name == "world"
    assert reward([""] * 5, list(clips), spec=specs) == get_reward("world")([""] * 5, list(clips), spec=specs)


def test_processes_are_kept_and_import_no_torch(scenes):
    with workers.pool_of(2) as pool:
        pids = [process.pid for process in pool.processes]
    check_batch(scenes[1], scenes[0], workers=2)
    with workers.pool_of(2) as pool:
        assert [process.pid for process in pool.processes] == pids
    for pid in pids:
        maps = f"/proc/{pid}/maps"
        if os.path.exists(maps):
            with open(maps) as file:
                libraries = file.read()
            assert "numpy" in libraries
            assert "libtorch" not in libraries
            assert "libcuda" not in libraries


def test_errors_come_back_and_the_processes_go_on(scenes, sight):
    wrong = replace(sight, rows_NC=sight.rows_NC[:, :5])
    with workers.pool_of(2) as pool:
        with pytest.raises(ValueError, match="not enough values to unpack") as caught:
            [job.result() for job in pool.submit(wrong, scenes[0])]
        assert "In a process of the judge" in caught.value.__notes__[0]
        jobs = pool.submit(sight, scenes[0])
        assert [report for job in jobs for report in job.result()] == judge(sight, scenes[0])
    with pytest.raises(UserError, match="workers=-1: give 0 or more"):
        check_batch(scenes[1], scenes[0], workers=-1)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_process_is_an_error_and_the_next_call_works(scenes):
    specs, clips = scenes
    here = check_batch(clips, specs, workers=2)
    with workers.pool_of(2) as pool:
        os.kill(pool.processes[0].pid, signal.SIGKILL)
    with pytest.raises(workers.WorkerDied, match=r"died \(exit code -9\)"):
        check_batch(clips, specs, workers=2)
    assert all(process.end() == -9 for process in pool.processes)
    assert check_batch(clips, specs, workers=2) == here


def test_a_process_that_cannot_start_says_so(scenes, monkeypatch):
    false = shutil.which("false")
    if false is None:
        pytest.skip("no program that only fails")
    monkeypatch.setattr(sys, "executable", false)
    with pytest.raises(workers.WorkerDied, match=r"died \(exit code 1\).*workers=0"):
        check_batch(scenes[1], scenes[0], workers=3)


def test_an_interrupt_ends_them():
    with pytest.raises(KeyboardInterrupt), workers.pool_of(1) as pool:
        raise KeyboardInterrupt
    assert pool.processes[0].end() == -9


def test_a_call_under_way_finishes_when_the_pools_are_closed(scenes, sight):
    with workers.pool_of(2) as pool:
        before = pool.submit(sight, scenes[0])
        workers.close_pools()
        after = pool.submit(sight, scenes[0])
        with workers.pool_of(2) as other:
            assert other is not pool
        for jobs in (before, after):
            assert [report for job in jobs for report in job.result()] == judge(sight, scenes[0])
    assert all(process.end() == -9 for process in pool.processes)


def test_a_call_that_fails_leaves_the_others_their_processes(scenes, sight):
    """An interrupted call must not end the processes of another call, as in another thread."""
    with workers.pool_of(2) as pool:
        with pytest.raises(KeyboardInterrupt), workers.pool_of(2):
            raise KeyboardInterrupt
        jobs = pool.submit(sight, scenes[0])
        assert [report for job in jobs for report in job.result()] == judge(sight, scenes[0])
    assert all(process.end() == -9 for process in pool.processes)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 2)"])
def test_no_process_outlives_its_parent(end):
    script = "import os\nfrom postgen.world.check.workers import pool_of\nwith pool_of(2) as pool:\n"
    script += f"    print(*[p.pid for p in pool.processes], flush=True)\n    {end or 'pass'}"
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False
    )
    pids = done.stdout.split()
    assert len(pids) == 2
    limit = time.monotonic() + 10
    while any(_runs(int(pid)) for pid in pids):
        assert time.monotonic() < limit
        time.sleep(0.05)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_85th_percentile_is_numpys():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 4, 7, 17, 33, 81):
        values = rng.random(n).tolist()
        assert large(values) == float(np.percentile(values, 85))
