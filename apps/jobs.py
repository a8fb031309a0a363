"""The job queue of the app: jobs run one after another and report progress; an error of one job ends that job only."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from postgen.errors import UserError, cut_words, named_error

State = Literal["waiting", "running", "done", "failed", "cancelled"]
Work = Callable[["Task"], Any]
"""The function of a job, called in a worker thread with the `Task`. It calls `Task.step` regularly: that call raises
`CancelledError` when the job is cancelled."""

LOOK = 0.15
"""Seconds between two checks in `Jobs.follow`."""
_REMEMBERED = 200
"""Number of finished jobs that the queue remembers, so that a page can still ask for their results."""


class CancelledError(Exception):
    """The job was cancelled. `Task.step` and `Task.check` raise this error, and `Task.run` catches it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """The state of a job."""

    state: State
    position: int = 0
    """Number of jobs before this one, including running jobs; 0 if the job runs or has ended."""
    text: str = ""
    """Current activity, in a few words."""
    done: int = 0
    """Number of finished steps."""
    total: int = 0
    """Total number of steps; 0 if unknown."""
    unit: str = "step"
    """Name of one step on the page, such as "step" or "frame"."""
    seconds: float = 0.0
    """Seconds since the job started to run."""
    seconds_left: float | None = None
    """Estimate of the remaining seconds, from the measured time of the job's steps; None until two steps are done."""
    preview: Any = None
    """The last value of `Task.show`."""
    note: str = ""
    """The last value of `Task.note`; it stays after the end of the job."""
    stopping: bool = False
    """Whether a cancel or an early stop was requested and the job still runs."""
    result: Any = None
    """The return value of the work, if the state is "done"."""
    error: str | None = None
    """The reason of a failure, in one line."""

    @property
    def ended(self) -> bool:
        """Whether the job is done, failed or cancelled."""
        return self.state in ("done", "failed", "cancelled")


class Task:
    """One job. The page refers to the job by `id`, a random text that cannot be guessed."""

    def __init__(self, title: str, work: Work, over: Callable[[], None] | None = None) -> None:
        self.id = secrets.token_urlsafe(12)
        self.title = title
        self._over = over
        self._work: Work | None = work
        self._state: State = "waiting"
        self._text, self._unit = "", "step"
        self._done = self._total = 0
        self._began = self._ended = 0.0
        self._first: tuple[int, float] | None = None
        self._last = 0.0
        self._preview: Any = None
        self._note = ""
        self._result: Any = None
        self._error: str | None = None
        self._cancel = threading.Event()
        self._early = threading.Event()
        self.changes = 0
        """Counter that grows with every change of the job."""

    # The work calls the following methods.

    def check(self) -> None:
        """Raise `CancelledError` if the job was cancelled.

        Raises:
            CancelledError: the job was cancelled.
        """
        if self._cancel.is_set():
            raise CancelledError

    def step(self, done: int, total: int, unit: str = "step") -> None:
        """Report that `done` of `total` steps are done; a `postgen.generate.StepCallback`.

        Args:
            done: number of finished steps.
            total: total number of steps.
            unit: name of one step on the page.

        Raises:
            CancelledError: the job was cancelled.
        """
        now = time.monotonic()
        if self._first is None or total != self._total or done < self._done:
            self._first = (done, now)  # the time until the first step is not measured: it includes warm-up
        self._done, self._total, self._unit, self._last = done, total, unit, now
        self.changes += 1
        self.check()

    def tell(self, text: str) -> None:
        """Report the current activity in a few words, and reset the step count.

        Raises:
            CancelledError: the job was cancelled.
        """
        self._text, self._first, self._done, self._total = text, None, 0, 0
        self.changes += 1
        self.check()

    def show(self, preview: Any) -> None:
        """Set the preview that every page following the job shows. The value is sent often: keep it small."""
        self._preview = preview
        self.changes += 1

    def note(self, text: str) -> None:
        """Show one line of information to the user; the job goes on."""
        self._note = text
        self.changes += 1

    @property
    def early(self) -> bool:
        """Whether the work should end as soon as possible and keep its partial result; set by `Jobs.finish_early`."""
        return self._early.is_set()

    # Pages and the queue call the following methods.

    def progress(self, position: int = 0) -> Progress:
        """Return the state of the job; `position` is its place in the queue."""
        end = self._ended or time.monotonic()
        return Progress(
            state=self._state,
            position=position,
            text=self._text,
            done=self._done,
            total=self._total,
            unit=self._unit,
            seconds=end - self._began if self._began else 0.0,
            seconds_left=self._seconds_left(),
            preview=self._preview,
            note=self._note,
            stopping=not self._ended and (self._cancel.is_set() or self._early.is_set()),
            result=self._result,
            error=self._error,
        )

    def _seconds_left(self) -> float | None:
        if self._first is None or self._ended or self._done <= self._first[0] or not self._total:
            return None
        each = (self._last - self._first[1]) / (self._done - self._first[0])
        return max(0.0, each * (self._total - self._done) - (time.monotonic() - self._last))

    def run(self) -> None:
        """Run the work in the current thread. Every exception of the work, of any type, only ends this job."""
        work, self._work = self._work, None  # so that objects of the work can be freed when it ends
        assert work is not None
        self._state, self._began = "running", time.monotonic()
        self.changes += 1
        try:
            self.check()
            self._result = work(self)
            self._close("done")
        except CancelledError:
            self._close("cancelled")
        except UserError as error:
            self._error = cut_words(str(error), 400)
            self._close("failed")
        except BaseException as error:  # includes SystemExit of a library, which must not end the server
            traceback.print_exception(error)
            self._error = f"internal error, the terminal of the server shows the details: {named_error(error)}"
            self._close("failed")

    def cancel(self) -> None:
        """Request that the running job ends at its next step and keeps nothing."""
        self._cancel.set()
        self.changes += 1

    def finish_early(self) -> None:
        """Request that the job ends soon and keeps its partial result; only work that reads `early` supports this."""
        self._early.set()
        self.changes += 1

    def drop(self) -> None:
        """Cancel the job before it has started."""
        self._work = None
        self._close("cancelled")

    def _close(self, state: State) -> None:
        over, self._over = self._over, None
        if over is not None:
            over()
        self._ended, self._preview, self._state = time.monotonic(), None, state
        self.changes += 1


