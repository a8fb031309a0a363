"""The other tabs in a browser, and all of them on a narrow screen; one server with a tiny model and a training run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from postgen import world
from postgen.grpo.logging import write_samples
from postgen.training.logging import MetricsFile
from postgen.video import write_video
from tests.apps.browser.driving import TINY, ask, heard, made, opened, says, tab, too_wide, watched
from tests.apps.served import Served

TABS = ("Generate", "Before and after", "Long video", "Rewards", "Training")
SCENE = world.sample(7)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that writes, by the trainer's own writers."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "one").mkdir()
    (folder / "one" / "config.yaml").write_text("max_steps: 50\n")
    _steps(folder / "one", 1, 5)
    for step in (1, 4):
        write_samples(folder / "one" / "samples", step, [torch.rand(3, 3, 32, 32)] * 2, ["a ball", "a cube"], 8.0)
    return folder


def _steps(run: Path, first: int, behind: int) -> None:
    file = MetricsFile(run / "metrics.jsonl", 0)
    for step in range(first, behind):
        file.append(step, {"reward": step / 10, "loss": 0.5, "grad_norm": 1.0, "step_time": 2.0})


@pytest.fixture(scope="module")
def server(start: Callable[..., AbstractContextManager[Served]], tiny_wan: Path, runs: Path) -> Iterator[Served]:
    with start("--model", tiny_wan, "--runs", runs, "--upload-seconds", "4") as found:
        yield found


@pytest.fixture
def page(server: Served, new_page: Callable[..., Any]) -> Any:
    """A window of one user at the app."""
    return opened(new_page(), server.url)


def test_before_and_after_with_a_plug_in(page: Any) -> None:
    tab(page, "Before and after")
    page.locator("#compare-prompt textarea").fill("a ball")
    page.locator("#compare").click()
    assert "before and after are the same" in page.locator(".toast-body").inner_text()
    page.get_by_role("button", name="What both have").click()
    for name, value in TINY.items():
        page.locator(f"#before-{name} input").fill(str(value))
    page.locator("#after-enhance input").fill("4")
    page.locator("#after-enhance input").press("Enter")
    page.locator("#compare").click()
    says(page, "Done", "#compare-status")
    watched(page, "#compare-players")
    videos = page.locator("#compare-players video")
    assert [round(video.evaluate("v => v.duration"), 2) for video in videos.all()] == [1.06, 1.06]
    assert "After: Enhance-A-Video 4" in page.locator("#compare-players").inner_text()
    measured = page.locator("#compare-measured").inner_text()
    assert "PSNR" in measured
    play = page.locator("#compare-players .play")
    play.click()
    page.wait_for_function("[...document.querySelectorAll('#compare-players video')].every(v => v.paused)")
    page.locator("#compare-players .next").click()
    times = [video.evaluate("v => v.currentTime") for video in videos.all()]
    assert times[0] == pytest.approx(times[1], abs=0.02)
    assert page.locator("#compare-frame img").first.evaluate("i => i.naturalWidth") > 0
    assert page.outside == []
    assert page.wrong == []


def test_an_uploaded_clip_is_scored(page: Any, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    write_video(clip, world.render([SCENE]).rgb_BF3HW[0], fps=8)
    tab(page, "Rewards")
    page.locator("#score-clip input[type=file]").set_input_files(clip)
    says(page, re.compile(r"\d+ frames"), "#score-facts")
    page.locator("#score-prompt textarea").fill(world.simple_caption(SCENE))
    for box in page.locator("#score-rewards input").all():
        box.set_checked(box.get_attribute("name") == "world")
    page.locator("#score").click()
    says(page, "Done", "#score-status")
    assert "world" in page.locator("#scores").inner_text()
    says(page, "Everything is as asked.", "#judge")
    assert page.wrong == []


def test_clips_that_are_refused(page: Any, tmp_path: Path) -> None:
    """One that takes too long, and one that is none: a line, no place of the server, and the page goes on."""
    (tmp_path / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + b"\xff" * 500)
    write_video(tmp_path / "long.mp4", torch.rand(48, 3, 32, 32), fps=8)
    tab(page, "Rewards")
    for name, line in (("long.mp4", "the clip takes 6.0 seconds, and at most 4 are allowed"), ("broken.mp4", "clip")):
        told = heard(
            page, lambda name=name: page.locator("#score-clip input[type=file]").set_input_files(tmp_path / name)
        )
        assert line in told
        assert "/tmp" not in told
        page.reload()
        says(page, "Ready.")
        tab(page, "Rewards")


def test_a_run_is_seen_and_followed(page: Any, runs: Path) -> None:
    """New lines of a run appear without a hand, in the line above and in the plots."""
    tab(page, "Training")
    says(page, re.compile("step 4 of 50"), "#run-status")
    page.locator("#plot-0 canvas, #plot-0 svg").first.wait_for()
    page.locator("#sample-steps img").first.wait_for()
    assert page.locator("#sample-steps .caption-label").all_inner_texts() == ["step 1", "step 4"]
    _steps(runs / "one", 5, 8)
    says(page, re.compile("step 7 of 50"), "#run-status")
    write_samples(runs / "one" / "samples", 7, [torch.rand(3, 3, 32, 32)] * 2, ["a ball", "a cube"], 8.0)
    page.locator("#sample-steps").get_by_text("step 7").wait_for()
    assert page.outside == []
    assert page.wrong == []


def test_a_narrow_screen_scrolls_in_one_direction(server: Served, new_page: Callable[..., Any], shot: Any) -> None:
    page = opened(new_page(width=390, height=844), server.url)
    ask(page, "a ball on a narrow screen", **TINY)
    made(page, "a ball on a narrow screen")
    for title in TABS:
        tab(page, title)
        page.wait_for_timeout(500)
        assert page.get_by_role("tabpanel").filter(visible=True).count() == 1
        assert too_wide(page) == 0, title
