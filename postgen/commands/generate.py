"""`postgen generate`."""

import hashlib
import re
import unicodedata
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from postgen.commands import options as o
from postgen.commands.errors import when_stopped
from postgen.commands.generate_long import LongWords, make_long
from postgen.errors import UserError, shown
from postgen.files import check_apart, named
from postgen.prompt_rows import read_prompts
from postgen.reading import check_name

Prompt = Annotated[str | None, typer.Argument(help="Description of the video.", show_default=False)]
Output = Annotated[
    str | None,
    typer.Option(
        *("-o", "--output"),
        metavar="PATH",
        help="Path of the video; existing files are overwritten. With several videos, the names get -000, -001, ..."
        " \\[default: named after the first prompt]",
        rich_help_panel=o.FILES,
    ),
]
Count = Annotated[
    int,
    typer.Option("--count", help="Number of videos per prompt, with seeds SEED, SEED+1, ...", rich_help_panel=o.LOOK),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompts",
        metavar="FILE|FRAME:PROMPT",
        help="File with one prompt per video: text with one prompt per line, or JSONL, JSON, CSV or TSV with `prompt`."
        " With --long or --stream instead: the prompt from a frame on, such as '48:a blue cube' (can be repeated), or"
        " a file of such lines.",
        rich_help_panel=o.FILES,
    ),
]
Long = Annotated[
    float | None,
    typer.Option(
        "--long",
        metavar="SECONDS",
        help="Length of a long video, which is written chunk by chunk. An existing video is overwritten. --frames,"
        " --count, --from, --offload, --lit and plug-ins cannot be used.",
        rich_help_panel=o.LONG,
    ),
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Generate a long video without end, until Ctrl-C; options as with --long.",
        rich_help_panel=o.LONG,
    ),
]
GoOn = Annotated[
    str | None,
    typer.Option(
        "--continue",
        metavar="STATE",
        help="Continue a long video from its state; with --output, write a new video and keep the old one.",
        rich_help_panel=o.LONG,
    ),
]
Depth = Annotated[
    bool,
    typer.Option(
        "--depth", help="Also write a depth video of a long video; needs an adapter.", rich_help_panel=o.LONG
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="Adapter for long videos. \\[default: the embedded adapter for the embedded model, otherwise none]",
        rich_help_panel=o.LONG,
    ),
]
From = Annotated[
    Path | None,
    typer.Option(
        "--from",
        help="Sidecar of a video to generate again; other options replace its settings.",
        rich_help_panel=o.FILES,
    ),
]

_MOST_VIDEOS = 10_000
"""Largest number of videos per prompt in one call, because all file names are checked before the first video."""


def generate(
    prompt: Prompt = None,
    output: Output = None,
    *,
    given: dict[str, Any],
    count: Count = 1,
    prompts: Prompts = None,
    sidecar: From = None,
    format: o.Format = None,
    long: Long = None,
    stream: Stream = False,
    go_on: GoOn = None,
    depth: Depth = False,
    adapter: Adapter = None,
) -> None:
    """Generate videos from prompts. Each video gets a contact sheet (PNG) and a sidecar (JSON) that reproduces it."""
    # The sidecar determines the format if --format is not given, and frames are a folder.
    folder = format == "frames" or (None if sidecar is not None and format is None else False)
    place = None if output is None else named(output, folder=folder)
    if go_on is not None:
        check_name(go_on, "the state")
    state = None if go_on is None else Path(go_on).expanduser()
    words = LongWords(long=long, stream=stream, go_on=state, depth=depth, adapter=adapter)
    if words.asked:
        for name, used in (("--count", count != 1), ("--from", sidecar is not None)):
            if used:
                raise UserError(f"{name} cannot be used with a long video: omit it")
        make_long(prompt, prompts or [], given, place, format, words, _file_name)
        return
    if len(prompts or []) > 1:
        raise UserError("--prompts can be repeated only for a long video: give one file of prompts, or add --long")
    file = Path(prompts[0]) if prompts else None
    if sidecar is not None:
        new = prompt is not None or file is not None or "enhance_prompt" in given
        given, place, format = _again(sidecar, given, place, format)
        if new:  # the enhanced prompt of the sidecar belongs to its prompt and enhancer
            given.pop("enhanced_prompt", None)
    texts = _texts(prompt, file, given.pop("prompt", None), given.get("enhance_prompt"))
    read = [each for each in (sidecar, file) if each is not None]
    _make(texts, given, count, place or Path(_file_name(texts[0])), format, read)


def _again(
    sidecar: Path, given: dict[str, Any], output: Path | None, format: str | None
) -> tuple[dict[str, Any], Path, str | None]:
    """Take the settings from a sidecar that the options do not set."""
    from postgen.request import read_sidecar, with_places

    old, old_format = read_sidecar(sidecar)
    old = with_places({name: value for name, value in old.items() if name not in given}, sidecar)
    output = output or sidecar.with_name(f"{sidecar.stem}-again")
    return old | given, output, format or (None if output.suffix else old_format)


