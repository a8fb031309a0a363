"""`postgen curate`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from postgen.commands.errors import when_stopped
from postgen.errors import UserError, cut, shown
from postgen.files import check_apart, check_place, named
from postgen.prompt_rows import read_prompts

if TYPE_CHECKING:
    from postgen.generate import StepCallback
    from postgen.sft.curation import Funnel, Places
    from postgen.sft.faults import Fault

Source = Annotated[
    str,
    typer.Argument(
        help="Images and videos with captions: a folder, a file of rows (JSONL, JSON, CSV, TSV), or a folder or id of"
        " `datasets`."
    ),
]
Output = Annotated[
    str,
    typer.Option(
        "-o",
        "--output",
        help="JSONL file of the clips that are kept. Beside it: NAME-report (counts, pictures), NAME-clips (shots, "
        "pictures without bars) and NAME.measures.jsonl, from which the same command continues.",
    ),
]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file with thresholds and other settings.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting that replaces that of --config: flow=[0.02,null]."),
]
Apart = Annotated[
    list[Path] | None,
    typer.Option("--apart-from", help="File of prompts that no caption may repeat, such as those of RL or of tests."),
]
Column = Annotated[str | None, typer.Option("--caption-column", help="Column of the captions in rows.")]
CaptionModel = Annotated[
    str | None,
    typer.Option(
        "--caption-model", help="Model whose text encoder compares captions. Default: hashed words, without a model."
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
Workers = Annotated[int, typer.Option("--workers", help="Number of files that are measured at once.")]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="A switch without a value: a file that cannot be used is an error, not a count."),
]
_MOST = 256


def curate(
    source: Source,
    output: Output,
    config: Config = None,
    set_: Set = None,
    apart_from: Apart = None,
    caption_column: Column = None,
    caption_model: CaptionModel = None,
    device: Device = "auto",
    workers: Workers = 2,
    strict: Strict = False,
) -> None:
    """Filter images and videos for fine-tuning, and report how many each filter removes.

    Thresholds may be changed without measuring again: run the same command with other settings.
    """
    target = _target(output, workers)

    from postgen.commands.score import reward_device
    from postgen.sft.curation import Places, ngram_embeddings, pipeline_embedder, read_config
    from postgen.sft.curation import curate as curated
    from postgen.sft.curation.run import ADVICE
    from postgen.sft.faults import check_faults
    from postgen.sft.items import read_items

    settings = read_config(config, _values(set_ or ()))
    places = Places(target)
    _check_outputs(places, source, [*(apart_from or ()), *([config] if config else ())])
    prompts = [row["prompt"] for path in apart_from or () for row in read_prompts(path)]
    place = reward_device(device)
    faults: list[Fault] = []
    items = read_items(source, caption_column=caption_column, where="the source", faults=faults)
    if strict or not items:
        check_faults(faults, len(items) + len(faults), "the source", ADVICE)
    embed = ngram_embeddings if caption_model is None else pipeline_embedder(caption_model, place)
    with ExitStack() as stack:
        stack.enter_context(when_stopped(lambda: _standing(places)))
        funnel = curated(
            items,
            target,
            settings,
            faults=faults,
            apart_from=prompts,
            caption_embed=embed,
            device=place,
            workers=workers,
            strict=strict,
            report=_Bars(stack),
        )
    _show(funnel)
    _tell(funnel, faults, places)


def _target(output: str, workers: int) -> Path:
    target = named(output)
    if target.suffix != ".jsonl":
        raise UserError(f"--output must end in .jsonl, got {target}")
    if not 1 <= workers <= _MOST:
        raise UserError(f"--workers must be at least 1 and at most {_MOST}, got {workers}")
    check_place(target, folder=False)
    return target


def _values(words: list[str] | tuple[()]) -> dict[str, Any]:
    """Parse `KEY=VALUE`, where the value is YAML."""
    import yaml

    values: dict[str, Any] = {}
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or not key.strip():
            raise UserError(f"--set must be KEY=VALUE, got {shown(word)}")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"--set {cut(word)}: the value is not valid YAML") from error
    return values


def _check_outputs(places: Places, source: str, inputs: list[Path]) -> None:
    """Check that the outputs do not overwrite or extend the inputs, or replace other files."""
    from postgen.sft.curation import check_own

    given = Path(source).expanduser()
    if given.exists():
        inputs.append(given)
        inside = places.output.resolve().parent
        if given.is_dir() and given.resolve() in (inside, *inside.parents):
            raise UserError(
                f"--output {places.output} is inside the source {given}, so its clips would become part of the source:"
                " give a place outside"
            )
    check_apart([places.output, places.store, places.clips, places.report], inputs)
    check_own(places)


class _Bars:
    """Progress bars, one after the other, one for each kind of work."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack, self._now, self._title = stack, ExitStack(), ""
        self._callback: StepCallback | None = None
        stack.callback(self._now.close)

    def __call__(self, title: str, done: int, total: int) -> None:
        from postgen.commands.progress import steps

        if title != self._title:
            self._now.close()
            self._title, self._callback = title, self._now.enter_context(steps(title, "files"))
        assert self._callback is not None
        self._callback(done, total)


def _standing(places: Places) -> str:
    kept = places.store.name if places.store.exists() else "nothing"
    return f"the measurements so far are in {kept}; to continue, run the same command again"


def _show(funnel: Funnel) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("step")
    for name in ("before", "removed", "left", "alone"):
        table.add_column(name, justify="right")
    table.add_column("allowed", overflow="fold")
    for step in funnel.steps:
        removed = str(step.removed) if step.removed >= 0 else f"+{-step.removed}"
        alone = "" if step.alone is None else str(step.alone)
        table.add_row(step.name, str(step.before), removed, str(step.after), alone, step.threshold)
    Console().print(table)


def _tell(funnel: Funnel, faults: list[Fault], places: Places) -> None:
    unread = [one for one in funnel.candidates if one.shot is None]
    for count, what, first in (
        (len(faults), "rows or files that cannot be used", faults[0].key + ": " + faults[0].reason if faults else ""),
        (len(unread), "files that cannot be read", unread[0].why if unread else ""),
    ):
        if count:
            typer.echo(f"postgen: {what}: {count}; the first: {first}", err=True)
    typer.echo(f"postgen: clips in {places.output}: {len(funnel.kept)}; the report is in {places.report}", err=True)
