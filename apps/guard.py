"""What of Gradio's HTTP interface is closed: this stands before all of its routes.

Gradio opens more than the page needs: it fetches addresses of the network for whoever asks, keeps what it refuses, and
has routes for recordings, links and editors. It answers under every name (`postgen.apps.hosts`).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from postgen.apps.cancels import CancelOne
from postgen.apps.hosts import Names
from postgen.apps.settings import RESULTS, AppSettings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

TEMPORARY = "GRADIO_TEMP_DIR"
"""Names, to Gradio, the folder of uploads."""
_PREFIX = "/gradio_api/"
_CLOSED = (
    *("proxy=", "process_recording", "deep_link", "component_server", "custom_component/", "stream/", "dev/"),
    *("runs", "run-history/", "vibe-", "undo-vibe-", "profiling/"),
)
"""Begins of routes that nothing here uses."""
_FILES = ("file=", "file/")
_CALLS = ("queue/join", "call/", "run/", "api/")
"""Begins of routes whose JSON may name files."""
_BODY = 2**22
"""Bytes of a request that is no upload."""
_FORM = 2**16
"""Bytes of an upload that are none of its file."""
_DISCARDED = 2**26
"""Bytes that are read of a request that is refused."""
_NOT_GIVEN = "this server gives out results and uploads, and opens uploads: nothing else of this machine or a network"


def uploads_folder() -> Path:
    """Return the folder where Gradio keeps uploads."""
    return Path(os.environ.get(TEMPORARY) or Path(tempfile.gettempdir()) / "gradio")


class Guard:
    """An ASGI application around another one, which refuses what the page never asks for.

    - A request names this server, and comes from no other site: `postgen.apps.hosts`.
    - `file=` gives what stands, through all links, in the folder of a result or of uploads, and fetches no address.
    - A call that names a file has uploaded it, or names a result.
    - An upload is held to the limit before it is read. Of one that breaks off nothing is kept.

    Args:
        app: the application.
        folder: of results.
        names: of the server.
        upload_bytes: largest upload.
        own_uploads: whether nobody but this server uses the folder of uploads.
    """

    def __init__(self, app: Any, folder: Path, names: Names, upload_bytes: int, own_uploads: bool = False) -> None:
        self._app, self._folder, self._names = app, folder, names
        self._most, self._own = upload_bytes, own_uploads
        self._uploading = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._other(scope, receive, send)
            return
        route = scope["path"].partition(_PREFIX)[2]
        if (refused := self._refused(scope, route)) is not None:
            await _discarded(receive)
            await _answer(send, *refused)
        elif scope["method"] == "POST" and route.startswith(_CALLS):
            await self._call(scope, receive, send)
        elif scope["method"] == "POST" and route.rstrip("/") == "upload":
            await self._upload(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let what is no request go on, a socket only where a request might."""
        if scope["type"] == "websocket" and self._names.refused(scope["headers"]) is not None:
            await receive()
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: the answer is 403
            return
        await self._app(scope, receive, send)

    def _refused(self, scope: Scope, route: str) -> tuple[int, str] | None:
        """Return the status and the reason why a request goes no further, as its head tells."""
        if (why := self._names.refused(scope["headers"])) is not None:
            return 403, why
        if route.startswith(_CLOSED):
            return 404, "this server has no such route"
        for word in _FILES:
            if route.startswith(word) and not self._given(route[len(word) :]):
                return 403, _NOT_GIVEN
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return None
        size = _size(scope)
        if size is None:
            return 411, "a request must say how many bytes it has"
        most = self._most + _FORM if route.startswith("upload") else _BODY
        if size > most:
            return 413, f"the request has {size:,} bytes, and at most {most:,} are allowed: make it smaller"
        return None

    def _given(self, name: str) -> bool:
        """Whether a path, as a request has it, is one that this server gives out."""
        try:
            place, results = Path(os.path.realpath(name)), Path(os.path.realpath(self._folder))
            # Folders inside a result have the states of a long video, which name files of this machine.
            if place.is_relative_to(results):
                return len(place.relative_to(results).parts) == 2
            return place.is_relative_to(os.path.realpath(uploads_folder()))
        except (OSError, ValueError):  # a null character, or a name that is too long
            return False

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Look at the files that a call names, and let it go on."""
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        try:
            names = _paths_in(json.loads(body))
        except ValueError:
            names = []  # no JSON, which Gradio says
        except RecursionError:
            await _answer(send, 400, "the request is nested too deeply")
            return
        if not all(self._given(name) for name in names):
            await _answer(send, 403, _NOT_GIVEN)
            return
        rest = iter(messages)

        async def again() -> MutableMapping[str, Any]:
            return next(rest, None) or await receive()

        await self._app(scope, again, send)

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let an upload go on, and remove what Gradio has written of one that did not come to its end."""
        self._uploading += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._uploading -= 1
            # A finished upload stands in a folder of its own. What stands beside these may belong to another one; else
            # it is of what was refused, broke off, or came in a form without an end, to which Gradio answers 200.
            if self._own and not self._uploading:
                _remove_files(uploads_folder())


def guarded(settings: AppSettings, *, own_uploads: bool = False) -> dict[str, Any]:
    """Return arguments for `gr.Blocks.launch` that put a `Guard` before the page.

    Args:
        settings: of the page.
        own_uploads: as of `Guard`.
    """
    from starlette.middleware import Middleware

    folder = Path(settings.outputs).expanduser().absolute() / RESULTS
    own: dict[str, Any] = {"folder": folder, "upload_bytes": settings.upload_bytes, "own_uploads": own_uploads}
    own["names"] = Names(host=settings.host, allowed=settings.allow_hosts)
    return {"app_kwargs": {"middleware": [Middleware(Guard, **own), Middleware(CancelOne)]}}


def _size(scope: Scope) -> int | None:
    """Return how many bytes a request has; None where it does not say, or comes in chunks, whatever it says."""
    if any(name == b"transfer-encoding" for name, _ in scope["headers"]):
        return None
    found = [value for name, value in scope["headers"] if name == b"content-length"]
    return int(found[0]) if len(found) == 1 and found[0].isdigit() else None


def _paths_in(value: Any) -> list[str]:
    """Return what a call names as files, wherever they stand in it."""
    found: list[str] = []
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            if isinstance(path := one.get("path"), str):
                found.append(path)
            left += one.values()
        elif isinstance(one, list):
            left += one
    return found


async def _discarded(receive: Receive) -> None:
    """Read what a refused request still sends, up to a limit: who sends into a closed connection gets no answer."""
    left = _DISCARDED
    while left > 0:
        message = await receive()
        left -= max(1, len(message.get("body", b"")))
        if message["type"] != "http.request" or not message.get("more_body"):
            return


async def _answer(send: Send, status: int, text: str) -> None:
    body = json.dumps({"detail": text}).encode()
    kind = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": kind})
    await send({"type": "http.response.body", "body": body})


def _remove_files(folder: Path) -> None:
    paths: Sequence[Path] = ()
    with suppress(OSError):
        paths = list(folder.iterdir())
    for path in paths:
        with suppress(OSError):
            if path.is_file():
                path.unlink()
