"""What is asked for: the settings of one video, and the sidecar that keeps them. Light to import."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from postgen.assets import EMBEDDED
from postgen.errors import UserError, check_text, shown
from postgen.families.loading import check_device_name
from postgen.families.lora import parse_lora
from postgen.families.model_folder import DTYPES, is_hub_id
from postgen.families.offload import OFFLOADS
from postgen.families.video_calls import MOST_PIXELS, RANGES
from postgen.plug_ins import known_plug_ins
from postgen.reading import check_name, read_json


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """One video. A field that is None takes the model's default."""

    prompt: str
    """What the video shows."""
    model: str | None = None
    """A local diffusers folder or a hub id; None is the embedded model."""
    negative_prompt: str | None = None
    """What it should not show; needs guidance above 1, or true guidance where the model has it."""
    width: int | None = None
    """Pixels."""
    height: int | None = None
    """Pixels."""
    num_frames: int | None = None
    """Frames of the clip."""
    num_inference_steps: int | None = None
    """Denoising steps."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance; up to 1 is off. A distilled network (HunyuanVideo) is told it."""
    true_cfg_scale: float | None = None
    """Scale of classifier-free guidance beside that of a distilled network, against the negative prompt or, where
    there is none, the empty one; up to 1 is off."""
    seed: int = 0
    """Seed of the initial noise, drawn on the CPU so that every device starts from the same."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    offload: str = "none"
    """none, auto, model or sequential: `postgen.families.offload.place_weights`."""
    lora: tuple[str, ...] = ()
    """LoRA files, each `PATH[:scale]`."""
    lit: str | None = None
    """Adapter of hybrid linear attention (`postgen.lit.adapter`): a file, a folder with one, or `embedded`."""
    image: str | None = None
    """Picture file of the first frame, for image-to-video models; it is resized to the clip."""
    fps: float | None = None
    """Frames per second of the written video; a network that is conditioned on them is told."""
    plug_ins: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Texts by option of `postgen.plug_ins`, as {"enhance": "auto"}; what is not named is off."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """Return a request from settings as commands and sidecars have them: an option of a plug-in beside the fields.

        Raises:
            UserError: a setting that is none, or a wrong one.
        """
        fields = cls.__dataclass_fields__.keys() - {"plug_ins"}
        own = {name: value for name, value in settings.items() if name in fields}
        others = {name: value for name, value in settings.items() if name not in fields and value is not None}
        return cls(**own, plug_ins=others)

    def __post_init__(self) -> None:
        _check_types(self)
        if not self.prompt.strip():
            raise UserError("the prompt is empty: say what the video shows")
        check_text("the prompt", self.prompt)
        check_text("the negative prompt", self.negative_prompt or "")
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("offload", self.offload, OFFLOADS)
        check_device_name(self.device)
        _check_ranges(self)
        options = [row.option for row in known_plug_ins()]
        for option, text in self.plug_ins.items():
            if option not in options:
                raise UserError(f"unknown setting {option!r}. Plug-ins: {', '.join(options)}")
            if not isinstance(text, str):
                raise UserError(f"{option} must be a text, got {shown(text)}")
        if not all(isinstance(lora, str) for lora in self.lora):
            raise UserError(f"lora must be texts, [NETWORK=]PATH[:scale], got {shown(self.lora)}")
        if self.lit is not None:
            check_name(self.lit, "the adapter")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be between 0 and 2**63 - 1, got {shown(self.seed)}")


def portable(config: GenerateConfig) -> dict[str, Any]:
    """Return the settings for a sidecar: file names become absolute, so that it works from every folder.

    Plug-ins stand beside the fields, each under its option; None is off.
    """
    settings = dataclasses.asdict(config)
    texts = settings.pop("plug_ins")
    settings |= {row.option: texts.get(row.option) for row in known_plug_ins()}
    for name in ("model", "image", *(["lit"] if config.lit != EMBEDDED else [])):
        settings[name] = _absolute(settings[name])
    loras = map(parse_lora, config.lora)
    settings["lora"] = [str(dataclasses.replace(lora, path=_absolute(lora.path) or lora.path)) for lora in loras]
    return settings


def carried(note: Mapping[str, Any]) -> str:
    """Return what a video file carries of its sidecar, JSON: what makes it again.

    Videos are passed on: of files of this machine their names are there, not where they are.
    """
    settings = without_places(note["settings"])
    kept = ("plug_ins", "format", "pipeline", "versions")
    return json.dumps({"settings": settings, **{name: note[name] for name in kept}}, ensure_ascii=False)


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a sidecar with the names of files of this machine in place of where they are."""
    found = dict(settings)
    for name in {"model", "lit", "image"} & found.keys():
        found[name] = name_of(found[name])
    loras = map(parse_lora, found.get("lora", ()))
    found["lora"] = [str(dataclasses.replace(lora, path=name_of(lora.path) or lora.path)) for lora in loras]
    return found


