"""Refused requests leave no files: neither uploads nor first frames."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from postgen import UserError
from postgen.apps import making
from postgen.apps.guard import TEMPORARY
from postgen.apps.history import SIDECAR
from postgen.apps.making import Form
from postgen.apps.settings import AppSettings
from postgen.apps.state import App
from postgen.apps.uploads import discarding

SMALL = {"prompt": "a ball", "steps": 1, "width": 32, "height": 16, "frames": 5, "seed": 3, "guidance": 1.0}


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "uploads"
    folder.mkdir()
    monkeypatch.setenv(TEMPORARY, str(folder))
    return folder


@pytest.fixture
def app(tiny_wan_image: Path, tmp_path: Path) -> Iterator[App]:
    made = App(AppSettings(outputs=tmp_path / "outputs", model=str(tiny_wan_image), waiting=0, upload_bytes=50_000))
    yield made
    made.close()


def sent(uploads: Path, name: str, content: bytes | None = None) -> str:
    """Store a file as Gradio stores an upload, and return its path."""
    (uploads / name).mkdir()
    path = uploads / name / f"{name}.png"
    if content is None:
        Image.new("RGB", (40, 20), "red").save(path)
    else:
        path.write_bytes(content)
    return str(path)


def files(app: App, uploads: Path) -> list[str]:
    return sorted(p.name for top in (uploads, app.history.folder.parent) for p in top.rglob("*") if p.is_file())


def form(app: App, **more: Any) -> Form:
    return Form(**{"model": app.model_names[0], **SMALL, **more})


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(60_000)])
def test_a_first_frame_that_is_none_is_removed(app: App, uploads: Path, content: bytes) -> None:
    before = files(app, uploads)
    path = sent(uploads, "a", content)
    with pytest.raises(UserError, match="first frame"):
        making.submitted(app, form(app, image=path))
    assert files(app, uploads) == before
    assert not Path(path).parent.exists()
    with pytest.raises(UserError, match="upload it again"):
        making.submitted(app, form(app, image=path))


def test_a_form_that_is_refused_keeps_no_first_frame_and_leaves_the_upload_to_the_page(
    app: App, uploads: Path
) -> None:
    image = sent(uploads, "a")
    before = files(app, uploads)
    for wrong in ({"frames": 6}, {"seed": -1}, {"plug_ins": {"enhance": "much"}}, {"prompt": ""}, {"guidance": -1}):
        with pytest.raises(UserError):
            making.job_of(app, form(app, image=image, **wrong))
        with pytest.raises(UserError):
            making.submitted(app, form(app, image=image, **wrong))
        assert files(app, uploads) == before, wrong


def test_a_first_frame_is_kept_as_long_as_a_job_or_a_result_names_it(app: App, uploads: Path) -> None:
    image, go = sent(uploads, "a"), threading.Event()
    before = files(app, uploads)
    gate = app.jobs.submit("gate", lambda task: go.wait(20))
    with pytest.raises(UserError, match="the queue is full"):
        making.submitted(app, form(app, image=image))
    assert files(app, uploads) == before
    app.jobs.most_waiting = 5
    one, two, lost = (making.submitted(app, form(app, image=image, seed=seed)) for seed in (1, 2, 3))
    assert len(files(app, uploads)) == len(before) + 1
    app.jobs.cancel(one.id)
    app.jobs.cancel(lost.id)
    assert len(files(app, uploads)) == len(before) + 1
    go.set()
    assert ended(app, gate) == "done"
    assert ended(app, two) == "done"
    (entry,) = app.history.entries()
    (kept,) = app.pictures.folder.iterdir()
    assert json.loads((entry.folder / SIDECAR).read_text())["settings"]["image"] == kept.name
    app.jobs.cancel((task := making.submitted(app, form(app, image=image, steps=500))).id)
    assert ended(app, task) == "cancelled"
    assert kept.is_file()  # the result still uses it
    app.pictures.remove_result(entry.id)
    assert files(app, uploads) == before


def test_a_job_that_fails_keeps_no_first_frame(app: App, uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = sent(uploads, "a")
    before = files(app, uploads)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(making, "make_video", full)
    task = making.submitted(app, form(app, image=image))
    assert ended(app, task) == "failed"
    assert app.jobs.progress(task).error == "the server cannot keep the result: No space left on device"
    assert files(app, uploads) == before


def test_a_first_frame_comes_as_the_browser_sends_it_and_gradio_decodes_nothing() -> None:
    pytest.importorskip("gradio")
    from postgen.apps.tabs.generate import _form
    from postgen.plug_ins import known_plug_ins

    values = [None] * len(making.FIELDS)
    for image, expected in (({"path": "/a.png", "url": None}, "/a.png"), ({"path": None}, ""), (None, None)):
        values[making.FIELDS.index("image")] = image
        assert _form((*values, *["off"] * len(known_plug_ins()))).image == expected


def test_only_uploads_are_removed(app: App, uploads: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    other.write_bytes(b"no picture")
    (uploads / "link.png").symlink_to(other)
    for path in (other, uploads / "link.png", uploads / ".." / "other.png", uploads, "a\0b", None, 3):
        with pytest.raises(UserError), discarding(path if path is None else str(path)):
            raise UserError("no")
    assert other.read_bytes() == b"no picture"
    assert uploads.is_dir()


def ended(app: App, task: Any) -> str:
    limit = time.monotonic() + 30
    while not app.jobs.progress(task).ended:
        assert time.monotonic() < limit
        time.sleep(0.02)
    return str(app.jobs.progress(task).state)
