"""Attack test of the app: can a client read a file of the server that is not a result or an asset of the page?

    python -m benchmarks.app_paths

The test starts a real server next to private files, each with a unique line. It runs the tries of
`benchmarks.app_tries`, triggers every event of the page with a path in place of each input, and searches the answers
for the unique lines. An upload whose name makes the server write outside the folder of uploads counts too.
"""

from __future__ import annotations

import http.client
import json
import secrets
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.app_tries import FILE, RESULT, Places, Try, tries
from postgen import embedded_model
from tests.apps.served import ROOT, Served, serving

GIVEN = b"what everybody may read"
"""Content of a public result; reading it back shows that the search works."""
_PATIENCE = 20.0
_MOST = 2**21
"""Largest part of an answer that is searched, in bytes."""
_TAKES_FILES = {"image", "video", "file", "uploadbutton", "imageslider", "audio", "gallery"}


@dataclass(kw_only=True)
class Web:
    """HTTP client that sends paths unchanged; libraries would normalise them."""

    url: str
    session: str = field(default_factory=lambda: secrets.token_hex(8))

    def ask(
        self, method: str, path: str, body: bytes | None = None, kind: str = "application/json"
    ) -> tuple[int, bytes]:
        """Send a request; return the status (0 if the server closed the connection) and the start of the answer."""
        place = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=_PATIENCE)
        path = "".join(letter if 32 < ord(letter) < 127 else urllib.parse.quote(letter) for letter in path)
        try:
            connection.request(method, path, body, {"Content-Type": kind} if body is not None else {})
            answer = connection.getresponse()
            return answer.status, _read(answer)
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def call(self, name: str, data: Sequence[Any]) -> tuple[int, bytes]:
        """Call an endpoint and return its answer."""
        status, found = self.ask("POST", f"/gradio_api/call/{name}", json.dumps({"data": data}).encode())
        with suppress(ValueError, LookupError, TypeError):
            return self.ask("GET", f"/gradio_api/call/{name}/{json.loads(found)['event_id']}")
        return status, found

    def event(self, number: int, data: Sequence[Any]) -> tuple[int, bytes]:
        """Trigger an event of the page and return its answer."""
        session = secrets.token_hex(8)
        body = {"data": data, "fn_index": number, "session_hash": session, "event_data": None, "trigger_id": None}
        status, found = self.ask("POST", "/gradio_api/queue/join?", json.dumps(body).encode())
        if status != 200:
            return status, found
        return self.ask("GET", f"/gradio_api/queue/data?session_hash={session}")

    def upload(self, name: str, content: bytes) -> tuple[int, bytes]:
        """Upload a file and return the answer."""
        text = name.replace('"', "%22")
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{text}"\r\n\r\n'
        body = head.encode() + content + b"\r\n--x--\r\n"
        return self.ask("POST", "/gradio_api/upload", body, "multipart/form-data; boundary=x")


def _read(answer: http.client.HTTPResponse) -> bytes:
    """Return the bytes of an answer; an event stream is read until the event of the page has ended."""
    found, end = b"", time.monotonic() + _PATIENCE
    with suppress(OSError, http.client.HTTPException):
        while len(found) < _MOST and time.monotonic() < end and (part := answer.read1(2**16)):
            found += part
            if b'"msg":"process_completed"' in found or b'"msg":"close_stream"' in found:
                break
    return found