class Jobs:
    """All jobs of a server; they run in the order of submission.

    Args:
        at_once: number of jobs that run at the same time.
        waiting: largest number of waiting jobs.
    """

    def __init__(self, *, at_once: int = 1, waiting: int = 50) -> None:
        self.most_waiting = waiting
        self._known: dict[str, Task] = {}
        self._queue: deque[Task] = deque()
        self._running: list[Task] = []
        self._lock = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._serve, name=f"job-{n}", daemon=True) for n in range(at_once)]
        for thread in self._threads:
            thread.start()

    def submit(self, title: str, work: Work, over: Callable[[], None] | None = None) -> Task:
        """Put a job at the end of the queue.

        Args:
            title: short description of the job.
            work: function of the job. Its return value becomes `Progress.result` and stays in memory: keep it small.
            over: called once at the end of the job, also if the job never started, but not if `submit` raises. It must
                not call methods of `Jobs`.

        Raises:
            UserError: too many jobs are waiting, or the server is closing.
        """
        task = Task(title, work, over)
        with self._lock:
            if self._closed:
                raise UserError("the app is being closed and takes no more jobs: start it again")
            free = len(self._threads) - len(self._running)
            if len(self._queue) >= self.most_waiting + free:
                raise UserError(f"the queue is full, {len(self._queue)} jobs are waiting: try again later")
            self._queue.append(task)
            self._known[task.id] = task
            self._forget()
            self._lock.notify()
        return task

    def find(self, id: object) -> Task | None:
        """Return the job with an id; None if no remembered job has it. `id` may be any value that the page sent."""
        return self._known.get(id) if isinstance(id, str) else None

    def progress(self, task: Task) -> Progress:
        """Return the state of a job, including its place in the queue."""
        with self._lock:
            before = self._queue.index(task) + len(self._running) if task in self._queue else 0
            return task.progress(before)

    def cancel(self, id: object) -> bool:
        """Cancel a job and keep nothing: a waiting job ends immediately, a running job at its next step.

        Returns:
            Whether a job with this id existed and had not ended.
        """
        with self._lock:
            task = self.find(id)
            if task is None or task.progress().ended:
                return False
            if task in self._queue:
                self._queue.remove(task)
                task.drop()
            else:
                task.cancel()
        return True

    def finish_early(self, id: object) -> bool:
        """Request that a running job ends soon and keeps its partial result.

        Returns:
            Whether a job with this id was running.
        """
        task = self.find(id)
        if task is None or task.progress().state != "running":
            return False
        task.finish_early()
        return True

    async def follow(self, task: Task) -> AsyncIterator[Progress]:
        """Yield the state of a job after every change and once a second, until the job has ended.

        Leaving the loop, for instance because the page is closed, does not affect the job. Waiting blocks no thread.
        """
        seen: tuple[int, int, int] | None = None
        while True:
            progress = self.progress(task)
            now = (task.changes, progress.position, int(progress.seconds))
            if now != seen:
                seen = now
                yield progress
            if progress.ended:
                return
            await asyncio.sleep(LOOK)

    def close(self, patience: float = 10.0) -> bool:
        """Cancel all jobs, wait at most `patience` seconds, and return whether all worker threads have ended."""
        with self._lock:
            self._closed = True
            while self._queue:
                self._queue.pop().drop()
            for task in self._running:
                task.cancel()
            self._lock.notify_all()
        end = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _serve(self) -> None:
        while True:
            with self._lock:
                while not self._queue:
                    if self._closed:
                        return
                    self._lock.wait()
                task = self._queue.popleft()
                self._running.append(task)
            task.run()
            with self._lock, suppress(ValueError):
                self._running.remove(task)
            del task

    def _forget(self) -> None:
        over = [id for id, task in self._known.items() if task.progress().ended]
        for id in over[: max(0, len(over) - _REMEMBERED)]:
            del self._known[id]
