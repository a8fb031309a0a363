"""`postgen generate --long`, `--stream` and `--continue`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from postgen.commands.errors import when_stopped
from postgen.commands.options import option_of
from postgen.errors import UserError, check_number

_CHANGES = ("guidance_scale", "negative_prompt", "seed")
"""Settings that may change when a video is continued."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LongWords:
    """Options of `postgen generate` that concern long videos."""

    long: float | None = None
    stream: bool = False
    go_on: Path | None = None
    depth: bool = False
    adapter: str | None = None

    @property
    def asked(self) -> bool:
        """Whether the options request a long video.

        Raises:
            UserError: an option that needs a long video is used without one, or the length is wrong.
        """
        asked = self.long is not None or self.stream or self.go_on is not None
        if self.long is not None:
            check_number("--long", self.long, 0.01, 10**6)
        for name in ("depth", "adapter"):
            if not asked and getattr(self, name):
                raise UserError(f"--{name} needs --long, --stream or --continue: add one of them")
        if self.long is not None and self.stream:
            raise UserError("--long sets a length, and --stream has no end: give one of them")
        return asked


def make_long(
    prompt: str | None,
    entries: list[str],
    given: Mapping[str, Any],
    output: Path | None,
    format: str | None,
    words: LongWords,
    name: Any,
) -> None:
    """Begin a long video, or continue one.

    Args:
        prompt: the prompt from frame 0 on.
        entries: values of `--prompts`.
        given: settings that the user gave.
        output: path of the video; None: named after the prompt, or the existing video that is continued.
        format: mp4 or frames.
        words: options of long videos.
        name: function that returns a file name for a prompt.

    Raises:
        UserError: an option is wrong.
    """
    if words.go_on is not None:
        _go_on(prompt, entries, given, output, format, words)
        return
    from postgen.generate_long import (
        NOTHING,
        LongRequest,
        LongVideo,
        load_long,
        places_of,
        prepare_long,
        read_schedule,
    )
    from postgen.request import GenerateConfig

    schedule = read_schedule(entries, prompt) if entries or prompt is not None else ()
    if not schedule:
        raise UserError('there is no prompt: postgen generate "a red ball rolls left" --long 20 -o out.mp4')
    config = GenerateConfig.of({"seed": 0, **given, "prompt": schedule[0][1]})
    request = LongRequest(
        config=config, schedule=schedule, seconds=words.long, adapter=words.adapter, depth=words.depth
    )
    places = places_of(output or Path(name(config.prompt)), format, request)
    job = prepare_long(request)
    with when_stopped(lambda: NOTHING):
        pipe = _loaded(load_long, request, job)
    _make(LongVideo(pipe, request, job, places), {})


def _go_on(
    prompt: str | None,
    entries: list[str],
    given: Mapping[str, Any],
    output: Path | None,
    format: str | None,
    words: LongWords,
) -> None:
    assert words.go_on is not None
    from postgen.generate_long import LongVideo, check_long_settings, load_long, places_of, prepare_long, read_request
    from postgen.generate_long import read_schedule as read

    check_long_settings(given)
    own = {"--depth": words.depth, "--adapter": words.adapter}
    if stored := [_typed(name) for name in given if name not in _CHANGES] + [name for name in own if own[name]]:
        raise UserError(f"{stored[0]} is stored in the state of the video and cannot change: omit it")
    request, places = read_request(words.go_on)
    source = None
    changes: dict[str, Any] = {name: given[name] for name in ("guidance_scale", "negative_prompt") if name in given}
    if entries or prompt is not None:
        request = dataclasses.replace(request, schedule=read(entries, prompt))
        changes["prompt"] = None
    config = dataclasses.replace(request.config, **given, prompt=request.schedule[0][1])
    seconds = None if words.stream else request.seconds if words.long is None else words.long
    request = dataclasses.replace(request, config=config, seconds=seconds)
    if changes:  # pass all prompts: a new prompt keeps the negative prompt, a new guidance scale may need one
        changes |= {"prompt": list(request.schedule), "negative_prompt": config.negative_prompt}
    if "seed" in given:
        import torch

        changes["generator"] = torch.Generator().manual_seed(config.seed)
    if output is not None or format is not None:
        new = places_of(output or places.video, format, request)
        if new.kind != places.kind:
            raise UserError(f"the format of the video is {places.kind} and cannot change: give a name of this format")
        if new.video.absolute() != places.video.absolute():
            places, source = new, places
    job = prepare_long(request, begins=False)
    pipe = _loaded(load_long, request, job)
    state = pipe.load_state(words.go_on)
    _make(LongVideo(pipe, request, job, places, state, source), changes)


def _typed(name: str) -> str:
    """Return the option of a setting; --size, --width and --height set the same two settings."""
    return "the size (--size, --width, --height)" if name in ("width", "height") else option_of(name)


def _loaded(load: Any, request: Any, job: Any) -> Any:
    from postgen.commands.progress import waiting
    from postgen.compat import quiet_libraries

    with waiting(f"Loading {job.facts.source}"), quiet_libraries():
        pipe = load(request, job)
    if request.adapter_folder is None:
        who = "the embedded model" if request.config.model is None else job.facts.source
        typer.echo(f"no adapter for {who}: the model was not trained for long videos, and makes RGB only", err=True)
    return pipe


def _make(video: Any, changes: dict[str, Any]) -> None:
    from postgen.commands.progress import steps

    video.check()
    with when_stopped(video.standing), steps("Generating", "frames") as on_step:
        video.make(on_step, **changes)
    video.write_sheet()
    places = video.places
    depth = f", depth {places.depth}" if video.request.depth else ""
    length = f"({video.files.frames} frames, {video.seconds:.1f} s)"
    typer.echo(f"Video {places.video} {length}{depth}, contact sheet {places.sheet}, state {places.state}")
