"""Settings in the address of the page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl

import pytest

from postgen import UserError
from postgen.apps.links import form_in, link_of, names
from postgen.apps.making import Form, job_of
from postgen.apps.settings import AppSettings
from postgen.apps.state import App
from postgen.apps.tabs.results import about
from postgen.request import portable, without_places


@pytest.fixture(scope="module")
def app(tiny_wan: Path, tiny_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    outputs = tmp_path_factory.mktemp("outputs")
    made = App(AppSettings(model=str(tiny_wan), loras=(str(tiny_lora),), outputs=outputs))
    yield made
    made.close()


def test_a_link_fills_the_form_and_a_preset_the_rest(app: App) -> None:
    found = form_in(app, {"prompt": "a ball", "seed": "7", "preset": "draft", "__theme": "dark", "view": "api"})
    assert found is not None
    form, preset, randomise = found
    assert (form.prompt, form.seed, form.steps, preset, randomise) == ("a ball", 7, 20, "draft", False)
    found = form_in(app, {"prompt": "a ball", "steps": "3", "enhance": "auto"})
    assert found is not None
    assert (found[0].steps, found[0].width, found[0].plug_ins, *found[1:]) == (3, 832, {"enhance": "auto"}, None, True)


@pytest.mark.parametrize("words", [{}, {"__theme": "dark"}, {"utm_source": "x"}])
def test_an_address_that_asks_for_no_video_changes_nothing(app: App, words: dict[str, str]) -> None:
    assert form_in(app, words) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"seed": "3"}, "the prompt is empty"),
        ({"prompt": "a", "seed": "many"}, "seed must be a whole number"),
        ({"prompt": "a", "seed": "9" * 5000}, "seed must be a whole number"),
        ({"prompt": "a", "steps": "1e3"}, "steps must be a whole number"),
        ({"prompt": "a", "frames": "6"}, "4n"),
        ({"prompt": "a", "guidance": "nan"}, "guidance_scale must be"),
        ({"prompt": "a", "model": "/etc"}, "no model of that name"),
        ({"prompt": "a", "lora": "/etc/passwd"}, "no LoRA of that name"),
        ({"prompt": "a", "lora_scale": "0.5"}, "no LoRA is chosen"),
        ({"prompt": "a", "preset": "best"}, "unknown preset"),
        ({"prompt": "a", "image": "/etc/passwd"}, "unknown parameter 'image'"),
        ({"prompt": "a", "step": "3"}, "unknown parameter 'step'.*steps"),
        ({"prompt": "a", "enhance": "much"}, "enhance must be auto or a number"),
        ({"prompt": "a" * 3000}, "3,000 characters"),
    ],
)
def test_what_is_wrong_with_a_link_is_said_as_of_the_form(app: App, words: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as told:
        form_in(app, words)
    assert "\n" not in str(told.value)


def test_the_link_of_a_result_asks_for_its_settings(app: App, tiny_lora: Path) -> None:
    asked = Form(
        **{"prompt": 'a "red" ball & <b>', "model": app.model_names[0], "seed": 9, "lora": tiny_lora.name},
        **{"lora_scale": 0.5, "steps": 3, "width": 32, "height": 16, "frames": 5},
        plug_ins={"enhance": "2"},
    )
    job = job_of(app, asked)
    settings = json.loads(json.dumps(without_places(portable(job.config))))
    link = link_of(app, settings)
    assert link is not None
    found = form_in(app, dict(parse_qsl(link[1:])))
    assert found is not None
    assert job_of(app, found[0]).config == job.config
    assert 'href="?prompt=a+%22red%22+ball+%26+%3Cb%3E&amp;' in about({"settings": settings, "prompt": "x"}, link)
    assert "image" not in names()
    assert link_of(app, settings | {"model": "somebody's"}) is None
    assert link_of(app, {"prompt": 3}) is None
