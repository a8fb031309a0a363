"""`postgen score`."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from postgen.commands.errors import when_stopped
from postgen.errors import UserError, check_text
from postgen.files import check_apart, check_place, files_of, named
from postgen.prompt_rows import read_prompts

if TYPE_CHECKING:
    from rich.table import Table as Shown

    from postgen.rewards import RewardRunner
    from postgen.rewards.scoring import Clip
    from postgen.rewards.table import Table

Paths = Annotated[list[Path], typer.Argument(help="Videos, images, or folders of them.")]
Reward = Annotated[
    str,
    typer.Option(
        "--reward",
        help="Rewards, separated by commas: a name such as clip_score(frames=8), pkg.mod.fn, file.py:fn or http://...",
    ),
]
Prompt = Annotated[str | None, typer.Option("--prompt", help="Prompt of all videos.")]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="File with one prompt per video, in the order of the file names: text, or JSONL, JSON, CSV or TSV with"
        " `prompt` and optionally `file`.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option("--weights", help="Weights for the sum of the rewards, one per reward, separated by commas."),
]
Output = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        help="Table to write, .jsonl or .csv, row by row. The same command continues an incomplete table; a table of"
        " other videos or rewards is replaced, and any other file is refused.",
    ),
]
Frames = Annotated[
    bool,
    typer.Option(
        "--frames", help="A switch without a value: score a folder of images as one clip, instead of as single images."
    ),
]
WholeMb = Annotated[
    float,
    typer.Option(
        "--whole-mb",
        help="Memory limit in MiB (12 bytes per pixel) for rewards that need all frames of a video at once.",
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
Timeout = Annotated[
    float | None, typer.Option("--timeout", help="Longest time in seconds of one call of a reward. Default: no limit.")
]

_TEXT, _NUMBER = 8, 7
"""Smallest widths of columns with text and with numbers."""
_MOST_MB = 2**20
"""One TiB, more memory than any machine has for one clip."""


def score(
    paths: Paths,
    reward: Reward = "world",
    prompt: Prompt = None,
    prompts: Prompts = None,
    weights: Weights = None,
    output: Output = None,
    device: Device = "auto",
    timeout: Timeout = None,
    frames: Frames = False,
    whole_mb: WholeMb = 4096.0,
) -> None:
    """Score videos and images with rewards. Two folders are also compared prompt by prompt.

    Without --prompt or --prompts, the prompt of a video comes from the sidecar that `postgen generate` writes.
    """
    if prompt is not None:
        _check_prompt(prompt, prompts)
    table = None if output is None else named(output)
    if table is not None and table.suffix not in (".jsonl", ".csv"):
        raise UserError(f"--output must end in .jsonl or .csv, got {table}")
    if not 0 < whole_mb <= _MOST_MB:
        raise UserError(f"--whole-mb must be above 0 and at most {_MOST_MB:,}, got {whole_mb}")
    if table is not None:
        check_place(table, folder=False)
        check_apart([table], [*paths, *([prompts] if prompts else [])])
    rows = None if prompts is None else read_prompts(prompts)

    from postgen.compat import quiet_libraries
    from postgen.rewards import RewardRunner, split_rewards
    from postgen.rewards.scoring import check_needs, find_clips, set_prompts
    from postgen.rewards.table import check_table, setting_of

    clips = find_clips(paths, frames=frames)
    if frames and not any(clip.path.is_dir() for clip in clips):
        raise UserError("--frames scores a folder of images as one clip, but no such folder was given: leave it out")
    if table is not None and table.is_symlink():  # only a link can lead to an input, whose suffix is different
        read = [file for clip in clips for file in (*files_of(clip.path), clip.path.with_suffix(".json"))]
        check_apart([table], read)
    if table is not None:
        check_table(table)
    _tell_pictures(clips)
    set_prompts(clips, prompt, rows)
    texts, place = split_rewards(reward), reward_device(device)
    runner = RewardRunner(texts, None if weights is None else _numbers(weights), device=place, timeout=timeout)
    check_needs(clips, runner)
    # Rewards without a network do not import these libraries, which takes time and memory.
    with quiet_libraries() if any(hasattr(one.function, "load") for one in runner.rewards) else nullcontext():
        runner.load()
    _score_all(clips, runner, table, setting_of(runner.rewards, texts, place), weights is not None, whole_mb)
    _show(clips, paths, runner.names)
    if _tell_failures(clips, runner.names):
        raise typer.Exit(1)


def _check_prompt(prompt: str, prompts: Path | None) -> None:
    if prompts is not None:
        raise UserError("give either --prompt or --prompts, not both")
    check_text("--prompt", prompt)
    if not prompt.strip():
        raise UserError("--prompt is empty: say what the videos show, or leave it out")


def _score_all(
    clips: Sequence[Clip], runner: RewardRunner, output: Path | None, setting: str, weighted: bool, whole_mb: float
) -> None:
    from postgen.commands.progress import steps
    from postgen.rewards.scoring import score_clips
    from postgen.rewards.table import Table, set_keys

    with ExitStack() as stack:
        table = None
        if output is not None:
            set_keys(clips, setting)
            table = Table(output, clips, runner.names, ["sum"] if weighted else [])
            if known := table.resume():
                typer.echo(f"postgen: {known} of {len(clips)} rows are already in {output} and are kept", err=True)
            _add_sum(clips, runner.weights, weighted)
            stack.enter_context(table)
        stack.enter_context(when_stopped(lambda: _standing(clips, table)))
        report = stack.enter_context(steps("Scoring", "videos"))

        def after(clip: Clip) -> None:
            _add_sum([clip], runner.weights, weighted)
            if table is not None:
                table.add(clip)
            report(next(done), len(clips))

        # `_tell_failures` reports the failures that the runner logs.
        log = logging.getLogger("postgen.rewards.runner")
        stack.callback(setattr, log, "disabled", log.disabled)
        log.disabled = True
        done = itertools.count(1 + sum(clip.done for clip in clips))
        score_clips(clips, runner, after, most=int(whole_mb * 2**20))


def _standing(clips: Sequence[Clip], table: Table | None) -> str:
    """Return the message after Ctrl-C."""
    if table is not None:
        return f"{table.count} of {len(clips)} rows are in {table.path}; to continue, run the same command again"
    return f"the scores of {sum(clip.done for clip in clips)} of {len(clips)} are lost; -o t.jsonl keeps them"


def _tell_pictures(clips: Sequence[Clip]) -> None:
    """Print a note for folders of images: each image is scored on its own, which the user may not expect."""
    from postgen.video import PICTURES

    found = Counter(c.path.parent for c in clips if not c.named and c.path.suffix.lower() in PICTURES)
    for folder, count in found.items():
        if count > 1:
            typer.echo(
                f"postgen: {folder}: {count} images are scored one by one (as one clip with --frames)", err=True
            )


def _tell_failures(clips: Sequence[Clip], rewards: Sequence[str]) -> bool:
    """Print which videos have no score and why; return whether the exit code of the command must be 1."""
    useless = _tell_gaps(clips, rewards)
    unread = [clip for clip in clips if clip.error]
    for clip in unread:
        named = str(clip.path) in (clip.error or "")
        typer.echo(f"postgen: {'' if named else f'cannot read {clip.path}: '}{clip.error}", err=True)
    failed = [clip for clip in clips if clip.failures]
    for reward in rewards:
        if own := [clip for clip in failed if reward in clip.failures]:
            where = _where(own, len(clips))
            typer.echo(f"postgen: {reward} failed for {where}: {own[-1].failures[reward]}", err=True)
    if unread or failed:
        bad = len(unread) + len(failed)
        typer.echo(f"postgen: {len(clips) - bad} of {len(clips)} scored, {bad} failed", err=True)
    return bool(unread or failed or useless)


def _where(clips: Sequence[Clip], count: int) -> str:
    """Return how many of `count` videos a message is about, and the names of the first three."""
    names = [clip.path.name for clip in clips[:3]] + ["..."] * (len(clips) > 3)
    return f"{len(clips)} of {count} video{'s' if count != 1 else ''} ({', '.join(names)})"


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--weights must be numbers separated by commas, got {text!r}") from None


def reward_device(asked: str) -> str:
    """Return the device of the rewards; auto is a CUDA GPU if there is one, otherwise the CPU.

    Raises:
        UserError: the device is unknown or does not exist.
    """
    from postgen.families.loading import check_device

    if asked != "auto":
        check_device(asked)
        return asked
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _add_sum(clips: Sequence[Clip], weights: Sequence[float], asked: bool) -> None:
    """Add the weighted sum to the scores of each clip. It is None if a reward returned no score."""
    for clip in clips if asked else ():
        values = list(clip.scores.values())
        known = [w * v for w, v in zip(weights, values, strict=True) if v is not None] if values else []
        if values:
            clip.scores["sum"] = sum(known) if len(known) == len(values) else None


def _tell_gaps(clips: Sequence[Clip], rewards: Sequence[str]) -> bool:
    """Print which rewards returned no score for some videos; return whether a reward scored no video at all."""
    useless = False
    read = [clip for clip in clips if not clip.error]
    for name in rewards:
        gaps = [c for c in read if c.scores.get(name) is None and name not in c.failures]
        if gaps:
            why = Counter(clip.reasons[name] for clip in gaps if name in clip.reasons)
            told = "; ".join(f"{reason} ({count})" if len(why) > 1 else reason for reason, count in why.most_common(3))
            where = _where(gaps, len(read))
            typer.echo(f"postgen: {name} has no score for {where}{': ' if told else ''}{told}", err=True)
            useless |= len(gaps) == len(read)
    return useless


def _show(clips: Sequence[Clip], paths: Sequence[Path], rewards: Sequence[str]) -> None:
    from rich.console import Console
    from rich.markup import escape

    names = list(dict.fromkeys(name for clip in clips for name in clip.scores)) or list(rewards)
    for part in _fitting(names):
        table = _table("video", "prompt", names=part)
        for clip in clips:
            table.add_row(
                escape(clip.path.name), escape(clip.prompt or ""), *(_cell(clip.scores.get(name)) for name in part)
            )
        table.add_section()
        for origin, path in enumerate(paths):
            own = [clip for clip in clips if clip.origin == origin]
            if len(own) > 1:
                table.add_row(
                    escape(f"mean of {path}"), "", *(_cell(_mean([c.scores.get(n) for c in own])) for n in part)
                )
        Console().print(table)
    if len(paths) == 2 and all(path.is_dir() for path in paths):
        _show_wins(clips, paths, names)


def _show_wins(clips: Sequence[Clip], paths: Sequence[Path], names: Sequence[str]) -> None:
    from rich.console import Console
    from rich.markup import escape

    from postgen.rewards.scoring import win_rates

    rates = win_rates(clips, names)
    if not rates:
        typer.echo("postgen: the two folders have no prompt in common, so they are not compared", err=True)
        return
    for part in _fitting(names):
        table = _table("prompt", names=part)
        table.title = escape(f"how often {paths[0]} is better than {paths[1]}")
        for prompt, row in rates.items():
            table.add_row(escape(prompt), *(_cell(row.get(name)) for name in part))
        table.add_section()
        table.add_row("all prompts", *(_cell(_mean([row.get(name) for row in rates.values()])) for name in part))
        Console().print(table)


def _fitting(names: Sequence[str]) -> list[list[str]]:
    """Divide the rewards among tables that fit into the width of the terminal."""
    from rich.console import Console

    most, tables, left = Console().width - 2 * (_TEXT + 3) - 1, list[list[str]](), 0
    for name in names:
        width = max(len(name), _NUMBER) + 3
        if not tables or width > left:
            tables.append([])
            left = most
        tables[-1].append(name)
        left -= width
    return tables


def _table(*texts: str, names: Sequence[str]) -> Shown:
    """Return an empty table. Text columns are wrapped; names of rewards and numbers are not."""
    from rich.table import Table

    table = Table()
    for text in texts:
        table.add_column(text, overflow="fold", min_width=_TEXT)
    for name in names:
        table.add_column(name, no_wrap=True, justify="right", min_width=max(len(name), _NUMBER))
    return table


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
