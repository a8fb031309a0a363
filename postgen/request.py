"""The settings of one video, and the sidecar file that stores them. Light to import."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from postgen.assets import EMBEDDED
from postgen.errors import SettingError, UserError, check_text, shown
from postgen.families.loading import check_device_name
from postgen.families.lora import parse_lora
from postgen.families.model_folder import DTYPES, is_hub_id
from postgen.families.offload import OFFLOADS
from postgen.families.video_calls import MOST_PIXELS, RANGES
from postgen.plug_ins import known_plug_ins
from postgen.prompt.naming import name_without_place, portable_name
from postgen.reading import check_name, read_json

NO_ENHANCER = "none"
"""Name that switches prompt enhancement off, for `--from` and `--a` of a request that has an enhancer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """Settings of one video. A field that is None takes the default of the model."""

    prompt: str
    """Description of the video."""
    model: str | None = None
    """Local diffusers folder or Hub id; None: the embedded model. The name `embedded` becomes None."""
    negative_prompt: str | None = None
    """Description of what the video should not show. It needs a guidance scale above 1, or a true CFG scale above 1 if
    the pipeline has one."""
    width: int | None = None
    """Width in pixels."""
    height: int | None = None
    """Height in pixels."""
    num_frames: int | None = None
    """Number of frames."""
    num_inference_steps: int | None = None
    """Number of denoising steps."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance; values up to 1 switch it off. A guidance-distilled network (HunyuanVideo)
    receives the scale as an input."""
    true_cfg_scale: float | None = None
    """Scale of classifier-free guidance in addition to the distilled guidance of a network. It uses the negative
    prompt, or the empty prompt if there is none. Values up to 1 switch it off."""
    seed: int = 0
    """Seed of the initial noise. The noise is drawn on the CPU, so that it is the same for every device."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    offload: str = "none"
    """none, auto, model or sequential; see `postgen.families.offload.place_weights`."""
    lora: tuple[str, ...] = ()
    """LoRA files, each as `[NETWORK=]PATH[:scale]`."""
    lit: str | None = None
    """Adapter of hybrid linear attention (`postgen.lit.adapter`): a file, a folder that contains one, or
    `embedded`."""
    image: str | None = None
    """Image file of the first frame, for image-to-video models; it is resized to the size of the clip."""
    fps: float | None = None
    """Frames per second of the written video; also an input of networks that are conditioned on the frame rate."""
    enhance_prompt: str | None = None
    """Prompt enhancer, as in `postgen.prompt.get_rewriter`: template, smollm2, chat:MODEL, api:MODEL@URL, or your own
    function; None or `none`: the prompt is used as it is."""
    enhanced_prompt: str | None = None
    """Prompt of the enhancer, which the model receives instead of `prompt`; None: not made yet. A sidecar contains it,
    so that a video is made again without the enhancer."""
    plug_ins: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Texts of plug-ins by option (`postgen.plug_ins`), such as {"enhance": "auto"}. A plug-in without a text is
    off."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """Return a request from the settings of a command or a sidecar.

        Args:
            settings: values by name of the field, and texts of plug-ins by option.

        Raises:
            UserError: a setting is unknown or wrong.
        """
        fields = cls.__dataclass_fields__.keys() - {"plug_ins"}
        own = {name: value for name, value in settings.items() if name in fields}
        others = {name: value for name, value in settings.items() if name not in fields and value is not None}
        return cls(**own, plug_ins=others)

    def __post_init__(self) -> None:
        _check_types(self)
        if self.model == EMBEDDED:
            object.__setattr__(self, "model", None)
        if self.enhance_prompt == NO_ENHANCER:
            object.__setattr__(self, "enhance_prompt", None)
        if not self.prompt.strip():
            raise UserError("the prompt is empty: say what the video shows")
        _check_enhancer(self)
        check_text("the prompt", self.prompt)
        check_text("the negative prompt", self.negative_prompt or "")
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("offload", self.offload, OFFLOADS)
        check_device_name(self.device)
        _check_ranges(self)
        options = [row.option for row in known_plug_ins()]
        for option, text in self.plug_ins.items():
            if option not in options:
                raise UserError(f"unknown setting {option!r}. Known plug-ins: {', '.join(options)}")
            if not isinstance(text, str):
                raise SettingError(option, f" must be a text, got {shown(text)}")
        if not all(isinstance(lora, str) for lora in self.lora):
            raise SettingError("lora", f" must contain texts [NETWORK=]PATH[:scale], got {shown(self.lora)}")
        if self.lit is not None:
            check_name(self.lit, "the adapter")
        if not 0 <= self.seed < 2**63:
            raise SettingError("seed", f" must be between 0 and {2**63 - 1}, got {shown(self.seed)}")


def portable(config: GenerateConfig) -> dict[str, Any]:
    """Return the settings for a sidecar. Paths become absolute, so that the sidecar can be used from every folder.

    The result also contains the texts of plug-ins, each under its option; None: the plug-in is off.
    """
    settings = dataclasses.asdict(config)
    texts = settings.pop("plug_ins")
    settings |= {row.option: texts.get(row.option) for row in known_plug_ins()}
    for name in ("model", "image", *(["lit"] if config.lit != EMBEDDED else [])):
        settings[name] = _absolute(settings[name])
    if config.enhance_prompt is not None:
        settings["enhance_prompt"] = portable_name(config.enhance_prompt)
    loras = map(parse_lora, config.lora)
    settings["lora"] = [str(dataclasses.replace(lora, path=_absolute(lora.path) or lora.path)) for lora in loras]
    return settings


def carried(note: Mapping[str, Any]) -> str:
    """Return the JSON text that is stored inside a video file: the part of its sidecar that reproduces the video.

    Users share videos, so paths of this machine are reduced to file names.
    """
    settings = without_places(note["settings"])
    kept = ("plug_ins", "format", "pipeline", "versions")
    return json.dumps({"settings": settings, **{name: note[name] for name in kept}}, ensure_ascii=False)


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a sidecar with absolute paths reduced to file names."""
    found = dict(settings)
    for name in {"model", "lit", "image"} & found.keys():
        found[name] = name_of(found[name])
    loras = map(parse_lora, found.get("lora", ()))
    found["lora"] = [str(dataclasses.replace(lora, path=name_of(lora.path) or lora.path)) for lora in loras]
    if found.get("enhance_prompt") is not None:
        found["enhance_prompt"] = name_without_place(found["enhance_prompt"])
    return found


