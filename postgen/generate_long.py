"""Generate long videos and write them chunk by chunk: the implementation of `postgen generate --long` and `--stream`.

The rollout state is saved beside the video after every chunk, so a process that is killed loses only the chunk in
flight. The state contains the request too, so another process can continue the video.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from postgen.assets import embedded_adapter, embedded_model
from postgen.errors import SettingError, UserError, shown
from postgen.families.loading import inspect_model
from postgen.files import check_apart, check_place, files_of
from postgen.generate import Job, load, output_paths, prepare, read_by, refusals
from postgen.long_files import REQUEST, LongFiles, Places
from postgen.pipelines.worldweaver import BASES, WorldWeaverPipeline
from postgen.plug_ins import known_plug_ins
from postgen.reading import read_text
from postgen.request import GenerateConfig, portable
from postgen.video import GROWING, Footage, contact_sheet, read_picture
from postgen.worldweaver.adapter import CONFIG
from postgen.worldweaver.plan import DEFAULTS, frames_of_latent
from postgen.worldweaver.state import RolloutState
from postgen.worldweaver.widen import two_experts

EMBEDDED_STEPS = 15
"""Denoising steps of the embedded model in a long video. With 15, two CPU cores make 20 s of video in 90 s."""
_GROUPS: int = math.ceil(DEFAULTS["num_inference_steps"] / DEFAULTS["ar_step"])
"""Default number of groups in flight, without an adapter."""
NOTHING = "the first chunk was not finished, and nothing was written"
"""Message after Ctrl-C before the first chunk of a long video."""
_ENTRY = re.compile(r"\s*([0-9]{1,9})\s*:\s*(.*\S)\s*")
Report = Callable[[int, int | None], None]
"""Callback after each chunk: number of frames so far, and number of frames of the whole video (None: no end)."""
Call = Callable[[], None]
"""Callback after each forward pass. An exception that it raises stops the video after the last complete chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LongRequest:
    """The request for a long video."""

    config: GenerateConfig
    """Settings of generation. `num_frames` is not used; `image` is the first frame."""
    schedule: tuple[tuple[int, str], ...]
    """Prompt schedule of (frame, text), beginning at frame 0."""
    seconds: float | None
    """Minimum length in seconds, above 0; None: no end."""
    adapter: str | None
    """Folder of an adapter; None: the embedded adapter for the embedded model, and no adapter for other models."""
    depth: bool
    """Whether to write a depth video beside the video."""

    @property
    def adapter_folder(self) -> Path | None:
        """Folder of the adapter to use; None: no adapter."""
        if self.adapter is not None:
            return Path(self.adapter).expanduser()
        return embedded_adapter() if self.config.model is None else None


def read_schedule(entries: Sequence[str], prompt: str | None) -> tuple[tuple[int, str], ...]:
    """Parse a prompt schedule.

    Args:
        entries: texts "FRAME:PROMPT", or a single path of a file with one entry per line. Empty lines and lines that
            begin with # are ignored.
        prompt: the prompt from frame 0 on, if the entries do not have it.

    Raises:
        UserError: an entry or a file that cannot be parsed, frames that do not rise, or no prompt for frame 0.
    """
    lines = list(entries)
    if len(lines) == 1 and not _ENTRY.fullmatch(lines[0]):
        text = read_text(lines[0], f"cannot read the prompt schedule {lines[0]}")
        lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        if not lines:
            raise UserError(
                f"the prompt schedule {entries[0]} is empty: write a line such as 0: a red ball rolls left"
            )
    found = [] if prompt is None else [(0, prompt)]
    for line in lines:
        match = _ENTRY.fullmatch(line)
        if match is None:
            raise UserError(f"an entry of the prompt schedule must be FRAME:PROMPT, got {shown(line)}")
        found.append((int(match[1]), match[2]))
    if not found or found[0][0] != 0:
        raise UserError("there is no prompt for frame 0: give a prompt, or begin the schedule with 0:")
    for (before, _), (after, _) in pairwise(found):
        if after <= before:
            raise UserError(f"the prompt schedule goes from frame {before} to {after}: give frames in rising order")
    return tuple(found)


