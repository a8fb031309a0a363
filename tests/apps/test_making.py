"""Presets, plug-in controls, and the checks of a form before it enters the queue."""

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from postgen import UserError, embedded_model, plug_ins
from postgen.apps import controls, making
from postgen.apps.making import FIELDS, Form, form_of, job_of, place_of
from postgen.apps.settings import AppSettings
from postgen.apps.state import EMBEDDED, App
from postgen.families.loading import inspect_model
from postgen.generate import portable
from postgen.plug_ins import PlugIn

SMALL = {"steps": 1, "width": 32, "height": 16, "frames": 5}


@pytest.fixture(scope="module")
def app(tiny_wan, tiny_lora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    made = App(AppSettings(model=str(tiny_wan), loras=(str(tiny_lora),), outputs=folder))
    yield made
    made.close()


def form(app, **more):
    return Form(**{"prompt": "a ball", "model": app.model_names[0], "seed": 3, **SMALL, **more})


def test_presets_of_the_embedded_model():
    own = controls.presets(inspect_model(embedded_model()))
    assert [own[name].steps for name in ("draft", "balanced", "quality")] == [8, 14, 20]
    assert {(preset.width, preset.height, preset.frames, preset.guidance) for preset in own.values()} == {
        (128, 128, 33, 3.0)
    }


def test_presets_of_a_model_of_large_pictures(tiny_wan):
    facts = inspect_model(tiny_wan)
    own = controls.presets(facts)
    assert (own["quality"].width, own["quality"].height, own["quality"].steps) == (832, 480, 50)
    assert (own["balanced"].width, own["balanced"].height, own["balanced"].steps) == (832, 480, 35)
    draft = own["draft"]
    assert draft.width * draft.height == pytest.approx(832 * 480 / 2, rel=0.1)
    for preset in own.values():
        facts.check_size(preset.frames, preset.height, preset.width)
    few = dataclasses.replace(facts, least_steps=30)
    assert controls.presets(few)["draft"].steps == 30


def test_a_plug_in_that_is_registered_has_a_control(monkeypatch):
    gr = pytest.importorskip("gradio")
    fused = plug_ins.known_plug_ins()[0]
    row = dataclasses.replace(fused, name="boost", option="boost", title="Boost", metavar="soft|hard|WEIGHT")
    monkeypatch.setattr(plug_ins, "_rows", [*plug_ins.known_plug_ins(), row])
    with gr.Blocks():
        made = controls.plug_in_controls()
    titles = ["Fused operations", "FP8 attention", "Enhance-A-Video", "Linear layers in FP8", "Boost"]
    assert [control.label for control in made] == titles
    assert [word for word, _ in made[-1].choices] == ["off", "soft", "hard"]
    assert controls.plug_in_texts(["off", "off", " auto ", None, "2.5"]) == {"enhance": "auto", "boost": "2.5"}
    assert controls.plug_in_values({"enhance": "auto"}) == ["off", "off", "auto", "off", "off"]
    assert isinstance(row, PlugIn)


@pytest.mark.parametrize("values", [[], ["off"], ["off", 3, "off"], ["off", ["auto"], "off"]])
def test_values_that_no_control_has_are_refused(values):
    with pytest.raises(UserError):
        controls.plug_in_texts(values)


@pytest.mark.parametrize(
    ("wrong", "message", "field"),
    [
        ({"prompt": "  "}, "the prompt is empty", "prompt"),
        ({"prompt": None}, "the prompt must be a text", "prompt"),
        ({"frames": 6}, "number of frames must be 4n", "frames"),
        ({"frames": 5.5}, "frames must be a whole number", "frames"),
        ({"width": 33}, "width must be", "width"),
        ({"height": -16}, "height must be", "height"),
        ({"steps": 0}, "steps must be", "steps"),
        ({"steps": "many"}, "steps must be", "steps"),
        ({"guidance": -1}, "guidance_scale must be", "guidance"),
        ({"guidance": "high"}, "guidance_scale must be", "guidance"),
        ({"seed": -1}, "seed must be", "seed"),
        ({"seed": 2**53}, "seed must be", "seed"),
        ({"seed": None}, "seed must be", "seed"),
        ({"model": "/etc"}, "no model of that name", "model"),
        ({"model": ["x"]}, "no model of that name", "model"),
        ({"lora": "/etc/passwd"}, "no LoRA of that name", "lora"),
        ({"lora_scale": 0.5}, "no LoRA is chosen", "lora_scale"),
        ({"lora_scale": "strong"}, "no LoRA is chosen", "lora_scale"),
        ({"lora_scale": [1]}, "no LoRA is chosen", "lora_scale"),
        ({"negative_prompt": "dark", "guidance": 1}, "negative prompt needs guidance", "negative_prompt"),
        ({"image": "/etc/passwd"}, "text only", "image"),
        ({"plug_ins": {"enhance": "much"}}, "enhance must be auto or a number", "enhance"),
        ({"width": 16000, "height": 16000, "frames": 101}, "GiB of memory", "frames"),
        ({"plug_ins": {"nothing": "1"}}, "unknown setting", "fused"),
    ],
)
def test_what_is_wrong_is_found_before_the_queue(app, tmp_path, wrong, message, field):
    if "image" in wrong:
        Image.new("RGB", (32, 16)).save(tmp_path / "x.png")
        wrong = {"image": str(tmp_path / "x.png")}
    with pytest.raises(UserError, match=message) as told:
        job_of(app, form(app, **wrong))
    names = [*FIELDS, *(row.option for row in plug_ins.known_plug_ins())]
    assert names[place_of(str(told.value))] == field


def test_numbers_of_a_page_and_of_a_client_are_the_same(app):
    one, two = job_of(app, form(app)), job_of(app, form(app, steps=1.0, width=32.0))
    assert one.config == two.config
    assert one.config.seed == 3


def test_a_lora_is_chosen_by_its_name(app, tiny_lora):
    job = job_of(app, form(app, lora=tiny_lora.name, lora_scale=0.5))
    assert job.config.lora == (f"{tiny_lora}:0.5",)
    with pytest.raises(UserError, match="LoRA scale"):
        job_of(app, form(app, lora=tiny_lora.name, lora_scale=float("nan")))


def test_runs_and_their_loras_are_below_the_folder_of_the_runs(tiny_lora, tmp_path):
    root, outside = tmp_path / "runs", tmp_path / "outside"
    for folder in (root / "mine" / "export", outside / "export"):
        folder.mkdir(parents=True)
        (folder / "pytorch_lora_weights.safetensors").touch()
    (root / "theirs").symlink_to(outside)
    (root / "mine" / "linked").symlink_to(outside / "export")
    app = App(AppSettings(runs=root, outputs=tmp_path / "outputs"))
    assert list(app.runs()) == ["mine"]
    assert list(app.loras()) == ["mine/export"]
    app.close()


def test_settings_of_a_result_give_its_job_again(app, tiny_lora):
    job = job_of(app, form(app, lora=tiny_lora.name, lora_scale=0.5, plug_ins={"enhance": "2"}))
    again, missing = form_of(app, json.loads(json.dumps(portable(job.config))))
    assert missing == []
    assert job_of(app, again).config == job.config
    enhanced = portable(job.config) | {"enhance_prompt": "template", "enhanced_prompt": "A red ball. Soft light."}
    again, missing = form_of(app, enhanced)
    assert (again.prompt, missing) == ("A red ball. Soft light.", [])


def test_settings_of_a_stranger_open_nothing(app, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"x")
    settings = portable(job_of(app, form(app)).config)
    settings |= {"model": str(tmp_path), "lora": [str(tmp_path / "x")], "image": str(tmp_path / "secret.png")}
    again, missing = form_of(app, settings | {"lit": "adapter.safetensors"})
    assert missing == ["the model", "the LoRA", "the first frame", "the linear-attention adapter"]
    assert (again.model, again.lora, again.image) == (app.model_names[0], None, None)


@pytest.mark.parametrize("settings", [{}, {"prompt": 3, "seed": 1}, {"prompt": "x", "seed": 2**60}])
def test_settings_that_are_none_are_refused(app, settings):
    with pytest.raises(UserError, match="no prompt, or no seed"):
        form_of(app, settings)


def test_only_models_of_the_server_unless_it_says_otherwise(app, tiny_wan, tmp_path):
    assert app.model(None) is None
    assert app.model(EMBEDDED) is None
    assert app.model(str(tiny_wan)) == str(tiny_wan)
    any_model = App(AppSettings(any_model=True, outputs=tmp_path))
    assert any_model.model("owner/name") == "owner/name"
    any_model.close()


def test_the_made_video_is_in_the_history_with_all_its_files(app):
    task = app.jobs.submit("x", making.work_of(app, job_of(app, form(app, steps=3))))
    while not (progress := app.jobs.progress(task)).ended:
        pass
    assert progress.error is None
    entry = app.history.get(progress.result)
    assert sorted(path.name for path in entry.folder.iterdir()) == [
        "poster.png",
        "video.json",
        "video.mp4",
        "video.png",
    ]
    assert Path(entry.video).stat().st_size > 0
    assert making.note_of(entry.file("video.json"))["seed"] == 3


def test_results_hold_names_and_no_places(app, tmp_path):
    job = job_of(app, form(app, lora=next(iter(app.loras()))))
    places = json.dumps({"settings": portable(job.config), "a": {"model": "/models/wan"}, "b": {"model": "embedded"}})
    (tmp_path / "video.json").write_text(places)
    making.hide_places(tmp_path)
    note = json.loads((tmp_path / "video.json").read_text())
    assert (note["a"], note["b"]) == ({"model": "wan"}, {"model": "embedded"})
    assert str(Path(app.settings.model).parent) in places
    assert str(Path(app.settings.model).parent) not in json.dumps(note)
    again, missing = form_of(app, note["settings"])
    assert (again.model, again.lora, missing) == (app.model_names[0], next(iter(app.loras())), [])


def test_of_two_models_of_one_name_none_is_taken_for_the_other(tiny_wan, tmp_path):
    other = tmp_path / "other" / tiny_wan.name
    other.mkdir(parents=True)
    two = App(AppSettings(model=str(tiny_wan), models=(str(other),), outputs=tmp_path / "outputs"))
    settings = {"prompt": "a ball", "seed": 1, "model": tiny_wan.name}
    assert form_of(two, settings)[1] == ["the model"]
    assert form_of(two, {**settings, "model": str(other)})[0].model == str(other)
    two.close()


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_a_prompt_that_no_tokenizer_reads_in_time_is_refused(app, name):
    with pytest.raises(UserError, match="2,001 characters, and at most 2,000"):
        job_of(app, form(app, **{name: "x" * 2001}))


def test_a_number_that_no_answer_holds_is_damage(tmp_path):
    for note in ({"settings": {"seed": 10**30}}, {"settings": {}, "seed": 10**30}):
        (tmp_path / "video.json").write_text(json.dumps(note))
        with pytest.raises(UserError, match="a number is too large"):
            making.note_of(tmp_path / "video.json")


def test_a_preset_that_is_no_text(app):
    with pytest.raises(UserError, match="unknown preset"):
        making.filled(app, form(app), ["draft"])
