"""ASGI middleware before all routes of Gradio. It closes the parts of the HTTP interface that the page does not need.

Gradio fetches network addresses that a client names, keeps files of refused uploads, and has routes for recordings,
links and editors. It also accepts every host name (see `postgen.apps.hosts`).
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
"""Environment variable that tells Gradio the folder of uploads."""
_PREFIX = "/gradio_api/"
_CLOSED = (
    *("proxy=", "process_recording", "deep_link", "component_server", "custom_component/", "stream/", "dev/"),
    *("runs", "run-history/", "vibe-", "undo-vibe-", "profiling/"),
)
"""Prefixes of routes that the page does not use."""
_FILES = ("file=", "file/")
_CALLS = ("queue/join", "call/", "run/", "api/")
"""Prefixes of routes whose JSON body may name files."""
_BODY = 2**22
"""Largest body of a request other than an upload, in bytes."""
_FORM = 2**16
"""Bytes that an upload may have in addition to its file, for the headers of the form."""
_DISCARDED = 2**26
"""Largest number of bytes that the server reads from a refused request."""
_NOT_GIVEN = "this server only opens files of results and uploads: upload the file, then name the upload"


def uploads_folder() -> Path:
    """Return the folder in which Gradio stores uploads."""
    return Path(os.environ.get(TEMPORARY) or Path(tempfile.gettempdir()) / "gradio")


class Guard:
    """ASGI middleware that refuses requests that the page never makes.

    - Host name and origin: a request must name this server and must not come from another site
      (`postgen.apps.hosts`).
    - Files: the `file=` routes return files of results and uploads only, after symbolic links are resolved, and never
      fetch a network address.
    - Calls: a file in the JSON of a call must be an upload or a file of a result.
    - Uploads: the size limit is checked before the body is read, and files of an interrupted upload are deleted.

    Args:
        app: the wrapped ASGI application.
        folder: folder of the results.
        names: accepted host names.
        upload_bytes: largest upload, in bytes.
        own_uploads: whether only this server uses the folder of uploads, so that it may delete leftover files there.
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
        """Pass on events that are not HTTP requests; a WebSocket must pass the same name check as a request."""
        if scope["type"] == "websocket" and self._names.refused(scope["headers"]) is not None:
            await receive()
            await send({"type": "websocket.close", "code": 1008})  # a close before the accept is sent as status 403
            return
        await self._app(scope, receive, send)

    def _refused(self, scope: Scope, route: str) -> tuple[int, str] | None:
        """Return HTTP status and reason if the headers of a request are refused, otherwise None."""
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
            return 411, "the request has no valid Content-Length header: send the body with its length, not in chunks"
        most = self._most + _FORM if route.startswith("upload") else _BODY
        if size > most:
            return 413, f"the request has {size:,} bytes, and at most {most:,} are allowed: make it smaller"
        return None

    def _given(self, name: str) -> bool:
        """Whether a path in a request is a file that clients may read."""
        try:
            place, results = Path(os.path.realpath(name)), Path(os.path.realpath(self._folder))
            # Subfolders of a result hold states of long videos, which contain paths of this machine.
            if place.is_relative_to(results):
                return len(place.relative_to(results).parts) == 2
            return place.is_relative_to(os.path.realpath(uploads_folder()))
        except (OSError, ValueError):  # a null character, or a name that is too long
            return False

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the files that a call names, then pass the call on."""
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        try:
            names = _paths_in(json.loads(body))
        except ValueError:
            names = []  # the body is not JSON: Gradio reports this error
        except RecursionError:
            await _answer(send, 400, "the JSON of the request is nested too deeply: send fewer levels")
            return
        if not all(self._given(name) for name in names):
            await _answer(send, 403, _NOT_GIVEN)
            return
        rest = iter(messages)

        async def again() -> MutableMapping[str, Any]:
            return next(rest, None) or await receive()

        await self._app(scope, again, send)

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an upload on, then delete leftover files of uploads that did not finish."""
        self._uploading += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._uploading -= 1
            # Gradio moves a finished upload into its own subfolder. A file directly in the folder of uploads belongs
            # to a running upload, or it is left over from an upload that was refused, was interrupted, or had a form
            # without an end (Gradio answers 200 to such a form).
            if self._own and not self._uploading:
                _remove_files(uploads_folder())


def guarded(settings: AppSettings, *, own_uploads: bool = False) -> dict[str, Any]:
    """Return arguments for `gr.Blocks.launch` that add the middleware `Guard` and `CancelOne`.

    Args:
        settings: settings of the app.
        own_uploads: see `Guard`.
    """
    from starlette.middleware import Middleware

    folder = Path(settings.outputs).expanduser().absolute() / RESULTS
    own: dict[str, Any] = {"folder": folder, "upload_bytes": settings.upload_bytes, "own_uploads": own_uploads}
    own["names"] = Names(host=settings.host, allowed=settings.allow_hosts)
    return {"app_kwargs": {"middleware": [Middleware(Guard, **own), Middleware(CancelOne)]}}


def _size(scope: Scope) -> int | None:
    """Return the length of a request's body; None if it has no valid `Content-Length` or a transfer encoding."""
    if any(name == b"transfer-encoding" for name, _ in scope["headers"]):
        return None
    found = [value for name, value in scope["headers"] if name == b"content-length"]
    return int(found[0]) if len(found) == 1 and found[0].isdigit() else None


def _paths_in(value: Any) -> list[str]:
    """Return all file paths in the JSON of a call, at any depth."""
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
    """Read the rest of a refused request, up to a limit; a client that sends to a closed connection gets no answer."""
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