def name_of(name: str | None) -> str | None:
    """Return the name of a file or folder of an absolute place; anything else, as an id of the hub, stays."""
    return name if name is None or not Path(name).is_absolute() else Path(name).name


def plug_in_places(config: GenerateConfig) -> dict[str, str]:
    """Return, for a sidecar, where the plug-ins come from that a request names: `module:function` by option."""
    return {row.option: row.apply for row in known_plug_ins() if row.option in config.plug_ins}


def _known() -> list[str]:
    fields = [name for name in GenerateConfig.__dataclass_fields__ if name != "plug_ins"]
    return [*fields, *(row.option for row in known_plug_ins())]


def _check_known(path: str | Path, settings: Mapping[str, Any], places: Any) -> None:
    """Refuse settings that nobody here knows; one of a plug-in says where that comes from.

    Raises:
        UserError: the first of them.
    """
    known = _known()
    unknown = sorted(set(settings) - set(known))
    for name in unknown:
        if isinstance(places, dict) and isinstance(place := places.get(name), str):
            raise UserError(
                f"the sidecar {path} was made with a plug-in {name!r} of {place.partition(':')[0]}, which this command"
                " does not have: use the command of its package, or a program of two lines, postgen.plug_ins."
                f'register_plug_in(its row) and postgen.cli.main(); without it, set "{name}" to null in the sidecar'
            )
    if unknown:
        raise UserError(
            f"the sidecar {path} has unknown settings {', '.join(unknown)}. Known: {', '.join(known)}. One of a"
            " plug-in is known to the command that registers it"
        )


def read_sidecar(path: str | Path) -> tuple[dict[str, Any], str]:
    """Return the settings of a sidecar (for `GenerateConfig.of`) and the format of its video.

    Raises:
        UserError: no such file, not a sidecar, or settings that this version does not know.
    """
    note = read_json(path, f"cannot read the sidecar {path}")
    settings = note.get("settings") if isinstance(note, dict) else None
    if not isinstance(settings, dict) or not isinstance(note.get("format"), str):
        raise UserError(f"{path} is no sidecar of postgen: it has no settings or no format")
    known = _known()
    # A plug-in that was off is not missed.
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
    """Return the settings of a sidecar with the places of the files that they name.

    A sidecar of the app, or of a video that was passed on, has names only: they are looked for in the present folder
    and beside the sidecar. Ids of the hub stay.

    Args:
        settings: from `read_sidecar`, those left out that the user gives anew.
        sidecar: its file.

    Raises:
        UserError: a model, LoRA, adapter or first frame that is at neither place.
    """
    found = dict(settings)
    for name, what in (("model", "the model"), ("lit", "the adapter"), ("image", "the first frame")):
        if found.get(name) is not None and (name, found[name]) != ("lit", EMBEDDED):
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
    """Return where a file is that a sidecar names."""
    path, beside = Path(name).expanduser(), Path(sidecar).absolute().parent
    if path.exists():
        return name
    if not path.is_absolute() and (beside / path).exists():
        return str(beside / path)
    if what not in ("the first frame", "the adapter") and is_hub_id(name):
        return name
    if path.is_absolute():
        raise UserError(f"the sidecar {sidecar} names {what} {name}, which is not there: say where it is with {again}")
    places = " nor in ".join(dict.fromkeys([str(Path.cwd()), str(beside)]))
    raise UserError(
        f"the sidecar {sidecar} names {what} {name} without its place, and it is not in {places}: say where it is with"
        f" {again}"
    )


def _absolute(name: str | None) -> str | None:
    if name is None or not Path(name).expanduser().exists():
        return name
    return str(Path(name).expanduser().resolve())


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"unknown {name} {value!r}. Known: {', '.join(known)}")


_KINDS: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "tuple": (tuple,),
    "Mapping": (Mapping,),
}


def _check_types(config: GenerateConfig) -> None:
    """Settings also come from files and from `key=value` texts, where a number may have become something else."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        kind, _, optional = str(item.type).partition(" | ")
        allowed = _KINDS[kind.partition("[")[0]]
        if (value is None and optional) or (isinstance(value, allowed) and not isinstance(value, bool)):
            continue
        raise UserError(f"{item.name} must be {kind}, got {shown(value)}")


def _check_ranges(config: GenerateConfig) -> None:
    """Refuse numbers that no clip can have, before a model is loaded to find that out.

    Raises:
        UserError: the first of them.
    """
    for name, (least, most) in RANGES.items():
        value = getattr(config, name, None)
        if value is None or least <= value <= most:
            continue
        if value > most:
            raise UserError(f"{name} must be at most {most:,}, got {shown(value)}")
        bound = "at least 0" if least == 0 else f"at least {least}" if value > 0 else "above 0"
        raise UserError(f"{name} must be {bound}, got {shown(value)}")
    width, height, frames = config.width or 1, config.height or 1, config.num_frames or 1
    if width * height * frames > MOST_PIXELS:
        raise UserError(
            f"{frames} frames of {width} x {height} pixels are more than the {MOST_PIXELS:,} pixels that a clip may"
            " have: make it smaller or shorter"
        )