def _texts(prompt: str | None, prompts: Path | None, old: str | None, enhancer: str | None) -> list[str]:
    if prompt is not None and prompts is not None:
        raise UserError("give either a prompt or --prompts FILE, not both")
    if prompts is not None:
        return [str(row["prompt"]) for row in read_prompts(prompts)]
    text = prompt if prompt is not None else old
    if text is None:
        taken = enhancer is not None and " " in enhancer  # a prompt, in the place of the optional name
        hint = f". {shown(enhancer)} is the name of --enhance-prompt: put the prompt before it" if taken else ""
        raise UserError(f'there is no prompt: postgen generate "a red ball rolls left" -o out.mp4{hint}')
    return [text]


def _make(
    texts: list[str], given: dict[str, Any], count: int, output: Path, format: str | None, read: list[Path]
) -> None:
    from postgen.enhancing import enhanced_jobs
    from postgen.generate import check_rate, load, output_paths, prepare, read_by
    from postgen.request import GenerateConfig

    if not 1 <= count <= _MOST_VIDEOS:
        raise UserError(f"--count must be at least 1 and at most {_MOST_VIDEOS:,}, got {count}")
    config = GenerateConfig.of({"seed": 0, **given, "prompt": texts[0]})
    wanted = [(text, config.seed + n) for text in texts for n in range(count)]
    if not output.suffix and format is None:
        format = "mp4"
    names = [output] if len(wanted) == 1 else [_numbered(output, n) for n in range(len(wanted))]
    # Find all errors before the model is loaded, which takes seconds or minutes.
    places = [output_paths(name, format) for name in names]
    check_apart((file for files, _ in places for file in files.files), [*read, *read_by(config)])
    first = prepare(config)
    check_rate(first, places[0][1])
    jobs = enhanced_jobs([first.again(prompt=text, seed=seed) for text, seed in wanted])
    told = {job.config.prompt: job.config.enhanced_prompt for job in jobs}
    for text in filter(None, told.values()):
        typer.echo(f"Enhanced prompt: {text}")

    from postgen.commands.progress import waiting
    from postgen.compat import quiet_libraries

    with waiting(f"Loading {first.facts.source}"), quiet_libraries():
        pipe = load(first)
    for text in texts:
        _tell_unknown(pipe, first, told[text] or text)
    made: list[Path] = []
    stack = ExitStack()
    if len(jobs) > 1:
        stack.enter_context(when_stopped(lambda: _standing(made, len(jobs))))
    with stack:
        _make_each(pipe, jobs, places, made)


def _make_each(pipe: Any, jobs: list[Any], places: list[Any], made: list[Path]) -> None:
    from postgen.commands.progress import steps
    from postgen.generate import make_video

    for number, (job, (files, kind)) in enumerate(zip(jobs, places, strict=True), 1):
        title = "Generating" if len(jobs) == 1 else f"Generating {number} of {len(jobs)}"
        with steps(title) as on_step:
            make_video(pipe, job, files, kind, on_step)
        made.append(files.video)
        typer.echo(f"Video {files.video}, contact sheet {files.sheet}, settings {files.sidecar}")


def _standing(made: list[Path], count: int) -> str:
    """Return the message after Ctrl-C for several videos."""
    if not made:
        return f"none of {count} videos was finished, and no half-written file was left"
    last = f" to {made[-1]}" if len(made) > 1 else ""
    return (
        f"{len(made)} of {count} videos were finished, {made[0]}{last}; the same command generates all of them again"
    )


def _tell_unknown(pipe: Any, job: Any, prompt: str) -> None:
    """Print the words of a prompt that a model with a closed vocabulary does not know. Other models know all words."""
    examples = job.facts.closed_vocabulary
    if not examples:
        return
    from postgen.training.tokenizers import unknown_words

    if words := unknown_words(pipe.tokenizer, prompt):
        name = "the embedded model" if job.config.model is None else job.facts.source
        known = ", ".join(f'"{text}"' for text in examples)
        typer.echo(f"{name} does not know: {', '.join(words)}. It knows prompts like {known}", err=True)


def _numbered(output: Path, number: int) -> Path:
    return output.with_name(f"{output.stem}-{number:03d}{output.suffix}")


def _file_name(prompt: str) -> str:
    """Return a file name made of the words of a prompt. A name that is shortened or has no words gets a hash.

    >>> _file_name("A red ball, rolls left!")
    'a-red-ball-rolls-left'
    """
    text = unicodedata.normalize("NFC", prompt.lower())
    # Keep letters, marks (the vowels of many scripts) and digits.
    words = re.sub("-+", "-", "".join(c if unicodedata.category(c)[0] in "LMN" else "-" for c in text)).strip("-")
    # File systems limit the number of bytes, and the name of the temporary file is longer.
    short = words[:60].encode()[:150].decode(errors="ignore").rstrip("-")
    if short == words and words:
        return words
    return f"{short or 'video'}-{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:8]}"