@contextmanager
def server(folder: Path) -> Iterator[tuple[Served, Places, dict[str, bytes]]]:
    """Start a server; yield it, the paths of its files, and the unique line of each private file by name."""
    outputs, runs = folder / "outputs", folder / "runs"
    private, lora = folder / "private.txt", folder / "offered.safetensors"
    result, pictures = outputs / "results" / RESULT, outputs / "pictures"
    for place in (result / "long.state", pictures, runs / "one", folder / "elsewhere" / "out"):
        place.mkdir(parents=True)
    hidden = [
        private,
        lora,
        pictures / "frame.png",
        result / "long.state" / "state.json",
        runs / "one" / "config.yaml",
    ]
    hidden += [outputs / "results" / "stray.txt", folder / "elsewhere" / "out" / "metrics.jsonl"]
    lines = {path.name: _hide(path) for path in hidden}
    (result / "video.mp4").write_bytes(GIVEN)
    (result / "link.txt").symlink_to(private)
    (result / "folder").symlink_to(folder)
    (runs / "out").symlink_to(folder / "elsewhere" / "out")
    (runs / "one" / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    lines |= {"pyproject.toml": b"build-backend", "model_index.json": b"_diffusers_version"}
    lines["cli.py"] = (ROOT / "postgen" / "cli.py").read_bytes().splitlines()[0]
    if (system := Path("/etc/passwd")).is_file():
        lines["passwd"] = system.read_bytes().splitlines()[0]
    lines["environ"], lines["server.log"] = b"HF_HUB_OFFLINE=1", b"stop with Ctrl-C"
    words = ["-m", "postgen", "demo", "--port", "0", "--outputs", outputs, "--runs", runs, "--lora", lora]
    with serving(words, folder, seconds=600) as served:
        lines["an upload"] = other = f"hidden-{secrets.token_hex(16)}".encode()
        _, told = Web(url=served.url).upload("somebodys.mp4", other)
        at = Path(json.loads(told)[0])
        yield (
            served,
            Places(
                outputs=outputs, private=private, lora=lora, runs=runs,
                model=Path(embedded_model()), uploads=at.parents[1], other=at,
            ),
            lines,
        )  # fmt: skip


def _hide(path: Path) -> bytes:
    line = f"hidden-{secrets.token_hex(16)}"
    path.write_text(line + "\n")
    return line.encode()


def read(content: bytes, lines: Mapping[str, bytes]) -> list[str]:
    """Return the names of the private files whose line is in an answer."""
    return [name for name, line in lines.items() if line in content]


def done(web: Web, one: Try, lines: Mapping[str, bytes], folder: Path) -> dict[str, Any]:
    """Run one try and return its row for the result."""
    if one.call:
        status, content = web.call(one.call, one.data)
    elif one.name:
        status, told = web.upload(one.name, b"uploaded " + one.name[:20].encode())
        content = told
        with suppress(ValueError, LookupError, TypeError):
            content += web.ask("GET", f"/gradio_api/file={json.loads(told)[0]}")[1]
    else:
        status, content = web.ask("GET", one.address)
    found = read(content, lines)
    found += [f"written to {path.name}" for path in _escaped(folder)] if one.name else []
    return {"what": one.what, "status": status, "read": found}


def _escaped(folder: Path) -> list[Path]:
    """Return uploaded files outside the folder of uploads."""
    inside = folder / "temporary"
    return [path for path in folder.rglob("*escaped*") if not path.is_relative_to(inside)]


def events(web: Web, places: Places, lines: Mapping[str, bytes]) -> Iterator[dict[str, Any]]:
    """Trigger every event of the page with a path of the server in place of each input, and yield the rows.

    An event with file inputs runs twice: with the path as the file, which the server must refuse, and with an uploaded
    settings file that names private files.
    """
    config = json.loads(web.ask("GET", "/config")[1])
    kinds = {one["id"]: one["type"] for one in config["components"]}
    own = {
        "prompt": "a ball",
        "seed": 0,
        "image": str(places.private),
        "model": str(places.private),
        "lora": ["/etc/passwd"],
    }
    _, told = web.upload("settings.json", json.dumps({"prompt": "a ball", "seed": 0, "settings": own}).encode())
    named = {"path": str(places.private), **FILE}
    sent = {"path": json.loads(told)[0], "orig_name": "settings.json", **FILE}
    for event in config["dependencies"]:
        inputs = [kinds.get(number) for number in event["inputs"]]
        files = [kind in _TAKES_FILES for kind in inputs]
        for what, file in {"a path": named, "an upload": sent}.items():
            if what == "a path" or any(files):
                data = [file if is_file else str(places.private) for is_file in files]
                status, content = web.event(event["id"], data)
                row = {"what": f"event {event['id']} of the page, {len(inputs)} inputs, {what}", "status": status}
                yield {**row, "read": read(content, lines)}


def measured(folder: Path, *, tiny: bool = False) -> dict[str, Any]:
    """Start a server, run all tries, and return their rows; `tiny` skips the events of the page."""
    rows = []
    with server(folder) as (served, places, lines):
        web = Web(url=served.url)
        wanted = tries(places)
        for one in wanted:
            rows.append(done(web, one, lines, folder))
            if rows[-1]["read"] or len(rows) % 20 == 0:
                print(f"{len(rows)} of {len(wanted)} paths: {rows[-1]}", flush=True)
        if not tiny:
            for row in events(web, places, lines):
                rows.append(row)
                if row["read"] or len(rows) % 20 == 0:
                    print(f"{len(rows)}: {row}", flush=True)
        given = web.ask("GET", f"/gradio_api/file={places.result / 'video.mp4'}")[1]
        alive = web.ask("GET", "/")[0]
        by_address = web.ask("GET", f"/gradio_api/file={places.other}")[1] == lines["an upload"]
    return {
        "tries": len(rows),
        "readable": [row for row in rows if row["read"]],
        "page_after_all": alive,
        "result_is_given": given == GIVEN,
        "upload_read_by_its_full_address": by_address,
        "rows": rows,
    }


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        found = measured(Path(name))
    print({key: value for key, value in found.items() if key != "rows"})
