"""Generate videos from prompts: the implementation of `postgen generate`, which `postgen compare` also uses.

Light to import. `prepare` finds all errors that can be found before the weights are loaded.
"""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import postgen
from postgen.compat import execution_device
from postgen.enhancing import enhanced
from postgen.errors import SettingError, UserError
from postgen.families.loading import ModelFacts, check_device, inspect_model, load_pipeline
from postgen.families.lora import check_lora, load_loras, parse_lora
from postgen.families.offload import check_offload
from postgen.families.video_calls import ROWS, UNKNOWN
from postgen.files import check_apart, check_place, files_of, replacing_all
from postgen.plug_ins import prepare_plug_ins
from postgen.request import GenerateConfig, carried, plug_in_places, portable
from postgen.running import CALL, StepCallback, Watch, first_frame, refusals, run

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "GenerateConfig",
    "Job",
    "StepCallback",
    "Watch",
    "Written",
    "all_written",
    "check_rate",
    "generate_video",
    "load",
    "make_video",
    "output_paths",
    "prepare",
    "read_by",
    "refusals",
    "run",
    "versions",
    "write",
    "write_parts",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A checked request in which all defaults are filled in."""

    config: GenerateConfig
    """Settings of the video."""
    facts: ModelFacts
    """Properties of the model."""
    plug_ins: Mapping[str, Any]
    """Settings by name of the plug-in, from `postgen.plug_ins.prepare_plug_ins`."""

    @property
    def loading(self) -> tuple[Any, ...]:
        """Key of the loaded pipeline: two jobs with equal keys can share a pipeline."""
        config, facts = self.config, self.facts
        place = config.dtype, config.device, config.offload
        return facts.source, facts.parts, facts.pipeline, *place, config.lora, config.lit

    def again(self, *, prompt: str, seed: int) -> Job:
        """Return the same job with another prompt and seed. Other settings are not checked again.

        Raises:
            UserError: the prompt is empty, or the seed is out of range.
        """
        text = self.config.enhanced_prompt if prompt == self.config.prompt else None
        config = dataclasses.replace(self.config, prompt=prompt, seed=seed, enhanced_prompt=text)
        return dataclasses.replace(self, config=config)


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """Paths of the files of a video."""

    video: Path
    """Video file, or folder of frames."""
    sheet: Path
    """Contact sheet, a PNG file."""
    sidecar: Path
    """JSON file with all settings that reproduce the video."""

    @property
    def files(self) -> list[Path]:
        """All three paths, the video first."""
        return [self.video, self.sheet, self.sidecar]


def prepare(config: GenerateConfig) -> Job:
    """Fill in the defaults of the model, and check everything that can be checked without its weights.

    Raises:
        UserError: a setting is wrong or does not fit the model.
    """
    facts = inspect_model(config.model if config.model is not None else postgen.embedded_model())
    if config.image is not None:
        facts = facts.with_image()
    for name in ("negative_prompt", *CALL):
        if getattr(config, name) is not None and name not in facts.arguments:
            raise SettingError(name, ": omit it", before=f"{facts.pipeline} has no ")
    own = {name: facts.default(name) for name in (*CALL, "fps") if getattr(config, name) is None}
    if config.negative_prompt is None:
        own.pop("true_cfg_scale", None)  # the pipelines apply true guidance only with a negative prompt
        if (config.true_cfg_scale or 0) > 1:
            own["negative_prompt"] = ""
    config = dataclasses.replace(config, **own)
    facts.check_size(config.num_frames, config.height, config.width)
    if config.num_inference_steps is not None and config.num_inference_steps < facts.least_steps:
        raise UserError(
            f"{facts.pipeline} needs at least {facts.least_steps} denoising steps with its scheduler,"
            f" got {config.num_inference_steps}"
        )
    _check_inputs(config, facts)
    if config.device != "auto" or config.offload != "none":
        check_offload(config.offload, check_device(config.device))
    return Job(config=config, facts=facts, plug_ins=prepare_plug_ins(facts, config.plug_ins))


def load(job: Job) -> Any:
    """Load the pipeline of a job with its adapter and its LoRAs.

    Raises:
        UserError: the pipeline cannot be loaded, or an adapter or a LoRA does not fit.
    """
    config = job.config

    def with_adapter(pipe: Any) -> None:
        if config.lit is not None:
            from postgen.lit.adapter import apply_adapter

            apply_adapter(pipe, config.lit)

    place = {"dtype": config.dtype, "device": config.device, "offload": config.offload}
    pipe = load_pipeline(job.facts, **place, before_placing=with_adapter)
    load_loras(pipe, config.lora)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def output_paths(output: Path, format: str | None = None) -> tuple[Written, str]:
    """Return the output files of a video and its format, and check that the files can be written.

    Args:
        output: path of the video.
        format: format of the video; None: the suffix of `output` determines it.

    Raises:
        UserError: the format is unknown, or a path cannot be written.
    """
    from postgen.video import FORMATS, check_target

    check_place(output)  # before a suffix is added, so that the name of a device is refused
    if not output.suffix and format is not None and FORMATS.get(format):
        output = output.with_name(f"{output.name}{FORMATS[format]}")
    kind = check_target(output, format)
    base = output.with_suffix("") if FORMATS[kind] and output.suffix else output
    sheet, sidecar = (base.with_name(base.name + suffix) for suffix in (".png", ".json"))
    paths = Written(video=output, sheet=sheet, sidecar=sidecar)
    for path in (paths.sheet, paths.sidecar):
        check_place(path, folder=False)
    check_apart(paths.files)
    return paths, kind


def read_by(config: GenerateConfig) -> list[Path]:
    """Return the files that a request reads, including the files of its model folder."""
    names = [config.model, config.image, config.lit, *(parse_lora(lora).path for lora in config.lora)]
    return [file for name in names if name is not None for file in files_of(Path(name).expanduser())]


def check_rate(job: Job, kind: str) -> None:
    """Check, before the model is loaded, that the video format supports the frame rate of a job.

    Raises:
        UserError: the format does not support the rate.
    """
    from postgen.video import checked_rate

    checked_rate(job.config.fps or 8.0, kind)


def write(
    clip: Tensor, job: Job, paths: Written, kind: str, *, seconds: float, place: str, stopped_after: int | None = None
) -> None:
    """Write video, contact sheet and sidecar: either all three files or none of them.

    Args:
        clip: (F, 3, H, W) in [0, 1].
        job: the job that made the clip.
        paths: output files, from `output_paths`.
        kind: format, from `output_paths`.
        seconds: duration of the generation, for the sidecar.
        place: device of the generation, for the sidecar.
        stopped_after: number of denoising steps after which the generation was stopped early, for the sidecar; None:
            it was not stopped.

    Raises:
        UserError: a file cannot be written, or the clip contains NaN or infinite values.
    """
    with all_written(paths.files) as parts:
        write_parts(clip, job, parts, kind, seconds=seconds, place=place, stopped_after=stopped_after)


@contextmanager
def all_written(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Context manager like `postgen.files.replacing_all`, whose errors name the final paths.

    Yields:
        The temporary paths, in the order of `paths`.

    Raises:
        UserError: a file cannot be written.
    """
    parts: list[Path] = []
    try:
        with replacing_all(paths) as parts:
            yield parts
    except OSError as error:
        raise UserError(f"cannot write {paths[0]}: {error.strerror or error}") from error
    except UserError as error:
        text = str(error)
        for part, path in zip(parts, paths, strict=False):
            text = text.replace(str(part), str(path))
        raise UserError(text) from error


