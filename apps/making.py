"""From what the page or a client asks for to a checked job, and what that job does."""

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
"""Kind of these results in the history."""
VIDEO = "video.mp4"
"""Their video."""
LARGEST_SEED = 2**53 - 1
"""Beyond it a browser's numbers are not exact."""
_RANDOM = 2**31
LONGEST = 2000
"""Characters of a prompt: a tokenizer takes minutes for a million, and nothing cancels it."""
_TITLE = 60
"""Characters of a prompt that name a job."""
_ALSO = {"negative prompt": "negative_prompt", "LoRA": "lora", "first frame": "image", "picture": "image"}
_ALSO |= {"strength": "lora_scale"}
"""What messages call fields."""
_COPIES = 2
"""Of a finished clip as float32, that are in memory at once at the least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What somebody asks for, as it came: nothing of it is trusted. None takes the model's default."""

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
    """An upload: where Gradio keeps it."""
    plug_ins: Mapping[str, str] = field(default_factory=dict)
    """Texts by option, as `GenerateConfig.plug_ins`."""


FIELDS = tuple(item.name for item in dataclasses.fields(Form) if item.name != "plug_ins")
"""In this order the page's components stand; those of plug-ins follow."""
_SETTINGS = {"steps": "num_inference_steps", "frames": "num_frames", "guidance": "guidance_scale"}
_SETTINGS |= {name: name for name in ("negative_prompt", "width", "height")}
_WHOLE = {"steps": "steps", "width": "width", "height": "height", "frames": "frames"}


def job_of(app: App, form: Form) -> Job:
    """Check all that can be checked before the queue.

    Its first frame is the upload: `submitted` keeps it. An upload that is no picture is removed.

    Raises:
        UserError: the first thing that is wrong.
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
        raise UserError(f"the strength is {shown(scale)}, and there is no LoRA: choose one, or set the strength to 1")
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
    """Hold a prompt, and what is not to be in the video, to texts of at most `LONGEST` characters.

    Raises:
        UserError: the prompt is no text, or one of the two is too long.
    """
    if not isinstance(prompt, str):
        raise UserError("the prompt must be a text: say what the video shows")
    for name, text in (("the prompt", prompt), ("the negative prompt", negative)):
        if isinstance(text, str) and len(text) > LONGEST:
            raise UserError(f"{name} has {len(text):,} characters, and at most {LONGEST:,} are allowed: shorten it")


def submitted(app: App, form: Form) -> Task:
    """Check a form and queue its job.

    Raises:
        UserError: as `job_of`, or too many jobs wait.
    """
    job = job_of(app, form)
    title = job.config.prompt[:_TITLE]
    if form.image is None:
        return app.jobs.submit(title, work_of(app, job))
    # A result names its first frame, so it is kept from now on: until the job ends, and longer where it has a result.
    path = app.pictures.hold(uploaded_picture(form.image, app.settings, "first frame"))
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, image=str(path)))
    try:
        return app.jobs.submit(title, work_of(app, job), lambda: app.pictures.release(path))
    except UserError:
        app.pictures.release(path)
        raise


def filled(app: App, form: Form, preset: str) -> Form:
    """Return a form with the numbers of a preset where it has none.

    Raises:
        UserError: an unknown preset or model.
    """
    own = presets(app.facts(app.model(form.model)))
    if not isinstance(preset, str) or preset not in own:
        raise UserError(f"unknown preset {shown(preset)}. Known: {', '.join(own)}")
    names = ("steps", "width", "height", "frames", "guidance")
    empty = [name for name in names if getattr(form, name) is None]
    return dataclasses.replace(form, **{name: getattr(own[preset], name) for name in empty})


def drawn_seed() -> int:
    """Return a seed by chance."""
    return secrets.randbelow(_RANDOM)


def work_of(app: App, job: Job) -> Work:
    """Return what a job of the queue does: it loads the model, makes the video and keeps it in the history.

    Its result is the id of the entry.
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
                new.poster  # noqa: B018 - made now, and not while somebody waits for the gallery
            preview.learn(watch.latents, clip)
        return new.id

    return work


def shown_model(model: str | None) -> str:
    """Return what the page calls a model: of a folder its name, not where it is."""
    from postgen.apps.state import EMBEDDED

    return EMBEDDED if model is None else Path(model).name if Path(model).is_dir() else model


def note_of(path: Path) -> Mapping[str, Any]:
    """Return the sidecar of a result.

    Raises:
        UserError: it is damaged.
    """
    note = read_json(path, "the settings of this result cannot be read")
    if not isinstance(note, dict) or not isinstance(note.get("settings"), dict):
        raise UserError("the settings of this result cannot be read: they are none of postgen")
    if any(isinstance(one, int) and one.bit_length() > 63 for one in (*note.values(), *note["settings"].values())):
        raise UserError("the settings of this result cannot be read: a number is too large")  # for any answer
    return note


