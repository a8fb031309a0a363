"""Make videos from prompts: what stands behind `postgen generate` and `postgen compare`.

Light to import. `prepare` finds every mistake that can be found before the weights are read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import postgen
from postgen.compat import execution_device
from postgen.errors import UserError
from postgen.families.loading import DEVICES, DTYPES, OFFLOADS, ModelFacts, check_device, inspect_model, load_pipeline
from postgen.families.lora import check_lora, load_loras, parse_lora
from postgen.files import check_place
from postgen.plug_ins import check_plug_ins, enhance_setting, fused_setting, plug_ins_for_call

if TYPE_CHECKING:
    from torch import Tensor

StepCallback = Callable[[int, int], None]
"""Called after each denoising step with (steps done, steps in all)."""


_CALL = ("width", "height", "num_frames", "num_inference_steps", "guidance_scale")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """One video. A field that is None takes the model's default."""

    prompt: str
    """What the video shows."""
    model: str | None = None
    """A local diffusers folder or a hub id; None is the embedded model."""
    negative_prompt: str | None = None
    """What it should not show; needs guidance above 1."""
    width: int | None = None
    """Pixels."""
    height: int | None = None
    """Pixels."""
    num_frames: int | None = None
    """Frames of the clip."""
    num_inference_steps: int | None = None
    """Denoising steps."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance; up to 1 is off."""
    seed: int = 0
    """Seed of the initial noise, drawn on the CPU so that every device starts from the same."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    offload: str = "none"
    """none, model or sequential."""
    lora: tuple[str, ...] = ()
    """LoRA files, each `PATH[:scale]`."""
    image: str | None = None
    """Picture file of the first frame, for image-to-video models; it is resized to the clip."""
    fps: float | None = None
    """Frames per second of the written video."""
    enhance: str | None = None
    """Enhance-A-Video: auto, or its weight as a number; None and 0 are off."""
    fused: str | None = None
    """Fused operations: auto for all, or some of norm_rope, adaln, attention with commas between; None is off."""

    def __post_init__(self) -> None:
        _check_types(self)
        if not self.prompt.strip():
            raise UserError("the prompt is empty: say what the video shows")
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("offload", self.offload, OFFLOADS)
        _check_choice("device", self.device.partition(":")[0], DEVICES)
        for name in ("width", "height", "num_frames", "num_inference_steps", "fps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be above 0, got {value}")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < math.inf:
            raise UserError(f"guidance_scale must be at least 0, got {self.guidance_scale}")
        enhance_setting(self.enhance)
        fused_setting(self.fused)
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be between 0 and 2**63 - 1, got {self.seed}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A checked request: every default filled in."""

    config: GenerateConfig
    """The request."""
    facts: ModelFacts
    """What is known of its model."""

    @property
    def loading(self) -> tuple[Any, ...]:
        """Equal for two jobs that can share a loaded pipeline."""
        config = self.config
        return self.facts.source, config.dtype, config.device, config.offload, config.lora


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """Where the files of a video are."""

    video: Path
    """The video file, or the folder of frames."""
    sheet: Path
    """Contact sheet, PNG."""
    sidecar: Path
    """Everything needed to make the video again, JSON."""


def prepare(config: GenerateConfig) -> Job:
    """Fill in the model's defaults and check everything that can be checked without its weights.

    Raises:
        UserError: the first thing that is wrong, in one line.
    """
    facts = inspect_model(config.model if config.model is not None else postgen.embedded_model())
    for name in ("negative_prompt", *_CALL):
        if getattr(config, name) is not None and name not in facts.arguments:
            raise UserError(f"{facts.pipeline} has no {name}: leave it out")
    own = {name: getattr(facts.defaults, name) for name in (*_CALL, "fps") if getattr(config, name) is None}
    config = dataclasses.replace(config, **own)
    facts.check_size(config.num_frames, config.height, config.width)
    _check_inputs(config, facts)
    if config.device != "auto":
        check_device(config.device)
    return Job(config=config, facts=facts)


