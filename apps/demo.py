"""The Gradio app: `postgen demo`, or `python -m postgen.apps.demo`."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from postgen.apps.api import add_endpoints
from postgen.apps.guard import TEMPORARY, guarded
from postgen.apps.jobs import Task
from postgen.apps.looks import launch_looks
from postgen.apps.making import shown_model
from postgen.apps.settings import AppSettings
from postgen.apps.state import App
from postgen.errors import UserError
from postgen.families.loading import check_device
from postgen.families.offload import check_offload
from postgen.generate import prepare

_LOOK, _AGE = 1800, 6 * 3600
"""Seconds between two checks for old uploads, and age in seconds at which an upload is deleted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TabRow:
    """One tab of the page."""

    title: str
    """Title of the tab on the page."""
    place: str
    """Module with a function `tab(app)`, which builds the tab in the open `gr.Blocks` and registers its events."""
    shown: Callable[[App], bool] = lambda app: True
    """Whether the settings of this server allow the tab; otherwise the page has no such tab."""


TABS = (
    TabRow(title="Generate", place="postgen.apps.tabs.generate"),
    TabRow(title="Before and after", place="postgen.apps.tabs.compare"),
    TabRow(
        title="Long video",
        place="postgen.apps.tabs.long_video",
        # A long video denoises several groups of frames at once, so the whole model must stay on the device.
        shown=lambda app: app.settings.offload == "none",
    ),
    TabRow(title="Rewards", place="postgen.apps.tabs.rewards"),
    TabRow(title="Training", place="postgen.apps.tabs.training", shown=lambda app: app.settings.runs is not None),
)
"""All tabs, in the order of the page."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A running server."""

    url: str
    """Address of the page."""
    app: App
    """Jobs, models and results of the server."""
    close: Callable[[], None]
    """Function that ends the jobs, frees the models, deletes the uploads and stops the server."""

    def wait(self) -> None:
        """Block until Ctrl-C or another signal raises an exception."""
        while True:
            time.sleep(3600)


def check_gradio() -> None:
    """Check that Gradio is installed.

    Raises:
        UserError: Gradio is not installed.
    """
    if find_spec("gradio") is None:
        raise UserError("the app needs Gradio: pip install 'postgen[demo]'")


def build(settings: AppSettings | None = None, *, app: App | None = None) -> Any:
    """Build the page and return it as a `gr.Blocks`. `launch` also serves the page.

    Args:
        settings: settings of the app; None means the defaults.
        app: an existing `App`; None creates one from the settings.

    Raises:
        UserError: Gradio is not installed, or the folder of outputs cannot be written.
    """
    check_gradio()
    import gradio as gr

    app = app if app is not None else App(settings or AppSettings())
    gr.set_static_paths([app.history.folder])
    with gr.Blocks(title="postgen", analytics_enabled=False, delete_cache=(_LOOK, _AGE)) as page:
        app.page = page
        add_endpoints(app)  # before the tabs: Gradio renames later functions of the same name
        gr.HTML(
            "<h1>postgen</h1><p>Generate videos from text, with plug-ins that you can switch on and off.</p>",
            elem_id="page-head",
        )
        rows = [row for row in TABS if row.shown(app)]
        for row in rows:
            key = f"{row.place}-kept"
            app.remembered[row.place] = gr.BrowserState(None, storage_key=key, secret="postgen")
        # "wrap": Gradio's overflow menu hides tabs, and loses them when the window changes its width.
        with gr.Tabs(overflow_behavior="wrap"):
            for row in rows:
                with gr.Tab(row.title, id=row.title.lower()):
                    import_module(row.place).tab(app)
    # Jobs wait in `App.jobs`, which reports their position; Gradio's own queue must not hold events back.
    page.queue(max_size=None, default_concurrency_limit=None)
    return page


def launch(settings: AppSettings | None = None, *, warm: bool = True) -> Served:
    """Start the server in threads of this process and return it.

    Args:
        settings: settings of the app; None means the defaults.
        warm: whether a first job loads the first model in the background.

    Raises:
        UserError: Gradio is not installed, the port is in use, the model does not exist, the folder of outputs cannot
            be written, or offloading is set and the device is not a GPU.
    """
    check_gradio()
    settings = settings or AppSettings()
    if settings.offload != "none":
        check_offload(settings.offload, check_device(settings.device))
    app = App(settings)
    app.facts(settings.model)
    port = _free_port(settings)
    uploads = _upload_folder()
    page = build(app=app)

    def close() -> None:
        app.close()
        page.close(verbose=False)
        if uploads is not None:
            os.environ.pop(TEMPORARY, None)
            shutil.rmtree(uploads, ignore_errors=True)

    try:
        _, url, _ = page.launch(
            server_name=settings.host,
            server_port=port,
            auth=list(settings.auth) or None,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            max_file_size=settings.upload_bytes,
            allowed_paths=[str(app.history.folder)],  # set here, so that no environment variable adds folders
            enable_monitoring=False,
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            **guarded(settings, own_uploads=uploads is not None),
            **launch_looks(settings.theme),
        )
    except OSError as error:
        close()
        raise UserError(f"cannot serve at {settings.host}:{port}: {error}") from error
    if warm:
        app.jobs.submit("the first model", lambda task: _warm(app, task))
    return Served(url=url, app=app, close=close)


def _warm(app: App, task: Task) -> None:
    """Load the first model, as the first job. Errors are ignored here: the first use of the model reports them."""
    from postgen.families.latent_colours import latent_colours

    task.tell(f"Loading {shown_model(app.settings.model)}")
    job = prepare(app.request("warm", model=app.settings.model))
    with suppress(UserError), app.models.pipeline(job) as pipe:
        latent_colours(pipe)  # computed here, so that the first video does not wait for it


def _upload_folder() -> str | None:
    """Create a temporary folder for Gradio's uploads, and return it; None if the environment names a folder.

    `launch` deletes the folder when the server closes.
    """
    if os.environ.get(TEMPORARY):
        return None
    folder = tempfile.mkdtemp(prefix="postgen-uploads-")
    os.environ[TEMPORARY] = folder
    return folder


def _free_port(settings: AppSettings) -> int:
    """Return the port of the settings, or a free port if it is 0.

    Raises:
        UserError: the port is in use, or the host is not an address of this machine.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host.strip("[]"), settings.port))
        except OSError as error:
            raise UserError(
                f"cannot listen at {settings.host}:{settings.port}: {error.strerror or error}; use another port, or"
                " --port 0 for a free one"
            ) from error
        port: int = probe.getsockname()[1]
    return port


if __name__ == "__main__":
    import sys

    from postgen.cli import main

    main(["demo", *sys.argv[1:]])
