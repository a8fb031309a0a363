"""Settings, results on disk and uploads: which input is refused, and which files remain."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from postgen import UserError
from postgen.apps.history import History
from postgen.apps.pictures import Pictures
from postgen.apps.settings import AppSettings, read_auth
from postgen.apps.uploads import uploaded, uploaded_picture, uploaded_settings, uploaded_video
from postgen.video import write_video


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, "give --auth"),
        ({"host": "192.168.1.4"}, "give --auth"),
        ({"host": " "}, "host is empty"),
        ({"port": 70_000}, "port must be"),
        ({"port": True}, "port must be"),
        ({"upload_bytes": 0}, "upload_bytes must be"),
        ({"upload_seconds": float("nan")}, "upload_seconds must be"),
        ({"waiting": -1}, "waiting must be"),
        ({"at_once": 0}, "at_once must be"),
        ({"theme": "pink"}, "unknown theme"),
        ({"device": "tpu"}, "unknown device"),
        ({"auth": (("ann", ""),)}, "pairs of a name and a password"),
        ({"runs": Path("no-such-folder")}, "there is no folder of training runs"),
        ({"outputs": Path(__file__)}, "is a file"),
        ({"outputs": ""}, "outputs must be the path of a folder"),
        ({"outputs": None}, "outputs must be the path of a folder"),
        ({"runs": 3}, "runs must be the path of a folder"),
        ({"runs": "no-such-folder"}, "there is no folder of training runs"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        AppSettings(**settings)


def test_folders_may_be_strings(tmp_path):
    settings = AppSettings(outputs=str(tmp_path / "outputs"), runs=str(tmp_path))
    assert (settings.outputs, settings.runs) == (tmp_path / "outputs", tmp_path)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.9.1"])
def test_this_machine_alone_needs_no_password(host):
    assert AppSettings(host=host).local
    assert AppSettings(host="0.0.0.0", auth=(("ann", "x"),)).auth


def test_people_of_a_file(tmp_path):
    file = tmp_path / "people"
    file.write_text("# who\nann:a:b\n\nbob:secret\n")
    assert read_auth(str(file)) == (("ann", "a:b"), ("bob", "secret"))
    file.write_text("ann:a\nann:b\n")
    with pytest.raises(UserError, match="twice"):
        read_auth(str(file))
    file.write_text("hunter2\n")
    with pytest.raises(UserError, match="line 1") as told:
        read_auth(str(file))
    assert "hunter2" not in str(told.value)


def fill(entry, prompt="a ball"):
    write_video(entry.folder / "video.mp4", torch.rand(3, 3, 16, 16), fps=8)
    (entry.folder / "video.json").write_text(json.dumps({"prompt": prompt, "settings": {}}))


def test_results_are_there_for_the_next_server(tmp_path):
    history = History(tmp_path / "results")
    with history.adding("generate") as new:
        fill(new)
    again = History(tmp_path / "results")
    (entry,) = again.entries()
    assert (entry.id, entry.kind) == (new.id, "generate")
    assert entry.video.name == "video.mp4"
    assert Image.open(entry.poster).size == (16, 16)
    assert again.entries("compare") == []
    again.remove(entry.id)
    assert again.entries() == []
    assert list((tmp_path / "results").iterdir()) == []


def test_what_fails_while_it_is_written_leaves_nothing(tmp_path):
    history = History(tmp_path / "results")

    def fails():
        with history.adding("generate") as new:
            fill(new)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert history.entries() == []
    assert list((tmp_path / "results").iterdir()) == []


def test_what_fails_while_it_is_written_names_no_place(tmp_path):
    history = History(tmp_path / "results")

    def fails():
        with history.adding("generate") as new:
            raise UserError(f"cannot write {new.folder / 'video.mp4'}: no space, {history.folder / 'x'}")

    with pytest.raises(UserError, match=r"^cannot write video\.mp4: no space, x$"):
        fails()


@pytest.mark.parametrize(
    "id", [None, 3, "", ".", "..", "../x", "/etc", "20260101-000000-generate-zzzzzzzz", "20260101-000000-x-01234567\n"]
)
def test_an_id_of_no_result_finds_none(tmp_path, id):
    history = History(tmp_path / "results")
    assert history.find(id) is None
    with pytest.raises(UserError, match="no such result"):
        history.remove(id)


def test_a_link_is_no_result(tmp_path):
    history = History(tmp_path / "results")
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", history.folder / "20260101-000000-generate-01234567")
    assert history.entries() == []


@pytest.fixture
def limits(tmp_path):
    return AppSettings(upload_bytes=20_000, upload_seconds=1, upload_pixels=40 * 256, outputs=tmp_path)


def clip_file(path, frames, fps=8, size=16):
    write_video(path, torch.rand(frames, 3, size, size), fps=fps)
    return str(path)


def test_uploads_are_held_to_their_limits(tmp_path, limits):
    assert uploaded_video(clip_file(tmp_path / "fine.mp4", 5), limits).info.frames == 5
    with pytest.raises(UserError, match=r"has 2\.5 seconds"):
        uploaded_video(clip_file(tmp_path / "long.mp4", 20), limits)
    with pytest.raises(UserError, match="more than 10,240 pixels"):
        uploaded_video(clip_file(tmp_path / "many.mp4", 41, fps=60), limits)
    large = tmp_path / "large.mp4"
    large.write_bytes(b"\0" * 20_001)
    with pytest.raises(UserError, match="has 20,001 bytes"):
        uploaded_video(str(large), limits)


@pytest.mark.parametrize("content", [b"", b"no video", b"\0\0\0\x18ftypmp42" + b"\0" * 99])
def test_what_is_no_video_is_one_line_without_a_path(tmp_path, limits, content):
    file = tmp_path / "x.mp4"
    file.write_bytes(content)
    with pytest.raises(UserError) as told:
        uploaded_video(str(file), limits)
    assert str(tmp_path) not in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("path", [None, 3, "", "/no/such/file", "/etc"])
def test_what_is_no_upload_is_refused(limits, path):
    with pytest.raises(UserError):
        uploaded(path, limits, "file")


def test_pictures_are_kept_once_under_a_name_of_their_content(tmp_path, limits):
    picture = Image.new("RGB", (20, 10), "red")
    picture.save(tmp_path / "..a name.png")
    found = uploaded_picture(str(tmp_path / "..a name.png"), limits)
    pictures = Pictures(tmp_path / "kept", History(tmp_path / "results"))
    paths = {pictures.hold(found), pictures.hold(picture)}
    (path,) = paths
    assert path.parent == tmp_path / "kept"
    assert list(Image.open(path).getdata()) == list(picture.getdata())
    Image.new("RGB", (100, 7)).save(tmp_path / "wide.png")
    with pytest.raises(UserError, match="100 x 7 pixels"):
        uploaded_picture(str(tmp_path / "wide.png"), limits)


def test_settings_come_from_a_sidecar_and_from_a_video(tmp_path, limits):
    note = {"settings": {"prompt": "a ball", "seed": 3}, "format": "mp4"}
    (tmp_path / "x.json").write_text(json.dumps(note))
    write_video(tmp_path / "x.mp4", torch.rand(3, 3, 16, 16), fps=8, comment=json.dumps(note))
    assert uploaded_settings(str(tmp_path / "x.json"), limits) == note["settings"]
    assert uploaded_settings(str(tmp_path / "x.mp4"), limits) == note["settings"]
    with pytest.raises(UserError, match="has no settings"):
        uploaded_settings(clip_file(tmp_path / "y.mp4", 3), limits)
    for number, text in enumerate(("[]", "{}", '{"settings": 3}', "{", "")):
        (tmp_path / f"{number}.json").write_text(text)
        with pytest.raises(UserError):
            uploaded_settings(str(tmp_path / f"{number}.json"), limits)


@pytest.mark.parametrize("id", ["99999999-999999-generate-0123abcd", "20261399-000000-generate-0123abcd"])
def test_a_folder_whose_name_is_no_time_is_no_result(tmp_path, id):
    history = History(tmp_path)
    (tmp_path / id).mkdir()
    assert (history.find(id), history.entries()) == (None, [])


def test_what_goes_wrong_with_a_result_names_no_place(tmp_path):
    history = History(tmp_path)
    with pytest.raises(UserError) as told, history.adding("generate") as new:
        raise UserError(f"cannot write {new.folder / 'video.mp4'}: No space left on device")
    assert str(told.value) == "cannot write video.mp4: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_a_poster_that_cannot_be_written_is_one_line(tmp_path):
    history = History(tmp_path)
    with history.adding("generate") as new:
        write_video(new.folder / "video.mp4", torch.rand(3, 3, 16, 16), fps=8)
        id = new.id
    (tmp_path / id / "poster.png").mkdir()
    with pytest.raises(UserError, match="the picture of a result cannot be written"):
        _ = history.get(id).poster


def test_a_large_picture_is_refused_before_it_is_decoded(tmp_path):
    file = tmp_path / "large.png"
    Image.new("RGB", (300, 300)).save(file)
    file.write_bytes(file.read_bytes()[:100])  # a truncated file: decoding it would fail with another message
    with pytest.raises(UserError, match="300 x 300 pixels, and at most 64"):
        uploaded_picture(str(file), AppSettings(outputs=tmp_path, upload_pixels=1024))


def test_links_that_lead_out_of_the_runs_are_none_of_them(tmp_path):
    from postgen.apps.long_making import adapters
    from postgen.apps.state import App

    outside, runs = tmp_path / "outside", tmp_path / "runs"
    for folder in (outside / "lora-1", runs / "own" / "lora-1", runs / "mixed"):
        folder.mkdir(parents=True)
        (folder / "lora.safetensors").write_bytes(b"")
        (folder / "worldweaver.json").write_text("{}")
    (runs / "linked").symlink_to(outside)
    (runs / "mixed" / "lora-2").symlink_to(outside / "lora-1")
    app = App(AppSettings(runs=runs, outputs=tmp_path / "outputs"))
    assert list(app.loras()) == ["mixed", "own/lora-1"]
    assert list(adapters(app)) == ["mixed", "own/lora-1"]
    runs.rename(tmp_path / "away")
    assert (app.runs(), app.loras(), adapters(app)) == ({}, {}, {})
    app.close()


def test_two_loras_of_one_name_are_both_offered(tmp_path):
    from postgen.apps.state import App

    app = App(AppSettings(loras=("a/lora.safetensors", "b/lora.safetensors"), outputs=tmp_path))
    assert app.loras() == {"lora.safetensors": "a/lora.safetensors", "b/lora.safetensors": "b/lora.safetensors"}
    app.close()