def write_parts(
    clip: Tensor,
    job: Job,
    parts: Sequence[Path],
    kind: str,
    *,
    seconds: float,
    place: str,
    stopped_after: int | None = None,
) -> None:
    """Write video, contact sheet and sidecar to three paths that the caller gives; other arguments as in `write`.

    Raises:
        OSError: a file cannot be written.
        UserError: the video cannot be written, or the clip contains NaN or infinite values.
    """
    from postgen.video import contact_sheet, holds_comment, write_video

    config = _as_made(job.config, clip)
    if config.num_frames != clip.shape[0]:
        text = f"{job.facts.pipeline} made {clip.shape[0]} frames instead of the requested {config.num_frames}"
        warnings.warn(text, stacklevel=3)
    note = {
        "prompt": config.prompt,
        "seed": config.seed,
        "settings": portable(config),
        "plug_ins": plug_in_places(config),
        "format": kind,
        "pipeline": job.facts.pipeline,
        "frames": clip.shape[0],
        "width": clip.shape[-1],
        "height": clip.shape[-2],
        "seconds": round(seconds, 3),
        "device": place,
        "versions": versions(),
    }
    if stopped_after is not None:  # the settings alone reproduce the complete video
        note["stopped_after"] = stopped_after
    video, sheet, sidecar = parts
    kept = comment if holds_comment(kind, comment := carried(note)) else None
    write_video(video, clip, fps=config.fps or 8.0, format=kind, comment=kept)
    contact_sheet(clip, sheet, title=f"{config.prompt} (seed {config.seed})")
    sidecar.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def generate_video(
    config: GenerateConfig,
    output: str | Path,
    *,
    format: str | None = None,
    pipe: Any = None,
    on_step: StepCallback | None = None,
) -> Written:
    """Generate one video, and write it with its contact sheet and its sidecar.

    Args:
        config: the request.
        output: path of the video, or of the folder of frames. The other two files are written beside it.
        format: mp4, webm, gif or frames; None: the suffix of `output` determines it.
        pipe: a pipeline from `load`; None: load one.
        on_step: callback after each denoising step.

    Raises:
        UserError: an error that the user can correct.
    """
    paths, kind = output_paths(Path(output), format)
    check_apart(paths.files, read_by(config))
    job = prepare(config)
    check_rate(job, kind)
    job = enhanced(job)
    make_video(pipe if pipe is not None else load(job), job, paths, kind, on_step)
    return paths


