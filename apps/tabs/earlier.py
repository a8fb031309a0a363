"""Base class for the part of a tab that shows one result of a kind and the list of earlier results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import gradio as gr

from postgen.apps.errors import said
from postgen.apps.history import Entry
from postgen.apps.state import App
from postgen.errors import UserError

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Arguments of all events that are no public endpoints."""
_MOST = 24
"""Most results in the list."""


class Earlier(ABC):
    """One result of a kind and a list of earlier results, in the open Gradio layout.

    Subclasses create `chosen`, `list`, `remove` and `shown`.

    Args:
        app: the server.
        kind: kind of the results in the history.
    """

    chosen: Any
    """Session state with the id of the result that is shown."""
    list: Any
    """Dropdown of earlier results."""
    remove: Any
    """Button that removes the result that is shown."""
    shown: list[Any]
    """Components that change with the result."""

    def __init__(self, app: App, kind: str) -> None:
        self.app, self.kind = app, kind

    @abstractmethod
    def one(self, id: Any) -> list[Any]:
        """Return the values of `shown` for a result.

        Raises:
            UserError: the result does not exist or is damaged.
        """

    @abstractmethod
    def nothing(self) -> list[Any]:
        """Return the values of `shown` if there is no result."""

    @abstractmethod
    def caption(self, entry: Entry) -> str:
        """Return the text of a result in the list, after its time.

        Raises:
            UserError: the result cannot be read.
        """

    def wire(self) -> None:
        """Register the events of the list and the button."""
        self.list.input(lambda id: said(lambda: self.one(id)), self.list, self.shown, **PRIVATE)
        self.remove.click(lambda id: said(lambda: self.removed(id)), self.chosen, self.shown, **PRIVATE)

    def newest(self) -> list[Any]:
        """Return the values of `shown` for the newest readable result."""
        for entry in self.app.history.entries(self.kind):
            try:
                return self.one(entry.id)
            except UserError:
                continue
        return self.nothing()

    def removed(self, id: Any) -> list[Any]:
        """Remove a result, and return the values of `shown` for the newest remaining one.

        Raises:
            UserError: the result does not exist.
        """
        self.app.history.remove(id)
        return self.newest()

    def listed(self, id: str | None) -> Any:
        """Return an update of the list with the result `id` selected."""
        choices = []
        for entry in self.app.history.entries(self.kind)[:_MOST]:
            try:
                choices.append((f"{entry.made:%d %b %H:%M}  {self.caption(entry)}", entry.id))
            except UserError:
                continue
        return gr.update(choices=choices, value=id, visible=bool(choices))
