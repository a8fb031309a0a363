"""Tries to read private files through the app, run by `benchmarks.app_paths`.

They use addresses of Gradio's routes, arguments of calls and names of uploads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.apps.served import ROOT

RESULT = "20260101-000000-generate-0123abcd"
"""Name of a result."""
FILE = {"meta": {"_type": "gradio.FileData"}}
"""Fields that a call sends with the path of a file."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Paths on the machine of the server."""

    outputs: Path
    private: Path
    """A private file next to the folder of outputs."""
    lora: Path
    """A LoRA that the server offers."""
    runs: Path
    """Folder of training runs."""
    model: Path
    """Folder of a model that the server offers."""
    uploads: Path
    """Folder of uploads."""
    other: Path
    """An upload of another user; the attacker knows its file name, not its full path."""

    @property
    def result(self) -> Path:
        """Folder of a result that contains symbolic links to other places."""
        return self.outputs / "results" / RESULT


@dataclass(frozen=True, kw_only=True)
class Try:
    """One try to read a file, by an address, a call, or the name of an upload."""

    what: str
    address: str = ""
    call: str = ""
    """Endpoint to call with `data`."""
    data: Sequence[Any] = ()
    name: str = ""
    """File name of an upload."""


def files(places: Places) -> list[Try]:
    """Return tries that request files through the route of results."""
    private, result = places.private, places.result
    named = {
        "a system file": "/etc/passwd",
        "the environment of the server": "/proc/self/environ",
        "the log of the server": places.outputs.parent / "server.log",
        "a file beside the outputs": private,
        "a first frame of another user": places.outputs / "pictures" / "frame.png",
        "code of postgen": ROOT / "postgen" / "cli.py",
        "the project's settings": ROOT / "pyproject.toml",
        "a model": places.model / "model_index.json",
        "a LoRA": places.lora,
        "a recipe of a run": places.runs / "one" / "config.yaml",
        "a result, then up": f"{result}/../../../{private.name}",
        "a result, then up, encoded": f"{result}/%2e%2e/%2e%2e/%2e%2e/{private.name}",
        "a result, then up, encoded twice": f"{result}/%252e%252e/%252e%252e/%252e%252e/{private.name}",
        "a result, then up with back slashes": f"{result}\\..\\..\\..\\{private.name}",
        "a link in a result": result / "link.txt",
        "a linked folder in a result": result / "folder" / private.name,
        "a kept state in a result": result / "long.state" / "state.json",
        "a file beside the results": places.outputs / "results" / "stray.txt",
        "up from the working directory": f"../../../../../../..{private}",
        "a file with a null character": f"{private}%00.mp4",
        "all encoded": quote(str(private), safe=""),
        "an address of the system": f"file://{private}",
        "the folder of uploads": places.uploads,
        "uploads, then up": f"{places.uploads}/../{private.name}",
        "another user's upload by its name": places.uploads / places.other.name,
        "another user's upload by any folder": f"{places.uploads}/*/{places.other.name}",
        "another user's upload by a digest of its name": (
            places.uploads / hashlib.sha256(places.other.name.encode()).hexdigest() / places.other.name
        ),
    }
    return [Try(what=what, address=f"/gradio_api/file={path}") for what, path in named.items()]


def routes(places: Places) -> list[Try]:
    """Return tries that request files through other routes."""
    private = places.private
    up = str(private).lstrip("/")
    others = {
        "the old route of files": f"/file={private}",
        "files by a path": f"/gradio_api/file/{up}",
        "files by a path with two slashes": f"/gradio_api/file/{private}",
        "the route written twice": f"/gradio_api/gradio_api/file={private}",
        "the route in capitals": f"/GRADIO_API/FILE={private}",
        "the route encoded": f"/gradio_api/%66ile={private}",
        "the route after two slashes": f"//gradio_api/file={private}",
        "the route after another one": f"/gradio_api/upload/../file={private}",
        "the proxy, a file": f"/gradio_api/proxy=file://{private}",
        "the proxy, the server itself": "/gradio_api/proxy=http://127.0.0.1/config",
        "static files": f"/static/../../../../../../../../../../..{private}",
        "static files, encoded": f"/static/{'%2e%2e/' * 12}{up}",
        "static files, absolute": f"/static/{private}",
        "assets": f"/assets/{'../' * 12}{up}",
        "assets, encoded": f"/assets/{'%2e%2e%2f' * 12}{quote(up, safe='')}",
        "code of the page": f"/svelte/{'../' * 12}{up}",
        "custom components": f"/gradio_api/custom_component/a/client/component/{'../' * 12}etc/passwd",
        "streams": f"/gradio_api/stream/a/0/1/{'%2e%2e%2f' * 12}etc/passwd",
        "a picture of the page": f"/pwa_icon/{'%2e%2e%2f' * 12}etc/passwd",
        "monitoring": f"/monitoring/{'%2e%2e%2f' * 12}etc/passwd",
        "links": f"/gradio_api/deep_link?session_hash={'../' * 12}etc/passwd",
        "recorded runs": "/gradio_api/run-history/records",
        "progress of an upload": f"/gradio_api/upload_progress?upload_id={'../' * 12}etc/passwd",
        "the page of another place": f"/?__theme={'../' * 12}etc/passwd",
    }
    return [Try(what=what, address=address) for what, address in others.items()]


