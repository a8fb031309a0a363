"""Jobs of the app: one after another, each with its progress, its end, and one line where it fails."""

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
"""What a job does, in a thread of its own. It calls `Task.step` now and then, which ends it when it is cancelled."""

LOOK = 0.15
"""Seconds after which `Jobs.follow` looks again."""
_REMEMBERED = 200
"""Finished jobs that are still known, so that a page can ask how they ended."""


class CancelledError(Exception):
    """The job was cancelled: raised by `Task.step` and `Task.check`, and caught by whoever runs the job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How a job stands."""

    state: State
    position: int = 0
    """Jobs before it, those that run included; 0 when it runs or has ended."""
    text: str = ""
    """What it is doing, in a few words."""
    done: int = 0
    """Steps that are done."""
    total: int = 0
    """Steps in all; 0 where that is not known."""
    unit: str = "step"
    """What a step is."""
    seconds: float = 0.0
    """Since it began to run."""
    seconds_left: float | None = None
    """Measured on its own steps; None before two are done."""
    preview: Any = None
    """What `Task.show` was given last."""
    note: str = ""
    """What `Task.note` was given last; it stays when the job has ended."""
    stopping: bool = False
    """Whether it was asked to end and has not yet."""
    result: Any = None
    """What the work returned, when it is done."""
    error: str | None = None
    """Why it failed, in one line."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ("done", "failed", "cancelled")


class Task:
    """One job. The page knows it by `id`, which nobody can guess."""

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
        """Goes up whenever something changes."""

    # For the work.

    def check(self) -> None:
        """End the work if the job was cancelled.

        Raises:
            CancelledError: it was.
        """
        if self._cancel.is_set():
            raise CancelledError

    def step(self, done: int, total: int, unit: str = "step") -> None:
        """Say that `done` of `total` steps are done: a `postgen.generate.StepCallback`. `unit` says what a step is.

        Raises:
            CancelledError: the job was cancelled.
        """
        now = time.monotonic()
        if self._first is None or total != self._total or done < self._done:
            self._first = (done, now)  # the step before it also warmed caches up, so it is not measured
        self._done, self._total, self._unit, self._last = done, total, unit, now
        self.changes += 1
        self.check()

    def tell(self, text: str) -> None:
        """Say what it is doing, in a few words; steps are counted anew.

        Raises:
            CancelledError: the job was cancelled.
        """
        self._text, self._first, self._done, self._total = text, None, 0, 0
        self.changes += 1
        self.check()

    def show(self, preview: Any) -> None:
        """Show something of what is being made, on every page that follows the job. Keep it small."""
        self._preview = preview
        self.changes += 1

    def note(self, text: str) -> None:
        """Say something that the user should know and that stops nothing, in one line."""
        self._note = text
        self.changes += 1

    @property
    def early(self) -> bool:
        """Whether the work should end as soon as it can and keep what there is; `Jobs.finish_early` asks for it."""
        return self._early.is_set()

    # For pages.

    def progress(self, position: int = 0) -> Progress:
        """Return how it stands."""
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
        """Do the work, in this thread; whatever it raises becomes the end of this job alone."""
        work, self._work = self._work, None  # what it holds is free when it is over
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
        except BaseException as error:  # also what a library raises to end the process: the server goes on
            traceback.print_exception(error)
            self._error = f"this is a fault of the program, which its terminal tells more of: {named_error(error)}"
            self._close("failed")

    def cancel(self) -> None:
        """Ask it to end at its next step and to keep nothing; one that waits has ended already."""
        self._cancel.set()
        self.changes += 1

    def finish_early(self) -> None:
        """Ask it to end soon and to keep what there is; only work that looks at `early` does so."""
        self._early.set()
        self.changes += 1

    def drop(self) -> None:
        """End it before it has begun."""
        self._work = None
        self._close("cancelled")

    def _close(self, state: State) -> None:
        over, self._over = self._over, None
        if over is not None:
            over()
        self._ended, self._preview, self._state = time.monotonic(), None, state
        self.changes += 1


class Jobs:
    """All jobs of a server, in the order in which they came.

    Args:
        at_once: jobs that run at a time.
        waiting: most jobs that wait.
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
            title: what it is, in a few words.
            work: what it does; what it returns is `Progress.result`, and is kept, so it should be small.
            over: called once at its end, also when it never began; not where it is refused. It asks nothing of jobs.

        Raises:
            UserError: too many jobs wait, or the server is closing.
        """
        task = Task(title, work, over)
        with self._lock:
            if self._closed:
                raise UserError("the app is being closed: it takes no more jobs")
            free = len(self._threads) - len(self._running)
            if len(self._queue) >= self.most_waiting + free:
                raise UserError(f"{len(self._queue)} jobs wait already, and no more may: try again in a while")
            self._queue.append(task)
            self._known[task.id] = task
            self._forget()
            self._lock.notify()
        return task

    def find(self, id: object) -> Task | None:
        """Return a job by its id, of whatever type the page sent; None where there is none or it is long over."""
        return self._known.get(id) if isinstance(id, str) else None

    def progress(self, task: Task) -> Progress:
        """Return how a job stands, its place in the queue included."""
        with self._lock:
            before = self._queue.index(task) + len(self._running) if task in self._queue else 0
            return task.progress(before)

    def cancel(self, id: object) -> bool:
        """Cancel a job: one that waits at once, one that runs at its next step. Nothing of it is kept.

        Returns:
            Whether there was such a job and it had not ended.
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
        """Ask a running job to end soon and to keep what there is.

        Returns:
            Whether there was such a job and it ran.
        """
        task = self.find(id)
        if task is None or task.progress().state != "running":
            return False
        task.finish_early()
        return True

    async def follow(self, task: Task) -> AsyncIterator[Progress]:
        """Yield how a job stands, whenever that has changed and once a second, until it has ended.

        Leaving the loop, also by a page that is closed, leaves the job as it is. No thread waits meanwhile.
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
        """Cancel everything and wait for it, at most `patience` seconds; return whether all of it has ended."""
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
