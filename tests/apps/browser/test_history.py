"""Results, running jobs and settings after a reload of the page and a restart of the server."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tests.apps.browser.driving import LONG, TINY, ask, histories, made, numbers, opened, says
from tests.apps.served import Served

Start = Callable[..., AbstractContextManager[Served]]
STEP = re.compile(r"step (\d+) of 5000")


def test_a_reload_and_a_restart_find_everything_again(
    server: Served, page: Any, start: Start, tiny_wan: Path, new_page: Callable[..., Any]
) -> None:
    ask(page, "the older one", **TINY)
    made(page, "the older one")
    seed = page.locator("#seed input").input_value()
    ask(page, "the newer one", **{**TINY, "width": 80})
    made(page, "the newer one")
    says(page, "Done")
    _is_used_again(page, seed)
    _goes_on_after_a_reload(page)
    assert histories(page)[:3] == ["goes on", "the newer one", "the older one"]
    page.goto(f"{server.url}/none")  # leave the page, so that it plays no video while the other server starts
    with start("--model", tiny_wan, "--outputs", server.outputs) as restarted:
        page = opened(new_page(storage_state=_moved(page, restarted.url)), restarted.url)
        made(page, "goes on")
        assert histories(page)[:3] == ["goes on", "the newer one", "the older one"]
        assert page.locator("#prompt textarea").input_value() == "goes on"
        page.locator("#remove").click()
        page.locator("#history").get_by_text("goes on").wait_for(state="hidden")
        page.locator("#about").get_by_text("goes on").wait_for(state="hidden")
        page.locator("#history").get_by_text("the older one").click()
        made(page, "the older one")
        assert not [note for note in server.outputs.glob("results/*/video.json") if "goes on" in note.read_text()]


def _moved(page: Any, url: str) -> dict[str, Any]:
    """Return the stored data of a browser, changed to the same page on another port."""
    kept: dict[str, Any] = page.context.storage_state()
    assert len(kept["origins"]) == 1
    return {**kept, "origins": [{**kept["origins"][0], "origin": url}]}


def _is_used_again(page: Any, seed: str) -> None:
    """Choose another result of the history, and check that its settings fill the controls."""
    page.locator("#history").get_by_text("the older one").click()
    made(page, "the older one")
    page.locator("#reuse").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'the older one'")
    numbers(page)
    shown = {name: page.locator(f"#{name} input").input_value() for name in ("seed", *TINY)}
    assert shown == {"seed": seed, **{name: str(value) for name, value in TINY.items()}}
    assert not page.locator("#randomise input").is_checked()


def _goes_on_after_a_reload(page: Any) -> None:
    """A job continues during a reload, and the page shows it again."""
    ask(page, "goes on", **{**TINY, **LONG})
    before = _step(says(page, STEP))
    page.reload()
    assert _step(says(page, STEP)) > before
    assert page.locator("#prompt textarea").input_value() == "goes on"
    page.locator("#keep").click()
    made(page, "goes on")


def _step(text: str) -> int:
    found = STEP.search(text)
    assert found is not None
    return int(found[1])
