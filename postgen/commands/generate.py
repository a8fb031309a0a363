"""`postgen generate`."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from postgen.commands import options as o
from postgen.errors import UserError

Prompt = Annotated[str | None, typer.Argument(help="What the video shows.", show_default=False)]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="The video. \\[default: named after the prompt]", rich_help_panel=o.FILES),
]
Count = Annotated[
    int, typer.Option("--count", help="Videos per prompt, with seed, seed+1, ...", rich_help_panel=o.LOOK)
]
Prompts = Annotated[
    Path | None,
    typer.Option("--prompts", help="File of prompts: one a line, or JSONL with `prompt`.", rich_help_panel=o.FILES),
]
From = Annotated[
    Path | None,
    typer.Option("--from", help="Sidecar of a video to make again; other options change it.", rich_help_panel=o.FILES),
]


@o.takes_settings
def generate(
    prompt: Prompt = None,
    output: Output = None,
    *,
    given: dict[str, Any],
    count: Count = 1,
    prompts: Prompts = None,
    sidecar: From = None,
    format: o.Format = None,
) -> None:
    """Make videos from prompts; each with a contact sheet (PNG) and a sidecar (JSON) that makes it again."""
    if sidecar is not None:
        given, output, format = _again(sidecar, given, output, format)
    texts = _texts(prompt, prompts, given.pop("prompt", None))
    _make(texts, given, count, output or Path(_file_name(texts[0])), format)


def _again(
    sidecar: Path, given: dict[str, Any], output: Path | None, format: str | None
) -> tuple[dict[str, Any], Path, str | None]:
    """Fill in what a sidecar says where the options say nothing."""
    from postgen.generate import read_sidecar

    old, old_format = read_sidecar(sidecar)
    output = output or sidecar.with_name(f"{sidecar.stem}-again")
    return old | given, output, format or (None if output.suffix else old_format)


def _texts(prompt: str | None, prompts: Path | None, old: str | None) -> list[str]:
    if prompt is not None and prompts is not None:
        raise UserError("give one prompt or --prompts FILE, not both")
    if prompts is not None:
        return read_prompts(prompts)
    text = prompt if prompt is not None else old
    if text is None:
        raise UserError('there is no prompt: postgen generate "a red ball rolls left" -o out.mp4')
    return [text]


def read_prompts(path: Path) -> list[str]:
    """Read a file of prompts: JSONL objects with `prompt`, or one prompt a line; blank lines do not count.

    Raises:
        UserError: no such file, a line without prompt, or no prompt at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts {path}: {error}") from error
    texts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            texts.append(_json_prompt(line, path, number) if path.suffix == ".jsonl" else line.strip())
    if not texts:
        raise UserError(f"there is no prompt in {path}")
    return texts


def _json_prompt(line: str, path: Path, number: int) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number} is not JSON: {error}") from error
    text = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{path}, line {number} has no prompt: expected an object with a text under 'prompt'")
    return text


def _make(texts: list[str], given: dict[str, Any], count: int, output: Path, format: str | None) -> None:
    from postgen.generate import GenerateConfig, generate_video, load, output_paths, prepare

    if count < 1:
        raise UserError(f"--count must be at least 1, got {count}")
    first = given.pop("seed", 0)
    configs = [GenerateConfig(prompt=text, seed=first + n, **given) for text in texts for n in range(count)]
    if not output.suffix and format is None:
        format = "mp4"
    names = [output] if len(configs) == 1 else [_numbered(output, n) for n in range(len(configs))]
    # Every mistake is found here, before seconds or minutes go into loading.
    for name in names:
        output_paths(name, format)
    jobs = [prepare(config) for config in configs]

    from postgen.commands.progress import steps, waiting
    from postgen.compat import quiet_libraries

    with waiting(f"Loading {jobs[0].facts.source}"), quiet_libraries():
        pipe = load(jobs[0])
    for text in texts:
        _tell_unknown(pipe, jobs[0], text)
    for number, (config, name) in enumerate(zip(configs, names, strict=True), 1):
        title = "Generating" if len(configs) == 1 else f"Generating {number} of {len(configs)}"
        with steps(title) as on_step:
            files = generate_video(config, name, format=format, pipe=pipe, on_step=on_step)
        typer.echo(f"Video {files.video}, contact sheet {files.sheet}, settings {files.sidecar}")


def _tell_unknown(pipe: Any, job: Any, prompt: str) -> None:
    """Say in one line which words a model with a closed vocabulary does not know; nothing for other models."""
    examples = job.facts.closed_vocabulary
    if not examples:
        return
    from postgen.training.tokenizers import unknown_words

    if words := unknown_words(pipe.tokenizer, prompt):
        name = "the embedded model" if job.config.model is None else job.facts.source
        known = ", ".join(f'"{text}"' for text in examples)
        typer.echo(f"unknown to {name}: {', '.join(words)}. It knows prompts like {known}", err=True)


def _numbered(output: Path, number: int) -> Path:
    return output.with_name(f"{output.stem}-{number:03d}{output.suffix}")


def _file_name(prompt: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:60].rstrip("-") or "video"