def hide_places(folder: Path) -> None:
    """Take the places of files of this machine out of the sidecars and the report in a folder; their names stay.

    Whoever uses the page can read them.
    """
    for path in folder.glob("*.json"):
        note = read_json(path, "the settings of this result cannot be read")
        if "settings" in note:
            note["settings"] = without_places(note["settings"])
        for side in ("a", "b"):  # of a comparison
            if side in note:
                note[side]["model"] = name_of(note[side]["model"])
        with replacing(path) as part:
            part.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def form_of(app: App, settings: Mapping[str, Any]) -> tuple[Form, list[str]]:
    """Return the form that asks for the settings of a sidecar, and what of them this server does not have.

    Nothing that a sidecar names is opened: its model, its LoRA and its first frame are used only where they are those
    of this server.

    Args:
        app: the server.
        settings: of a sidecar of anybody.

    Raises:
        UserError: they are no settings.
    """
    prompt, seed = settings.get("prompt"), settings.get("seed")
    if not isinstance(prompt, str) or not is_whole(seed, 0, LARGEST_SEED):
        raise UserError("the settings have no prompt, or no seed that a page can hold: use postgen generate --from")
    missing: list[str] = []
    model = _own_model(app, settings.get("model"), missing)
    lora, scale = _own_lora(app, settings.get("lora"), missing)
    picture = _own_picture(app, settings.get("image"), missing)
    if settings.get("lit") is not None:  # the page has no control for it
        missing.append("its adapter of linear attention")
    rest = {name: _number_or_text(settings.get(setting)) for name, setting in _SETTINGS.items()}
    texts = {row.option: text for row in known_plug_ins() if isinstance(text := settings.get(row.option), str)}
    form = Form(
        prompt=prompt, model=model, seed=seed, lora=lora, lora_scale=scale, image=picture, plug_ins=texts, **rest
    )
    return form, missing


def values_of(form: Form, plug_ins: Sequence[Any]) -> list[Any]:
    """Return the values of the page's components for a form, in their order; `plug_ins` are those of the controls."""
    return [*(getattr(form, name) for name in FIELDS), *plug_ins]


def _check_takes_image(facts: ModelFacts) -> None:
    if not facts.takes_image and facts.image_pipeline is None:
        raise UserError(f"{facts.pipeline} takes text only: leave the first frame out")


def _check_memory(config: GenerateConfig) -> None:
    """Refuse a clip that fits into no memory of this machine, however it is made."""
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
    """Say which words of the prompt a model with a closed vocabulary does not know."""
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
        raise UserError(f"the strength of the LoRA must be from -{LARGEST:g} to {LARGEST:g}, got {shown(scale)}")
    return str(dataclasses.replace(parse_lora(lora), scale=float(scale)))


def _own_model(app: App, model: Any, missing: list[str]) -> str:
    from postgen.apps.state import EMBEDDED

    if model is None:
        return EMBEDDED
    named = [name for name in app.model_names if name == model]
    named = named or [name for name in app.model_names if name != EMBEDDED and _same_place(name, model)]
    if len(named) == 1:  # two folders of one name cannot be told apart
        return named[0]
    if app.settings.any_model and isinstance(model, str):
        return model
    missing.append("its model")
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
    missing.append("its LoRA" if len(texts) < 2 else "its LoRAs, of which the page takes one")
    return None, 1.0


def _own_picture(app: App, image: Any, missing: list[str]) -> str | None:
    if image is None:
        return None
    if (path := app.pictures.find(image)) is not None:
        return str(path)
    missing.append("its first frame")
    return None


def _same_place(own: str, other: Any) -> bool:
    """Whether a file of this server is the one that a sidecar names: by its place, or by its name in a video."""
    place = Path(own).expanduser()
    return isinstance(other, str) and place.exists() and other in (str(place.resolve()), place.resolve().name)


def _number_or_text(value: Any) -> Any:
    return value if isinstance(value, int | float | str) and not isinstance(value, bool) else None


def place_of(message: str) -> int:
    """Return the place, among `FIELDS` and the controls of plug-ins after them, of what a message is about.

    It is the first that the message names; the prompt, where it names none.
    """
    words = {name: FIELDS.index(name) for name in FIELDS}
    words |= {setting: words[name] for name, setting in _SETTINGS.items()}
    words |= {said: words[name] for said, name in _ALSO.items()}
    words |= {row.option: len(FIELDS) + number for number, row in enumerate(known_plug_ins())}
    found = [(message.find(word), -len(word), place) for word, place in words.items() if word in message]
    return min(found)[2] if found else 0
