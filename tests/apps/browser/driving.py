"""Helpers for actions of a user on the page and for its content; each takes a page of Playwright."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from postgen.training.logging import MetricsFile

TINY = {"steps": 2, "width": 64, "height": 64, "frames": 5}
"""Settings of a video that takes less than a second."""
LONG = {"steps": 5000, "frames": 17}
"""Settings of a job that does not finish during a test."""
_WATCHED = """selector => {
  const v = document.querySelector(selector + ' video');
  return v && v.readyState >= 2 && !v.error && v.offsetParent ? [v.currentSrc, v.duration, v.videoWidth] : null;
}"""
_WIDER = "document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth"


def opened(page: Any, url: str) -> Any:
    """Open the app and wait until it is ready."""
    page.goto(url)
    page.locator("#status").get_by_text("Ready.").wait_for()
    return page


def numbers(page: Any, **values: float) -> None:
    """Type numbers under *More settings*; open that part first if it is closed."""
    if not page.locator("#steps").is_visible():
        page.get_by_role("button", name="More settings").first.click()
    for name, value in values.items():
        page.locator(f"#{name} input").fill(str(value))


def ask(page: Any, prompt: str, **values: float) -> None:
    """Type a prompt and numbers, then press *Generate*."""
    if values:
        numbers(page, **values)
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#generate").click()


def says(page: Any, text: str | re.Pattern[str], place: str = "#status") -> str:
    """Wait until a text is visible in an element, and return all text of the element."""
    page.locator(place).get_by_text(text).first.wait_for()
    return str(page.locator(place).inner_text())


def made(page: Any, prompt: str) -> tuple[str, float]:
    """Wait for the result of a prompt; return the address and the duration (seconds) of the video."""
    page.locator("#about").get_by_text(prompt, exact=True).wait_for()
    source, seconds, width = watched(page, "#result")
    assert width > 0
    return source, seconds


def watched(page: Any, place: str) -> tuple[str, float, int]:
    """Wait for a visible video that can play; return its address, its duration (seconds) and its width (pixels)."""
    source, seconds, width = page.wait_for_function(_WATCHED, arg=place).json_value()
    return source, seconds, width


def tab(page: Any, title: str) -> None:
    """Open a tab."""
    page.get_by_role("tab", name=title, exact=True).click()


def steps(run: Path, first: int, behind: int) -> None:
    """Write metrics for the steps from `first` to `behind` - 1 of a training run, as its trainer does."""
    file = MetricsFile(run / "metrics.jsonl", 0)
    for step in range(first, behind):
        file.append(step, {"reward": step / 10, "loss": 0.5, "grad_norm": 1.0, "step_time": 2.0})


def too_wide(page: Any) -> int:
    """Return the number of pixels by which the page is wider than its window."""
    return int(page.evaluate(_WIDER))


def heard(page: Any, act: Callable[[], Any], saying: str = "") -> str:
    """Run an action that makes the page show a message, and return the last message.

    Args:
        page: page of the app.
        act: the action.
        saying: text in the message; the video player may show other messages.
    """
    act()
    toast = page.locator(".toast-body").filter(has_text=saying).last
    toast.wait_for()
    return str(toast.inner_text())


def histories(page: Any) -> list[str]:
    """Return the captions of the history, newest first."""
    return list(page.locator("#history .caption-label").all_inner_texts())
