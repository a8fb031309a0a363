"""A server of the app, and a page of it in Debian's Chromium: `server`, `page`, `shot`.

Pages are looked at where they are, without the network: what a page asks of other machines is refused and noted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.apps.served import Served, missing, serving

SIZES = {"1280": (1280, 900), "390": (390, 844)}
"""Names of screenshots -> width and height of the window."""
_TIMEOUT = 60_000
"""Milliseconds that a locator waits: the machine may be busy."""


# One for a file, not for the process: Playwright runs an event loop in this thread until it is closed, and other tests
# of the process run their own.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The browser; each test has a window of its own that remembers nothing."""
    if lacks := missing():
        if os.environ.get("POSTGEN_NEEDS_BROWSER"):
            pytest.fail(f"browser tests need {lacks}", pytrace=False)
        pytest.skip(f"browser tests need {lacks}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            # Root has no sandbox in a container, and /dev/shm is small there.
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--force-color-profile=srgb"],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def start(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., AbstractContextManager[Served]]:
    """Start another server: `with start("--any-model") as server:` with options of the app."""

    def app(*options: str | Path) -> AbstractContextManager[Served]:
        folder = tmp_path_factory.mktemp("app")
        words = ["-m", "postgen.apps.demo", "--port", "0", "--outputs", folder / "outputs", *options]
        return serving(words, folder)

    return app


@pytest.fixture(scope="module")
def server(start: Callable[..., AbstractContextManager[Served]]) -> Iterator[Served]:
    """The app with its defaults, one for the tests of a file."""
    with start() as found:
        yield found


@pytest.fixture
def new_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Open a window that nobody else shares: `new_page(width=390, height=844)`. Two calls are two users.

    A page has what it asked of other machines in `page.outside`, and what went wrong in its scripts and what it could
    not load in `page.wrong`.
    """
    contexts = []

    def opened(width: int = 1280, height: int = 900, **settings: Any) -> Any:
        context = chromium.new_context(viewport={"width": width, "height": height}, **settings)
        contexts.append(context)
        context.set_default_timeout(_TIMEOUT)
        page = context.new_page()
        page.outside, page.wrong = [], []
        context.route("**/*", lambda route: _let_through(route, page.outside))
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("console", lambda line: page.wrong.append(line.text) if line.type == "error" else None)
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture
def page(new_page: Callable[..., Any]) -> Any:
    """A window of 1280 by 900 pixels."""
    return new_page()


@pytest.fixture
def shot(tmp_path: Path) -> Callable[[Any, str], dict[str, Path]]:
    """Take pictures of a page: `shot(page, "generate")` gives `{"1280": path, "390": path}` and leaves its size.

    The environment's POSTGEN_SHOTS names a folder that keeps them.
    """

    def shoot(page: Any, name: str, *, full: bool = False) -> dict[str, Path]:
        folder = Path(os.environ.get("POSTGEN_SHOTS") or tmp_path)
        before, found = page.viewport_size, {}
        for key, (width, height) in SIZES.items():
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_timeout(300)  # until what moves has moved
            found[key] = folder / f"{name}-{key}.png"
            page.screenshot(path=found[key], full_page=full, animations="disabled")
        page.set_viewport_size(before)
        return found

    return shoot


def _let_through(route: Any, outside: list[str]) -> None:
    url = route.request.url
    if urlsplit(url).scheme in ("data", "blob", "about") or urlsplit(url).hostname == "127.0.0.1":
        route.continue_()
    else:
        outside.append(url)
        route.abort()
