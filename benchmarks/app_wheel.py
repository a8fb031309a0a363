"""Test of the wheel: build it, install it outside the checkout, and run its commands.

    python -m benchmarks.app_wheel

The virtual environment is new; it takes the other libraries from the environment that runs the test.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from postgen.errors import UserError
from postgen.video import read_video
from tests.apps.served import serving
from tests.wheels import ROOT, build, copied, install, run, training_words

_PROMPT = "a red ball rolls left"
_CLIP = ("--frames", "5", "--size", "32x32", "--steps", "2")


def generate(command: Path, folder: Path) -> str:
    """Make a video; return an error text, or "" if the video is correct."""
    run(command, "generate", _PROMPT, "-o", "ball.mp4", *_CLIP, folder=folder)
    note = json.loads((folder / "ball.json").read_text(encoding="utf-8"))
    return "" if (len(read_video(folder / "ball.mp4")), note["prompt"]) == (5, _PROMPT) else f"its sidecar is {note}"


def recipes(command: Path, folder: Path) -> str:
    """List the recipes and show one; return an error text or ""."""
    if "dancegrpo-tiny" not in run(command, "recipes", folder=folder):
        return "dancegrpo-tiny is not listed"
    return (
        ""
        if "method: dancegrpo" in run(command, "recipes", "show", "dancegrpo-tiny", folder=folder)
        else "nothing is shown"
    )


def train(command: Path, folder: Path) -> str:
    """Train one step of a recipe by its name; return an error text or ""."""
    run(command, "train", "dancegrpo-tiny", *training_words(steps=1), folder=folder)
    lines = (folder / "runs" / "dancegrpo-tiny" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    step = max(json.loads(line)["step"] for line in lines)
    return "" if step == 1 else f"training ended at step {step} instead of 1"


def demo(command: Path, folder: Path) -> str:
    """Start the app and make a video with it; return an error text or ""."""
    from gradio_client import Client

    words = ["-m", "postgen", "demo", "--port", "0"]
    with serving(words, folder, python=command.with_name("python"), seconds=600) as served:
        client = Client(served.url, verbose=False, download_files=str(folder / "downloads"))
        asked = {"prompt": _PROMPT, "width": 32, "height": 32, "frames": 5, "steps": 2, "seed": 3}
        last = client.predict(**asked, api_name="/generate")
        note = json.loads(Path(last["result"]["sidecar"]).read_text(encoding="utf-8"))
        frames = len(read_video(last["result"]["video"]))
    return "" if (frames, note["seed"]) == (5, 3) else f"{frames} frames, its sidecar is {note}"


def installed(command: Path, folder: Path) -> str:
    """Check that Python imports the package of the wheel; return an error text or ""."""
    script = "import postgen, postgen.apps, postgen.recipes as r\nprint(postgen.__file__, *r.__path__)"
    places = run(command.with_name("python"), "-c", script, folder=folder).split()
    wrong = [place for place in places if not Path(place).is_relative_to(command.parents[1])]
    return f"the package is imported from {', '.join(wrong)}" if wrong else ""


STEPS: Mapping[str, Callable[[Path, Path], str]] = {
    "installed": installed,
    "generate": generate,
    "recipes": recipes,
    "train": train,
    "demo": demo,
}


def measured(folder: Path, *, tiny: bool = False) -> dict[str, Any]:
    """Build and install the wheel, run all steps, and return a row for each step.

    Args:
        folder: folder for all files, outside the checkout.
        tiny: whether to skip training and the demo.
    """
    if folder.resolve().is_relative_to(ROOT):
        raise UserError(f"{folder} is inside the checkout: give a folder outside of it")
    begin = time.monotonic()
    (folder / "source").mkdir()
    wheel = build("wheel", copied(folder / "source"), folder / "built")
    command = install(wheel, folder / "venv")
    rows = [{"what": "build and install", "wrong": "", "seconds": round(time.monotonic() - begin, 1)}]
    for name, step in STEPS.items():
        if tiny and name in ("train", "demo"):
            continue
        (folder / name).mkdir()
        begin = time.monotonic()
        try:
            wrong = step(command, folder / name)
        except (AssertionError, OSError, KeyError, ValueError, UserError, subprocess.SubprocessError) as error:
            wrong = f"{type(error).__name__}: {str(error)[-600:]}"
        rows.append({"what": name, "wrong": wrong, "seconds": round(time.monotonic() - begin, 1)})
        print(f"wheel, {name}: {wrong or 'fine'}", flush=True)
    return {"wheel_mb": round(wheel.stat().st_size / 1e6, 1), "rows": rows}


def works(found: Mapping[str, Any]) -> float:
    """Return 1 if every step was run without an error, otherwise 0."""
    there = {row["what"] for row in found["rows"] if not row["wrong"]}
    return float(there >= STEPS.keys())


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        result = measured(Path(name))
    print(result, works(result))
