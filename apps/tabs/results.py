"""The part of the Generate tab that shows results: a player, actions for the chosen result, and the gallery."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import gradio as gr

from postgen.apps import making
from postgen.apps.errors import said
from postgen.apps.history import SIDECAR, Entry
from postgen.apps.links import link_of
from postgen.apps.state import App
from postgen.apps.status import duration
from postgen.apps.uploads import discarding, uploaded_settings
from postgen.errors import UserError, is_number

PAGE = 24
"""Number of results in the gallery at first, and number of results that "Show more" adds."""
_CAPTION = 40


class Results:
    """A player for the chosen result, and the gallery, in the open Gradio layout.

    `shown` lists the components that change with a result; `newest` and `unchanged` return values for them, and `one`
    returns values for the components without the gallery.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self.video = gr.Video(label="Result", autoplay=True, loop=True, elem_id="result", height=380, buttons=[])
        self.about = gr.HTML(elem_id="about")
        small: dict[str, Any] = {"interactive": False, "size": "sm", "min_width": 90}
        with gr.Row(elem_classes=["buttons", "results-buttons"]):
            self.again = gr.Button("Reuse settings", elem_id="reuse", **small)
            self.get_video = gr.DownloadButton("Save video", elem_id="get-video", **small)
            self.get_note = gr.DownloadButton("Save settings", elem_id="get-settings", **small)
            self.remove = gr.Button("Remove", elem_id="remove", **small)
        gr.HTML("<h2>History</h2>", elem_classes="heading")
        self.gallery = gr.Gallery(
            label="History",
            show_label=False,
            columns=4,
            height="auto",
            object_fit="cover",
            allow_preview=False,
            interactive=False,
            elem_id="history",
            buttons=[],
        )
        self.more = gr.Button("Show more", visible=False, size="sm", elem_id="more")
        self.upload = gr.UploadButton(
            "Load settings from a postgen video or JSON file",
            file_types=[".json", ".mp4", ".webm"],
            size="sm",
            elem_id="from-file",
        )
        self.chosen = gr.State(None)
        self.ids = gr.State([])
        self.count = gr.State(PAGE)
        self._one = [self.video, self.about, self.again, self.get_video, self.get_note, self.remove, self.chosen]
        self.shown = [*self._one, self.gallery, self.more, self.ids]

    def wire(self, reuse: Callable[[Mapping[str, Any]], list[Any]], controls: list[Any]) -> None:
        """Register the events.

        Args:
            reuse: function from the settings of a sidecar to the values of `controls`.
            controls: components of the request.
        """
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

        def chosen(ids: list[str], event: gr.SelectData) -> list[Any]:
            return said(lambda: self.one(self.app.history.get(ids[event.index] if event.index < len(ids) else None)))

        def again(id: str | None) -> list[Any]:
            return said(lambda: reuse(self._note(self.app.history.get(id))["settings"]))

        def removed(id: str | None, count: int) -> list[Any]:
            said(lambda: self.app.pictures.remove_result(id))
            return [*self._nothing(), *self._listed(count)]

        def taken(file: str) -> list[Any]:
            def read() -> list[Any]:
                with discarding(file):
                    settings = uploaded_settings(file, self.app.settings)
                return reuse(settings)

            return said(read)

        self.gallery.select(chosen, self.ids, self._one, **private)
        self.again.click(again, self.chosen, controls, **private)
        self.remove.click(removed, [self.chosen, self.count], self.shown, **private)
        self.upload.upload(taken, self.upload, controls, **private)
        self.more.click(
            lambda count: [count + PAGE, *self._listed(count + PAGE)],
            self.count,
            [self.count, *self.shown[len(self._one) :]],
            **private,
        )

    def newest(self, id: str | None = None) -> list[Any]:
        """Return the values of `shown`: the current gallery, and the result `id`, or the newest without an id."""
        listed = self._listed(PAGE)
        entry = self.app.history.find(id) if id is not None else None
        if entry is None:
            entry = next(iter(self.app.history.entries(making.KIND)), None)
        return [*(self._nothing() if entry is None else self._one_or_nothing(entry)), *listed]

    def unchanged(self) -> list[Any]:
        """Return the values of `shown` that change nothing."""
        return [gr.skip() for _ in self.shown]

    def one(self, entry: Entry) -> list[Any]:
        """Return the values of the player, the facts and the buttons for a result.

        Raises:
            UserError: the result does not exist or is damaged.
        """
        video, note = str(entry.video), self._note(entry)
        on = gr.update(interactive=True)
        return [
            video,
            about(note, link_of(self.app, note["settings"])),
            on,
            gr.update(value=video, interactive=True),
            gr.update(value=str(entry.file(SIDECAR)), interactive=True),
            on,
            entry.id,
        ]

    def _one_or_nothing(self, entry: Entry) -> list[Any]:
        try:
            return self.one(entry)
        except UserError:
            return self._nothing()

    def _nothing(self) -> list[Any]:
        off = gr.update(interactive=False)
        return [None, "", off, off, off, off, None]

    def _listed(self, count: int) -> list[Any]:
        entries = self.app.history.entries(making.KIND)
        pictures, ids = [], []
        for entry in entries[:count]:
            try:
                pictures.append((str(entry.poster), str(self._note(entry).get("prompt"))[:_CAPTION]))
            except UserError:  # a file of the result is missing
                continue
            ids.append(entry.id)
        return [pictures, gr.update(visible=len(entries) > count), ids]

    def _note(self, entry: Entry) -> Mapping[str, Any]:
        return making.note_of(entry.file(SIDECAR))


def about(note: Mapping[str, Any], link: str | None = None) -> str:
    """Return HTML with the prompt and the settings of a video.

    Args:
        note: sidecar of the video.
        link: address that fills the form with these settings; None omits the link.
    """
    settings, seconds = note["settings"], note.get("seconds")
    facts = [
        ("Seed", note.get("seed")),
        ("Size", f"{note.get('width')} x {note.get('height')}, {note.get('frames')} frames"),
        ("Steps", settings.get("num_inference_steps")),
        ("Guidance", f"{scale:g}" if is_number(scale := settings.get("guidance_scale")) else None),
        ("Stopped", f"after step {stopped}" if (stopped := note.get("stopped_after")) is not None else None),
        ("Took", duration(float(seconds)) if seconds is not None and is_number(seconds) else None),
    ]
    plug_ins = note.get("plug_ins")
    facts += [(row, settings.get(row)) for row in (plug_ins if isinstance(plug_ins, Mapping) else ())]
    spans = "".join(f"<span><b>{escape(str(k))}</b> {escape(str(v))}</span>" for k, v in facts if v is not None)
    if link is not None:
        spans += f'<span><a href="{escape(link)}">Link to these settings</a></span>'
    return f'<p class="about-prompt">{escape(str(note.get("prompt")))}</p><p class="about-facts">{spans}</p>'
