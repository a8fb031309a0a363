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
"""Seconds after which uploads are looked through, and after which one is removed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TabRow:
    """One tab of the page."""

    title: str
    """What the page calls it."""
    place: str
    """Module with `tab(app)`, which builds the tab inside the open `gr.Blocks` and wires its events."""
    shown: Callable[[App], bool] = lambda app: True
    """Whether this server has what the tab needs; without it there is no tab."""


TABS = (
    TabRow(title="Generate", place="postgen.apps.tabs.generate"),
    TabRow(title="Before and after", place="postgen.apps.tabs.compare"),
    TabRow(
        title="Long video",
        place="postgen.apps.tabs.long_video",
        shown=lambda app: app.settings.offload == "none",  # groups in flight keep the whole model busy
    ),
    TabRow(title="Rewards", place="postgen.apps.tabs.rewards"),
    TabRow(title="Training", place="postgen.apps.tabs.training", shown=lambda app: app.settings.runs is not None),
)
"""In the order of the page."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A server that runs."""

    url: str
    """Where."""
    app: App
    """What it holds."""
    close: Callable[[], None]
    """Ends it: jobs, models, uploads and the server."""

    def wait(self) -> None:
        """Wait until Ctrl-C or another signal, which is raised."""
        while True:
            time.sleep(3600)


def check_gradio() -> None:
    """Say in one line that the app needs Gradio.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("gradio") is None:
        raise UserError("the app needs Gradio: pip install 'postgen[demo]'")


def build(settings: AppSettings | None = None, *, app: App | None = None) -> Any:
    """Return the page, a `gr.Blocks`. `launch` also serves it.

    Args:
        settings: None are the defaults.
        app: what the server holds; None makes one of the settings.

    Raises:
        UserError: Gradio is not installed, or a folder cannot be written.
    """
    check_gradio()
    import gradio as gr

    app = app if app is not None else App(settings or AppSettings())
    gr.set_static_paths([app.history.folder])
    with gr.Blocks(title="postgen", analytics_enabled=False, delete_cache=(_LOOK, _AGE)) as page:
        app.page = page
        add_endpoints(app)  # first, as functions of tabs may have the same names
        gr.HTML(
            "<h1>postgen</h1><p>Video from text, with what makes it better switched on or off.</p>",
            elem_id="page-head",
        )
        rows = [row for row in TABS if row.shown(app)]
        for row in rows:
            key = f"{row.place}-kept"
            app.remembered[row.place] = gr.BrowserState(None, storage_key=key, secret="postgen")
        with gr.Tabs(overflow_behavior="wrap"):  # a menu hides tabs, and loses them when the window changes its width
            for row in rows:
                with gr.Tab(row.title, id=row.title.lower()):
                    import_module(row.place).tab(app)
    # Jobs wait in a queue of their own, which says where they stand: Gradio's lets everything through.
    page.queue(max_size=None, default_concurrency_limit=None)
    return page


def launch(settings: AppSettings | None = None, *, warm: bool = True) -> Served:
    """Serve the page from threads of this process.

    Args:
        settings: None are the defaults.
        warm: whether the first model is loaded meanwhile.

    Raises:
        UserError: Gradio is not installed, the port is taken, the model is none, a folder cannot be written, there is
            nothing to offload from.
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
            allowed_paths=[str(app.history.folder)],  # also keeps the environment from naming more
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
    """Load the first model, as the first job; what is wrong with it is said when it is used."""
    from postgen.families.latent_colours import latent_colours

    task.tell(f"Loading {shown_model(app.settings.model)}")
    job = prepare(app.request("warm", model=app.settings.model))
    with suppress(UserError), app.models.pipeline(job) as pipe:
        latent_colours(pipe)  # so that the first job has not to wait for it


def _upload_folder() -> str | None:
    """Give Gradio a folder for uploads that ends with the server, unless the environment names one."""
    if os.environ.get(TEMPORARY):
        return None
    folder = tempfile.mkdtemp(prefix="postgen-uploads-")
    os.environ[TEMPORARY] = folder
    return folder


def _free_port(settings: AppSettings) -> int:
    """Return the port, or one that is free where it is 0.

    Raises:
        UserError: it is taken, or the address is none of this machine.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host.strip("[]"), settings.port))
        except OSError as error:
            raise UserError(
                f"cannot listen at {settings.host}:{settings.port}: {error.strerror or error}; --port 0 takes a free"
                " one"
            ) from error
        port: int = probe.getsockname()[1]
    return port


if __name__ == "__main__":
    import sys

    from postgen.cli import main

    main(["demo", *sys.argv[1:]])
