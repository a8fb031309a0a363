"""Read the facts of a model from its small files without loading weights (`inspect_model`), and load the model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postgen.errors import SettingError, UserError, shown
from postgen.families.exports import NOTE, hint, read_note
from postgen.families.model_folder import (
    Defaults,
    check_configs,
    class_of,
    optional,
    own_words,
    read_index,
    small_files,
    wan_multiples,
)
from postgen.families.offload import check_offload, place_weights
from postgen.families.own_format import load_part, noted_networks
from postgen.families.video_calls import ROWS, UNKNOWN, least_steps, rate_of, sizes_of
from postgen.families.wan_sizes import check_size
from postgen.families.whole import check_whole, foreign_weights_refused, random_weights_told

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")

# Copied from the signatures of the pipelines: to read them from diffusers would cost seconds of import.
_WAN_ARGUMENTS = frozenset(
    {"prompt", "negative_prompt", "width", "height", "num_frames", "num_inference_steps", "guidance_scale"}
) | {"callback_on_step_end"}
RATES = ("frame_rate", "fps")
"""Names of the call argument with the playback rate of the clip, in frames per second."""
_ARGUMENTS = _WAN_ARGUMENTS | {"true_cfg_scale", *RATES}


_WAN_DEFAULTS = {"width": 832, "height": 480, "num_frames": 81, "num_inference_steps": 50, "guidance_scale": 5.0}
# Pipelines whose facts follow from their configuration files, without an import of diffusers. Value: takes an image.
_WAN_PIPELINES = {"WanPipeline": False, "WanImageToVideoPipeline": True}
# Text-to-video pipeline -> image-to-video pipeline for the same weights. It needs a network that accepts the first
# latent frame with a timestep of its own.
_CONTINUES = {"WanPipeline": "WanImageToVideoPipeline"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What the small files of a model tell about it before its weights are read."""

    source: str
    """Folder or hub id, the argument of `from_pretrained`."""
    pipeline: str
    """Class name of the pipeline."""
    takes_image: bool
    """Whether the pipeline accepts a first frame."""
    arguments: frozenset[str]
    """Names of the settings that the pipeline's call accepts and the network uses."""
    defaults: Defaults
    """Values of settings that the user does not give."""
    multiples: tuple[int, int, int] | None
    """Numbers of which height, width and frames - 1 must be multiples; None if only the pipeline knows them."""
    least_steps: int = 1
    """Smallest number of denoising steps that the scheduler supports."""
    call_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Name of a setting -> its default value in the signature of the call."""
    needs_image: bool = False
    """Whether the pipeline requires a first frame."""
    needs_others: tuple[str, ...] = ()
    """Other required arguments of the call, besides the prompt and the image."""
    transformer: str | None = None
    """Class name of the transformer; None if the pipeline has none."""
    experts: bool = False
    """Whether two networks share the noise levels, as in Wan2.2-A14B."""
    full_precision: tuple[str, ...] = ()
    """Components that stay in float32 with every `dtype`."""
    closed_vocabulary: tuple[str, ...] = ()
    """Example prompts from `postgen.json`, for a model whose tokenizer knows a fixed list of words; else empty."""
    image_pipeline: str | None = None
    """Class name of the pipeline that continues a first frame with the same weights; None if there is no such class.

    A text-to-video folder has one if `expand_timesteps` is true in its `model_index.json` (Wan2.2-TI2V-5B), or
    `image_to_video` is true in its `postgen.json`."""
    expands_timesteps: bool = False
    """Whether `pipeline` is such an image pipeline for a text-to-video folder."""
    parts: tuple[tuple[str, str], ...] = ()
    """(component, folder or hub id to load it from) for the networks of an export; see `families.exports`."""

    def with_image(self) -> ModelFacts:
        """Return the facts of the pipeline that takes a first frame: these facts, or those of `image_pipeline`."""
        if self.takes_image or self.image_pipeline is None:
            return self
        return replace(
            self,
            pipeline=self.image_pipeline,
            image_pipeline=None,
            takes_image=True,
            needs_image=True,
            expands_timesteps=True,
        )

    def default(self, name: str) -> Any:
        """Return the default of a setting: from `defaults`, else from the call; None if neither has it."""
        value = getattr(self.defaults, name, None)
        return self.call_defaults.get(name) if value is None else value

    def check_size(self, num_frames: int | None, height: int | None, width: int | None) -> None:
        """Refuse video sizes that the model cannot make.

        Raises:
            UserError: a size is not allowed; the message names the nearest allowed sizes.
        """
        if self.multiples is not None:
            check_size(num_frames, height, width, *self.multiples)


def inspect_model(model: str | Path, *, images: bool = False) -> ModelFacts:
    """Read the small files of a model and return its facts, without reading weights.

    Args:
        model: a local diffusers folder, a hub id, an export of trained networks (`postgen.families.exports`), or
            `embedded` for the embedded model.
        images: whether pipelines that make pictures are allowed as well.

    Raises:
        UserError: the model does not exist, is not a pipeline, makes no videos, or one of its files is damaged.
    """
    folder, source = small_files(str(model))
    if not (folder / "model_index.json").is_file():
        return _inspect_export(folder, source, str(model), images)
    index, pipeline = read_index(folder)
    own, examples, continues = own_words(folder / "postgen.json")
    if continues and pipeline not in _CONTINUES:
        known = ", ".join(_CONTINUES)
        raise UserError(f"{folder / 'postgen.json'}: image_to_video is allowed for {known} only, not for {pipeline}")
    network = optional(folder / "transformer" / "config.json") or optional(folder / "unet" / "config.json")
    own = {"fps": rate_of(pipeline, index, network), **own}
    transformer = class_of(index, "transformer", "transformer_2")
    # The facts of Wan follow from its config files. Other pipelines need an import of diffusers, for the signature.
    if pipeline in _WAN_PIPELINES:
        if transformer is None:
            raise UserError(f"{folder / 'model_index.json'} names no transformer, which a {pipeline} needs")
        facts = ModelFacts(
            source=source,
            pipeline=pipeline,
            takes_image=_WAN_PIPELINES[pipeline],
            needs_image=_WAN_PIPELINES[pipeline],
            arguments=_WAN_ARGUMENTS,
            defaults=Defaults(**{**_WAN_DEFAULTS, **own}),
            multiples=wan_multiples(folder),
            full_precision=("vae",),  # the decoder loses detail in half precision
            image_pipeline=_CONTINUES.get(pipeline) if continues or index.get("expand_timesteps") is True else None,
        )
    else:
        facts = _facts_of_call(folder, source, pipeline, network, Defaults(**own), images)
    return replace(
        facts,
        transformer=transformer,
        experts=index.get("boundary_ratio") is not None or class_of(index, "transformer_2") is not None,
        least_steps=least_steps(pipeline, optional(folder / "scheduler" / "scheduler_config.json")),
        closed_vocabulary=examples,
    )


def _inspect_export(folder: Path, source: str, model: str, images: bool) -> ModelFacts:
    """Return the facts of an export: those of its base model, with the exported networks as `parts`."""
    export = read_note(folder)
    if export is None:
        raise UserError(f"{model} is not a diffusers pipeline: it has no model_index.json{hint(folder, model)}")
    try:
        inner = small_files(export.base)[0]
        if (inner / NOTE).is_file() and not (inner / "model_index.json").is_file():
            raise UserError("that model is itself an export, name the whole model there")
        facts = inspect_model(export.base, images=images)
    except UserError as error:
        raise UserError(f"{model} is an export of {export.base}, which {folder / NOTE} names: {error}") from error
    return replace(facts, parts=tuple((name, source) for name in export.parts))


def _facts_of_call(
    folder: Path, source: str, pipeline: str, network: Mapping[str, Any], defaults: Defaults, images: bool
) -> ModelFacts:
    """Return the facts that follow from the signature of a pipeline's call and from the pipeline's row."""
    call = _call(pipeline, source, images)
    arguments = _ARGUMENTS & call.keys()
    if "true_cfg_scale" in call and network.get("guidance_embeds") is False:
        arguments -= {"guidance_scale"}  # the pipeline accepts it, but the network has no input for it
    required = [name for name, value in call.items() if value is inspect.Parameter.empty]
    return ModelFacts(
        source=source,
        pipeline=pipeline,
        takes_image="image" in call,
        needs_image="image" in call and not ROWS.get(pipeline, UNKNOWN).image_optional,
        needs_others=tuple(name for name in required if name not in ("self", "prompt", "image")),
        arguments=arguments,
        defaults=defaults,
        call_defaults={name: call[name] for name in arguments if isinstance(call[name], int | float)},
        multiples=sizes_of(pipeline, optional(folder / "vae" / "config.json"), network),
    )


def check_device_name(device: str) -> None:
    """Refuse a device name that is neither in `DEVICES` nor cuda:N. The device need not exist on this machine.

    Raises:
        UserError: the name is unknown.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,4})?", device):
        raise SettingError("device", f" {shown(device)}. Known: {', '.join(DEVICES)}, cuda:N", before="unknown ")


