"""Requests for a video: check the values of a page or client, queue the job, make the video, read settings back."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from postgen.apps.controls import presets
from postgen.apps.jobs import Task, Work
from postgen.apps.preview import Preview
from postgen.apps.state import App
from postgen.apps.uploads import discarding, uploaded_picture
from postgen.errors import UserError, is_whole, shown
from postgen.families.loading import ModelFacts
from postgen.families.lora import LARGEST, parse_lora
from postgen.files import replacing
from postgen.generate import Job, Watch, make_video, output_paths, prepare
from postgen.plug_ins import known_plug_ins
from postgen.reading import read_json
from postgen.request import GenerateConfig, name_of, without_places

KIND = "generate"
"""Kind of the results in the history."""
VIDEO = "video.mp4"
"""File name of the video of a result."""
LARGEST_SEED = 2**53 - 1
"""Largest seed: numbers of a browser are exact up to this value."""
_RANDOM = 2**31
LONGEST = 2000
"""Most characters of a prompt: a tokenizer takes minutes for a million characters and cannot be cancelled."""
_TITLE = 60
"""Characters of the prompt that are used as the title of a job."""
_ALSO = {"negative prompt": "negative_prompt", "LoRA": "lora", "first frame": "image", "picture": "image"}
_ALSO |= {"LoRA scale": "lora_scale"}
"""Words of messages that name a field -> the field."""
_COPIES = 2
"""Smallest number of float32 copies of a finished clip that are in memory at the same time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """A request as the page or a client sent it. No value is checked yet; None means the default of the model."""

    prompt: Any = ""
    model: Any = None
    """A name of `App.model_names`."""
    negative_prompt: Any = None
    steps: Any = None
    width: Any = None
    height: Any = None
    frames: Any = None
    guidance: Any = None
    seed: Any = None
    lora: Any = None
    """A name of `App.loras`."""
    lora_scale: Any = 1.0
    image: Any = None
    """Path of an uploaded first frame in Gradio's folder of uploads."""
    plug_ins: Mapping[str, str] = field(default_factory=dict)
    """Settings of plug-ins as texts, by option name, as in `GenerateConfig.plug_ins`."""


FIELDS = tuple(item.name for item in dataclasses.fields(Form) if item.name != "plug_ins")
"""Fields in the order of the page's components; the components of plug-ins follow."""
_SETTINGS = {"steps": "num_inference_steps", "frames": "num_frames", "guidance": "guidance_scale"}
_SETTINGS |= {name: name for name in ("negative_prompt", "width", "height")}
_WHOLE = {"steps": "steps", "width": "width", "height": "height", "frames": "frames"}


def job_of(app: App, form: Form) -> Job:
    """Check a request before it enters the queue, and return its job.

    The first frame of the job is the path of the upload; `submitted` stores a copy. An upload that is not a valid
    picture is deleted.

    Raises:
        UserError: a value is invalid; the message is about the first one.
    """
    check_prompts(form.prompt, form.negative_prompt)
    fields: dict[str, Any] = {}
    for name, setting in _SETTINGS.items():
        value = getattr(form, name)
        if value not in (None, ""):
            fields[setting] = _whole(name, value) if name in _WHOLE else value
    if not is_whole(form.seed, 0, LARGEST_SEED):
        raise UserError(f"the seed must be a whole number from 0 to {LARGEST_SEED:,}, got {shown(form.seed)}")
    scale = 1.0 if form.lora_scale in (None, "") else form.lora_scale
    if (lora := app.lora(form.lora)) is not None:
        fields["lora"] = (_scaled(lora, scale),)
    elif scale != 1:
        raise UserError(f"the LoRA scale is {shown(scale)}, but no LoRA is chosen: choose one, or set the scale to 1")
    model = app.model(form.model)
    if form.image is not None:
        _check_takes_image(app.facts(model))
        with discarding(form.image):
            uploaded_picture(form.image, app.settings, "first frame")
        fields["image"] = form.image
    job = prepare(app.request(form.prompt, model=model, seed=form.seed, plug_ins=form.plug_ins, **fields))
    _check_memory(job.config)
    return job


def check_prompts(prompt: Any, negative: Any = None) -> None:
    """Check that the prompt is a text, and that prompt and negative prompt have at most `LONGEST` characters.

    Raises:
        UserError: the prompt is not a text, or one of the two is too long.
    """
    if not isinstance(prompt, str):
        raise UserError("the prompt must be a text: say what the video shows")
    for name, text in (("the prompt", prompt), ("the negative prompt", negative)):
        if isinstance(text, str) and len(text) > LONGEST:
            raise UserError(f"{name} has {len(text):,} characters, and at most {LONGEST:,} are allowed: shorten it")