def load(job: Job) -> Any:
    """Load the pipeline of a job, LoRAs included.

    Raises:
        UserError: it cannot be loaded, or a LoRA does not fit.
    """
    config = job.config
    pipe = load_pipeline(job.facts, dtype=config.dtype, device=config.device, offload=config.offload)
    load_loras(pipe, config.lora)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, job: Job, on_step: StepCallback | None = None) -> Tensor:
    """Return the clip of a job, (F, 3, H, W) float32 in [0, 1] on the CPU.

    Raises:
        UserError: the pipeline refuses the settings, or memory runs out.
    """
    import torch

    config = job.config
    call = {name: getattr(config, name) for name in job.facts.arguments if getattr(config, name) is not None}
    if config.image is not None:
        call["image"] = _open_image(config.image)
    total = config.num_inference_steps or 0

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(step + 1, total or pipe.num_timesteps)
        return tensors

    generator = torch.Generator().manual_seed(config.seed)
    try:
        with plug_ins_for_call(pipe, enhance=config.enhance, fused=config.fused):
            frames = pipe(**call, generator=generator, output_type="pt", callback_on_step_end=after_step).frames
    except torch.OutOfMemoryError as error:
        raise UserError("out of GPU memory: use --offload model, a smaller size, fewer frames or bfloat16") from error
    except ValueError as error:
        raise UserError(f"{job.facts.pipeline} refuses: {' '.join(str(error).split())[:300]}") from error
    clip: Tensor = frames[0].float().cpu()
    return clip


def output_paths(output: Path, format: str | None = None) -> tuple[Written, str]:
    """Name the files of a video and say its format, before anything is made.

    Raises:
        UserError: an unknown format, or a place that cannot be written.
    """
    from postgen.video import FORMATS, check_target

    if not output.suffix and format is not None and FORMATS.get(format):
        output = output.with_name(f"{output.name}{FORMATS[format]}")
    kind = check_target(output, format)
    check_place(output)
    base = output.with_suffix("") if FORMATS[kind] and output.suffix else output
    return Written(video=output, sheet=_sibling(base, ".png"), sidecar=_sibling(base, ".json")), kind


def write(clip: Tensor, job: Job, paths: Written, kind: str, *, seconds: float, place: str) -> None:
    """Write video, contact sheet and sidecar: all three appear, complete, or none does.

    Args:
        clip: (F, 3, H, W) in [0, 1].
        job: what was asked.
        paths: from `output_paths`.
        kind: format, from `output_paths`.
        seconds: time the generation took, for the sidecar.
        place: device it ran on, for the sidecar.

    Raises:
        UserError: a file cannot be written, or the model made values that are no numbers.
    """
    from postgen.files import replacing
    from postgen.video import contact_sheet, write_video

    config = job.config
    note = {
        "prompt": config.prompt,
        "seed": config.seed,
        "settings": portable(config),
        "format": kind,
        "pipeline": job.facts.pipeline,
        "frames": clip.shape[0],
        "width": clip.shape[-1],
        "height": clip.shape[-2],
        "seconds": round(seconds, 3),
        "device": place,
        "versions": versions(),
    }
    try:
        with ExitStack() as stack:
            video, sheet, sidecar = (
                stack.enter_context(replacing(path)) for path in (paths.video, paths.sheet, paths.sidecar)
            )
            write_video(video, clip, fps=config.fps or 8.0, format=kind)
            contact_sheet(clip, sheet, title=f"{config.prompt} (seed {config.seed})")
            sidecar.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {paths.video}: {error.strerror or error}") from error


