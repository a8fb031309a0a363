"""Progress displays on the terminal. They use standard error, so that scripts can read standard output."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from postgen.generate import StepCallback

console = Console(stderr=True)


class _Left(TimeRemainingColumn):
    """Column with the remaining time; empty for a task without an end."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task).append(" left")


@contextmanager
def steps(title: str, unit: str = "steps") -> Iterator[StepCallback]:
    """Context manager that shows a progress bar, and yields the callback that updates it.

    Args:
        title: text before the bar.
        unit: what the bar counts.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit},"),
        TimeElapsedColumn(),
        TextColumn("gone"),
        _Left(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """Context manager that shows a title during work without steps."""
    with console.status(title):
        yield
