"""Options that several commands share. Every default is None, so that a command knows which options the user gave."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

from postgen.errors import UserError, shown
from postgen.plug_ins import PlugIn, known_plug_ins
from postgen.prompt.naming import DEFAULT

MODEL, LOOK, LONG, RUN, FILES = "Model", "Video", "Long videos", "Running", "Files"

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Local diffusers folder, Hub id, or the word embedded. \\[default: the embedded model]",
        rich_help_panel=MODEL,
    ),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        help="LoRA file or folder as [NETWORK=]PATH[:scale]; can be repeated. NETWORK is transformer or transformer_2,"
        " for models with two transformers.",
        rich_help_panel=MODEL,
    ),
]
Lit = Annotated[
    str | None,
    typer.Option(
        "--lit",
        metavar="PATH|embedded",
        help="Adapter of hybrid linear attention: a file, or embedded for the adapter of the embedded model.",
        rich_help_panel=MODEL,
    ),
]
Width = Annotated[
    int | None, typer.Option("--width", help="Width in pixels. \\[default: the model's]", rich_help_panel=LOOK)
]
Height = Annotated[
    int | None, typer.Option("--height", help="Height in pixels. \\[default: the model's]", rich_help_panel=LOOK)
]
Size = Annotated[
    str | None,
    typer.Option(
        "--size",
        help="Width and height in pixels, such as 96x96; for most models multiples of 16. \\[default: the model's]",
        rich_help_panel=LOOK,
    ),
]
Frames = Annotated[
    int | None,
    typer.Option(
        "--frames",
        help="Number of frames; for most models 4n+1, such as 17. \\[default: the model's]",
        rich_help_panel=LOOK,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", help="Number of denoising steps. \\[default: the model's]", rich_help_panel=LOOK),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance", help="Guidance scale; 1 switches guidance off. \\[default: the model's]", rich_help_panel=LOOK
    ),
]
TrueCfg = Annotated[
    float | None,
    typer.Option(
        "--true-cfg",
        help="Scale of classifier-free guidance for a guidance-distilled model (HunyuanVideo); a negative prompt needs"
        " it.",
        rich_help_panel=LOOK,
    ),
]
Negative = Annotated[
    str | None,
    typer.Option("--negative-prompt", help="Description of what the video should not show.", rich_help_panel=LOOK),
]
EnhancePrompt = Annotated[
    str | None,
    typer.Option(
        "--enhance-prompt",
        metavar="[NAME]",
        help="Rewrite the prompt for the model: template (also without a NAME) for phrases without a language model,"
        " smollm2, chat:MODEL, api:MODEL@URL, or your own module:function; none for off. A word after this option is"
        " its NAME, so put the prompt before it. \\[default: off]",
        rich_help_panel=LOOK,
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Seed of the first video. \\[default: 0]", rich_help_panel=LOOK)
]
Image = Annotated[
    str | None,
    typer.Option(
        "--image",
        help="Image of the first frame, for image-to-video models and the embedded model.",
        rich_help_panel=LOOK,
    ),
]
Fps = Annotated[
    float | None,
    typer.Option(
        "--fps",
        help="Frames per second of the file; few models (LTX) also use it for the motion. \\[default: the model's]",
        rich_help_panel=LOOK,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="auto, float32, bfloat16 or float16. \\[default: auto]", rich_help_panel=RUN),
]
Device = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps. \\[default: auto]", rich_help_panel=RUN)
]
Offload = Annotated[
    str | None,
    typer.Option(
        "--offload",
        help="Offloading to CPU memory: none, auto, model or sequential. \\[default: none]",
        rich_help_panel=RUN,
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format", help="mp4, webm, gif or frames. \\[default: by the suffix, otherwise mp4]", rich_help_panel=FILES
    ),
]

_OTHERS = (
    *("prompt", "prompts", "output", "format", "count", "sidecar", "from", "a", "b", "plug_ins", "help"),
    *("enhanced_prompt", "prompt_enhancer", "long", "stream", "go_on", "continue", "depth", "adapter"),
)
"""Names that commands and `GenerateConfig` use for other purposes, so that a plug-in cannot have them."""

SETTINGS: dict[str, tuple[Any, str]] = {
    "model": (Model, "model"),
    "lora": (Lora, "lora"),
    "lit": (Lit, "lit"),
    "size": (Size, "size"),
    "width": (Width, "width"),
    "height": (Height, "height"),
    "frames": (Frames, "num_frames"),
    "steps": (Steps, "num_inference_steps"),
    "guidance": (Guidance, "guidance_scale"),
    "true_cfg": (TrueCfg, "true_cfg_scale"),
    "negative_prompt": (Negative, "negative_prompt"),
    "enhance_prompt": (EnhancePrompt, "enhance_prompt"),
    "seed": (Seed, "seed"),
    "image": (Image, "image"),
    "fps": (Fps, "fps"),
    "dtype": (Dtype, "dtype"),
    "device": (Device, "device"),
    "offload": (Offload, "offload"),
}
"""All settings of a video: parameter of a command -> (option, field of `GenerateConfig`)."""


def setting_options() -> dict[str, tuple[Any, str]]:
    """Return `SETTINGS` and the options of the plug-ins; the field of a plug-in is its option.

    Raises:
        UserError: a plug-in has the same option as a setting.
    """
    options = dict(SETTINGS)
    taken = {*SETTINGS, *(field for _, field in SETTINGS.values()), *_OTHERS}
    for row in known_plug_ins():
        if row.option in taken:
            raise UserError(f"the option {row.option} of the plug-in {row.name} already exists: choose another name")
        options[row.option] = (_plug_in_option(row), row.option)
    return options


_CONVERT = ("layers", "budget", "kinds", "first_block", "inherit")
"""Settings of `postgen convert lit` that are no settings of a video; each has the name of its option."""


def option_of(setting: str) -> str:
    """Return the command-line option of a setting, for messages.

    Args:
        setting: field of `GenerateConfig`, or setting of `postgen convert lit`. Other names, and width and height,
            which --size sets too, are returned unchanged.

    >>> option_of("num_inference_steps"), option_of("first_block"), option_of("width"), option_of("rank")
    ('--steps', '--first-block', 'width', 'rank')
    """
    names = {field: option for option, (_, field) in setting_options().items() if field not in ("width", "height")}
    name = names.get(setting, setting if setting in _CONVERT else None)
    return setting if name is None else f"--{name.replace('_', '-')}"


def with_optional_values(words: list[str]) -> list[str]:
    """Return the words of a command line with the default values of options that may stand without one.

    >>> with_optional_values(["generate", "a", "--enhance-prompt", "--steps", "4"])
    ['generate', 'a', '--enhance-prompt', 'template', '--steps', '4']
    """
    found: list[str] = []
    for place, word in enumerate(words):
        if word == "--":
            return [*found, *words[place:]]
        found.append(word)
        alone = place + 1 == len(words) or words[place + 1].startswith("-")
        if word == "--enhance-prompt" and alone:
            found.append(DEFAULT)
    return found


def _plug_in_option(row: PlugIn) -> Any:
    text = f"{row.summary} \\[default: off]"
    return Annotated[str | None, typer.Option(row.flag, metavar=row.metavar, help=text, rich_help_panel=row.panel)]


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `given` of a command by the options of all settings.

    Args:
        command: function whose parameter `given` takes the settings that the user gave, in the form of `settings`.
    """
    options, parameters = setting_options(), []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if parameter.name != "given":
            parameters.append(parameter)
            continue
        for name, (option, _) in options.items():
            parameters.append(parameter.replace(name=name, annotation=option, default=None))

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        given = {field: values.pop(name) for name, (_, field) in options.items()}
        command(**values, given=settings(given.pop("size"), **given))

    # typer reads the signature and the annotations.
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def settings(size: str | None, **given: Any) -> dict[str, Any]:
    """Return the settings that the user gave, for `GenerateConfig.of`.

    Raises:
        UserError: the size is wrong, or given twice.
    """
    said = {name: value for name, value in given.items() if value is not None and value != []}
    if "lora" in said:
        said["lora"] = tuple(said["lora"])
    if size is not None:
        match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", size)
        if match is None:
            raise UserError(f"--size must look like 96x96 (width x height), got {shown(size)}")
        if "width" in said or "height" in said:
            raise UserError("--size and --width/--height set the same size: give one of them")
        said["width"], said["height"] = int(match[1]), int(match[2])
    return said
