"""The job queue: jobs run one after another, and the failure of one job does not affect the others."""

import asyncio
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from postgen import UserError
from postgen.apps.jobs import Jobs
from postgen.apps.status import status


@pytest.fixture
def jobs():
    made = Jobs(waiting=3)
    yield made
    made.close(patience=5)


class Gate:
    """Work that sets `begun` when it starts and waits for `go`."""

    def __init__(self):
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, task):
        self.begun.set()
        while not self.go.wait(0.01):
            task.check()
        return "made"


def ended(jobs, task, seconds=10):
    limit = time.monotonic() + seconds
    while not (progress := jobs.progress(task)).ended:
        assert time.monotonic() < limit
        time.sleep(0.005)
    return progress


def test_they_run_in_their_order_and_say_their_place(jobs):
    first, order = Gate(), []
    one = jobs.submit("one", first)
    two = jobs.submit("two", lambda task: order.append("two"))
    three = jobs.submit("three", lambda task: order.append("three"))
    assert first.begun.wait(5)
    assert [jobs.progress(task).position for task in (one, two, three)] == [0, 1, 2]
    assert "2 jobs before" in status(jobs.progress(three))
    first.go.set()
    assert ended(jobs, three).state == "done"
    assert jobs.progress(one).result == "made"
    assert order == ["two", "three"]


def test_a_job_that_fails_in_any_way_leaves_the_next_alone(jobs, capsys):
    def wrong(task):
        raise UserError("the number of frames\nmust be 5")

    def broken(task):
        raise SystemExit("a library gave up")

    said = ended(jobs, jobs.submit("wrong", wrong))
    assert (said.state, said.error) == ("failed", "the number of frames must be 5")
    failed = ended(jobs, jobs.submit("broken", broken))
    assert failed.error.endswith("SystemExit: a library gave up")
    assert "Traceback" in capsys.readouterr().err
    assert ended(jobs, jobs.submit("next", lambda task: 3)).result == 3


def test_cancelled_while_it_runs_it_ends_at_its_next_step(jobs):
    gate = Gate()
    task = jobs.submit("one", gate)
    assert gate.begun.wait(5)
    assert jobs.cancel(task.id)
    assert ended(jobs, task).state == "cancelled"
    assert not jobs.cancel(task.id)


def test_cancelled_while_it_waits_it_never_begins(jobs):
    gate, begun = Gate(), []
    jobs.submit("one", gate)
    task = jobs.submit("two", begun.append)
    assert jobs.cancel(task.id)
    assert jobs.progress(task).state == "cancelled"
    gate.go.set()
    assert ended(jobs, jobs.submit("three", lambda task: 0)).state == "done"
    assert begun == []


def test_more_than_may_wait_are_refused_and_there_is_room_again(jobs):
    gate = Gate()
    jobs.submit("running", gate)
    assert gate.begun.wait(5)
    tasks = [jobs.submit(str(n), lambda task: 0) for n in range(3)]
    with pytest.raises(UserError, match="the queue is full, 3 jobs are waiting"):
        jobs.submit("too many", lambda task: 0)
    gate.go.set()
    ended(jobs, tasks[-1])
    assert ended(jobs, jobs.submit("again", lambda task: 1)).result == 1


@pytest.mark.parametrize("id", [None, 7, "nothing", ["x"], {"id": "x"}])
def test_an_id_of_nobody_finds_nothing(jobs, id):
    assert jobs.find(id) is None
    assert not jobs.cancel(id)
    assert not jobs.finish_early(id)


def test_seconds_left_are_measured_on_its_own_steps(jobs):
    gates = [threading.Event() for _ in range(2)]

    def work(task):
        task.step(1, 5)
        time.sleep(0.2)
        task.step(2, 5)
        gates[0].set()
        gates[1].wait(5)

    task = jobs.submit("one", work)
    assert gates[0].wait(5)
    assert 0.3 < jobs.progress(task).seconds_left < 0.9
    assert "step 2 of 5" in status(jobs.progress(task))
    gates[1].set()
    assert ended(jobs, task).seconds_left is None


def test_asked_to_end_early_the_work_is_told(jobs):
    def work(task):
        while not task.early:
            time.sleep(0.005)
            task.check()
        return "kept"

    task = jobs.submit("one", work)
    while not jobs.finish_early(task.id):
        time.sleep(0.005)
    assert ended(jobs, task).result == "kept"


def test_followed_to_its_end_and_the_preview_is_gone_then(jobs):
    go = threading.Event()

    def work(task):
        task.show("picture")
        go.wait(5)

    task = jobs.submit("one", work)

    async def follow():
        seen = []
        async for progress in jobs.follow(task):
            seen.append((progress.state, progress.preview))
            if progress.preview:
                go.set()
        return seen

    # In a separate thread, because Playwright of another test may run an event loop in this thread.
    with ThreadPoolExecutor(1) as thread:
        seen = thread.submit(lambda: asyncio.run(follow())).result()
    assert ("running", "picture") in seen
    assert seen[-1] == ("done", None)


def test_closing_ends_what_runs_and_what_waits():
    jobs, gate = Jobs(), Gate()
    one, two = jobs.submit("one", gate), jobs.submit("two", lambda task: 0)
    assert gate.begun.wait(5)
    jobs.close(patience=5)
    assert [jobs.progress(task).state for task in (one, two)] == ["cancelled", "cancelled"]
    with pytest.raises(UserError, match="closed"):
        jobs.submit("three", lambda task: 0)


def test_closing_says_whether_all_has_ended():
    ended, stubborn = Jobs(), Jobs()
    assert ended.close(patience=5) is True
    go, begun = threading.Event(), threading.Event()
    stubborn.submit("never looks", lambda task: (begun.set(), go.wait(20)))
    assert begun.wait(5)
    assert stubborn.close(patience=0.1) is False
    go.set()


def test_a_process_whose_threads_were_given_up_ends_at_once_with_its_code():
    words = "from postgen.interrupts import *; import atexit; atexit.register(print, 'torn down');"
    for given_up, said in ((True, ""), (False, "torn down\n")):
        end = f"{'give_up_threads();' if given_up else ''} leave_given_up(143); raise SystemExit(143)"
        done = subprocess.run([sys.executable, "-c", words + end], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (143, said)
