"""Tests of the browser fixtures, with a small page instead of the app."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.apps import served
from tests.apps.browser.small_page import FONT
from tests.apps.served import Served, serving

SMALL = Path(__file__).with_name("small_page.py")


@pytest.fixture
def page(new_page: Callable[..., Any]) -> Any:
    """An empty window."""
    return new_page()


@pytest.fixture(scope="module")
def small(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving([SMALL], tmp_path_factory.mktemp("small")) as found:
        yield found


def test_a_page_is_used(small: Served, new_page: Callable[..., Any]) -> None:
    """Two users have separate windows; requests to other machines fail and are recorded, as are errors of scripts."""
    first, second = new_page(), new_page(width=390, height=844)
    for page, name in ((first, "Ann"), (second, "Bo")):
        page.goto(small.url)
        page.get_by_label("Name").fill(name)
    for page, name in ((first, "Ann"), (second, "Bo")):
        page.get_by_role("button", name="Greet").click()
        page.get_by_text(f"hello {name}").wait_for()
        assert page.outside == [FONT]
        assert page.wrong == ["Failed to load resource: net::ERR_NAME_NOT_RESOLVED"]
    with first.expect_event("pageerror"):
        first.get_by_role("button", name="Break").click()
    assert "broken on purpose" in first.wrong[-1]


def test_a_page_remembers_nothing_of_the_last_one(small: Served, page: Any) -> None:
    page.goto(small.url)
    assert page.evaluate("localStorage.length") == 0


def test_pictures_of_two_widths(small: Served, page: Any, shot: Callable[..., dict[str, Path]]) -> None:
    page.goto(small.url)
    page.get_by_label("Name").wait_for()
    found = shot(page, "small")
    sizes = {key: _size(path) for key, path in found.items()}
    assert sizes == {"1280": (1280, 900), "390": (390, 844)}
    assert page.viewport_size == {"width": 1280, "height": 900}


def test_a_server_ends_with_its_children(chromium: Any, tmp_path: Path) -> None:
    with serving([SMALL], tmp_path) as small:
        child = int((tmp_path / "child").read_text())
        assert psutil.pid_exists(child)
        assert small.url in small.said()
    assert small.process.returncode is not None
    assert not _alive(child)


def test_a_server_that_ends_is_told(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('no such model')")
    with pytest.raises(AssertionError, match=r"ended with code 1:\nno such model"), serving([script], tmp_path):
        pass


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.shutil, "which", lambda name: None)
    assert served.missing().startswith("chromium (as root: bash .ci/browser)")


def _size(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.size


def _alive(number: int) -> bool:
    end = time.monotonic() + 5
    while time.monotonic() < end:
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.05)
                continue
        return False
    return os.path.exists(f"/proc/{number}")
