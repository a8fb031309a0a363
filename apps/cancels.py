"""ASGI middleware that limits the cancel of a call to that call.

When a client cancels one call, Gradio ends all calls of the same session to the same endpoint. That would also end the
jobs of the other calls, and their callers would wait forever.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

_ROUTE = "/gradio_api/cancel"
_MARK = "<gradio-sep>"
"""Text before the event id in the name of the asyncio task of an event (`gradio.utils.set_task_name`)."""
_NONE = -1
"""Function index that no function of the page has."""


class CancelOne:
    """ASGI middleware: a cancel request ends only the event that it names."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        """Answer a cancel request; pass every other request on unchanged."""
        if scope["type"] != "http" or scope["method"] != "POST" or not _is_cancel(scope["path"]):
            await self._app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        body = await _without_the_others(b"".join(message.get("body", b"") for message in messages))
        rest = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> MutableMapping[str, Any]:
            return next(rest, None) or await receive()

        await self._app(scope, again, send)


def _is_cancel(path: str) -> bool:
    return path.rstrip("/").endswith(_ROUTE)


async def _without_the_others(body: bytes) -> bytes:
    """End the task of the event in a cancel request; return a body with which Gradio ends no other event."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return body  # the body is not JSON: Gradio reports this error
    if not isinstance(asked, dict) or not isinstance(event := asked.get("event_id"), str):
        return body
    tasks = [task for task in asyncio.all_tasks() if task.get_name().endswith(f"{_MARK}{event}")]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return json.dumps({**asked, "fn_index": _NONE}).encode()
