"""A server of the app, and a page of it in Debian's Chromium: `server`, `page`, `shot`.

Pages are looked at where they are, without the network: what a page asks of other machines is not found, and noted.
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
import torch

from postgen.grpo.logging import write_samples
from tests.apps.browser.driving import opened, steps
from tests.apps.served import Served, missing, serving

SIZES = {"1280": (1280, 900), "390": (390, 844)}
"""Names of screenshots -> width and height of the window."""
_TIMEOUT = 60_000
"""Milliseconds that a locator waits: the machine may be busy."""


# For this folder, not for the process: Playwright runs an event loop in this thread until it is closed, and other
# tests of the process run their own.
@pytest.fixture(scope="package")
def chromium() -> Iterator[Any]:
    """The browser."""
    if lacks := missing():
        if os.environ.get("POSTGEN_NEEDS_BROWSER"):
            pytest.fail(f"browser tests need {lacks}", pytrace=False)
        pytest.skip(f"browser tests need {lacks}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            # Root has no sandbox in a container, and /dev/shm is small there. Other machines are not found: to have
            # Python let each request through would take the browser's cache away.
            args=[
                "--no-sandbox",
                "--disable-dev-shm-usage",
                "--disable-gpu",
                "--force-color-profile=srgb",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def start(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., AbstractContextManager[Served]]:
    """Start another server: `with start("--any-model") as server:` with options of the app."""

    def app(*options: str | Path) -> AbstractContextManager[Served]:
        folder = tmp_path_factory.mktemp("app")
        words = ["-m", "postgen.apps.demo", "--port", "0", "--outputs", folder / "outputs", *options]
        return serving(words, folder)

    return app


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that writes, by the trainer's own writers."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "one").mkdir()
    (folder / "one" / "config.yaml").write_text("max_steps: 50\n")
    steps(folder / "one", 1, 5)
    for step in (1, 4):
        write_samples(folder / "one" / "samples", step, [torch.rand(3, 3, 32, 32)] * 2, ["a ball", "a cube"], 8.0)
    return folder


# It takes ten seconds of a core to start, so all tests use one: each looks at what it has made itself.
@pytest.fixture(scope="package")
def server(start: Callable[..., AbstractContextManager[Served]], tiny_wan: Path, runs: Path) -> Iterator[Served]:
    """The app with a tiny model, a training run, and small limits of uploads."""
    with start("--model", tiny_wan, "--runs", runs, "--upload-mb", "1", "--upload-seconds", "4") as found:
        yield found


@pytest.fixture(scope="package")
def _first(chromium: Any) -> Iterator[Any]:
    """The user whose browser has the scripts of the page in its cache."""
    context = chromium.new_context()
    yield context
    context.close()


@pytest.fixture
def new_page(chromium: Any, _first: Any) -> Iterator[Callable[..., Any]]:
    """Open a window that nobody else shares: `new_page(width=390, height=844)`. Two calls are two users.

    It remembers nothing. A page has what it asked of other machines in `page.outside`, and what went wrong in its
    scripts and what it could not load in `page.wrong`.
    """
    contexts: list[Any] = []
    pages: list[Any] = []

    def opened(width: int = 1280, height: int = 900, **settings: Any) -> Any:
        context = _first
        if pages or settings:
            context = chromium.new_context(**settings)
            contexts.append(context)
        context.set_default_timeout(_TIMEOUT)
        page = context.new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": height})
        page.outside, page.wrong = [], []
        page.on("request", lambda request: _note(request.url, page.outside))
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("console", lambda line: page.wrong.append(line.text) if line.type == "error" else None)
        return page

    yield opened
    for page in pages:
        page.evaluate("localStorage.clear()")
        page.close()
    for context in contexts:
        context.close()


@pytest.fixture
def page(server: Served, new_page: Callable[..., Any]) -> Any:
    """A window of one user at the app, 1280 by 900 pixels."""
    return opened(new_page(), server.url)


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


def _note(url: str, outside: list[str]) -> None:
    if urlsplit(url).scheme not in ("data", "blob", "about") and urlsplit(url).hostname != "127.0.0.1":
        outside.append(url)