def check_device(device: str) -> str:
    """Return the torch device name for `device`, one of `DEVICES` or cuda:N, on this machine.

    Raises:
        UserError: the name is unknown, or the machine has no such device.
    """
    import torch

    mps = torch.backends.mps.is_available()
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    check_device_name(device)
    kind, _, index = device.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("the device is cuda, but torch finds no CUDA GPU on this machine: use --device cpu or auto")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise UserError(f"there is no device {device}: torch finds {torch.cuda.device_count()} CUDA GPU(s)")
    if kind == "mps" and not mps:
        raise UserError("the device is mps, but torch finds none on this machine: use --device cpu or auto")
    return device


def load_pipeline(
    facts: ModelFacts,
    *,
    dtype: str = "auto",
    device: str = "auto",
    offload: str = "none",
    before_placing: Callable[[Any], None] | None = None,
    quantization: Any = None,
) -> Any:
    """Load the pipeline of a model onto a device.

    Args:
        facts: the result of `inspect_model`.
        dtype: one of `DTYPES`; `auto` is the dtype in the model's `postgen.json`, or else bfloat16 on CUDA and
            float32 on other devices.
        device: one of `DEVICES`, or cuda:N.
        offload: one of `OFFLOADS`, as in `place_weights`.
        before_placing: called with the pipeline while its weights are on the CPU, to change the pipeline's structure.
        quantization: a `diffusers.PipelineQuantizationConfig` by which components are quantised when they are loaded.

    Returns:
        The diffusers pipeline.

    Raises:
        UserError: the device does not exist, `offload` needs a GPU, or the files cannot be loaded.
    """
    import diffusers

    place = check_device(device)
    check_offload(offload, place)
    if Path(facts.source).is_dir():
        check_configs(Path(facts.source))
    try:
        loader: Any = diffusers.DiffusionPipeline
        options: dict[str, Any] = {}
        if facts.expands_timesteps:
            # The folder names the text-to-video class, so the image-to-video class must be called by its name.
            loader, options = getattr(diffusers, facts.pipeline), {"expand_timesteps": True}
        dtypes = _dtypes(facts, dtype, place)
        # Networks that diffusers cannot load from the folder: those of an export, and those with a note of postgen.
        parts = {name: load_part(source, name, dtypes.get(name, dtypes["default"])) for name, source in facts.parts}
        parts |= noted_networks(Path(facts.source), lambda name: dtypes.get(name, dtypes["default"]), parts)
        if parts and quantization is not None:
            raise UserError(
                f"{facts.source} has networks in postgen's own format ({', '.join(parts)}), which cannot be quantised"
                " when they are loaded: load a diffusers folder, or set base_quant to none"
            )
        if quantization is not None:
            options |= {"quantization_config": quantization}
        if parts:
            # DiffusionPipeline.from_pretrained ignores given components that the class lists as optional, such as the
            # transformer of Wan, so the pipeline class itself loads.
            loader, options = getattr(diffusers, facts.pipeline), options | parts
        with foreign_weights_refused(facts.source), random_weights_told(facts.source):
            pipe = loader.from_pretrained(facts.source, dtype=dtypes, **options)
    except UserError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors raise many types of errors
        raise UserError(f"cannot load {facts.source} as {facts.pipeline}: {_reason(error)}") from error
    check_whole(pipe, ", ".join(dict.fromkeys([facts.source, *(source for _, source in facts.parts)])))
    if before_placing is not None:
        before_placing(pipe)
    place_weights(pipe, place, offload)
    return pipe


