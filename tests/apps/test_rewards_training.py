"""The Rewards and Training tabs of a server, used by programs and by the page."""

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from postgen import world
from postgen.apps import demo
from postgen.apps.runs import Runs, Sample
from postgen.apps.sample_copies import SampleCopies
from postgen.apps.settings import AppSettings
from postgen.training.logging import MetricsFile
from postgen.training.samples import write_samples
from postgen.video import probe, write_video

gr = pytest.importorskip("gradio")
from gradio_client import Client, handle_file  # noqa: E402

from postgen.apps.tabs import training  # noqa: E402

PROMPT = world.simple_caption(world.sample(7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with samples, written by the code of the trainer, and a clip."""
    place = tmp_path_factory.mktemp("place")
    run = place / "runs" / "one"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("max_steps: 50\n")
    file = MetricsFile(run / "metrics.jsonl", 0)
    for step in range(1, 9):
        file.append(step, {"reward": step / 10, "loss": 0.5, "grad_norm": 1.0, "step_time": 2.0})
        write_samples(run / "samples", step, [torch.rand(3, 3, 32, 32)] * 2, ["a ball", "a cube"], 8.0)
    write_video(place / "clip.mp4", world.render([world.sample(7)]).rgb_BF3HW[0], fps=8)
    return place


@pytest.fixture(scope="module")
def client(folder, tiny_wan):
    settings = AppSettings(model=str(tiny_wan), outputs=folder / "out", runs=folder / "runs", port=0, device="cpu")
    served = demo.launch(settings, warm=False)
    yield Client(served.url, verbose=False)
    served.close()


def test_a_clip_is_scored_by_a_program(client, folder):
    asked = {"clip": handle_file(folder / "clip.mp4"), "made": "", "prompt": PROMPT}
    job = client.submit(**asked, rewards=["world", "motion_floor"], api_name="/score")
    last = job.result(timeout=60)
    assert last["state"] == "done"
    assert list(last["result"]["scores"]) == ["world", "motion_floor"]
    assert last["result"]["all_right"] is True
    with pytest.raises(Exception, match="need a prompt") as told:
        client.predict(**{**asked, "prompt": ""}, rewards=["world"], api_name="/score")
    assert "\n" not in str(told.value)
    with pytest.raises(Exception, match="there is no clip"):
        client.predict(**{**asked, "clip": None}, rewards=["world"], api_name="/score")


def test_no_file_of_the_server_is_scored(client, folder):
    """A client other than Gradio's may send a path that is not an upload: the server refuses it."""
    place = f"{client.src}gradio_api/call/score"

    def asked(clip, made):
        body = json.dumps({"data": [clip, made, PROMPT, ["world"]]}).encode()
        return urllib.request.Request(place, body, {"Content-Type": "application/json"})

    named = {"path": str(folder / "clip.mp4"), "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(asked(named, ""), timeout=20)
    with urllib.request.urlopen(asked(None, "../x"), timeout=20) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{place}/{event}", timeout=20) as answer:
        told = answer.read().decode()
    assert "event: error" in told
    assert "scores" not in told


def test_a_run_is_told_by_its_name_alone(client):
    told = client.predict("one", api_name="/run")
    assert (told["step"], told["max_steps"], told["writes"]) == (8, 50, True)
    assert told["metrics"]["reward"] == 0.8
    assert 0 < told["seconds_left"] <= 84
    for wrong in ("../runs/one", "/etc", ""):
        with pytest.raises(Exception, match="no such run"):
            client.predict(wrong, api_name="/run")


def test_samples_over_the_steps(folder):
    run, copies = Runs(folder / "runs").get("one"), SampleCopies()
    shown = training._pictured([run], copies, None, None)
    assert [caption for _, caption in shown[1]["value"]] == [f"step {step}" for step in (1, 2, 4, 5, 7, 8)]
    assert (shown[2]["value"], shown[3]["value"]) == (1, 8)
    assert [picture.size for picture in shown[4]] == [shown[4][0].size] * 2
    left = Path(shown[5]["value"])
    assert probe(left).frames == 3
    assert not left.is_relative_to(folder)
    assert training._pictured([run], copies, 3, 99)[2]["value"] == 3
    for step in range(1, 9):
        copies.of(Sample(step, left, folder / "runs" / "one" / "samples" / f"step-{step:06d}.mp4"))
    assert len(list(left.parent.iterdir())) == 8
    assert training._pictured([], copies, None, None)[0]["visible"] is False


def test_what_is_drawn_of_a_run(folder):
    run = Runs(folder / "runs").get("one")
    drawn = training._drawn([run], None)
    assert drawn[0]["visible"] is True
    assert [8, 0.8, "0"] in drawn[2]["data"]
    hidden = [value["visible"] for value in drawn[: 3 * len(training.GROUPS) : 3]]
    assert hidden.count(True) == 3  # reward, loss, seconds per step
    assert drawn[-6]["value"] == "grad_norm"
    assert "max_steps: 50" in drawn[-1]
    told = training._told([run])
    assert "step 8 of 50" in told
    assert "1 min" in told
    assert json.dumps(drawn[2])


def test_names_of_runs_are_shown_as_text(tmp_path):
    (tmp_path / "<b>bold").mkdir()
    MetricsFile(tmp_path / "<b>bold" / "metrics.jsonl", 0).append(1, {"reward": 1.0, "rewards/<i>x/mean": 1.0})
    runs = Runs(tmp_path)
    assert "<b>" not in training._told([runs.get(name) for name in runs.names()])
    assert "<i>" not in training._head("Each reward", "", ["<i>x"])
