"""Progress on the terminal (standard error, so that standard output stays clean for scripts)."""

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
    """The time left; nothing for what has no end."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task).append(" left")


@contextmanager
def steps(title: str, unit: str = "steps") -> Iterator[StepCallback]:
    """Show a bar of denoising steps (or of `unit`) with the time left; the block gets what to call after each."""
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
    """Show that something without steps is going on."""
    with console.status(title):
        yield