def name_of(name: str | None) -> str | None:
    """Return the last part of an absolute path; any other text, such as a Hub id, is returned unchanged."""
    return name if name is None or not Path(name).is_absolute() else Path(name).name


def plug_in_places(config: GenerateConfig) -> dict[str, str]:
    """Return the origin of the plug-ins of a request, for a sidecar: `module:function` by option."""
    return {row.option: row.apply for row in known_plug_ins() if row.option in config.plug_ins}


def _known() -> list[str]:
    fields = [name for name in GenerateConfig.__dataclass_fields__ if name != "plug_ins"]
    return [*fields, *(row.option for row in known_plug_ins())]


def _check_known(path: str | Path, settings: Mapping[str, Any], places: Any) -> None:
    """Check that all settings of a sidecar are known.

    Raises:
        UserError: a setting is unknown. If it belongs to a plug-in, the message names the package of the plug-in.
    """
    known = _known()
    unknown = sorted(set(settings) - set(known))
    for name in unknown:
        if isinstance(places, dict) and isinstance(place := places.get(name), str):
            raise UserError(
                f"the sidecar {path} was made with a plug-in {name!r} of {place.partition(':')[0]}, which this command"
                " does not have: use the command of that package, or a program with the two lines postgen.plug_ins."
                f'register_plug_in(its row) and postgen.cli.main(); to omit it, set "{name}" to null in the sidecar'
            )
    if unknown:
        raise UserError(
            f"the sidecar {path} has unknown settings {', '.join(unknown)}. Known: {', '.join(known)}. A setting of a"
            " plug-in is known only to a command that registers the plug-in"
        )


def read_sidecar(path: str | Path) -> tuple[dict[str, Any], str]:
    """Return the settings of a sidecar (for `GenerateConfig.of`), and the format of its video.

    Raises:
        UserError: the file does not exist, is not a sidecar, or has settings that this version does not know.
    """
    note = read_json(path, f"cannot read the sidecar {path}")
    settings = note.get("settings") if isinstance(note, dict) else None
    if not isinstance(settings, dict) or not isinstance(note.get("format"), str):
        raise UserError(f"{path} is not a sidecar of postgen: it has no settings or no format")
    known = _known()
    # Omit unknown plug-ins that were off.
    settings = {name: value for name, value in settings.items() if name in known or value is not None}
    _check_known(path, settings, note.get("plug_ins"))
    loras = settings.get("lora", [])
    if not isinstance(loras, list) or not all(isinstance(lora, str) for lora in loras):
        raise UserError(f"the sidecar {path} is damaged: lora must be a list of texts, got {shown(loras)}")
    settings["lora"] = tuple(loras)
    try:
        GenerateConfig.of({"prompt": "", **settings})
    except UserError as error:
        raise UserError(f"the sidecar {path} is damaged: {error}") from error
    return settings, note["format"]