def submitted(app: App, form: Form) -> Task:
    """Check a form and put its job into the queue.

    Raises:
        UserError: a value is invalid (see `job_of`), or too many jobs are waiting.
    """
    job = job_of(app, form)
    title = job.config.prompt[:_TITLE]
    if form.image is None:
        return app.jobs.submit(title, work_of(app, job))
    # The sidecar of a result names the first frame, so the picture must outlive the upload: `hold` keeps it until the
    # job ends, and as long as a result uses it.
    path = app.pictures.hold(uploaded_picture(form.image, app.settings, "first frame"))
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, image=str(path)))
    try:
        return app.jobs.submit(title, work_of(app, job), lambda: app.pictures.release(path))
    except UserError:
        app.pictures.release(path)
        raise


def filled(app: App, form: Form, preset: str) -> Form:
    """Return the form with the numbers of a preset in place of missing numbers.

    Raises:
        UserError: the preset or the model is unknown.
    """
    own = presets(app.facts(app.model(form.model)))
    if not isinstance(preset, str) or preset not in own:
        raise UserError(f"unknown preset {shown(preset)}. Known: {', '.join(own)}")
    names = ("steps", "width", "height", "frames", "guidance")
    empty = [name for name in names if getattr(form, name) is None]
    return dataclasses.replace(form, **{name: getattr(own[preset], name) for name in empty})


def drawn_seed() -> int:
    """Return a random seed, from 0 to 2**31 - 1."""
    return secrets.randbelow(_RANDOM)


def work_of(app: App, job: Job) -> Work:
    """Return the work of a queued job that loads the model, makes the video and adds it to the history.

    The work returns the id of the new history entry.
    """

    def work(task: Task) -> str:
        task.tell(f"Loading {shown_model(job.config.model)}")
        with app.models.pipeline(job) as pipe:
            _tell_unknown(task, pipe, job)
            preview = Preview(pipe, task.show)
            watch = Watch(look=preview.look, early=lambda: task.early)
            task.tell("Making the video")
            with app.history.adding(KIND) as new:
                paths, kind = output_paths(new.folder / VIDEO)
                clip = make_video(pipe, job, paths, kind, lambda done, total: _stepped(task, done, total), watch)
                task.check()
                hide_places(new.folder)
                new.poster  # noqa: B018 - written here, so that the gallery does not wait for it later
            preview.learn(watch.latents, clip)
        return new.id

    return work


def shown_model(model: str | None) -> str:
    """Return the name of a model on the page; for a local folder the folder name without its path."""
    from postgen.apps.state import EMBEDDED

    return EMBEDDED if model is None else Path(model).name if Path(model).is_dir() else model


def note_of(path: Path) -> Mapping[str, Any]:
    """Read the sidecar of a result.

    Raises:
        UserError: the sidecar cannot be read or is damaged.
    """
    note = read_json(path, "the settings of this result cannot be read")
    if not isinstance(note, dict) or not isinstance(note.get("settings"), dict):
        raise UserError("the settings of this result cannot be read: the file was not written by postgen")
    # JSON answers of the server hold integers of at most 64 bits.
    if any(isinstance(one, int) and one.bit_length() > 63 for one in (*note.values(), *note["settings"].values())):
        raise UserError("the settings of this result cannot be read: a number is too large")
    return note


def hide_places(folder: Path) -> None:
    """Replace paths of this machine by file names in the sidecars and the report in a folder.

    All users of the page can read these files.
    """
    for path in folder.glob("*.json"):
        note = read_json(path, "the settings of this result cannot be read")
        if "settings" in note:
            note["settings"] = without_places(note["settings"])
        for side in ("a", "b"):  # only the report of a comparison has these keys
            if side in note:
                note[side]["model"] = name_of(note[side]["model"])
        with replacing(path) as part:
            part.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def form_of(app: App, settings: Mapping[str, Any]) -> tuple[Form, list[str]]:
    """Return the form for the settings of a sidecar, and a list of the settings that this server cannot provide.

    The sidecar may come from anyone, so no path in it is opened. Its model, LoRA and first frame are used only if this
    server already offers them.

    Args:
        app: the server.
        settings: the `settings` of a sidecar.

    Raises:
        UserError: the settings have no prompt or no valid seed.
    """
    prompt, seed = settings.get("prompt"), settings.get("seed")
    if not isinstance(prompt, str) or not is_whole(seed, 0, LARGEST_SEED):
        raise UserError(
            f"the settings have no prompt, or no seed from 0 to {LARGEST_SEED:,}: use postgen generate --from"
        )
    missing: list[str] = []
    model = _own_model(app, settings.get("model"), missing)
    lora, scale = _own_lora(app, settings.get("lora"), missing)
    picture = _own_picture(app, settings.get("image"), missing)
    if settings.get("lit") is not None:  # the page has no control for LiT adapters
        missing.append("the linear-attention adapter")
    if isinstance(better := settings.get("enhanced_prompt"), str):
        prompt = better  # the page has no enhancer, and the video was made from these words
    rest = {name: _number_or_text(settings.get(setting)) for name, setting in _SETTINGS.items()}
    texts = {row.option: text for row in known_plug_ins() if isinstance(text := settings.get(row.option), str)}
    form = Form(
        prompt=prompt, model=model, seed=seed, lora=lora, lora_scale=scale, image=picture, plug_ins=texts, **rest
    )
    return form, missing


