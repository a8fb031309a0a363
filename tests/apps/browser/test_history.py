"""What a browser finds again: results after a reload and after a restart, jobs that go on, settings to use again."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.apps.browser.driving import LONG, TINY, ask, histories, made, numbers, opened, says
from tests.apps.served import Served

Start = Callable[..., AbstractContextManager[Served]]


def test_a_reload_and_a_restart_find_everything_again(
    start: Start, tiny_wan: Path, new_page: Callable[..., Any], tmp_path: Path
) -> None:
    page = new_page()
    options = ("--model", tiny_wan, "--outputs", tmp_path / "kept")
    with start(*options) as server:
        port = urlsplit(server.url).port
        ask(opened(page, server.url), "the older one", **TINY)
        made(page, "the older one")
        seed = page.locator("#seed input").input_value()
        ask(page, "the newer one", **{**TINY, "width": 64})
        made(page, "the newer one")
        says(page, "Done")
        _reloaded(page)
        assert histories(page) == ["the newer one", "the older one"]
        _is_used_again(page, seed)
        _goes_on_after_a_reload(page)
    with start(*options, "--port", str(port)) as server:
        opened(page, server.url)
        made(page, "goes on")
        assert histories(page) == ["goes on", "the newer one", "the older one"]
        assert page.locator("#prompt textarea").input_value() == "goes on"
        page.locator("#remove").click()
        page.locator("#about").get_by_text("goes on").wait_for(state="hidden")
        _reloaded(page)
        assert histories(page) == ["the newer one", "the older one"]


def _reloaded(page: Any) -> None:
    page.reload()
    says(page, "Ready.")
    page.locator("#history .caption-label").first.wait_for()


def _is_used_again(page: Any, seed: str) -> None:
    """Another result of the history is chosen and seen, and its settings stand in the controls."""
    page.locator("#history").get_by_text("the older one").click()
    made(page, "the older one")
    page.locator("#reuse").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'the older one'")
    numbers(page)
    shown = {name: page.locator(f"#{name} input").input_value() for name in ("seed", "steps", "width", "frames")}
    assert shown == {"seed": seed, "steps": "3", "width": "96", "frames": "17"}
    assert not page.locator("#randomise input").is_checked()


def _goes_on_after_a_reload(page: Any) -> None:
    """A job goes on while nobody looks, and the page finds it again."""
    ask(page, "goes on", **{**TINY, **LONG})
    before = _step(says(page, re.compile(r"step \d+ of 5000")))
    page.reload()
    assert _step(says(page, re.compile(r"step \d+ of 5000"))) >= before
    assert page.locator("#prompt textarea").input_value() == "goes on"
    page.locator("#keep").click()
    made(page, "goes on")


def _step(text: str) -> int:
    found = re.search(r"step (\d+) of", text)
    assert found is not None
    return int(found[1])
