"""Public HTTP endpoints, for `gradio_client` or plain HTTP. All other events of the page are private.

Arguments and return values are plain JSON values. The endpoints `/score` and `/run` are in the tabs Rewards and
Training.
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
    """Add the endpoints `/generate`, `/cancel` and `/history` to the open `gr.Blocks`."""
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
        """Make a video. Yields the state of the job, at the end with the result. Cancelling the call ends the job."""
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
            app.jobs.cancel(task.id)  # no effect if the job has ended

    def cancel(job: str) -> bool:
        """Cancel a job by its id from generate and keep nothing. Returns whether the job existed and had not ended."""
        return app.jobs.cancel(job)

    def history(limit: int = 20) -> list[dict[str, Any]]:
        """Return the newest results with their settings and files."""
        said(lambda: check_number("limit", limit, 0, 10**9, whole=True))
        entries = app.history.entries(making.KIND)[: min(limit, _MOST_LISTED)]
        return [row for entry in entries if (row := _row(entry)) is not None]

    api(generate, api_name="generate")
    api(cancel, api_name="cancel")
    api(history, api_name="history")


def _stands(app: App, job: str, progress: Progress) -> dict[str, Any]:
    """Return the state of a job as plain values, with its result if it is done."""
    names = ("state", "position", "text", "done", "total", "seconds_left")
    made = app.history.find(progress.result) if progress.state == "done" else None
    return {
        "job": job,
        **{name: getattr(progress, name) for name in names},
        "seconds": round(progress.seconds, 2),
        "result": _row(made) if made is not None else None,
    }


def _row(entry: Entry) -> dict[str, Any] | None:
    """Return a result as plain values; None if one of its files is missing or damaged."""
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
    """Return a file in the format of Gradio's clients, which download it."""
    from gradio import FileData

    path = entry.file(name)
    told: dict[str, Any] = FileData(path=str(path), orig_name=f"{entry.id}{path.suffix}").model_dump()
    return told
