"""Tab: a video from a prompt."""

from __future__ import annotations

from postgen.apps.state import App


def tab(app: App) -> None:
    """Build the tab."""
    import gradio as gr

    gr.Textbox(label="Prompt")
