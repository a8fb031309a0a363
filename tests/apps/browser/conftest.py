"""Fixtures for browser tests: `server` (the app), `page` (its page in Debian's Chromium), `shot` (screenshots).

The browser has no network: requests to other machines fail, and `page.outside` records them.
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

from postgen.training.samples import write_samples
from tests.apps.browser.driving import opened, steps
from tests.apps.served import Served, missing, serving

SIZES = {"1280": (1280, 900), "390": (390, 844)}
"""Names of screenshots -> width and height of the window."""
_TIMEOUT = 60_000
"""Milliseconds that a locator waits; long, because the machine may be busy."""


# Package scope instead of session scope: Playwright runs an event loop in this thread until it is closed, and other
# tests of the process run their own event loops.
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
            # In a container, root has no sandbox, and /dev/shm is small. The resolver rule blocks other machines;
            # Playwright's request interception would disable the cache of the browser.
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
    """Return a function that starts another server with options of the app: `with start("--any-model") as server:`."""

    def app(*options: str | Path) -> AbstractContextManager[Served]:
        folder = tmp_path_factory.mktemp("app")
        words = ["-m", "postgen.apps.demo", "--port", "0", "--outputs", folder / "outputs", *options]
        return serving(words, folder)

    return app


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an active training run, written by the code of the trainer."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "one").mkdir()
    (folder / "one" / "config.yaml").write_text("max_steps: 50\n")
    steps(folder / "one", 1, 5)
    for step in (1, 4):
        write_samples(folder / "one" / "samples", step, [torch.rand(3, 3, 32, 32)] * 2, ["a ball", "a cube"], 8.0)
    return folder


# A start takes ten seconds of CPU time, so all tests share one server; each test checks its own results only.
@pytest.fixture(scope="package")
def server(start: Callable[..., AbstractContextManager[Served]], tiny_wan: Path, runs: Path) -> Iterator[Served]:
    """The app with a tiny model, a training run, and small limits of uploads."""
    with start("--model", tiny_wan, "--runs", runs, "--upload-mb", "1", "--upload-seconds", "4") as found:
        yield found


@pytest.fixture(scope="package")
def _first(chromium: Any) -> Iterator[Any]:
    """A browser context that all tests share, so that the scripts of the page stay in its cache."""
    context = chromium.new_context()
    yield context
    context.close()


@pytest.fixture
def new_page(chromium: Any, _first: Any) -> Iterator[Callable[..., Any]]:
    """Return a function that opens a window: `new_page(width=390, height=844)`. Two calls are two users.

    The window has no stored data. `page.outside` lists requests to other machines; `page.wrong` lists script errors
    and failed loads.
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
    """A window of one user with the app, 1280 x 900 pixels."""
    return opened(new_page(), server.url)


@pytest.fixture
def shot(tmp_path: Path) -> Callable[[Any, str], dict[str, Path]]:
    """Return a function that takes screenshots in two widths: `shot(page, "generate")` returns `{"1280": path, ...}`.

    The window keeps its size. The environment variable POSTGEN_SHOTS names a folder that keeps the screenshots.
    """

    def shoot(page: Any, name: str, *, full: bool = False) -> dict[str, Path]:
        folder = Path(os.environ.get("POSTGEN_SHOTS") or tmp_path)
        before, found = page.viewport_size, {}
        for key, (width, height) in SIZES.items():
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_timeout(300)  # wait for the layout to settle
            found[key] = folder / f"{name}-{key}.png"
            page.screenshot(path=found[key], full_page=full, animations="disabled")
        page.set_viewport_size(before)
        return found

    return shoot


def _note(url: str, outside: list[str]) -> None:
    if urlsplit(url).scheme not in ("data", "blob", "about") and urlsplit(url).hostname != "127.0.0.1":
        outside.append(url)
