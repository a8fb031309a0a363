"""A server on a free port, used by client programs."""

import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from postgen import UserError
from postgen.apps import demo
from postgen.apps.settings import AppSettings
from postgen.video import probe

gr = pytest.importorskip("gradio")
import httpx  # noqa: E402
from gradio_client import Client  # noqa: E402

SMALL = {"width": 32, "height": 16, "frames": 5, "guidance": 1.0}


@pytest.fixture(scope="module")
def served(tiny_wan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    (folder / "private.txt").write_text("not for the page")
    made = demo.launch(AppSettings(model=str(tiny_wan), outputs=folder, port=0, upload_bytes=50_000))
    yield made
    uploads = os.environ[demo.TEMPORARY]
    made.close()
    assert not Path(uploads).exists()
    assert demo.TEMPORARY not in os.environ


@pytest.fixture(scope="module")
def client(served, tmp_path_factory):
    return Client(served.url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


def test_a_video_is_made_and_listed(client, served):
    job = client.submit(prompt="a red ball", seed=5, steps=3, **SMALL, api_name="/generate")
    last = job.result(timeout=60)
    assert (last["state"], last["result"]["seed"]) == ("done", 5)
    assert probe(last["result"]["video"]).frames == 5
    assert json.loads(Path(last["result"]["sidecar"]).read_text())["settings"]["num_inference_steps"] == 3
    first = job.outputs()[0]
    assert first["job"] == last["job"]
    listed = client.predict(api_name="/history")
    assert listed[0]["id"] == last["result"]["id"]
    assert served.app.history.find(listed[0]["id"]) is not None


def running(job):
    limit = time.monotonic() + 30
    while not (job.outputs() and job.outputs()[-1]["done"] > 0):
        assert time.monotonic() < limit
        time.sleep(0.05)
    return job.outputs()[-1]["job"]


def test_cancelled_by_another_call_and_the_next_one_runs(client):
    before = len(client.predict(api_name="/history"))
    job = client.submit(prompt="a red ball", steps=5000, **SMALL, api_name="/generate")
    assert client.predict(job=running(job), api_name="/cancel") is True
    assert job.result(timeout=20)["state"] == "cancelled"
    assert client.predict(prompt="a ball", steps=1, **SMALL, api_name="/generate")["state"] == "done"
    assert len(client.predict(api_name="/history")) == before + 1


def test_a_call_that_is_given_up_ends_its_job(client, served):
    job = client.submit(prompt="a red ball", steps=5000, **SMALL, api_name="/generate")
    id = running(job)
    job.cancel()
    limit = time.monotonic() + 20
    while not served.app.jobs.progress(served.app.jobs.find(id)).ended:
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert served.app.jobs.progress(served.app.jobs.find(id)).state == "cancelled"


def test_a_call_that_is_given_up_leaves_the_others_of_its_client(client):
    given_up = client.submit(prompt="a red ball", steps=5000, **SMALL, api_name="/generate")
    waiting = client.submit(prompt="a blue ball", steps=1, **SMALL, api_name="/generate")
    running(given_up)
    while not waiting.outputs():
        time.sleep(0.05)
    given_up.cancel()
    assert waiting.result(timeout=60)["state"] == "done"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": 6}, "4n"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"preset": "best"}, "unknown preset"),
        ({"model": "/etc"}, "no model of that name"),
        ({"plug_ins": {"enhance": "much"}}, "enhance must be auto or a number"),
        ({"plug_ins": []}, "plug_ins must be"),
        ({"lora_scale": 0.5}, "the LoRA scale is 0.5, but no LoRA is chosen"),
    ],
)
def test_a_wrong_call_is_one_line(client, wrong, message):
    with pytest.raises(Exception, match=message) as told:
        client.predict(**{"prompt": "a ball", **SMALL, **wrong}, api_name="/generate")
    assert "\n" not in str(told.value)


def event(served, element, data, query=""):
    """Trigger the load event whose outputs contain an element, as a browser does; return the server's messages."""
    with httpx.Client(base_url=served.url, trust_env=False, timeout=30) as web:
        page = web.get("/config").json()
        own = {each["id"] for each in page["components"] if each["props"].get("elem_id") == element}
        rows = [row for row in page["dependencies"] if own & {*row["outputs"]} and row["targets"][0][1] == "load"]
        asked = {"data": data, "fn_index": rows[0]["id"], "session_hash": "a-browser"}
        assert web.post(f"/gradio_api/queue/join{query}", json=asked).status_code == 200
        with web.stream("GET", "/gradio_api/queue/data?session_hash=a-browser") as told:
            messages = [json.loads(line[5:]) for line in told.iter_lines() if line.startswith("data:")]
    return messages


def test_the_address_of_the_page_fills_the_form_and_runs_nothing(served):
    before = len(served.app.history.entries())
    got = event(served, "prompt", [None], "?prompt=a+red+ball&seed=5&frames=5&enhance=auto")
    made = next(message for message in got if message["msg"] == "process_generating")["output"]["data"]
    assert (made[2], "auto" in made, 5 in made, made[1]) == ("a red ball", True, True, False)
    wrong = event(served, "prompt", [None], "?prompt=a+red+ball&frames=6")
    (said,) = (message for message in wrong if message["msg"] == "log")
    assert "The link is not valid" in said["log"]
    assert "4n" in said["log"]
    assert len(served.app.history.entries()) == before


def test_nothing_else_can_be_called(client):
    known = client.view_api(return_format="dict")["named_endpoints"]
    assert set(known) == {"/generate", "/cancel", "/history", "/score"}


def read(served, path):
    try:
        with urllib.request.urlopen(f"{served.url.rstrip('/')}{path}", timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_no_file_of_the_server_but_its_results_can_be_read(client, served, tiny_wan):
    client.predict(prompt="a ball", steps=1, **SMALL, api_name="/generate")
    entry = served.app.history.entries()[0]
    assert read(served, f"/gradio_api/file={entry.video}")[0] == 200
    outside = served.app.history.folder.parent / "private.txt"
    for path in (
        *("/etc/passwd", outside, f"{entry.folder}/../../private.txt", tiny_wan / "model_index.json", __file__),
        *(Path.cwd() / "pyproject.toml", "../pyproject.toml", f"{entry.folder}/%2e%2e/%2e%2e/private.txt"),
    ):
        status, content = read(served, f"/gradio_api/file={path}")
        assert status in (403, 404), path
        assert b"private" not in content


def test_a_page_of_a_port_that_is_taken_says_so(served, tmp_path):
    port = int(served.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1:{port}.*--port 0"):
        demo.launch(AppSettings(port=port, outputs=tmp_path))


def test_without_gradio_there_is_one_line(cli, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    said = cli("demo")
    assert (said.code, said.err) == (2, "postgen: error: the app needs Gradio: pip install 'postgen[demo]'\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "give --auth"),
        (["--auth", "nobody"], "--auth takes USER:PASSWORD"),
        (["--model", "no/such/folder"], "no model folder"),
        (["--runs", "no-such-folder"], "no folder of training runs"),
        (["--upload-mb", "0"], "--upload-mb must be"),
        (["--offload", "model", "--device", "cpu"], "moves components to a GPU"),
        (["--offload", "auto", "--long-seconds", "9"], "makes no long videos"),
        (["--allow-host", "http://a.example"], "allow_host takes a name"),
    ],
)
def test_wrong_words_of_the_command_are_one_line(cli, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    said = cli("demo", "--port", "0", *words)
    assert said.code == 2
    assert message in said.err
    assert said.err.count("\n") == 1