def make_video(
    pipe: Any,
    job: Job,
    paths: Written,
    kind: str,
    on_step: StepCallback | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Run a job, write its files and return its clip.

    Args:
        pipe: the pipeline, from `load`.
        job: the job.
        paths: output files, from `output_paths`.
        kind: format, from `output_paths`.
        on_step: callback after each denoising step.
        watch: observer of the generation; see `Watch`.

    Raises:
        UserError: an error of `run` or `write`.
    """
    start = time.perf_counter()
    clip = run(pipe, job, on_step, watch)
    seconds, place = time.perf_counter() - start, str(execution_device(pipe))
    stopped_after = watch.stopped_after if watch is not None else None
    write(clip, job, paths, kind, seconds=seconds, place=place, stopped_after=stopped_after)
    return clip


def versions() -> dict[str, str]:
    """Return the versions of the packages that determine the video of a seed."""
    from postgen.versions import versions as named

    return named("torch", "diffusers", "transformers")


def _as_made(config: GenerateConfig, clip: Tensor) -> GenerateConfig:
    """Return the settings with the sizes that the pipeline chose itself, taken from the clip."""
    made: dict[str, Any] = {"num_frames": clip.shape[0], "width": clip.shape[-1], "height": clip.shape[-2]}
    return dataclasses.replace(config, **{name: n for name, n in made.items() if getattr(config, name) is None})


def _check_inputs(config: GenerateConfig, facts: ModelFacts) -> None:
    if reason := ROWS.get(facts.pipeline, UNKNOWN).refused:
        raise UserError(f"{facts.pipeline} is not supported here: {reason}")
    if facts.needs_others:
        raise UserError(
            f"{facts.pipeline} needs {', '.join(facts.needs_others)}, for which this command has no option:"
            " call it in Python"
        )
    _check_negative(config, facts)
    if "prompt" not in facts.arguments:
        warnings.warn(f"{facts.pipeline} takes no text: the prompt is only used for file names", stacklevel=3)
    if config.image is not None and not facts.takes_image:
        raise UserError(f"{facts.pipeline} takes text only: omit --image or use an image-to-video model")
    if config.image is None and facts.needs_image:
        raise UserError(f"{facts.pipeline} generates video from an image: give one with --image")
    if config.image is not None:
        first_frame(config.image)
    for lora in config.lora:
        check_lora(lora)
    if config.lit is not None:
        from postgen.lit.adapter import check_adapter

        sizes = config.num_frames, config.height, config.width
        known = all(size is not None for size in sizes)
        check_adapter(config.lit, facts, sizes if known else None)  # type: ignore[arg-type]


def _check_negative(config: GenerateConfig, facts: ModelFacts) -> None:
    """Refuse a negative prompt that guidance would not use.

    Pipelines without a guidance argument have their own guider, so nothing is checked for them.
    """
    if config.negative_prompt is None:
        return
    true, guidance = config.true_cfg_scale, config.guidance_scale
    if "true_cfg_scale" in facts.arguments:
        if true is None or true <= 1:
            raise UserError(
                f"a negative prompt needs true_cfg_scale (--true-cfg) above 1 in {facts.pipeline}, whose guidance is"
                f" distilled, got {true}: raise it or omit the negative prompt"
            )
    elif guidance is not None and guidance <= 1:
        raise UserError(
            f"a negative prompt needs guidance above 1, got {guidance}: raise it or omit the negative prompt"
        )