def check_long_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings that long videos do not have.

    Args:
        settings: values by name of the setting, and texts of plug-ins by option.

    Raises:
        SettingError: such a setting has another value than its default.
    """
    defaults = {"offload": "none", "lit": None, "num_frames": None, "enhance_prompt": None}
    defaults |= {row.option: None for row in known_plug_ins()}
    for name, default in defaults.items():
        if settings.get(name, default) != default:
            length = ", --long sets the length" if name == "num_frames" else ""
            raise SettingError(name, f" cannot be used with a long video{length}: omit it")


def prepare_long(request: LongRequest, *, begins: bool = True) -> Job:
    """Check everything that can be checked before the weights are loaded.

    Args:
        request: the request.
        begins: whether the video begins, so that the image of its first frame must be readable.

    Raises:
        UserError: a setting or a model that does not fit.
    """
    config = request.config
    facts = inspect_model(config.model if config.model is not None else embedded_model())
    if facts.pipeline not in BASES:
        raise UserError(f"{facts.pipeline} does not support long videos: use a model of {', '.join(BASES)}")
    if facts.experts:
        raise UserError(two_experts(facts.pipeline))
    check_long_settings(portable(config))
    if begins and config.image is not None:
        read_picture(config.image)
    folder = request.adapter_folder
    if folder is not None and not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a WorldWeaver adapter: the file {CONFIG} is missing")
    if folder is None and request.depth:
        raise UserError("--depth needs an adapter: give one with --adapter, or omit --depth")
    return prepare(dataclasses.replace(config, image=None))


def places_of(output: Path, format: str | None, request: LongRequest) -> Places:
    """Return the output files of a long video, and check that they can be written.

    Raises:
        UserError: a format that cannot be extended, or a file that cannot be written.
    """
    if not output.suffix and format is None:
        format = "mp4"
    written, kind = output_paths(output, format)
    if kind not in GROWING:
        raise UserError(f"a long video is written chunk by chunk: give the format {' or '.join(GROWING)}, not {kind}")
    base = written.sheet.with_suffix("")
    depth = base.with_name(f"{base.name}-depth{written.video.suffix}")
    places = Places(
        video=written.video, depth=depth, sheet=written.sheet, state=base.with_name(f"{base.name}.state"), kind=kind
    )
    check_place(places.state, folder=True)
    files = [places.video, places.sheet, places.state, *([places.depth] if request.depth else [])]
    adapter = [] if request.adapter is None else files_of(Path(request.adapter).expanduser())
    check_apart(files, [*read_by(request.config), *adapter])
    return places


def load_long(request: LongRequest, job: Job) -> Any:
    """Load the WorldWeaver pipeline of a long video, with the adapter of the request and its LoRA merged.

    Args:
        request: the request.
        job: what `prepare_long` returned.

    Raises:
        UserError: the pipeline cannot be loaded, or the adapter does not fit the model.
    """
    pipe = load(job)
    made: Any = WorldWeaverPipeline.from_pipe(pipe, request.adapter_folder, aux=())
    if request.adapter_folder is not None and getattr(pipe.transformer, "peft_config", None):
        # Merge the LoRA: unmerged it takes half of the time of the embedded model's layers.
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    made.set_progress_bar_config(disable=True)
    return made


class LongVideo:
    """A long video during generation: its pipeline, its files and its state.

    Args:
        pipe: from `load_long`.
        request: the request.
        job: from `prepare_long`.
        places: from `places_of`.
        state: state of an earlier process from which to continue; None: begin a new video.
        source: files of the earlier process, if they must not be changed; None: they are at `places`.
    """

    def __init__(
        self,
        pipe: Any,
        request: LongRequest,
        job: Job,
        places: Places,
        state: RolloutState | None = None,
        source: Places | None = None,
    ) -> None:
        self.pipe, self.request, self.job, self.places, self.state = pipe, request, job, places, state
        self.rate = job.config.fps or 8.0
        self.files = LongFiles(places, self.rate, depth=request.depth, state=state, source=source)

    @property
    def seconds(self) -> float:
        """Length in seconds of the video written so far."""
        return self.files.frames / self.rate

    def check(self) -> None:
        """Refuse a video that is complete, and a length that is too short, before `make`.

        Raises:
            UserError: there is nothing to generate, and the contact sheet exists.
        """
        frames = self._frames()
        if frames is not None and frames <= self.files.frames and (self.places.sheet.exists() or not self.files.saved):
            raise self._complete()

    def _complete(self) -> UserError:
        return UserError(f"this video is complete with {self.seconds:.1f} s: give a larger --long")

    def make(self, report: Report, *, on_call: Call | None = None, **changes: Any) -> None:
        """Generate the video to its end, if it has one. The state is saved after every chunk.

        If the video is complete and only its contact sheet is missing, nothing is generated.

        Args:
            report: see `Report`.
            on_call: see `Call`.
            changes: changed settings for a continued video: prompt, negative_prompt, guidance_scale, generator.

        Raises:
            UserError: an error of the pipeline or the disk, a video that is already complete, or a video that another
                process is writing.
        """
        with self.files.alone():
            self._make(report, on_call, **changes)

    def _make(self, report: Report, on_call: Call | None, **changes: Any) -> None:
        words: dict[str, Any] = {"output_type": "pt", "return_depth": self.request.depth}
        if on_call is not None:
            words["callback_on_step_end"] = lambda pipe, call, timesteps, tensors: on_call()
        if self.state is None:
            words |= self._first_call()
        else:
            words |= {"state": self.state, **changes}
        frames = self._frames()
        if self.state is not None and frames is None:
            self.state.extend(None)
        chunks, before = self.pipe.stream(num_frames=frames, **words), self.files.frames
        while True:
            with refusals("WorldWeaverPipeline"):
                chunk = next(chunks, None)
            if chunk is None:
                break
            self.files.take(chunk, self._note())
            report(self.files.frames, frames)
        if self.files.frames == before and (self.places.sheet.exists() or not self.files.saved):
            raise self._complete()

    def write_sheet(self) -> None:
        """Write the contact sheet of the video so far."""
        title = f"{self.request.schedule[0][1]} (seed {self.request.config.seed})"
        contact_sheet(Footage(self.places.video), self.places.sheet, title=title)

    def standing(self) -> str:
        """Return a message for the user of a stopped process: what was written, and how to continue."""
        if not self.files.saved:
            return NOTHING
        there = f"{self.files.frames} frames ({self.seconds:.1f} s) are in {self.places.video}"
        made = there if self.files.frames else "no frame is finished yet"
        return f"{made}; to continue: postgen generate --continue {self.places.state}"

    def _first_call(self) -> dict[str, Any]:
        config, job, adapter = self.request.config, self.job, self.pipe.config["defaults"] or {}
        words: dict[str, Any] = {name: getattr(job.config, name) for name in ("height", "width", "negative_prompt")}
        for name in ("num_inference_steps", "guidance_scale"):
            said = getattr(config, name)
            words[name] = said if said is not None or name in adapter else getattr(job.config, name)
        if config.num_inference_steps is None and "num_inference_steps" not in adapter:
            words["num_inference_steps"] = _steps(job, config)
        if "causal_block_size" not in adapter:
            words["causal_block_size"] = _block(job)
        if config.image is not None:
            words["image"] = read_picture(config.image)
        words["generator"] = torch.Generator().manual_seed(config.seed)
        return {**words, "prompt": list(self.request.schedule)}

    def _frames(self) -> int | None:
        """Return the number of frames of the whole video: the requested seconds, rounded up to whole latent frames."""
        if self.request.seconds is None:
            return None
        model = self.pipe.model
        if self.state is None:
            size = self.job.config.height, self.job.config.width
        else:
            size = self.state.model["height"], self.state.model["width"]
        time = frames_of_latent(model, size[0] or DEFAULTS["height"], size[1] or DEFAULTS["width"])
        wanted = max(1, math.ceil(self.request.seconds * self.rate - 1e-6))
        frames = math.ceil((wanted - 1) / time) * time + 1
        least = 0 if self.state is None else (self.state.next_frame - 1) * time + 1
        if frames < least:
            raise UserError(
                f"--long {self.request.seconds:g} is too short: {least} frames ({least / self.rate:.1f} s) are "
                "finished or in flight, give at least that length"
            )
        return frames

    def _note(self) -> dict[str, Any]:
        """Return the request as JSON values, for the process that continues the video."""
        adapter = self.request.adapter
        return {
            "settings": portable(self.request.config),
            "schedule": [list(entry) for entry in self.request.schedule],
            "adapter": None if adapter is None else str(Path(adapter).expanduser().absolute()),
            "depth": self.request.depth,
            "seconds": self.request.seconds,
            "video": self.places.video.name,
            "format": self.places.kind,
        }


def read_request(folder: Path) -> tuple[LongRequest, Places]:
    """Return the request and the files of a video from a state of `postgen generate`. The files are beside the state.

    Raises:
        UserError: there is no state, the state is damaged, or a Python program made it.
    """
    if not folder.exists():
        raise UserError(f"there is no folder {folder}: --continue takes the folder of a state, such as out.state")
    if folder.is_file():
        beside = folder.with_suffix(".state")
        hint = f"as {beside}" if beside.is_dir() else "whose name ends in .state"
        raise UserError(f"{folder} is a file: --continue takes the folder of the state, {hint}")
    note = RolloutState.load(folder).model.get(REQUEST)
    if not isinstance(note, dict):
        raise UserError(f"the state in {folder} was not made by postgen generate: continue it in Python")
    settings = dict(note["settings"])
    settings["lora"] = tuple(settings["lora"])
    request = LongRequest(
        config=GenerateConfig.of(settings),
        schedule=tuple((frame, text) for frame, text in note["schedule"]),
        seconds=note["seconds"],
        adapter=note["adapter"],
        depth=note["depth"],
    )
    return request, places_of(folder.absolute().parent / note["video"], note["format"], request)


def _steps(job: Job, config: GenerateConfig) -> int:
    """Return the default number of steps: a multiple of the groups in flight."""
    steps = EMBEDDED_STEPS if config.model is None else job.config.num_inference_steps or 1
    return math.ceil(steps / _GROUPS) * _GROUPS


def _block(job: Job) -> int:
    """Return the latent frames of a group such that the window is not longer than the clips of the base model."""
    time = (job.facts.multiples or (1, 1, 4))[2]
    clip: int = ((job.facts.default("num_frames") or 81) - 1) // max(1, time) + 1
    most: int = DEFAULTS["causal_block_size"]
    fits: int = (clip - sum(DEFAULTS["history_sizes"])) // _GROUPS
    return min(most, max(1, fits))