def calls(places: Places) -> list[Try]:
    """Return tries that name files in the arguments of calls."""
    private = str(places.private)
    words = {"prompt": "a ball", "width": 32, "height": 32, "frames": 5, "steps": 1}
    order = ("prompt", "model", "preset", "seed", "negative_prompt", "steps", "width", "height", "frames", "guidance")

    def generate(**own: Any) -> list[Any]:
        given = {"preset": "draft", **words, **own}
        return [*(given.get(name) for name in order), given.get("lora"), 1.0, given.get("plug_ins", {})]

    tries = [
        Try(what=f"generate, {name}", call="generate", data=generate(**{name: value}))
        for name, value in {
            "model": private,
            "preset": private,
            "seed": private,
            "negative_prompt": {"path": private, **FILE},
            "lora": private,
            "plug_ins": {"enhance": private, "lora": private},
            "prompt": {"path": private, **FILE},
        }.items()
    ]
    tries.append(Try(what="generate, a model above a model", call="generate", data=generate(model="../..")))
    kinds = {
        "a clip": {"path": private, **FILE},
        "a clip without kind": {"path": private},
        "a clip by address": {"path": f"file://{private}", "url": f"file://{private}", **FILE},
        "a clip by address alone": {"url": f"file://{private}", "orig_name": private, **FILE},
        "a clip inside a clip": {"video": {"path": private, **FILE}},
        "a clip as a text": private,
        "a clip through a link": {"path": str(places.result / "link.txt"), **FILE},
        "a clip beside uploads": {"path": f"{places.uploads}/../{places.private.name}", **FILE},
        "another user's upload": {"path": str(places.uploads / places.other.name), **FILE},
    }
    rewards = ["brightness_band"]
    tries += [Try(what=f"score, {what}", call="score", data=[clip, "", "", rewards]) for what, clip in kinds.items()]
    ids = {"a path": private, "a path up": "../../private.txt", "a result up": f"{RESULT}/../.."}
    tries += [
        Try(what=f"score, as a result {what}", call="score", data=[None, id, "", rewards]) for what, id in ids.items()
    ]
    for what, reward in {"a file": f"{private}:f", "a function": "os.getcwd", "another one": "builtins:open"}.items():
        tries.append(Try(what=f"score, as a reward {what}", call="score", data=[None, RESULT, "", [reward]]))
    names = {"a path": private, "up": "../", "a link that leads out": "out"}
    tries += [Try(what=f"run, {what}", call="run", data=[name]) for what, name in names.items()]
    return tries


def uploads(places: Places) -> list[Try]:
    """Return tries that upload a file under a dangerous name."""
    names = ["../escaped.txt", "../../escaped.txt", f"{places.outputs.parent}/escaped.txt", "..%2f..%2fescaped.txt"]
    names += ["..\\..\\escaped.txt", "a/../../../escaped.txt", ".", "..", "\\", "a" * 300, "escaped.txt\0.mp4"]
    told = [name.replace(str(places.outputs.parent), "/...")[:40] for name in names]
    return [Try(what=f"an upload called {what!r}", name=name) for what, name in zip(told, names, strict=True)]


def tries(places: Places) -> list[Try]:
    """Return all tries except those through events of the page."""
    return [*files(places), *routes(places), *calls(places), *uploads(places)]