def _reason(error: Exception) -> str:
    """Return the reason for a message about an error of a library; Python's own error types need an explanation."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, TypeError | AttributeError | ArithmeticError | LookupError | AssertionError):
        return f"its files do not fit together or contain invalid values ({type(error).__name__}: {text})"
    return text or type(error).__name__


def _dtypes(facts: ModelFacts, dtype: str, place: str) -> dict[str, torch.dtype]:
    """Return the dtype of every component; without it, diffusers loads text encoders in the dtype of their files."""
    import torch

    if dtype == "auto":
        dtype = facts.defaults.dtype or ("bfloat16" if place.startswith("cuda") else "float32")
    kept = dict.fromkeys(facts.full_precision, torch.float32)
    # T5 encoders overflow in float16.
    text = {"text_encoder": torch.float32} if dtype == "float16" else {}
    return {"default": getattr(torch, dtype), **text, **kept}


def _call(pipeline: str, source: str, images: bool) -> dict[str, Any]:
    """Return the parameters of a pipeline's call with their defaults; `inspect.Parameter.empty` means no default."""
    import diffusers

    kind = getattr(diffusers, pipeline, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise UserError(
            f"{source} holds a {pipeline}, which the installed diffusers {diffusers.__version__} does not have: "
            "give the model that it was made from, or load it in Python with its own class"
        )
    parameters = inspect.signature(kind.__call__).parameters.values()
    call = {each.name: each.default for each in parameters if each.kind is not each.VAR_KEYWORD}
    if "num_frames" not in call and not images:
        raise UserError(f"{source} holds a {pipeline}, which makes no video")
    return call
