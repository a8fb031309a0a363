"""A server of a page that asks for a font of another machine and throws an error on demand, with a child process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gradio as gr

FONT = '<link rel="stylesheet" href="https://fonts.example/css?family=Nice">'


def greet(name: str) -> str:
    """What the button does."""
    if not name:
        raise gr.Error("there is no name: type one", duration=None)
    return f"hello {name}"


def main() -> None:
    """Serve it at a free port."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path("child").write_text(str(child.pid))
    with gr.Blocks(title="small", analytics_enabled=False) as page:
        name = gr.Textbox(label="Name")
        answer = gr.Textbox(label="Answer")
        gr.Button("Greet").click(greet, name, answer)
        gr.Button("Break").click(None, js="() => { setTimeout(() => { throw new Error('broken on purpose') }) }")
    theme = gr.themes.Base(font=["system-ui"], font_mono=["monospace"])
    _, url, _ = page.launch(quiet=True, prevent_thread_lock=True, theme=theme, head=FONT, ssr_mode=False)
    print(f"serving at {url}", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
