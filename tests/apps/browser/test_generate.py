"""The Generate tab in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.apps.browser.driving import LONG, TINY, ask, heard, histories, made, numbers, opened, says, tab
from tests.apps.served import Served

FPS = 16
"""Frames per second of a Wan model."""
STEP = re.compile(r"step \d+ of 5000")


def kept(server: Served) -> list[Path]:
    return sorted((server.outputs / "results").glob("*/video.mp4"))


def test_a_video_is_made_and_seen(server: Served, page: Any) -> None:
    """The page makes no request to another machine, and its scripts raise no error."""
    ask(page, "a ball rolls", **TINY)
    source, seconds = made(page, "a ball rolls")
    assert source.startswith(server.url)
    assert seconds == pytest.approx(TINY["frames"] / FPS, abs=0.01)
    assert "Done" in says(page, "Done")
    assert histories(page)[0] == "a ball rolls"
    seed = page.locator("#seed input").input_value()
    assert f"Seed {seed}" in page.locator("#about").inner_text()
    with page.expect_download() as saved:
        page.locator("#get-settings").click()
    note = json.loads(Path(saved.value.path()).read_text())
    assert (note["prompt"], note["seed"], note["frames"]) == ("a ball rolls", int(seed), TINY["frames"])
    with page.expect_download() as saved:
        page.locator("#get-video").click()
    assert Path(saved.value.path()).read_bytes() == kept(server)[-1].read_bytes()
    assert page.outside == []
    assert page.wrong == []


def test_cancel_keeps_nothing_and_the_next_job_runs(server: Served, page: Any) -> None:
    before = len(kept(server))
    ask(page, "never seen", **{**TINY, **LONG})
    assert STEP.search(says(page, STEP))
    assert not page.locator("#generate").is_enabled()
    page.locator("#cancel").click()
    says(page, "Cancelled: nothing was kept")
    assert len(kept(server)) == before
    ask(page, "after the cancelled one", **TINY)
    made(page, "after the cancelled one")
    assert "never seen" not in histories(page)


def test_stop_early_keeps_a_whole_clip(page: Any) -> None:
    """A preview is shown before the stop."""
    ask(page, "stopped early", **{**TINY, **LONG})
    page.locator("#preview img").wait_for()
    assert page.evaluate("document.querySelector('#preview img').naturalWidth") > 0
    page.locator("#keep").click()
    _, seconds = made(page, "stopped early")
    assert seconds == pytest.approx(LONG["frames"] / FPS, abs=0.01)
    stopped = re.search(r"Stopped after step (\d+)", page.locator("#about").inner_text())
    assert stopped is not None
    assert 1 <= int(stopped[1]) < 5000


def test_a_bad_input_is_one_line_before_the_queue(server: Served, page: Any) -> None:
    before = len(kept(server))
    for prompt, wrong, line in (
        ("  ", {}, "the prompt is empty: say what the video shows"),
        ("a ball", {"frames": 18}, "the number of frames must be 4n+1, got 18: use 17 or 21"),
        ("a ball", {"width": 97}, "width must be a multiple of 16, got 97: use 96 or 112"),
        ("a ball", {"width": 16000, "height": 16000, "frames": 401}, "make it smaller or shorter"),
    ):
        ask(page, prompt, **{**TINY, **wrong})
        found = page.locator("#ask").get_by_text(line)
        found.wait_for()
        assert "\n" not in found.inner_text().strip()
        assert page.locator("#status .failed").count() == 1
        assert page.locator("#generate").is_enabled()
    tab(page, "Training")  # the timer of this tab is an event of the page
    tab(page, "Generate")
    page.locator("#preset label").first.click()
    page.locator("#preset input").first.wait_for()
    page.wait_for_timeout(500)
    assert found.is_visible(), "the error must stay until Generate is pressed again"
    ask(page, "mended", **TINY)
    made(page, "mended")
    assert page.locator("#ask").get_by_text("make it smaller").count() == 0
    assert len(kept(server)) == before + 1


def test_two_users_at_once(page: Any, server: Served, new_page: Callable[..., Any]) -> None:
    """The second user sees the place in the queue, moves up, and each user gets the own video."""
    other = opened(new_page(), server.url)
    ask(page, "of the first user", **{**TINY, **LONG})
    says(page, STEP)
    ask(other, "of the second user", **TINY)
    says(other, "Waiting: 1 job before this one")
    page.locator("#keep").click()
    assert made(other, "of the second user")[0] != made(page, "of the first user")[0]
    assert page.locator("#prompt textarea").input_value() == "of the first user"


def test_the_keyboard_alone(page: Any) -> None:
    """Tab follows the order of the page; Space, Enter, and Shift+Enter in the prompt start a job."""
    numbers(page, **TINY)
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    assert reached(page, "generate") == ["prompt", "preset", "generate"]
    for prompt, keys in (("by Space", "Space"), ("by Enter", "Enter"), ("by Shift", "Shift+Enter")):
        page.locator("#prompt textarea").focus()
        page.keyboard.press("Control+A")
        page.keyboard.type(prompt)
        if keys != "Shift+Enter":
            reached(page, "generate")
        page.keyboard.press(keys)
        made(page, prompt)
        says(page, "Done")


def reached(page: Any, last: str) -> list[str]:
    """Press Tab until the control `last` has the focus; return the controls on the way, each once."""
    met: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        found = page.evaluate("document.activeElement.closest('#prompt, #preset, #generate')?.id")
        met += [found] if found and found not in met else []
        if last in met:
            return met
    raise AssertionError(f"40 presses of Tab do not reach {last}, only {met}")


def test_a_failed_job_does_not_block_the_next(page: Any, server: Served) -> None:
    """The folder of results disappears while a job runs: the job fails with one line, and the next job succeeds."""
    results, gone = server.outputs / "results", server.outputs / "gone"
    ask(page, "fails", **{**TINY, **LONG})
    says(page, STEP)
    results.rename(gone)
    results.write_text("in the way")
    try:
        told = heard(page, page.locator("#keep").click)
        said = says(page, re.compile("^Failed: "))
    finally:
        results.unlink()
        gone.rename(results)
    assert "Traceback" not in told
    assert str(server.folder) not in told + said
    ask(page, "after the failed one", **TINY)
    made(page, "after the failed one")


def test_settings_from_an_uploaded_sidecar(page: Any, tmp_path: Path) -> None:
    ask(page, "to be taken", **TINY)
    made(page, "to be taken")
    with page.expect_download() as saved:
        page.locator("#get-settings").click()
    note = json.loads(Path(saved.value.path()).read_text())
    note["settings"] |= {"prompt": "from a file", "seed": 77, "num_inference_steps": 3, "enhance": "auto"}
    sidecar = tmp_path / "video.json"
    sidecar.write_text(json.dumps(note))
    _upload(page, sidecar)
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'from a file'")
    numbers(page)
    for name, value in {"seed": "77", "steps": "3", "frames": "5", "width": "64"}.items():
        page.wait_for_function(
            "([name, value]) => document.querySelector(`#${name} input`).value == value", arg=[name, value]
        )
    assert page.locator("#plug-in-enhance input").input_value() == "auto"
    page.locator("#generate").click()
    made(page, "from a file")
    assert "Seed 77" in page.locator("#about").inner_text()


def _upload(page: Any, file: Path) -> None:
    page.locator("#from-file").locator("xpath=..").locator("input[type=file]").first.set_input_files(file)


def test_a_corrupt_upload_and_one_over_the_limit(page: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + b"\xff" * 500)
    (tmp_path / "broken.json").write_text('{"settings": ')
    (tmp_path / "large.mp4").write_bytes(b"\0" * (2 * 2**20))
    told = {name: _refused(page, tmp_path / name) for name in ("broken.mp4", "broken.json", "large.mp4")}
    for name, line in told.items():
        assert str(tmp_path) not in line, name
        assert "gradio" not in line, name
    assert "settings" in told["broken.json"]
    assert "maximum" in told["large.mp4"].lower()
    ask(page, "after bad files", **TINY)
    made(page, "after bad files")


def _refused(page: Any, file: Path) -> str:
    told = heard(page, lambda: _upload(page, file))
    page.reload()
    says(page, "Ready.")
    return told
