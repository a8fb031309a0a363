"""The other tabs in a browser, and all tabs on a narrow screen."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from postgen import world
from postgen.training.samples import write_samples
from postgen.video import write_video
from tests.apps.browser.driving import TINY, ask, heard, made, opened, says, steps, tab, too_wide, watched
from tests.apps.served import Served

TABS = ("Generate", "Before and after", "Long video", "Rewards", "Training")
SCENE = world.sample(7)
_NAMELESS = """() => [...document.querySelectorAll('button, a[href], input, select, textarea')]
  .filter(e => e.checkVisibility() && !e.innerText?.trim() && !e.getAttribute('aria-label') && !e.title
    && !e.getAttribute('aria-labelledby') && !e.labels?.length && !e.querySelector('[aria-label], [title]'))
  .map(e => e.outerHTML.slice(0, 200))"""
"""Script that returns the visible controls without a name for screen readers."""
_VIDEOS = "[...document.querySelectorAll('#compare-players video')]"
_FRAME = 1 / 16
"""Seconds per frame of a Wan model."""


def test_before_and_after_with_a_plug_in(page: Any) -> None:
    tab(page, "Before and after")
    page.locator("#compare-prompt textarea").fill("a ball")
    page.locator("#compare").click()
    assert "Before and After are the same" in page.locator(".toast-body").inner_text()
    page.get_by_role("button", name="Settings of Before").click()
    for name, value in {**TINY, "frames": 17}.items():
        page.locator(f"#before-{name} input").fill(str(value))
    page.locator("#after-enhance input").fill("4")
    page.locator("#after-enhance input").press("Enter")
    page.locator("#compare").click()
    says(page, "Done", "#compare-status")
    watched(page, "#compare-players")
    assert "After: Enhance-A-Video 4" in page.locator("#compare-players").inner_text()
    assert "PSNR" in page.locator("#compare-measured").inner_text()
    _run_in_step(page)
    assert page.locator("#compare-frame img").first.evaluate("i => i.naturalWidth") > 0
    assert page.outside == []
    assert page.wrong == []


def _run_in_step(page: Any) -> None:
    """Check that both players play, pause and seek together."""
    videos = page.locator("#compare-players video")
    assert [round(video.evaluate("v => v.duration"), 2) for video in videos.all()] == [1.06, 1.06]
    page.wait_for_function(f"{_VIDEOS}.every(v => !v.paused && v.currentTime > 0)")
    page.locator("#compare-players .play").click()
    page.wait_for_function(f"{_VIDEOS}.every(v => v.paused && !v.seeking)")
    assert page.locator("#compare-players .play").inner_text() == "Play"
    _at(page, None)
    bar = page.get_by_role("slider", name="Time")
    bar.fill("0.5")
    _at(page, 0.5)
    page.get_by_role("button", name="Next frame").click()
    _at(page, 0.5 + _FRAME)
    page.get_by_role("button", name="Previous frame").click()
    _at(page, 0.5)
    page.locator("#compare-players .play").click()
    page.wait_for_function(f"{_VIDEOS}.every(v => !v.paused && v.currentTime > 0.6)")
    apart = page.evaluate(f"() => {{ const [a, b] = {_VIDEOS}; return Math.abs(a.currentTime - b.currentTime) }}")
    assert apart < 2 * _FRAME
    page.locator("#compare-players .play").click()
    page.wait_for_function(f"{_VIDEOS}.every(v => v.paused && !v.seeking)")
    _at(page, None)


def _at(page: Any, time: float | None) -> None:
    """Wait until both videos are at a time (seconds), and check that they differ by less than half a frame."""
    page.wait_for_function(f"{_VIDEOS}.every(v => !v.seeking)")
    first, second = (video.evaluate("v => v.currentTime") for video in page.locator("#compare-players video").all())
    assert first == pytest.approx(second, abs=_FRAME / 2)
    if time is not None:
        assert first == pytest.approx(time, abs=0.01)


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
    says(page, "The clip shows everything in the prompt.", "#judge")
    assert page.wrong == []


def test_clips_that_are_refused(page: Any, tmp_path: Path) -> None:
    """A clip that is too long and a broken one: the message is one line without a path, and the page stays usable."""
    (tmp_path / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + b"\xff" * 500)
    write_video(tmp_path / "long.mp4", torch.rand(48, 3, 32, 32), fps=8)
    tab(page, "Rewards")
    for name, line in (("long.mp4", "the clip has 6.0 seconds, and at most 4 are allowed"), ("broken.mp4", "clip")):
        told = heard(
            page, lambda name=name: page.locator("#score-clip input[type=file]").set_input_files(tmp_path / name), line
        )
        assert line in told
        assert "/tmp" not in told
        page.reload()
        says(page, "Ready.")
        tab(page, "Rewards")


def test_a_run_is_seen_and_followed(page: Any, runs: Path) -> None:
    """New metrics of a run appear without an action of the user, in the status line and in the plots."""
    tab(page, "Training")
    says(page, re.compile("step 4 of 50"), "#run-status")
    page.locator("#plot-0 canvas, #plot-0 svg").first.wait_for()
    page.locator("#sample-steps img").first.wait_for()
    assert page.locator("#sample-steps .caption-label").all_inner_texts() == ["step 1", "step 4"]
    steps(runs / "one", 5, 8)
    says(page, re.compile("step 7 of 50"), "#run-status")
    write_samples(runs / "one" / "samples", 7, [torch.rand(3, 3, 32, 32)] * 2, ["a ball", "a cube"], 8.0)
    page.locator("#sample-steps").get_by_text("step 7").wait_for()
    assert page.outside == []
    assert page.wrong == []


def test_a_narrow_screen_scrolls_in_one_direction(server: Served, new_page: Callable[..., Any]) -> None:
    """The page is never wider than its window; all tabs stay visible at every width, and each control has a name."""
    page = opened(new_page(width=390, height=844), server.url)
    ask(page, "a ball on a narrow screen", **TINY)
    made(page, "a ball on a narrow screen")
    for title in TABS:
        tab(page, title)
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 844})
            page.wait_for_function("width => document.documentElement.clientWidth <= width", arg=width)
            assert [one.inner_text() for one in page.get_by_role("tab").all() if one.is_visible()] == list(TABS)
            assert page.get_by_role("tabpanel").filter(visible=True).count() == 1
            assert too_wide(page) == 0, (title, width)
        assert page.evaluate(_NAMELESS) == [], title