def generate_video(
    config: GenerateConfig,
    output: str | Path,
    *,
    format: str | None = None,
    pipe: Any = None,
    on_step: StepCallback | None = None,
) -> Written:
    """Make one video and write it with its contact sheet and its sidecar.

    Args:
        config: the request.
        output: name of the video (of the folder, for frames); the other two files stand beside it.
        format: mp4, webm, gif or frames; None takes it from the name.
        pipe: a pipeline from `load` to use again; None loads one.
        on_step: called after each denoising step.

    Raises:
        UserError: anything the user can put right.
    """
    paths, kind = output_paths(Path(output), format)
    job = prepare(config)
    pipe = pipe if pipe is not None else load(job)
    start = time.perf_counter()
    clip = run(pipe, job, on_step)
    write(clip, job, paths, kind, seconds=time.perf_counter() - start, place=str(execution_device(pipe)))
    return paths


def portable(config: GenerateConfig) -> dict[str, Any]:
    """Return the settings for a sidecar: file names become absolute, so that it works from every folder."""
    settings = dataclasses.asdict(config)
    for name in ("model", "image"):
        settings[name] = _absolute(settings[name])
    loras = map(parse_lora, config.lora)
    settings["lora"] = [f"{_absolute(path)}:{scale:g}" for path, scale in loras]
    return settings


def read_sidecar(path: str | Path) -> tuple[dict[str, Any], str]:
    """Return the settings of a sidecar (keywords of `GenerateConfig`) and the format of its video.

    Raises:
        UserError: no such file, not a sidecar, or settings that this version does not know.
    """
    try:
        note = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the sidecar {path}: {error}") from error
    settings = note.get("settings") if isinstance(note, dict) else None
    if not isinstance(settings, dict) or not isinstance(note.get("format"), str):
        raise UserError(f"{path} is no sidecar of postgen: it has no settings or no format")
    known = GenerateConfig.__dataclass_fields__
    if unknown := sorted(set(settings) - set(known)):
        raise UserError(f"the sidecar {path} has unknown settings {', '.join(unknown)}. Known: {', '.join(known)}")
    loras = settings.get("lora", [])
    if not isinstance(loras, list) or not all(isinstance(lora, str) for lora in loras):
        raise UserError(f"the sidecar {path} is damaged: lora must be a list of texts, got {loras!r}")
    settings["lora"] = tuple(loras)
    try:
        GenerateConfig(**{"prompt": "", **settings})
    except UserError as error:
        raise UserError(f"the sidecar {path} is damaged: {error}") from error
    return settings, note["format"]


def versions() -> dict[str, str]:
    """Return the versions that decide what a seed gives."""
    from postgen.versions import versions as named

    return named("torch", "diffusers", "transformers")


def _check_inputs(config: GenerateConfig, facts: ModelFacts) -> None:
    guidance = config.guidance_scale
    if config.negative_prompt is not None and guidance is not None and guidance <= 1:
        raise UserError(f"a negative prompt needs guidance above 1, got {guidance}: change one of the two")
    if config.image is not None and not facts.takes_image:
        raise UserError(f"{facts.pipeline} takes text only: leave --image out or use an image-to-video model")
    if config.image is None and facts.takes_image:
        raise UserError(f"{facts.pipeline} makes video from a picture: name one with --image")
    if config.image is not None:
        _open_image(config.image)
    for lora in config.lora:
        check_lora(lora)
    check_plug_ins(facts, enhance=config.enhance, fused=config.fused)


def _sibling(base: Path, suffix: str) -> Path:
    return base.with_name(base.name + suffix)


def _absolute(name: str | None) -> str | None:
    if name is None or not Path(name).expanduser().exists():
        return name
    return str(Path(name).expanduser().resolve())


def _open_image(path: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(Path(path).expanduser()) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise UserError(f"cannot read the picture {path}: {error}") from error


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"unknown {name} {value!r}. Known: {', '.join(known)}")


_KINDS: Mapping[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "tuple": (tuple,)}


def _check_types(config: GenerateConfig) -> None:
    """Settings also come from files and from `key=value` texts, where a number may have become something else."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kind, _, optional = str(field.type).partition(" | ")
        allowed = _KINDS[kind.partition("[")[0]]
        if (value is None and optional) or (isinstance(value, allowed) and not isinstance(value, bool)):
            continue
        raise UserError(f"{field.name} must be {kind}, got {value!r}")
