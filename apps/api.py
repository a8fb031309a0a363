"""What a program may call, with `gradio_client` or plain HTTP: each function here is one documented endpoint.

They take and return plain values; everything else of the page is private.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from postgen.apps import making
from postgen.apps.errors import said
from postgen.apps.history import SIDECAR, Entry
from postgen.apps.jobs import Progress
from postgen.apps.state import App
from postgen.errors import UserError, check_number

_MOST_LISTED = 500


def add_endpoints(app: App) -> None:
    """Add the endpoints to the open `gr.Blocks`: generate, cancel and history."""
    import gradio as gr
    from gradio.events import api  # gr.api is the same, which type checkers do not see

    async def generate(
        prompt: str,
        model: str | None = None,
        preset: str = "balanced",
        seed: int | None = None,
        negative_prompt: str | None = None,
        steps: int | None = None,
        width: int | None = None,
        height: int | None = None,
        frames: int | None = None,
        guidance: float | None = None,
        lora: str | None = None,
        lora_scale: float = 1.0,
        plug_ins: dict[str, str] | None = None,
    ) -> AsyncIterator[dict[str, Any]]:
        """Make a video: how the job stands, again and again, and at last its files. Ending the call cancels it."""
        form = making.Form(
            prompt=prompt,
            model=model if model is not None else app.model_names[0],
            seed=seed if seed is not None else making.drawn_seed(),
            **{"negative_prompt": negative_prompt, "lora": lora, "lora_scale": lora_scale},
            **{"steps": steps, "width": width, "height": height, "frames": frames, "guidance": guidance},
            plug_ins={} if plug_ins is None else plug_ins,
        )
        task = said(lambda: making.submitted(app, making.filled(app, form, preset)))
        try:
            async for progress in app.jobs.follow(task):
                if progress.error is not None:
                    raise gr.Error(progress.error, print_exception=False)
                yield _stands(app, task.id, progress)
        finally:
            app.jobs.cancel(task.id)  # nothing, where it has ended

    def cancel(job: str) -> bool:
        """End a job by the id that generate gave: whether there was one that had not ended. Nothing of it is kept."""
        return app.jobs.cancel(job)

    def history(limit: int = 20) -> list[dict[str, Any]]:
        """List the newest results with their settings and files."""
        said(lambda: check_number("limit", limit, 0, 10**9, whole=True))
        entries = app.history.entries(making.KIND)[: min(limit, _MOST_LISTED)]
        return [row for entry in entries if (row := _row(entry)) is not None]

    api(generate, api_name="generate")
    api(cancel, api_name="cancel")
    api(history, api_name="history")


def _stands(app: App, job: str, progress: Progress) -> dict[str, Any]:
    """Return how a job stands as plain values, and its result when it is done."""
    names = ("state", "position", "text", "done", "total", "seconds_left")
    made = app.history.find(progress.result) if progress.state == "done" else None
    return {
        "job": job,
        **{name: getattr(progress, name) for name in names},
        "seconds": round(progress.seconds, 2),
        "result": _row(made) if made is not None else None,
    }


def _row(entry: Entry) -> dict[str, Any] | None:
    """Return a result as plain values; None for one of which a part has been removed by hand."""
    try:
        note = making.note_of(entry.file(SIDECAR))
        return {
            "id": entry.id,
            "prompt": note.get("prompt"),
            "seed": note.get("seed"),
            "settings": note["settings"],
            "video": _file(entry, making.VIDEO),
            "sidecar": _file(entry, SIDECAR),
        }
    except UserError:
        return None


def _file(entry: Entry, name: str) -> dict[str, Any]:
    """Return a file as Gradio's clients take it, which download it."""
    from gradio import FileData

    path = entry.file(name)
    told: dict[str, Any] = FileData(path=str(path), orig_name=f"{entry.id}{path.suffix}").model_dump()
    return told
