"""Ending one call of a client ends that call alone.

To Gradio a client that gives a call up means every call of its session to the same endpoint: the others would be ended
too, their jobs with them, and their callers would wait for ever.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

_ROUTE = "/gradio_api/cancel"
_MARK = "<gradio-sep>"
"""Stands before the id of an event in the name of the task that works on it (`gradio.utils.set_task_name`)."""
_NONE = -1
"""Number of no function of the page."""


class CancelOne:
    """An ASGI application around another one: a cancel ends the event that it names, and no other."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        """Answer a request."""
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
    """End the task of the event that a cancel names, and return a body that leaves all others alone."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return body  # no JSON, which Gradio says
    if not isinstance(asked, dict) or not isinstance(event := asked.get("event_id"), str):
        return body
    tasks = [task for task in asyncio.all_tasks() if task.get_name().endswith(f"{_MARK}{event}")]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return json.dumps({**asked, "fn_index": _NONE}).encode()