def with_places(settings: Mapping[str, Any], sidecar: str | Path) -> dict[str, Any]:
    """Return the settings of a sidecar with the paths of the files that they name.

    A sidecar of the app, or of a shared video, contains file names without folders. This function searches the files
    in the current folder and beside the sidecar. Hub ids stay unchanged.

    Args:
        settings: settings from `read_sidecar`, without those that the user replaces.
        sidecar: path of the sidecar.

    Raises:
        UserError: a model, LoRA, adapter or first frame is not found.
    """
    found = dict(settings)
    for name, what in (("model", "the model"), ("lit", "the adapter"), ("image", "the first frame")):
        if found.get(name) is not None and (name == "image" or found[name] != EMBEDDED):
            found[name] = _placed(found[name], sidecar, what, f"--{name} PATH")
    placed = []
    for lora in map(parse_lora, found.get("lora", ())):
        again = f"--lora {dataclasses.replace(lora, path='PATH')}"
        if len(found["lora"]) > 1:
            again += f", and with another --lora for each of its {len(found['lora'])}"
        path = _placed(lora.path, sidecar, "the LoRA", again)
        placed.append(str(dataclasses.replace(lora, path=path)))
    return found | {"lora": tuple(placed)} if placed else found


def _placed(name: str, sidecar: str | Path, what: str, again: str) -> str:
    """Return the path of a file that a sidecar names."""
    path, beside = Path(name).expanduser(), Path(sidecar).absolute().parent
    if path.exists():
        return name
    if not path.is_absolute() and (beside / path).exists():
        return str(beside / path)
    if what not in ("the first frame", "the adapter") and is_hub_id(name):
        return name
    if path.is_absolute():
        raise UserError(f"the sidecar {sidecar} names {what} {name}, which does not exist: give its path with {again}")
    places = " nor in ".join(dict.fromkeys([str(Path.cwd()), str(beside)]))
    raise UserError(
        f"the sidecar {sidecar} names {what} {name} without a folder, and it is not in {places}: give its path with"
        f" {again}"
    )


def _absolute(name: str | None) -> str | None:
    if name is None or not Path(name).expanduser().exists():
        return name
    return str(Path(name).expanduser().resolve())


def _check_enhancer(config: GenerateConfig) -> None:
    if config.enhance_prompt is not None and not config.enhance_prompt.strip():
        raise SettingError("enhance_prompt", " is empty: name an enhancer, such as template")
    text = config.enhanced_prompt
    check_text("the prompt enhancer", config.enhance_prompt or "")
    check_text("the enhanced prompt", text or "")
    if text is not None and (config.enhance_prompt is None or not text.strip()):
        raise SettingError("enhanced_prompt", " must be a text that is not empty, and needs enhance_prompt")


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SettingError(name, f" {value!r}. Known: {', '.join(known)}", before="unknown ")


_KINDS: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "tuple": (tuple,),
    "Mapping": (Mapping,),
}


def _check_types(config: GenerateConfig) -> None:
    """Check the type of each setting, because settings also come from sidecars and from `key=value` texts."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        kind, _, optional = str(item.type).partition(" | ")
        allowed = _KINDS[kind.partition("[")[0]]
        if (value is None and optional) or (isinstance(value, allowed) and not isinstance(value, bool)):
            continue
        raise SettingError(item.name, f" must be {kind}, got {shown(value)}")


def _check_ranges(config: GenerateConfig) -> None:
    """Check the ranges of all numbers, before a model is loaded.

    Raises:
        UserError: a number is out of its range.
    """
    for name, (least, most) in RANGES.items():
        value = getattr(config, name, None)
        if value is None or least <= value <= most:
            continue
        if isinstance(value, float) and math.isnan(value):
            bound = "a number"
        elif value > most:
            bound = f"at most {most:,}"
        else:
            bound = "at least 0" if least == 0 else f"at least {least}" if value > 0 else "above 0"
        raise SettingError(name, f" must be {bound}, got {shown(value)}")
    width, height, frames = config.width or 1, config.height or 1, config.num_frames or 1
    if width * height * frames > MOST_PIXELS:
        raise UserError(
            f"{frames} frames of {width} x {height} pixels are more than the allowed {MOST_PIXELS:,} pixels of a clip:"
            " make it smaller or shorter"
        )