def values_of(form: Form, plug_ins: Sequence[Any]) -> list[Any]:
    """Return the values of the page's components for a form, in their order.

    Args:
        form: the form.
        plug_ins: values of the plug-in controls, from `postgen.apps.controls.plug_in_values`.
    """
    return [*(getattr(form, name) for name in FIELDS), *plug_ins]


def _check_takes_image(facts: ModelFacts) -> None:
    if not facts.takes_image and facts.image_pipeline is None:
        raise UserError(f"{facts.pipeline} takes text only: remove the first frame or use an image-to-video model")


def _check_memory(config: GenerateConfig) -> None:
    """Refuse a clip whose decoded frames alone do not fit into the memory of this machine."""
    if not {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    width, height, frames = config.width or 1, config.height or 1, config.num_frames or 1
    if (least := 12 * _COPIES * width * height * frames) > memory:
        raise UserError(
            f"{frames} frames of {width} x {height} pixels take at least {least / 2**30:.0f} GiB of memory, and this"
            f" machine has {memory / 2**30:.0f}: make the video smaller or shorter"
        )


def _tell_unknown(task: Task, pipe: Any, job: Job) -> None:
    """Show a note with the words of the prompt that are not in the closed vocabulary of the model, if it has one."""
    if not (examples := job.facts.closed_vocabulary):
        return
    from postgen.training.tokenizers import unknown_words

    if words := unknown_words(pipe.tokenizer, job.config.prompt):
        task.note(f'This model does not know: {", ".join(words)}. It knows prompts like "{examples[0]}".')


def _stepped(task: Task, done: int, total: int) -> None:
    task.step(done, total)
    if done == total:
        task.tell("Decoding the frames")


def _whole(name: str, value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not is_whole(value, 1):
        raise UserError(f"{_WHOLE[name]} must be a whole number of at least 1, got {shown(value)}")
    return int(value)


def _scaled(lora: str, scale: Any) -> str:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not -LARGEST <= scale <= LARGEST:
        raise UserError(f"the LoRA scale must be from -{LARGEST:g} to {LARGEST:g}, got {shown(scale)}")
    return str(dataclasses.replace(parse_lora(lora), scale=float(scale)))


def _own_model(app: App, model: Any, missing: list[str]) -> str:
    from postgen.apps.state import EMBEDDED

    if model is None:
        return EMBEDDED
    named = [name for name in app.model_names if name == model]
    named = named or [name for name in app.model_names if name != EMBEDDED and _same_place(name, model)]
    if len(named) == 1:  # models in two folders of the same name cannot be distinguished
        return named[0]
    if app.settings.any_model and isinstance(model, str):
        return model
    missing.append("the model")
    return app.model_names[0]


def _own_lora(app: App, loras: Any, missing: list[str]) -> tuple[str | None, float]:
    if not loras:
        return None, 1.0
    texts = [text for text in loras if isinstance(text, str)] if isinstance(loras, list | tuple) else []
    if len(texts) == 1:
        choice = parse_lora(texts[0])
        for name, text in app.loras().items():
            own = parse_lora(text)
            if own.network == choice.network and (own.path == choice.path or _same_place(own.path, choice.path)):
                return name, choice.scale
    missing.append("the LoRA" if len(texts) < 2 else "the LoRAs (the page takes only one)")
    return None, 1.0


def _own_picture(app: App, image: Any, missing: list[str]) -> str | None:
    if image is None:
        return None
    if (path := app.pictures.find(image)) is not None:
        return str(path)
    missing.append("the first frame")
    return None


def _same_place(own: str, other: Any) -> bool:
    """Whether a sidecar names this file of the server, by its path or by its file name."""
    place = Path(own).expanduser()
    return isinstance(other, str) and place.exists() and other in (str(place.resolve()), place.resolve().name)


def _number_or_text(value: Any) -> Any:
    return value if isinstance(value, int | float | str) and not isinstance(value, bool) else None


def place_of(message: str) -> int:
    """Return the index of the field that an error message is about, in `FIELDS` and the plug-in controls after them.

    The first field that the message names counts; a message without a field name counts as one about the prompt.
    """
    words = {name: FIELDS.index(name) for name in FIELDS}
    words |= {setting: words[name] for name, setting in _SETTINGS.items()}
    words |= {said: words[name] for said, name in _ALSO.items()}
    words |= {row.option: len(FIELDS) + number for number, row in enumerate(known_plug_ins())}
    found = [(message.find(word), -len(word), place) for word, place in words.items() if word in message]
    return min(found)[2] if found else 0
