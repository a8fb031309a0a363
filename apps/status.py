"""HTML for the state of a job: one line and a progress bar, the same in every tab."""

from __future__ import annotations

from html import escape

from postgen.apps.jobs import Progress


def status(progress: Progress | None, idle: str = "") -> str:
    """Return HTML with the state of a job: its place in the queue, or its steps and remaining time, or its end.

    Args:
        progress: state of the job; None if there is no job.
        idle: text that is shown if there is no job.
    """
    if progress is None:
        return line("idle", idle, "")
    if progress.state == "waiting":
        jobs = "1 job" if progress.position == 1 else f"{progress.position} jobs"
        return line("waiting", f"Waiting: {jobs} before this one", "", 0.0)
    if progress.state == "running":
        return _running(progress)
    took = f"{duration(progress.seconds)} in total" if progress.seconds else ""
    said = {"done": "Done", "failed": f"Failed: {progress.error}", "cancelled": "Cancelled: nothing was kept"}
    return line(progress.state, said[progress.state], took, note=progress.note)


def duration(seconds: float) -> str:
    """Return a duration in seconds as a short text with units.

    >>> duration(7.4), duration(75), duration(4000)
    ('7 s', '1 min 15 s', '1 h 6 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _running(progress: Progress) -> str:
    what = "Stopping" if progress.stopping else progress.text or "Running"
    if not progress.total:
        return line("running", what, duration(progress.seconds), 0.0, progress.note)
    left = progress.seconds_left
    steps = f"{progress.unit} {progress.done} of {progress.total}"
    said = steps if left is None or progress.stopping else f"{steps}, {duration(left)} left"
    return line("running", what, said, progress.done / progress.total, progress.note)


def line(state: str, what: str, more: str, share: float | None = None, note: str = "") -> str:
    """Return HTML of a status line, optionally with a progress bar and a note.

    Args:
        state: idle, waiting, running, done, failed or cancelled; selects the style.
        what: text on the left.
        more: text on the right.
        share: finished share in [0, 1] for the progress bar; None omits the bar.
        note: text below the line.
    """
    bar = "" if share is None else f'<div class="bar"><div style="width:{share * 100:.1f}%"></div></div>'
    text = f'<div class="line"><span>{escape(what)}</span><span>{escape(more)}</span></div>'
    told = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<div class="job {state}" role="status" aria-live="polite">{text}{bar}{told}</div>'
