"""The part of a tab that shows one result of its kind, and the list of all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import gradio as gr

from postgen.apps.errors import said
from postgen.apps.history import Entry
from postgen.apps.state import App
from postgen.errors import UserError

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""What events of the page are."""
_MOST = 24
"""Results that the list shows."""


class Earlier(ABC):
    """Built inside the open layout. Who derives it makes `chosen`, `list`, `remove` and `shown`.

    Args:
        app: the server.
        kind: of the results, in the history.
    """

    chosen: Any
    """Id of the result that is shown, in the session."""
    list: Any
    """A dropdown of results."""
    remove: Any
    """A button."""
    shown: list[Any]
    """The components that change with a result."""

    def __init__(self, app: App, kind: str) -> None:
        self.app, self.kind = app, kind

    @abstractmethod
    def one(self, id: Any) -> list[Any]:
        """Return the values of `shown` for a result.

        Raises:
            UserError: it is no longer there.
        """

    @abstractmethod
    def nothing(self) -> list[Any]:
        """Return the values of `shown` where there is no result."""

    @abstractmethod
    def caption(self, entry: Entry) -> str:
        """Return what the list says of a result, beside its time.

        Raises:
            UserError: it cannot be read.
        """

    def wire(self) -> None:
        """Wire the list and the button."""
        self.list.input(lambda id: said(lambda: self.one(id)), self.list, self.shown, **PRIVATE)
        self.remove.click(lambda id: said(lambda: self.removed(id)), self.chosen, self.shown, **PRIVATE)

    def newest(self) -> list[Any]:
        """Return the values of `shown` for the newest result that can be read."""
        for entry in self.app.history.entries(self.kind):
            try:
                return self.one(entry.id)
            except UserError:
                continue
        return self.nothing()

    def removed(self, id: Any) -> list[Any]:
        """Remove a result, and return the values of `shown` for the newest that is left.

        Raises:
            UserError: it is no longer there.
        """
        self.app.history.remove(id)
        return self.newest()

    def listed(self, id: str | None) -> Any:
        """Return the list with one chosen."""
        choices = []
        for entry in self.app.history.entries(self.kind)[:_MOST]:
            try:
                choices.append((f"{entry.made:%d %b %H:%M}  {self.caption(entry)}", entry.id))
            except UserError:
                continue
        return gr.update(choices=choices, value=id, visible=bool(choices))
